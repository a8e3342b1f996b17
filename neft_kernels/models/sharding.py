"""Which noise each process draws where several processes train one model.

Replicas draw different noise, because each has a stream of its own. The ranks of one replica have a tensor-parallel table, or
each holds a part of every sequence. They draw the noise that one process alone would draw: they share a stream and a seed, and
number their tokens in the whole sequences.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from neft_kernels.ops.autograd import add_noise
from neft_kernels.ops.seed import draw_seed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from neft_kernels.models.options import NoiseOptions

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


def seed_and_stream(stream: int | None, groups: "Sequence[ProcessGroup]", device: torch.device) -> tuple[Tensor, int]:
    """The seed and the stream of this process, which the ranks of its replica share.

    Args:
        stream: the stream that the user chose. None: the lowest rank of the replica.
        groups: the process groups of the replica, one for each mesh dimension. Subtracting a rank's offset within each group
            gives the same number, the lowest rank, on the whole replica.
        device: where the seed is drawn.
    """
    if stream is None:
        stream = torch.distributed.get_rank() if distributed_is_on() else 0
        if groups:
            distinct = {group.group_name: group for group in groups}.values()
            stream -= sum(
                torch.distributed.get_rank() - min(torch.distributed.get_process_group_ranks(group))
                for group in distinct
            )
    seed = draw_seed(device, by_value=not groups)  # a broadcast takes a tensor on the device
    for group in groups:  # the seed of the first rank, because the others may have drawn other random numbers before
        seed = _collective("broadcast", seed, 0, group.group_name)
    return seed, stream


def _collective(name: str, *args: Any) -> Tensor:
    """The result of a functional collective, which torch.compile can trace, once it is there."""
    collectives = torch.ops._c10d_functional
    return collectives.wait_tensor(getattr(collectives, name)(*args))


def sum_over(groups: Sequence[str], values: Tensor) -> Tensor:
    """The sum of the `values` of all ranks of the process groups of these names."""
    for name in dict.fromkeys(groups):
        values = _collective("all_reduce", values, "sum", name)
    return values


def group_size(group: "ProcessGroup") -> int:
    """The number of its ranks."""
    return torch.distributed.get_world_size(group)


def groups_of(mesh: "Group") -> "list[ProcessGroup]":
    """A process group itself, or those of a mesh's dimensions."""
    if isinstance(mesh, torch.distributed.ProcessGroup):
        return [mesh]
    return [mesh.get_group(dimension) for dimension in range(mesh.ndim)]


# --- tables that are sharded over ranks -------------------------------------------------------------------------------


def is_dtensor(tensor: Any) -> bool:
    """Whether `tensor` is a DTensor; does not import what defines it."""
    return type(tensor) is not nn.Parameter and type(tensor) is not Tensor and hasattr(tensor, "device_mesh")


def tensor_parallel_groups(module: nn.Module) -> "list[ProcessGroup]":
    """The groups over which the parameters of `module` are sharded while its forward runs, when FSDP has gathered its own."""
    for parameter in module.parameters() if distributed_is_on() else ():
        if is_dtensor(parameter):
            return groups_of(parameter.device_mesh)  # type: ignore[attr-defined]
    return []


def add_to_whole(embeds: Tensor, add: Callable[[Tensor], Tensor]) -> Tensor:
    """Gathers the DTensor on every rank and applies `add`.

    Partial sums are reduced first; otherwise each rank would add the noise.
    """
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


