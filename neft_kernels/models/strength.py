"""How strong the noise is: its root mean square against that of the embeddings that it is added to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from neft_kernels.models.sharding import Part, sum_over
from neft_kernels.ops.magnitude import wide_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "BOUND",
    "RELATIVE_STRENGTH",
    "CleanEmbeddings",
    "described_kind",
    "described_ratio",
    "measured_rms",
    "readable_table",
    "rms_of_noise",
    "root_mean_square",
]

#: How the noise of a token relates to its magnitude, in words.
BOUND = {"uniform": "within +-", "sign": "+-", "gaussian": "of magnitude "}
#: The root mean square of noise of each kind, over that of uniform noise of the same magnitude.
RELATIVE_STRENGTH = {"uniform": 1.0, "sign": math.sqrt(3), "gaussian": 1.0}

#: Outside of these the noise is stronger or weaker against the embeddings than people have found useful.
WEAK, STRONG = 0.01, 0.5

#: About so many tokens of a batch are measured, evenly spaced, and so many elements of a table at a time.
TOKENS, ELEMENTS = 1024, 1 << 22


@dataclass(frozen=True)
class CleanEmbeddings:
    """The embeddings that a pass looks up, without their noise."""

    ids: Tensor  # [..., l]
    #: The table, ``[V, D]``. None: it cannot be read.
    table: Tensor | None
    #: What the module returned, ``[..., l, D]``. None: the rows of `table`, which the op looks up itself.
    output: Tensor | None = None
    #: Which part of the whole rows the ids are. None: they are whole rows.
    part: Part | None = None
    #: The process groups over which the table is sharded.
    groups: "Sequence[ProcessGroup]" = ()

    @property
    def embedding_dim(self) -> int:
        """``D``."""
        values = self.table if self.output is None else self.output
        assert values is not None
        return values.shape[-1]

    def squares(self, magnitude: float | Tensor) -> Tensor:
        """The sum of the squares of the embeddings whose `magnitude` is not 0, and the number of summands, ``[2]``.

        Only a sample of the tokens is measured. Zeros are not counted: padding in a table, and columns that other ranks hold.
        """
        shape = self.ids.shape if self.output is None else self.output.shape[:-1]
        step = max(1, shape.numel() // TOKENS)
        while math.gcd(step, shape[-1]) > 1:  # or all samples would be of a few columns
            step += 1
        every = slice(None, None, step)
        if self.output is not None:
            rows = self.output.detach().flatten(0, -2)[every]
        else:
            assert self.table is not None
            ids = self.ids.flatten()[every].clamp(0, self.table.shape[0] - 1)
            rows = nn.functional.embedding(ids, self.table.detach())
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if isinstance(magnitude, Tensor):
            rows = rows * (magnitude.expand(shape).flatten()[every] > 0)[:, None]
        return torch.stack([rows.square().sum(), rows.count_nonzero().to(rows.dtype)])


def measured_rms(
    ids: Tensor, table: Tensor | None, output: Tensor | None, magnitude: float | Tensor, groups: tuple[str, ...]
) -> float:
    """The root mean square of the table, times the factor by which the module scales what it looks up.

    If the table cannot be read, for example because it is quantised, the embeddings of the tokens whose `magnitude` is not 0
    are measured. Waits for the device.

    Args:
        ids, table, output: as in :class:`CleanEmbeddings`.
        magnitude: of each token.
        groups: the names of the process groups over which the table or the sequences are sharded. Their ranks get the same
            number.

    Raises:
        RuntimeError: the embeddings cannot be read, because this pass is exported or captured in a CUDA graph.
    """
    from torch._subclasses import FakeTensor

    if ids.is_meta:
        return 0.0
    is_fake = torch.compiler.is_exporting() or isinstance(ids, FakeTensor)
    if is_fake or (ids.is_cuda and torch.cuda.is_current_stream_capturing()):
        raise RuntimeError(
            'scale_by="rms" measures the embeddings in the first pass, and this one is exported or captured; run the model '
            "once in training mode before"
        )
    if output is None:
        assert table is not None
        return _rms_of_table(table)
    of_output = root_mean_square(sum_over(groups, CleanEmbeddings(ids, table, output).squares(magnitude)))
    if table is None:
        return of_output
    of_rows = root_mean_square(sum_over(groups, CleanEmbeddings(ids, table).squares(magnitude)))
    return _rms_of_table(table) * of_output / of_rows if of_rows else 0.0


# What torch.compiler.assume_constant_result does, without importing dynamo. While dynamo traces, it calls this function with
# the real tensors.
measured_rms._dynamo_marked_constant = True  # type: ignore[attr-defined]


def readable_table(module: nn.Module, ids: Tensor, output: Tensor) -> Tensor | None:
    """The table of numbers that `module` looked `ids` up in: its own, or the last one inside, as in a layer of PEFT."""
    if ids.shape != output.shape[:-1] or ids.is_floating_point():
        return None
    tables = [
        each.weight
        for each in module.modules()
        if isinstance(each, nn.Embedding) and type(each.weight) in (Tensor, nn.Parameter)
    ]
    fitting = [
        table
        for table in tables
        if table.ndim == 2 and table.is_floating_point() and table.shape[-1] == output.shape[-1]
        if table.device == ids.device
    ]
    return fitting[-1] if fitting else None


def described_kind(kind: str, symmetric: bool) -> str:
    """The kind of noise in words. Readers expect uniform noise, so that is not named."""
    return " ".join([*(["symmetric"] if symmetric else []), *([kind] if kind != "uniform" else []), "noise"])


def described_ratio(ratio: float) -> str:
    """`ratio` of the noise to the embeddings, for people, with a hint if it is unusual."""
    hint = ""
    if ratio > STRONG:
        hint = f" (strong: above {STRONG} it may drown the tokens; choose a smaller alpha)"
    elif 0 < ratio < WEAK:
        hint = f" (weak: below {WEAK} it may have no effect; choose a larger alpha)"
    return f"{ratio:.3g} of the embeddings{hint}"


def rms_of_noise(magnitude: float | Tensor, kind: str) -> float:
    """The root mean square of the noise, over the tokens that have noise. Waits for the device.

    Numbers that are uniform in (-m, m) have m / sqrt(3).
    """
    if not isinstance(magnitude, Tensor):
        return RELATIVE_STRENGTH[kind] * magnitude / math.sqrt(3)
    noisy = magnitude[magnitude > 0].to(wide_dtype(magnitude.device))
    return RELATIVE_STRENGTH[kind] * math.sqrt(noisy.square().mean().item() / 3) if noisy.numel() else 0.0


def _rms_of_table(table: Tensor) -> float:
    table = table.detach()
    rows = max(1, ELEMENTS // table.shape[-1])
    squares = [part.to(wide_dtype(table.device)).square().sum() for part in table.split(rows)]
    return math.sqrt(torch.stack(squares).sum().item() / table.numel())


def root_mean_square(squares: Tensor) -> float:
    """From the sum and the count of :meth:`CleanEmbeddings.squares`. 0.0 if no token has noise. Waits for the device."""
    total, count = squares.tolist()
    return math.sqrt(total / count) if count else 0.0
