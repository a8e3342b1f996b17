"""Contract: DeepSpeed's ZeRO-3 trains as one process does that is given the streams and seeds of all replicas.

``make test-deepspeed`` runs it: DeepSpeed comes as source only, so the other tests do without.
"""

import os

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
import torch.distributed as dist
from common import llama
from training import trained_by_one_process, training_batch

from neft_kernels import replace_embeddings

rank = dist.get_rank()
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 3},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
# DeepSpeed would compile its own all-reduce through shared memory, for minutes; without it gloo's is used.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def zero3_trains_as_one_process():
    """Whether the noise comes before DeepSpeed takes the table apart or after."""
    deepspeed.init_distributed(dist_backend="gloo")
    losses = trained_by_one_process(llama())
    for replace_first in (True, False):
        model = llama()
        if replace_first:
            replace_embeddings(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
        if not replace_first:
            replace_embeddings(model)
        for step, want in enumerate(losses):
            torch.manual_seed(step)
            loss = engine(**training_batch(step, rank)).loss
            # DeepSpeed's optimizer sees flat pieces of other lengths, so other elements are those that its vector loops leave
            # to a scalar one: a step may round a weight by 2**-24 of its size, 20 steps by 1.2e-6. Other noise is 1e-2 away.
            assert abs(loss.item() - want) <= (1e-5 if step else 0), (replace_first, step)
            engine.backward(loss)
            engine.step()


CHECKS = [zero3_trains_as_one_process]
