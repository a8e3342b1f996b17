"""The noise contract on GPUs, as one Triton kernel: gather, draw, scale, add and round in a single pass over the rows.

A Philox call gives 16 bytes of random words: the noise of 8 columns in half precision, of 4 in fp32 and of 2, twice over,
in fp64. So the unit of work is a vector of 16 bytes of a row, which is also the widest load and store of a GPU thread:
what a thread draws is what it adds to what it has loaded, nothing moves between threads, and no shared memory is used.

A program writes a tile of ``TOKENS`` tokens by ``VECTORS`` vectors, and each thread four vectors of it. If they are of one
row, its id, its address and the first words of its counters are computed once. Programs of the same rows follow on each other,
so that whole rows are read and written at about the same time. The arithmetic is that of :mod:`neft_kernels.ops.reference`,
and the kernel is launched without floating-point fusion, because the product and the sum round separately.
``tools/check_gpu.py`` looks at the machine code for all of this.
"""

import functools
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .reference import GAUSSIAN, SIGN, UNIFORM
from .triton_launch import INTERPRETED, launch_kernel, seed_arguments, tile_grid

__all__ = ["add_noise", "noisy_embedding"]

# The largest tile, and its warps. benchmarks/tune_gpu.py tries others.
TILE_VECTORS = 512
NUM_WARPS = 4
# Whether tiles that are narrower, but not too narrow for a warp, have one token and fewer warps, rather than several tokens.
ONE_TOKEN = True
# Registers of a thread. Without a limit ptxas uses fewer, and delays three of the four loads until the first vector is done.
MAX_REGISTERS = 80

_INTERPRETED = tl.constexpr(INTERPRETED)
_SIGN, _GAUSSIAN = tl.constexpr(SIGN), tl.constexpr(GAUSSIAN)


@triton.jit
def _multiply_wide(factor: tl.constexpr, word):
    """The halves of the 64-bit product of two words: one instruction, where tl.umulhi and * are two."""
    product = word.to(tl.uint64) * factor
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def _philox4x32(c0, c1, c2, c3, k0, k1):
    ROUNDS: tl.constexpr = 10
    MULTIPLIER_0: tl.constexpr = 0xD2511F53  # Salmon et al. 2011, table 2
    MULTIPLIER_1: tl.constexpr = 0xCD9E8D57
    WEYL_0: tl.constexpr = 0x9E3779B9  # golden ratio
    WEYL_1: tl.constexpr = 0xBB67AE85  # sqrt(3) - 1
    for _ in tl.static_range(ROUNDS):
        hi0, lo0 = _multiply_wide(MULTIPLIER_0, c0)
        hi1, lo1 = _multiply_wide(MULTIPLIER_1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0 = (k0.to(tl.uint64) + WEYL_0).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + WEYL_1).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _gaussian(u):
    # Exponent and fraction of a float, as one integer, are a rough logarithm; of the fourth power they are a better one.
    q = (1 - u) * (1 + u)
    r = q * q
    s = r * r
    x = (0x3FFF0000 - (s.to(tl.int32, bitcast=True) >> 7)).to(tl.float32, bitcast=True)
    c = x - 1.579746
    e = x - 0.78377885
    return ((13.442853 * u) * (2.2166462 - x)) * ((c * c + 0.51102036) * (e * e + 0.0049715075))


