"""Trains a tiny Llama on the sources of the standard library's json package, with NEFTune noise, in several processes.

::

    torchrun --standalone --nproc-per-node 2 examples/distributed/train.py --engine ddp

What an engine needs besides ``replace_embeddings(model)`` stands in its function below. Runs on CPUs; "cp" shards the
sequences, and its attention gathers keys and values, because torch's ring attention has no CPU kernels.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.nn.functional import all_gather
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from neft_kernels import describe, replace_embeddings

VOCAB = 256  # bytes
ROWS, LENGTH = 4, 64


def ddp(model: LlamaForCausalLM, mesh: DeviceMesh) -> nn.Module:
    """Each rank has the whole model and rows of its own."""
    return DistributedDataParallel(replace_embeddings(model))


def fsdp2(model: LlamaForCausalLM, mesh: DeviceMesh) -> nn.Module:
    """The model is spread over the ranks and gathered layer by layer. Noise first, so that it stays one kernel."""
    replace_embeddings(model)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def tp(model: LlamaForCausalLM, mesh: DeviceMesh) -> nn.Module:
    """Each matrix is spread over the ranks, which compute the same rows together: one replica, one stream of noise."""
    plan: dict[str, ParallelStyle] = {"model.embed_tokens": RowwiseParallel(input_layouts=Replicate())}
    for number in range(len(model.model.layers)):
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            plan[f"model.layers.{number}.{name}"] = ColwiseParallel()
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            plan[f"model.layers.{number}.{name}"] = RowwiseParallel()
    return replace_embeddings(parallelize_module(model, mesh, plan))


def cp(model: LlamaForCausalLM, mesh: DeviceMesh) -> nn.Module:
    """Each rank has the whole model and a part of every row, which the embedding has to be told."""
    group, rank = mesh.get_group(), mesh.get_local_rank()

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: object, **options: object) -> tuple:
        keys, values = (torch.cat(all_gather(part.contiguous(), group), 2) for part in (key, value))
        length = query.shape[2]
        causal = torch.ones(length, keys.shape[2], dtype=torch.bool).tril(rank * length)
        result = nn.functional.scaled_dot_product_attention(query, keys, values, causal)
        return result.transpose(1, 2).contiguous(), None

    AttentionInterface.register("gathered", attention)
    model.set_attn_implementation("gathered")
    return DistributedDataParallel(replace_embeddings(model, sequence_group=mesh, sequence_layout="contiguous"))


ENGINES: dict[str, Callable[[LlamaForCausalLM, DeviceMesh], nn.Module]] = {
    "ddp": ddp,
    "fsdp2": fsdp2,
    "tp": tp,
    "cp": cp,
}


def batches(engine: str, mesh: DeviceMesh) -> Iterator[dict[str, Tensor]]:
    """What this rank trains on: rows of its own, the same rows as the others ("tp"), or its part of them ("cp")."""
    rank, ranks = mesh.get_local_rank(), mesh.size()
    folder = Path(json.__file__).parent
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    tokens = torch.tensor(list(text))
    draw = torch.Generator().manual_seed(rank if engine in ("ddp", "fsdp2") else 0)
    while True:
        starts = torch.randint(len(tokens) - LENGTH - 1, (ROWS, 1), generator=draw)
        rows = tokens[starts + torch.arange(LENGTH + 1)]
        batch = {
            "input_ids": rows[:, :-1],
            "shift_labels": rows[:, 1:],
            "position_ids": torch.arange(LENGTH).expand(ROWS, LENGTH),
        }
        if engine == "cp":
            batch = {name: value.chunk(ranks, 1)[rank] for name, value in batch.items()}
        yield {name: value.contiguous() for name, value in batch.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=ENGINES, required=True)
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)  # all ranks alike, as trainers do; data-parallel ones draw different noise all the same
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    model = ENGINES[options.engine](LlamaForCausalLM(config).train(), mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step, batch in zip(range(options.steps), batches(options.engine, mesh), strict=False):
        labels = batch["shift_labels"]
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == options.steps - 1:
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            if dist.get_rank() == 0:
                print(f"step {step:3d}  loss {mean / dist.get_world_size():.4f}", flush=True)
    if dist.get_rank() == 0:
        print(describe(model))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
