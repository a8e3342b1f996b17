"""``torchrun run.py DIRECTORY MODULE...``: the CHECKS of each module, on all processes; a check that fails ends the run.

Modules may leave files in the directory for other runs.
"""

import importlib
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=timedelta(seconds=60))  # a process that waits for another one longer fails
for name in sys.argv[2:]:
    for check in importlib.import_module(name).CHECKS:
        check()
        if dist.get_rank() == 0:
            print(f"ok: {name}.{check.__name__}", flush=True)
dist.barrier()
dist.destroy_process_group()
