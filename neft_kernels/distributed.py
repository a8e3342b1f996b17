"""Who draws which noise where several processes train one model.

Replicas draw different noise: each has a stream of its own. The ranks that compute one replica together, because its table is
tensor-parallel or because each of them holds a part of every sequence, draw the noise that one process alone would draw: they
share a stream and a seed, and number their tokens in the whole sequences.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    Group = ProcessGroup | DeviceMesh


SEQUENCE_LAYOUTS = ("contiguous", "head_tail")
_HAS_DISTRIBUTED = torch.distributed.is_available()


def distributed_is_on() -> bool:
    """Whether there are several processes."""
    return _HAS_DISTRIBUTED and torch.distributed.is_initialized()


def check_group(name: str, group: Any) -> None:
    """`group`, the argument `name`, is a process group, or a mesh of one dimension."""
    if not distributed_is_on():
        raise ValueError(f"{name} needs torch.distributed.init_process_group() first")
    if not isinstance(group, torch.distributed.ProcessGroup) and getattr(group, "ndim", None) != 1:
        raise TypeError(f"{name} must be a ProcessGroup or a DeviceMesh of one dimension, not {group!r}")


def stream_of_replica(groups: "Sequence[ProcessGroup]") -> int:
    """The stream of this process: the smallest rank of those that compute its replica, which are one in each of `groups`.

    `groups` are dimensions of a regular mesh, so what is left of a rank after its place in each of them is the same for all.
    """
    if not distributed_is_on():
        return 0
    rank = torch.distributed.get_rank()
    distinct = {group.group_name: group for group in groups}.values()
    return rank - sum(rank - min(torch.distributed.get_process_group_ranks(group)) for group in distinct)


def shared_seed(seed: Tensor, groups: "Sequence[ProcessGroup]") -> Tensor:
    """`seed` of the first rank, so that the ranks of a replica need not have drawn the same random numbers before."""
    for group in groups:
        seed = _collective("broadcast", seed, 0, group.group_name)
    return seed


def _collective(name: str, *args: Any) -> Tensor:
    """The result of a functional collective, which torch.compile can trace, once it is there."""
    collectives = torch.ops._c10d_functional
    return collectives.wait_tensor(getattr(collectives, name)(*args))


def group_size(group: "ProcessGroup") -> int:
    """The number of its ranks."""
    return torch.distributed.get_world_size(group)


def groups_of(mesh: "Group") -> "list[ProcessGroup]":
    """A process group itself, or those of a mesh's dimensions."""
    if isinstance(mesh, torch.distributed.ProcessGroup):
        return [mesh]
    return [mesh.get_group(dimension) for dimension in range(mesh.ndim)]


# --- tables that are spread over ranks -------------------------------------------------------------------------------


def is_dtensor(tensor: Any) -> bool:
    """Whether `tensor` is a DTensor; does not import what defines it."""
    return type(tensor) is not nn.Parameter and type(tensor) is not Tensor and hasattr(tensor, "device_mesh")


def tensor_parallel_groups(module: nn.Module) -> "list[ProcessGroup]":
    """The groups over which the parameters of `module` are spread while its forward runs, when FSDP has gathered its own."""
    for parameter in module.parameters():
        if is_dtensor(parameter):
            return groups_of(parameter.device_mesh)  # type: ignore[attr-defined]
    return []