@triton.jit
def _noise(tokens, vectors, seed, stream, dtype: tl.constexpr, KIND: tl.constexpr):
    # [T], [V] -> [T, V * columns of a vector]
    # The counter's words broadcast against each other, so what depends on the token alone is computed once a token.
    token, vector = tokens[:, None], vectors[None, :]
    block = vector // 2 if dtype == tl.float64 else vector
    c0, c1, c2, c3 = _philox4x32(
        block.to(tl.uint32),
        token.to(tl.uint32),
        (token >> 32).to(tl.uint32),
        stream.to(tl.uint32),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )
    # Joining puts the new axis last, so the words are joined high bit first to come out in column order.
    if dtype == tl.float64:
        odd = vector % 2 == 1
        words = tl.join(tl.where(odd, c2, c0), tl.where(odd, c3, c1))
    else:
        words = tl.join(tl.join(c0, c2), tl.join(c1, c3))
    if dtype.primitive_bitwidth == 16:
        halves = tl.join(words & 0xFFFF, words >> 16)  # low half first
        if KIND == _SIGN:
            noise = ((halves ^ 0x8000) << 16 & 0x80000000 | 0x3F800000).to(tl.float32, bitcast=True)
        else:
            noise = tl.fma(halves.to(tl.float32), 2.0**-15, 2.0**-16 - 1)  # exact, so nothing is lost by fusing
    elif KIND == _SIGN:
        noise = (words & 0x80000000 | 0x3F800000).to(tl.float32, bitcast=True)
    else:
        noise = ((words.to(tl.int32, bitcast=True) >> 8) | 1).to(tl.float32) * 2.0**-23
    if KIND == _GAUSSIAN:
        noise = _gaussian(noise)
    return tl.reshape(noise, [tokens.shape[0], vectors.shape[0] * (128 // dtype.primitive_bitwidth)])


@triton.jit
def _widen(value):
    # Shifting bf16 into place is one instruction less than .to(), whose interpreted version flushes subnormals besides.
    if value.dtype == tl.bfloat16:
        wide = (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = value.to(tl.float64 if value.dtype == tl.float64 else tl.float32)
    return wide


@triton.jit
def _round_to(value, dtype: tl.constexpr):
    if _INTERPRETED and dtype == tl.bfloat16:  # the interpreter's .to() truncates
        bits = value.to(tl.uint32, bitcast=True)
        bits = tl.where(value == value, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x400000)
        rounded = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        rounded = value.to(dtype)
    return rounded


@triton.jit
def _source_row_and_magnitude(input_ids, token_magnitude, magnitude, tokens, is_token, num_rows):
    # Of each token, [T].
    if token_magnitude is None:
        m = tl.full(tokens.shape, magnitude, tl.float32)
    else:
        m = tl.load(token_magnitude + tokens, mask=is_token, other=0.0)
    if input_ids is None:
        source_row = tokens
    else:
        # An id that is out of range reads row 0 and makes it NaN.
        source_row = tl.load(input_ids + tokens, mask=is_token, other=0).to(tl.int64)
        valid = source_row.to(tl.uint64) < num_rows.to(tl.uint64)
        source_row = tl.where(valid, source_row, 0)
        m = tl.where(valid, m, float("nan"))
    return source_row, m


@triton.jit
def _store_noisy(target, w, m, noise, inside):
    # Each row is stored once. Two stores cost less than a choice between their values, element by element.
    m = m[:, None]
    wide = _widen(w)
    noisy = _round_to(wide + m.to(wide.dtype) * noise.to(wide.dtype), w.dtype)
    tl.store(target, noisy, mask=inside & (m != 0))
    tl.store(target, w, mask=inside & (m == 0))


# The kernel is not specialized on the values of numbers. Whatever changes the code is a constant. So a captured CUDA graph,
# whose seeds are on the device, launches the kernel that was compiled for seeds that are given by value.
@triton.jit(do_not_specialize=range(5, 15))
def noisy_rows_kernel(
    out,  # [T, D], contiguous
    source,  # [num_rows, D]
    input_ids,  # [T], contiguous: the source row of each token; None: row t for token t
    seed,  # [1]; a null pointer: it is given by its halves, which are 0 otherwise
    token_magnitude,  # [T], contiguous; None: every token gets `magnitude`
    seed_low,
    seed_high,
    magnitude,
    stream,
    first_token,
    num_tokens,  # that the grid is for: all of them, or the first half if SYMMETRIC
    num_rows,
    embedding_dim,  # in units, as the stride of the rows
    row_stride,
    column_stride,
    UNIT: tl.constexpr,  # columns that a row and the distance between rows are a multiple of
    CONTIGUOUS: tl.constexpr,  # columns lie side by side
    TOKENS: tl.constexpr,
    VECTORS: tl.constexpr,
    KIND: tl.constexpr,  # of noise
    SYMMETRIC: tl.constexpr,  # a program also writes the same tokens of the second half, with the noise negated
):
    dtype: tl.constexpr = out.dtype.element_ty
    COLUMNS: tl.constexpr = VECTORS * (128 // dtype.primitive_bitwidth)
    embedding_dim = embedding_dim.to(tl.int64) * UNIT
    row_stride = row_stride.to(tl.int64) * UNIT
    if CONTIGUOUS:
        column_stride = 1

    column_tile = tl.program_id(0)
    token_tile = tl.program_id(1) + tl.program_id(2).to(tl.int64) * tl.num_programs(1)
    tokens = token_tile * TOKENS + tl.arange(0, TOKENS)
    vectors = column_tile * VECTORS + tl.arange(0, VECTORS)
    first_column = column_tile.to(tl.int64) * COLUMNS
    columns = tl.arange(0, COLUMNS)  # from the first one of the tile
    is_token = tokens < num_tokens
    inside = is_token[:, None] & (columns < tl.minimum(embedding_dim - first_column, COLUMNS).to(tl.int32))[None, :]

    # What is loaded comes first, so that all of it is under way before the noise is drawn.
    source_row, m = _source_row_and_magnitude(input_ids, token_magnitude, magnitude, tokens, is_token, num_rows)
    if SYMMETRIC:
        others = tokens + num_tokens
        other_source_row, other_m = _source_row_and_magnitude(
            input_ids, token_magnitude, magnitude, others, is_token, num_rows
        )
    source += first_column * column_stride
    offsets = columns.to(tl.int64)[None, :] * column_stride
    w = tl.load((source + source_row * row_stride)[:, None] + offsets, mask=inside)
    if SYMMETRIC:
        other_w = tl.load((source + other_source_row * row_stride)[:, None] + offsets, mask=inside)

    given_seed = (seed_high.to(tl.int64) << 32) | (seed_low.to(tl.int64) & 0xFFFFFFFF)
    seed = tl.load(seed, mask=seed.to(tl.int64) != 0, other=0) | given_seed
    noise = _noise(first_token + tokens, vectors, seed, stream, dtype, KIND)
    out += first_column
    _store_noisy((out + tokens * embedding_dim)[:, None] + columns[None, :], w, m, noise, inside)
    if SYMMETRIC:
        _store_noisy((out + others * embedding_dim)[:, None] + columns[None, :], other_w, -other_m, noise, inside)


@functools.lru_cache(maxsize=64)
def _tile(embedding_dim: int, element_size: int) -> tuple[int, int, int, int]:
    """TOKENS, VECTORS, the warps of a program, and the number of tiles in a row.

    It is the widest tile among those that leave the fewest threads without work.
    """
    vectors_of_row = -(-embedding_dim * element_size // 16)
    if vectors_of_row <= 32:
        vectors = triton.next_power_of_2(vectors_of_row)
    else:
        halved = (TILE_VECTORS >> times for times in range(TILE_VECTORS.bit_length()))
        widths = [width for width in halved if width >= 32]
        vectors = min(widths, key=lambda width: -(-vectors_of_row // width) * width)
    tiles = -(-vectors_of_row // vectors)
    vectors_of_warp = TILE_VECTORS // NUM_WARPS
    if ONE_TOKEN and vectors >= vectors_of_warp:
        return 1, vectors, vectors // vectors_of_warp, tiles
    return TILE_VECTORS // vectors, vectors, NUM_WARPS, tiles


def _noisy_rows(
    out: Tensor,  # [..., D], contiguous
    source: Tensor,  # [num_rows, D]
    input_ids: Tensor | None,
    seed: Tensor,
    token_magnitude: Tensor | None,
    magnitude: float,
    stream: int,
    first_token: int,
    kind: int = UNIFORM,
    symmetric: bool = False,
) -> Tensor:
    num_rows, embedding_dim = source.shape
    num_tokens = num_rows if input_ids is None else input_ids.numel()
    if num_tokens == 0 or embedding_dim == 0:
        return out
    if num_rows == 0:
        return out.fill_(float("nan"))
    seed, *halves = seed_arguments(seed, source.device)
    tensors = (
        out,
        source,
        None if input_ids is None else input_ids.contiguous(),
        seed,
        None if token_magnitude is None else token_magnitude.contiguous(),
    )
    row_stride, column_stride = source.stride()
    columns_of_vector = 16 // source.element_size()
    is_aligned = (
        column_stride == 1
        and embedding_dim % columns_of_vector == 0
        and row_stride % columns_of_vector == 0
        and out.data_ptr() % 16 == 0
        and source.data_ptr() % 16 == 0
    )
    unit = columns_of_vector if is_aligned else 1
    tokens_of_tile, vectors, num_warps, column_tiles = _tile(embedding_dim, source.element_size())
    if symmetric:  # a thread has two vectors of either half
        num_tokens, num_warps = num_tokens // 2, num_warps * 2
    stream, first_token = int(stream), int(first_token)  # Triton compiles other code for booleans
    numbers = (
        *(*halves, magnitude, stream, first_token, num_tokens, num_rows),
        *(embedding_dim // unit, row_stride // unit, column_stride),
    )
    constants = (unit, column_stride == 1, tokens_of_tile, vectors, kind, symmetric)
    grid, most = tile_grid(num_tokens, tokens_of_tile, column_tiles), MAX_REGISTERS if unit > 1 else None
    launch_kernel(noisy_rows_kernel, grid, tensors, numbers, *constants, num_warps=num_warps, max_registers=most)
    return out


def noisy_embedding(input_ids: Tensor, weight: Tensor, *noise: Any) -> Tensor:
    """See :func:`neft_kernels.ops.reference.noisy_embedding`. Rows of ids that are out of range become NaN."""
    return _noisy_rows(weight.new_empty((*input_ids.shape, weight.shape[1])), weight, input_ids, *noise)


def add_noise(embeds: Tensor, *noise: Any) -> Tensor:
    """See :func:`neft_kernels.ops.reference.add_noise`."""
    out = embeds.new_empty(embeds.shape)
    return _noisy_rows(out, embeds.reshape(-1, embeds.shape[-1]), None, *noise) if out.numel() else out