# --- sequences that are sharded over ranks ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """The tokens of each row that a rank holds."""

    length: int  # of the whole row
    pieces: tuple[tuple[int, int], ...]  # [begin, end) in the whole row, in the order in which the rank holds them

    def is_one_run(self, ids: Tensor) -> bool:
        """Whether the numbers of `ids` ``[..., l]`` in the whole batch follow on each other."""
        return len(self.pieces) == 1 and ids.numel() == ids.shape[-1]

    def of(self, whole: float | Tensor) -> float | Tensor:
        """``[..., length]`` to ``[..., l]``. A number stays as it is."""
        if not isinstance(whole, Tensor) or whole.ndim == 0:
            return whole
        return torch.cat([whole[..., :0], *(whole[..., begin:end] for begin, end in self.pieces)], -1)

    def slice(self, begin: int, end: int) -> "Part":
        """The part that this part's own tokens from `begin` to `end` are."""
        held, pieces = 0, []
        for start, stop in self.pieces:
            first, last = max(start, start + begin - held), min(stop, start + end - held)
            if first < last:
                pieces.append((first, last))
            held += stop - start
        return Part(self.length, tuple(pieces))

    def whole_rows(
        self, ids: Tensor, sequences: dict[str, Any], options: "NoiseOptions"
    ) -> tuple[Tensor, dict[str, Any]]:
        """Ids of the shape of the whole rows, whose values do not count, and the `sequences` of all ranks together."""
        if options.sequence_group is not None:
            sequences = {
                name: value
                if value is None or name == "cu_seq_lens" or value.shape[-1] == self.length
                else gathered(value, options.sequence_group, options.sequence_layout)
                for name, value in sequences.items()
            }
        return ids[..., :1].expand(*ids.shape[:-1], self.length), sequences


def part_of_rank(ids: Tensor, options: "NoiseOptions") -> Part | None:
    """The part of the whole rows that this rank's `ids` ``[..., l]`` are. None: they are the whole rows.

    Layout "contiguous": rank r of n holds the r-th of n equal pieces. "head_tail": the r-th of 2n pieces from the front and
    the r-th from the back, which gives causal attention equal work on all ranks, as in torch's context_parallel().

    Raises:
        ValueError: the layout is "head_tail", and the number of tokens is odd.
    """
    if options.sequence_group is None:
        return None
    length = ids.shape[-1]
    (group,) = groups_of(options.sequence_group)
    rank, ranks = torch.distributed.get_rank(group), group_size(group)
    if options.sequence_layout == "contiguous":
        return Part(ranks * length, ((rank * length, (rank + 1) * length),))
    if length % 2:
        raise ValueError(f"sequence_layout='head_tail' needs an even number of tokens on each rank, not {length}")
    half = length // 2
    starts = (rank * half, (2 * ranks - 1 - rank) * half)
    return Part(ranks * length, tuple((start, start + half) for start in starts))


def part_of_output(part: Part | None, length: int, own_length: int, group: "ProcessGroup") -> Part:
    """The tokens that this rank holds of the output of a table that is sharded along the sequence.

    Each rank looks up `length` tokens and returns `own_length` of them.

    Args:
        part: the part that the ids are of their rows. None: they are whole rows.
    """
    whole = Part(length, ((0, length),)) if part is None else part
    begin = torch.distributed.get_rank(group) * own_length
    return whole.slice(begin, begin + own_length)


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


def in_parts(part: Part, embeds: Tensor, **noise: Any) -> Tensor:
    """:func:`add_noise` on `embeds` ``[..., l, D]``, with the numbers that the tokens have in the whole batch.

    Tokens are numbered row by row, so each piece of each row is a call of its own, with the number of its first token.
    """
    tokens_shape = embeds.shape[:-1]
    if tokens_shape.numel() == 0:
        return add_noise(embeds, **noise)
    rows = embeds.reshape(-1, *embeds.shape[-2:])  # [B, l, D]
    magnitude = noise.pop("magnitude")
    per_token = magnitude.expand(tokens_shape).reshape(rows.shape[:2]) if isinstance(magnitude, Tensor) else None
    results = []
    for row in range(rows.shape[0]):
        held, pieces = 0, []
        for begin, end in part.pieces:
            piece = slice(held, held + end - begin)
            held += end - begin
            here = magnitude if per_token is None else per_token[row, piece]
            first_token = row * part.length + begin
            pieces.append(add_noise(rows[row, piece], magnitude=here, first_token=first_token, **noise))
        results.append(pieces[0] if len(pieces) == 1 else torch.cat(pieces))
    noisy = torch.stack(results)
    return noisy if noisy.shape == embeds.shape else noisy.view(embeds.shape)
