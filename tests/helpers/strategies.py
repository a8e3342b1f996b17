"""What the property tests draw: tables, ids and magnitudes of any values, shapes, strides and offsets."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from helpers.contract import (
    FIRST_TOKENS,
    INT64_MAX,
    INT64_MIN,
    INTEGERS,
    MAGNITUDES,
    SEEDS,
    STREAMS,
    magnitude_bits,
    to_storage,
    to_storage_array,
    to_tensor,
)
from helpers.devices import DTYPES
from helpers.independent import STORAGE

ID_DTYPES = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64
)  # fmt: skip
MAX_WIDTH = 300
MAX_ELEMENTS = 3000  # of an output, so that thousands of them are quick
LARGEST_MAGNITUDE = float(np.finfo(np.float32).max)

VALUES = ("usual", "wide range", "limits", "any bits")
widths = st.one_of(st.integers(1, 40), st.integers(1, MAX_WIDTH))
seeds = st.one_of(st.integers(INT64_MIN, INT64_MAX), st.sampled_from(SEEDS))
streams = st.one_of(st.integers(0, 2**32 - 1), st.sampled_from(STREAMS))
first_tokens = st.one_of(
    st.integers(0, INT64_MAX), st.sampled_from(FIRST_TOKENS), st.integers(INT64_MAX - 8, INT64_MAX)
)
numbers = st.one_of(
    st.floats(0, LARGEST_MAGNITUDE), st.floats(0, 100), st.sampled_from(MAGNITUDES), st.integers(0, 10**6)
)
generators = st.integers(0, 2**32 - 1).map(np.random.default_rng)


def poison(dtype):
    """What lies between the elements of a tensor: a NaN, or an id that no table has."""
    if dtype == torch.bool:
        return True
    return math.nan if dtype.is_floating_point else torch.iinfo(dtype).max


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in memory."""

    order: tuple[int, ...]  # dimensions, from the one with the largest stride to the one with the smallest
    steps: tuple[int, ...]  # per dimension; above 1 there are gaps
    expanded: tuple[bool, ...]  # per dimension; True: stride 0
    offset: int  # elements before the first

    def of(self, values):
        """`values` laid out so; where a dimension is expanded, all are its first. The gaps hold what must not be read."""
        strides, extent = [0] * values.ndim, 1
        for dimension in reversed(self.order):
            if self.expanded[dimension]:
                values = values[(slice(None),) * dimension + (slice(0, 1),)]
            else:
                strides[dimension] = extent * self.steps[dimension]
                extent = strides[dimension] * max(1, values.shape[dimension])
        memory = torch.full((self.offset + extent,), poison(values.dtype), dtype=values.dtype)
        return memory.as_strided(values.shape, strides, self.offset).copy_(values)


@st.composite
def laid_out(draw, values):
    """`values`, or as much of them as strides of 0 leave, in the dimensions that they had, contiguous half of the time."""
    if draw(st.booleans()):
        return values
    per_dimension = {"min_size": values.ndim, "max_size": values.ndim}
    layout = Layout(
        tuple(draw(st.permutations(range(values.ndim)))),
        tuple(draw(st.lists(st.integers(1, 3), **per_dimension))),
        tuple(draw(st.lists(st.sampled_from((False, False, False, True)), **per_dimension))),
        draw(st.integers(0, 9)),
    )
    return layout.of(values).expand(values.shape)


@st.composite
def shapes(draw, max_tokens):
    """0 to 4 dimensions, empty ones among them, of at most `max_tokens` tokens."""
    if draw(st.integers(0, 7)) == 0:
        return (draw(st.integers(0, max_tokens)),)
    shape, room = [], max_tokens
    for size in draw(st.lists(st.integers(0, 6), max_size=4)):
        shape.append(min(size, room))
        room //= max(1, shape[-1])
    return tuple(shape)


@st.composite
def tables(draw, width, dtype):
    """A weight [1 to 8, width]: each row usual, of a wide range, of the limits of its type, or of any bits."""
    name = str(dtype).removeprefix("torch.")
    kinds, generator = draw(st.lists(st.sampled_from(VALUES), min_size=1, max_size=8)), draw(generators)
    integer = INTEGERS[np.dtype(STORAGE[name]).itemsize]
    bits = 8 * np.dtype(integer).itemsize
    positive = np.array(magnitude_bits(name), integer)
    limits = np.concatenate([positive, positive | integer(1 << (bits - 1))])

    def row(kind):
        if kind == "usual":
            return to_storage(generator.standard_normal(width) * 0.02, name)
        if kind == "wide range":
            return to_storage(generator.standard_normal(width) * 2.0 ** generator.integers(-30, 15, width), name)
        values = generator.choice(limits, width) if kind == "limits" else generator.integers(0, 2**bits, width, integer)
        return values.view(STORAGE[name])

    return draw(laid_out(to_tensor(np.stack([row(kind) for kind in kinds]), name)))


@st.composite
def magnitudes(draw, shape):
    """A number, or a float32 tensor that broadcasts to `shape`, with zeros among its values."""
    if draw(st.booleans()):
        return draw(numbers)
    kept = list(shape[draw(st.one_of(st.just(0), st.integers(0, len(shape)))) :])
    own = [draw(st.sampled_from((size, size, 1))) if size else 0 for size in kept]
    generator = draw(generators)
    uniform = generator.random(own) * 10.0 ** draw(st.integers(-8, 2))
    values = np.where(generator.random(own) < 0.5, generator.choice(MAGNITUDES, own), uniform)
    return draw(laid_out(torch.from_numpy(np.asarray(values, np.float32))))


