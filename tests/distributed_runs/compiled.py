"""Contract: torch.compile of a model in a distributed engine breaks its graph no more often with noise than without."""

import torch
import torch.distributed as dist
from common import SEED, Lookup, ids
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

from neft_kernels import replace_embeddings

rank, ranks = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh("cpu", (ranks,))
BATCH = {"input_ids": ids(2, 4 * ranks)}


def compiled(model, batch):
    """The result for one seed, and the number of graphs."""
    torch.manual_seed(SEED)
    torch._dynamo.reset()
    counter = CompileCounter()
    result = torch.compile(model, backend=counter)(**batch)
    return result.detach(), counter.frame_count


def tensor_parallel_model_is_one_graph():
    for scaled in (False, True):
        graphs, results = {}, {}
        for noisy in (False, True):
            model = Lookup(scaled)
            if noisy:
                replace_embeddings(model)
            parallelize_module(model, mesh, {"embed": RowwiseParallel(input_layouts=Replicate())})
            results[noisy], graphs[noisy] = compiled(model, BATCH)
        assert graphs[True] <= graphs[False], (scaled, graphs)
        want = replace_embeddings(Lookup(scaled), stream=0)
        torch.manual_seed(SEED)
        assert torch.equal(results[True], want(**BATCH)), scaled


def sequence_parallel_model_is_one_graph():
    part = {"input_ids": BATCH["input_ids"].chunk(ranks, 1)[rank]}
    for scaled in (False, True):
        want = replace_embeddings(Lookup(scaled), stream=0)
        torch.manual_seed(SEED)
        want = want(**BATCH).chunk(ranks, 1)[rank]
        result, graphs = compiled(replace_embeddings(Lookup(scaled), sequence_group=mesh), part)
        assert torch.equal(result, want)
        assert graphs == 1


def ddp_breaks_no_more_graphs():
    for scaled in (False, True):
        graphs = {}
        for noisy in (False, True):
            model = Lookup(scaled)
            if noisy:
                replace_embeddings(model)
            result, graphs[noisy] = compiled(nn.parallel.DistributedDataParallel(model), BATCH)
        assert graphs[True] <= graphs[False], (scaled, graphs)
        want = replace_embeddings(Lookup(scaled), stream=rank)
        torch.manual_seed(SEED)
        assert torch.equal(result, want(**BATCH)), scaled


CHECKS = [tensor_parallel_model_is_one_graph, sequence_parallel_model_is_one_graph, ddp_breaks_no_more_graphs]
