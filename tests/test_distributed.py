"""Contract: many processes train as one would, on torch's own engines: real processes, started by torchrun, with gloo.

Starting processes is what takes time, so each run is one launch with many checks, in ``distributed_runs/``.
"""

import copy
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from neft_kernels import NEFTuneCallback, NEFTuneEmbedding, noise_magnitude, noisy_embedding, replace_embeddings

PROGRAMS = Path(__file__).parent / "distributed_runs"
TIME_LIMIT = 300  # seconds; what hangs fails


def launch(processes, program, *args):
    """The output of all processes, once torchrun has ended, and its exit status."""
    path = os.pathsep.join(filter(None, (str(PROGRAMS.parent.parent), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*torchrun, PROGRAMS / program, *map(str, args)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIME_LIMIT,
        check=False,
    )
    return done.stdout, done.returncode


def passed(output, status):
    """The names of the checks that passed, of a run in which all did."""
    assert status == 0, output
    return [line.split()[1] for line in output.splitlines() if line.startswith("ok: ")]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """What one run leaves for another, such as a checkpoint."""
    return tmp_path_factory.mktemp("distributed")


def test_two_processes(directory):
    """Sequence and tensor parallelism, replicas, DDP, FSDP2, torch.compile."""
    names = passed(*launch(2, "run.py", directory, "sequence_parallel", "tensor_parallel", "training", "compiled"))
    assert "training.save" in names


def test_four_processes(directory):
    """The same with meshes of two dimensions, and a checkpoint of two processes resumed by four."""
    assert (directory / "checkpoint").is_dir(), "needs the checkpoint of test_two_processes"
    names = passed(*launch(4, "run.py", directory, "sequence_parallel", "tensor_parallel", "training"))
    assert "training.resume" in names


def test_trainers(directory):
    """The Trainer with DDP, accelerate with DDP and FSDP2."""
    passed(*launch(2, "run.py", directory, "trainers"))


def test_a_rank_that_fails_ends_the_run():
    """An id out of range is that rank's own IndexError; the other rank, which waits for it, is ended by torchrun."""
    output, status = launch(2, "failing.py")
    assert status != 0
    assert "IndexError: input_ids[0, 2] is 99, but ids must be in [0, 50), the rows of weight" in output
    assert "unreachable" not in output