@dataclass(frozen=True)
class Case:
    """The arguments of one call."""

    weight: torch.Tensor  # [V, D]
    ids: torch.Tensor  # [...]
    magnitude: float | torch.Tensor
    noise: dict[str, int | str | bool]  # seed, stream, first_token, noise, symmetric
    embeds: torch.Tensor  # [..., D], what the table holds at the ids, laid out anew

    @property
    def dtype_name(self):
        return str(self.weight.dtype).removeprefix("torch.")

    @property
    def magnitude_array(self):
        return self.magnitude.numpy() if isinstance(self.magnitude, torch.Tensor) else self.magnitude

    def __repr__(self):
        magnitude = self.magnitude if isinstance(self.magnitude, (int, float)) else self.magnitude.tolist()
        layouts = [(list(t.shape), t.stride(), t.storage_offset()) for t in (self.weight, self.ids, self.embeds)]
        return (
            f"Case({self.dtype_name}, weight, ids, embeds={layouts}, {self.ids.dtype}, ids={self.ids.tolist()}, "
            f"magnitude={magnitude}, {self.noise}, weight={self.weight.tolist()})"
        )


@st.composite
def cases(draw, max_elements=MAX_ELEMENTS, dtypes=DTYPES):
    """One call of both ops."""
    width = draw(widths)
    weight = draw(tables(width, draw(st.sampled_from(dtypes))))
    shape = draw(shapes(max(1, max_elements // width)))
    ids = draw(generators).integers(0, len(weight), shape)
    ids = draw(laid_out(torch.from_numpy(np.asarray(ids)).to(draw(st.sampled_from(ID_DTYPES)))))
    noise = {"seed": draw(seeds), "stream": draw(streams), "first_token": draw(first_tokens)}
    noise["noise"] = draw(st.sampled_from(("uniform", "sign", "gaussian")))
    noise["symmetric"] = draw(st.booleans()) and ids.numel() % 2 == 0
    name = str(weight.dtype).removeprefix("torch.")
    rows = to_storage_array(weight, name)[ids.to(torch.int64).numpy()]
    embeds = draw(laid_out(to_tensor(rows, name)))
    return Case(weight, ids, draw(magnitudes(shape)), noise, embeds)


@dataclass(frozen=True)
class Batch:
    """What noise_magnitude is told of a batch; None: nothing."""

    shape: tuple[int, ...]  # [..., L]
    alpha: float
    scale_by: str
    noise_on: str
    mask: torch.Tensor | None  # [..., L]
    positions: torch.Tensor | None  # broadcasts to [..., L]
    boundaries: torch.Tensor | None  # [N + 1]
    labels: torch.Tensor | None  # [..., L]


def runs(length):
    """Lengths of sequences that fill at most `length` tokens."""
    return st.lists(st.integers(1, max(1, length)), max_size=length).map(
        lambda sizes: [size for size, end in zip(sizes, np.cumsum(sizes), strict=True) if end <= length]
    )


@st.composite
def mask_rows(draw, length):
    """Padding left, right, on both sides or all over, holes, and packed sequences numbered, in order or not."""
    kind = draw(st.sampled_from(("padded", "holes", "nothing", "packed", "numbers")))
    if kind == "padded":
        left = draw(st.integers(0, length))
        right = draw(st.integers(0, length - left))
        return [0] * left + [1] * (length - left - right) + [0] * right
    if kind == "packed":
        row = [number for number, size in enumerate(draw(runs(length)), 1) for _ in range(size)]
        return row + [0] * (length - len(row))
    largest = {"holes": 1, "nothing": 0, "numbers": length}[kind]
    return draw(st.lists(st.integers(0, largest), min_size=length, max_size=length))


@st.composite
def position_rows(draw, length):
    """Packed sequences, which begin at 0 or elsewhere, with padding positions of 0 behind them; or any numbers."""
    if draw(st.integers(0, 3)) == 0:
        return draw(st.lists(st.integers(0, 3), min_size=length, max_size=length))
    row = []
    for size in draw(runs(length)):
        begin = draw(st.sampled_from((0, 0, 0, 7)))
        row += range(begin, begin + size)
    return row + [0] * (length - len(row))


@st.composite
def batches(draw):
    """A batch of 1 to 3 dimensions, of at most 12 tokens a row, and what is known of it."""
    length = draw(st.integers(0, 12))
    rows = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    shape, count = (*rows, length), math.prod(rows)

    def of_rows(strategy, number=count):
        return torch.tensor([draw(strategy) for _ in range(number)], dtype=torch.int64)

    mask = positions = boundaries = labels = None
    if draw(st.booleans()):
        dtype = draw(st.sampled_from((torch.int64, torch.int32, torch.uint8, torch.float32, torch.bool)))
        mask = draw(laid_out(of_rows(mask_rows(length)).reshape(shape).to(dtype)))
    if draw(st.booleans()):
        positions = of_rows(position_rows(length)).reshape(shape)
        positions = draw(
            st.sampled_from((positions, positions[(0,) * len(rows)], positions[:1] if rows else positions))
        )
    if count == 1 and length and draw(st.booleans()):
        ends = draw(st.lists(st.integers(0, length), min_size=1, max_size=length).map(sorted))
        boundaries = torch.tensor([0, *ends], dtype=draw(st.sampled_from((torch.int32, torch.int64))))
    noise_on = draw(st.sampled_from(("all", "prompt", "completion")))
    if noise_on != "all" or draw(st.booleans()):
        labels = of_rows(st.lists(st.sampled_from((-100, 7)), min_size=length, max_size=length)).reshape(shape)
    alpha = draw(st.one_of(st.floats(0, 100, allow_subnormal=False), st.just(5.0)))
    scale_by = draw(st.sampled_from(("sequence", "sequence", "batch")))
    return Batch(shape, alpha, scale_by, noise_on, mask, positions, boundaries, labels)
