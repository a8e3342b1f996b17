"""Contract: an embedding whose table is spread over ranks has the noise of one process, once; FSDP's sharding is not that."""

import itertools
import sys

import torch
import torch.distributed as dist
from common import (
    SEED,
    Lookup,
    batches,
    draw_differently,
    gemma_config,
    llama,
    of_one_process,
    summed,
    upstream,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM
from transformers.distributed import DistributedConfig

from neft_kernels import describe, replace_embeddings

rank, ranks = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
BATCH = batches(3, 4 * ranks)["right padding"]


def parallelized(model, style, tp_mesh=mesh):
    return parallelize_module(model, tp_mesh, {"embed": style})


def tables_of_torch():
    """By rows and by columns, the noise asked for before and after; whatever layout the output has."""
    layouts = (Replicate(), Shard(1), Shard(2))
    for scaled, cls, layout, local, replace_first in itertools.product(
        (False, True), (RowwiseParallel, ColwiseParallel), layouts, (True, False), (True, False)
    ):
        want, want_gradient = of_one_process(Lookup(scaled), BATCH)
        model = Lookup(scaled)
        if replace_first:
            replace_embeddings(model)
        parallelized(model, cls(input_layouts=Replicate(), output_layouts=layout, use_local_output=local))
        if not replace_first:
            replace_embeddings(model)
        draw_differently()
        got = model(**BATCH)
        gradient = upstream(want.shape)
        if not local:
            assert got.placements == (layout,)
            got.backward(DTensor.from_local(gradient, mesh, [Replicate()]).redistribute(placements=[layout]))
            got = got.full_tensor()
        elif layout == Replicate():
            got.backward(gradient)
        else:
            want = want.chunk(ranks, layout.dim)[rank]
            got.backward(gradient.chunk(ranks, layout.dim)[rank])
        case = (scaled, cls, layout, local, replace_first)
        assert torch.equal(got, want), case
        assert torch.equal(model.embed.weight.grad.full_tensor(), want_gradient), case
        (report,) = describe(model)
        assert (report.state, report.strategy) == ("on", "add_noise")


class Region(Lookup):
    """Looks up inside of a region that backward runs again, and whose gradient depends on the noise."""

    def __init__(self, is_checkpointed):
        super().__init__()
        self.is_checkpointed = is_checkpointed

    def forward(self, input_ids, attention_mask=None):
        def region(ids):
            embeds = self.embed(ids)
            return (embeds.full_tensor() if isinstance(embeds, DTensor) else embeds).square()

        return checkpoint(region, input_ids, use_reentrant=False) if self.is_checkpointed else region(input_ids)


def checkpointed_regions():
    for cls, local, replace_first in itertools.product(
        (RowwiseParallel, ColwiseParallel), (True, False), (True, False)
    ):
        gradients = []
        for is_checkpointed in (False, True):
            model = Region(is_checkpointed)
            if replace_first:
                replace_embeddings(model)
            parallelized(model, cls(input_layouts=Replicate(), output_layouts=Replicate(), use_local_output=local))
            if not replace_first:
                replace_embeddings(model)
            torch.manual_seed(SEED)
            model(**BATCH).sum().backward()
            gradients.append(model.embed.weight.grad.full_tensor())
        assert gradients[0].any()
        assert torch.equal(*gradients), (cls, local, replace_first)


def tables_of_transformers():
    """``from_pretrained`` with its own tensor parallelism; a scaled table too."""
    torch.manual_seed(0)
    models = {"llama": llama(), "gemma": Gemma3ForCausalLM(gemma_config()).train()}
    for name, whole in models.items():
        path = f"{sys.argv[1]}/{name}-{ranks}"
        if rank == 0:
            whole.save_pretrained(path)
        dist.barrier()
        embedding = whole.get_input_embeddings()
        replace_embeddings(whole, stream=0)
        torch.manual_seed(SEED)
        want = captured(whole, BATCH)
        want.backward(upstream(want.shape))
        plans = ("auto", {"model.embed_tokens": "embedding_rowwise"}, {"model.embed_tokens": "embedding_colwise"})
        for plan in plans:
            model = AutoModelForCausalLM.from_pretrained(
                path, distributed_config=DistributedConfig(tp_size=ranks, tp_plan=plan)
            ).train()
            table = model.get_input_embeddings().weight
            assert isinstance(table, DTensor)
            assert any(isinstance(placement, Shard) for placement in table.placements)
            replace_embeddings(model)
            draw_differently()
            got = captured(model, BATCH)
            got.backward(upstream(got.shape))
            assert torch.equal(got, want), (name, plan)
            assert torch.equal(table.grad.full_tensor(), embedding.weight.grad), (name, plan)


def captured(model, batch):
    """What the layers of `model` get to see of its embeddings."""
    seen = []
    handle = model.get_input_embeddings().register_forward_hook(lambda *args: seen.append(args[-1]))
    model(**batch)
    handle.remove()
    return seen[0]


def replicas_of_tensor_parallel_ranks():
    """In a mesh of (data-parallel, tensor-parallel) ranks that share a table share the noise; the replicas differ."""
    if ranks < 4:
        return
    replicas = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("dp", "tp"))
    first = rank - rank % (ranks // 2)
    for scaled, order in itertools.product((False, True), ("replace tp fsdp", "tp replace fsdp", "tp fsdp replace")):
        want, want_gradient = of_one_process(Lookup(scaled), BATCH, stream=first)
        model = Lookup(scaled)
        for step in order.split():
            if step == "replace":
                replace_embeddings(model)
            elif step == "tp":
                style = RowwiseParallel(input_layouts=Replicate())
                parallelized(model, style, replicas["tp"])
            else:
                fully_shard(model.embed, mesh=replicas["dp"])
                fully_shard(model, mesh=replicas["dp"])
        torch.manual_seed(SEED)
        got = model(**BATCH)
        got.backward(upstream(want.shape))
        assert torch.equal(got, want), (scaled, order)
        # The mean over the replicas: halves of integers.
        mean = summed(want_gradient, replicas["dp"].get_group()) / 2
        assert torch.equal(model.embed.weight.grad.full_tensor(), mean), (scaled, order)
        everyone = [torch.empty_like(want) for _ in range(ranks)]
        dist.all_gather(everyone, got.detach().contiguous())
        assert torch.equal(everyone[0], everyone[1])
        assert not torch.equal(everyone[0], everyone[2])


def tensor_parallel_and_sequence_parallel():
    """A table spread over one dimension of a mesh, and sequences over the other: one replica in all."""
    if ranks < 4:
        return
    both = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("cp", "tp"))
    part = both.get_local_rank("cp")
    for scaled, layout in itertools.product((False, True), (Replicate(), Shard(1))):
        want, want_gradient = of_one_process(Lookup(scaled), BATCH)
        model = replace_embeddings(Lookup(scaled), sequence_group=both["cp"])
        parallelized(model, RowwiseParallel(input_layouts=Replicate(), output_layouts=layout), both["tp"])
        draw_differently()
        got = model(**{name: value.chunk(2, 1)[part] for name, value in BATCH.items()})
        want, gradient = want.chunk(2, 1)[part], upstream(want.shape).chunk(2, 1)[part]
        if layout == Shard(1):
            mine = both.get_local_rank("tp")
            want, gradient = want.chunk(ranks // 2, 1)[mine], gradient.chunk(ranks // 2, 1)[mine]
        got.backward(gradient)
        assert torch.equal(got, want), (scaled, layout)
        table = summed(model.embed.weight.grad.full_tensor(), both["cp"].get_group())
        assert torch.equal(table, want_gradient), (scaled, layout)


def sharding_of_fsdp_is_no_tensor_parallelism():
    """Replicas that are seeded alike draw different noise, each of its rank's stream, wherever FSDP comes in."""
    for scaled, order, where, policy in itertools.product(
        (False, True),
        ("replace shard", "shard replace"),
        ("root", "embedding"),
        (MixedPrecisionPolicy(), MixedPrecisionPolicy(param_dtype=torch.bfloat16)),
    ):
        dtype = policy.param_dtype or torch.float32
        want, _ = of_one_process(Lookup(scaled, dtype), BATCH, stream=rank)
        model = Lookup(scaled)
        for step in order.split():
            if step == "replace":
                replace_embeddings(model)
            else:
                if where == "embedding":
                    fully_shard(model.embed, mp_policy=policy)
                fully_shard(model, mp_policy=policy)
        torch.manual_seed(SEED)
        assert torch.equal(model(**BATCH), want), (scaled, order, where, policy)
        fused = not scaled and order == "replace shard"
        assert describe(model)[0].strategy == ("fused" if fused else "add_noise")


def replicas_draw_the_stream_of_their_rank():
    """Seeded alike, and each told its own stream by nobody."""
    for scaled in (False, True):
        want, _ = of_one_process(Lookup(scaled), BATCH, stream=rank)
        model = torch.nn.parallel.DistributedDataParallel(replace_embeddings(Lookup(scaled)))
        torch.manual_seed(SEED)
        got = model(**BATCH)
        assert torch.equal(got, want)
        noise = got.detach() - Lookup(scaled)(**BATCH).detach()
        everyone = [torch.empty_like(noise) for _ in range(ranks)]
        dist.all_gather(everyone, noise)
        for a, b in itertools.combinations(everyone, 2):
            # 3 x 4 x ranks x 16 numbers, of which those without noise are equal: the padding's.
            assert torch.equal((a == b).all(-1), BATCH["attention_mask"] == 0)


CHECKS = [
    tables_of_torch,
    checkpointed_regions,
    tables_of_transformers,
    replicas_of_tensor_parallel_ranks,
    tensor_parallel_and_sequence_parallel,
    sharding_of_fsdp_is_no_tensor_parallelism,
    replicas_draw_the_stream_of_their_rank,
]