def add_to_whole(embeds: Tensor, add: Callable[[Tensor], Tensor]) -> Tensor:
    """`add` on the whole of a DTensor, which every rank then holds. Sums come first, or each rank would add its noise."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = embeds.device_mesh  # type: ignore[attr-defined]
    everywhere = [Replicate()] * mesh.ndim
    whole = embeds.redistribute(placements=everywhere).to_local()  # type: ignore[attr-defined]
    noisy = DTensor.from_local(add(whole), mesh, everywhere, run_check=False)
    if any(placement.is_partial() for placement in embeds.placements):  # type: ignore[attr-defined]
        return noisy
    return noisy.redistribute(placements=embeds.placements)  # type: ignore[attr-defined]


def add_to_columns(embeds: Tensor, width: int, group: "ProcessGroup", add: Callable[[Tensor], Tensor]) -> Tensor:
    """`add` on embeddings of `width` columns, of which this rank holds its share ``[..., width / ranks]``."""
    begin = torch.distributed.get_rank(group) * -(-width // group_size(group))
    end = begin + embeds.shape[-1]
    return add(nn.functional.pad(embeds, (begin, width - end)))[..., begin:end]


# --- sequences that are spread over ranks ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """The tokens of each sequence that a rank holds."""

    length: int  # of the whole row of tokens
    pieces: tuple[tuple[int, int], ...]  # [begin, end) in the whole, in the order in which the rank holds them

    def of(self, whole: Tensor) -> Tensor:
        """``[..., length]`` to ``[..., tokens of this rank]``."""
        return torch.cat([whole[..., :0], *(whole[..., begin:end] for begin, end in self.pieces)], -1)

    def slice(self, begin: int, end: int) -> "Part":
        """The part that the rank's own tokens from `begin` to `end` are."""
        pieces, held = [], 0
        for start, stop in self.pieces:
            first, last = max(start, start + begin - held), min(stop, start + end - held)
            if first < last:
                pieces.append((first, last))
            held += stop - start
        return Part(self.length, tuple(pieces))


def part_of_rank(length: int, group: "Group", layout: str) -> Part:
    """The part of this rank, which holds `length` tokens of each row.

    Layout "contiguous": rank r of n holds the r-th of n equal pieces. "head_tail": of 2n pieces the r-th from the front and
    the r-th from the back, which gives causal attention equal work on all ranks, as torch's context_parallel() has it.

    Raises:
        ValueError: the layout is "head_tail", and `length` is odd.
    """
    (group,) = groups_of(group)
    rank, ranks = torch.distributed.get_rank(group), group_size(group)
    if layout == "contiguous":
        return Part(ranks * length, ((rank * length, (rank + 1) * length),))
    if length % 2:
        raise ValueError(f"sequence_layout='head_tail' needs an even number of tokens on each rank, not {length}")
    half = length // 2
    starts = (rank * half, (2 * ranks - 1 - rank) * half)
    return Part(ranks * length, tuple((start, start + half) for start in starts))


def gathered(values: Tensor, group: "Group", layout: str) -> Tensor:
    """``[..., tokens of this rank]`` to ``[..., length]``: what all ranks hold, in the order of the tokens."""
    (group,) = groups_of(group)
    ranks = group_size(group)
    by_rank = _collective("all_gather_into_tensor", values.contiguous()[None], ranks, group.group_name)
    whole = by_rank.movedim(0, -2)  # [..., ranks, tokens of a rank]
    if layout == "contiguous":
        return whole.flatten(-2)
    pieces = whole.unflatten(-1, (2, -1))
    return torch.cat([pieces[..., 0, :], pieces[..., 1, :].flip(-2)], -2).flatten(-2)


def in_parts(add_noise: Callable[..., Tensor], embeds: Tensor, part: Part, options: dict[str, Any]) -> Tensor:
    """`add_noise` on `embeds` ``[..., l, D]``, with the numbers that the tokens have in the whole batch.

    Tokens are numbered row by row, so each row's pieces are a call of their own, with the number of their first token.
    """
    tokens_shape = embeds.shape[:-1]
    if tokens_shape.numel() == 0:
        return add_noise(embeds, **options)
    rows = embeds.reshape(-1, *embeds.shape[-2:])  # [B, l, D]
    magnitude = options["magnitude"]
    per_token = magnitude.expand(tokens_shape).reshape(rows.shape[:2]) if isinstance(magnitude, Tensor) else None
    results = []
    for row in range(rows.shape[0]):
        held, pieces = 0, []
        for begin, end in part.pieces:
            piece = slice(held, held + end - begin)
            held += end - begin
            here = magnitude if per_token is None else per_token[row, piece]
            first_token = row * part.length + begin
            pieces.append(add_noise(rows[row, piece], **{**options, "magnitude": here, "first_token": first_token}))
        results.append(pieces[0] if len(pieces) == 1 else torch.cat(pieces))
    noisy = torch.stack(results)
    return noisy if noisy.shape == embeds.shape else noisy.view(embeds.shape)
