"""The noise contract on GPUs: one Triton kernel per op.

A program owns a tile of ``ROWS`` tokens by ``BLOCKS`` Philox blocks. One Philox call per block gives four words, which are
exactly 16 bytes of output in half precision and in fp32, so a thread draws, loads, adds and stores 16 bytes at a time and
nothing moves between threads. The arithmetic is that of :mod:`neft_kernels.reference`; kernels are launched without
floating-point fusion, because the product and the sum round separately.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["add_noise", "noisy_embedding"]

_PHILOX_ROUNDS = tl.constexpr(10)
_PHILOX_MULTIPLIER_0 = tl.constexpr(0xD2511F53)  # Salmon et al. 2011, table 2
_PHILOX_MULTIPLIER_1 = tl.constexpr(0xCD9E8D57)
_PHILOX_WEYL_0 = tl.constexpr(0x9E3779B9)  # golden ratio
_PHILOX_WEYL_1 = tl.constexpr(0xBB67AE85)  # sqrt(3) - 1

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _multiply_wide(factor: tl.constexpr, word):
    product = word.to(tl.uint64) * factor
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def _philox4x32(c0, c1, c2, c3, k0, k1):
    for _ in tl.static_range(_PHILOX_ROUNDS):
        hi0, lo0 = _multiply_wide(_PHILOX_MULTIPLIER_0, c0)
        hi1, lo1 = _multiply_wide(_PHILOX_MULTIPLIER_1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0 = (k0.to(tl.uint64) + _PHILOX_WEYL_0).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + _PHILOX_WEYL_1).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _uniform(tokens, blocks, seed, stream, dtype: tl.constexpr):  # [R], [B] -> [R, B * columns per block]
    zero = tokens[:, None] * 0 + blocks[None, :] * 0  # int64, [R, B]
    c0, c1, c2, c3 = _philox4x32(
        (zero + blocks[None, :]).to(tl.uint32),
        (zero + tokens[:, None]).to(tl.uint32),
        (zero + (tokens[:, None] >> 32)).to(tl.uint32),
        (zero + stream).to(tl.uint32),
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )
    # Joining puts the new axis last, so the words are joined high bit first to come out in column order.
    words = tl.join(tl.join(c0, c2), tl.join(c1, c3))  # [R, B, word // 2, word % 2]
    compute: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    if dtype.primitive_bitwidth == 16:
        halves = tl.join(words & 0xFFFF, words >> 16)  # low half first
        u = (2 * halves.to(tl.int32) - 65535).to(compute) * 0.0000152587890625  # 2**-16
        return tl.reshape(u, [zero.shape[0], zero.shape[1] * 8])
    signed = words.to(tl.int32, bitcast=True)
    u = ((signed >> 8) | 1).to(compute) * 0.00000011920928955078125  # 2**-23
    return tl.reshape(u, [zero.shape[0], zero.shape[1] * 4])


@triton.jit
def _widen(value, dtype: tl.constexpr):
    if _INTERPRETED and value.dtype == tl.bfloat16:  # the interpreter flushes subnormals
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def _round_to(value, dtype: tl.constexpr):
    if _INTERPRETED and dtype == tl.bfloat16:  # the interpreter truncates
        bits = value.to(tl.uint32, bitcast=True)
        rounded = tl.where(value == value, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x400000)
        return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)


@triton.jit
def _add_noise(w, m, u, dtype: tl.constexpr):  # [R, C], [R, 1], [R, C] -> [R, C]
    noisy = _widen(w, u.dtype) + m.to(u.dtype) * u
    return tl.where(m == 0, w, _round_to(noisy, dtype))


@triton.jit
def _tile(num_tokens, embedding_dim, BLOCKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS_PER_BLOCK: tl.constexpr):
    """The program's token indices [R], Philox blocks [B] and columns [C], all int64."""
    column_tiles = tl.cdiv(embedding_dim, BLOCKS * COLUMNS_PER_BLOCK)
    program = tl.program_id(0)
    rows = (program // column_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column_tile = (program % column_tiles).to(tl.int64)
    blocks = column_tile * BLOCKS + tl.arange(0, BLOCKS)
    columns = column_tile * (BLOCKS * COLUMNS_PER_BLOCK) + tl.arange(0, BLOCKS * COLUMNS_PER_BLOCK)
    return rows, blocks, columns


@triton.jit
def _magnitudes(token_magnitude, magnitude, rows, in_range):
    if token_magnitude is None:
        return tl.full(rows.shape, 0.0, tl.float32) + magnitude
    return tl.load(token_magnitude + rows, mask=in_range, other=0.0)


@triton.jit(do_not_specialize=["num_tokens", "stream", "first_token"])
def noisy_embedding_kernel(
    out,  # [T, D], contiguous
    input_ids,  # [T], contiguous
    weight,  # [V, D]
    seed,  # [1]
    token_magnitude,  # [T], contiguous, or None
    magnitude,
    stream,
    first_token,
    num_tokens,
    num_embeddings,
    embedding_dim,
    row_stride,
    column_stride,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS_PER_BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = weight.dtype.element_ty
    rows, blocks, columns = _tile(num_tokens, embedding_dim, BLOCKS, ROWS, COLUMNS_PER_BLOCK)
    is_row = rows < num_tokens
    ids = tl.load(input_ids + rows, mask=is_row, other=0).to(tl.int64)
    valid = is_row & (ids >= 0) & (ids < num_embeddings)
    m = _magnitudes(token_magnitude, magnitude, rows, is_row)

    is_column = (columns < embedding_dim)[None, :]
    # An id out of range reads nothing; its row becomes NaN.
    w = tl.load(
        weight + ids[:, None] * row_stride + columns[None, :] * column_stride,
        mask=valid[:, None] & is_column,
        other=float("nan"),
    )
    u = _uniform(first_token + rows, blocks, tl.load(seed), stream, dtype)
    noisy = _add_noise(w, m[:, None], u, dtype)
    tl.store(out + rows[:, None] * embedding_dim + columns[None, :], noisy, mask=is_row[:, None] & is_column)


@triton.jit(do_not_specialize=["num_tokens", "stream", "first_token"])
def add_noise_kernel(
    out,  # [T, D], contiguous
    embeds,  # [T, D]
    seed,  # [1]
    token_magnitude,  # [T], contiguous, or None
    magnitude,
    stream,
    first_token,
    num_tokens,
    embedding_dim,
    row_stride,
    column_stride,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS_PER_BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = embeds.dtype.element_ty
    rows, blocks, columns = _tile(num_tokens, embedding_dim, BLOCKS, ROWS, COLUMNS_PER_BLOCK)
    is_row = rows < num_tokens
    m = _magnitudes(token_magnitude, magnitude, rows, is_row)
    in_range = is_row[:, None] & (columns < embedding_dim)[None, :]
    w = tl.load(embeds + rows[:, None] * row_stride + columns[None, :] * column_stride, mask=in_range)
    u = _uniform(first_token + rows, blocks, tl.load(seed), stream, dtype)
    tl.store(out + rows[:, None] * embedding_dim + columns[None, :], _add_noise(w, m[:, None], u, dtype), mask=in_range)


TILE_BLOCKS = 256  # Philox blocks of a program: two 16-byte vectors for each thread of four warps
NUM_WARPS = 4


def _launch(kernel, tensors: tuple, scalars: tuple, sizes: tuple, num_tokens: int, embeds: Tensor) -> None:
    """Launches `kernel` on tiles over ``[num_tokens, D]``; `embeds` is the table or the embeddings to read."""
    embedding_dim = embeds.shape[-1]
    columns_per_block = 8 if embeds.element_size() == 2 else 4
    blocks = min(TILE_BLOCKS, triton.next_power_of_2(triton.cdiv(embedding_dim, columns_per_block)))
    rows = TILE_BLOCKS // blocks
    grid = (triton.cdiv(num_tokens, rows) * triton.cdiv(embedding_dim, blocks * columns_per_block),)
    with torch.cuda.device(embeds.device if embeds.is_cuda else -1):
        kernel[grid](
            *tensors,
            *scalars,
            num_tokens,
            *sizes,
            embedding_dim,
            *embeds.stride()[-2:],
            ROWS=rows,
            BLOCKS=blocks,
            COLUMNS_PER_BLOCK=columns_per_block,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )


def noisy_embedding(
    input_ids: Tensor,
    weight: Tensor,
    seed: Tensor,
    token_magnitude: Tensor | None,
    magnitude: float,
    stream: int,
    first_token: int,
) -> Tensor:
    """See :func:`neft_kernels.reference.noisy_embedding`. Rows of ids that are out of range become NaN."""
    out = torch.empty(*input_ids.shape, weight.shape[1], dtype=weight.dtype, device=weight.device)
    if out.numel():
        ids = input_ids.reshape(-1).contiguous()
        tensors = (out, ids, weight, seed, _flat(token_magnitude))
        scalars = (magnitude, stream, first_token)
        _launch(noisy_embedding_kernel, tensors, scalars, (weight.shape[0],), ids.numel(), weight)
    return out


def add_noise(
    embeds: Tensor, seed: Tensor, token_magnitude: Tensor | None, magnitude: float, stream: int, first_token: int
) -> Tensor:
    """See :func:`neft_kernels.reference.add_noise`."""
    out = torch.empty(embeds.shape, dtype=embeds.dtype, device=embeds.device)
    if out.numel():
        rows = embeds.reshape(-1, embeds.shape[-1])
        tensors = (out, rows, seed, _flat(token_magnitude))
        _launch(add_noise_kernel, tensors, (magnitude, stream, first_token), (), rows.shape[0], rows)
    return out


def _flat(token_magnitude: Tensor | None) -> Tensor | None:
    return None if token_magnitude is None else token_magnitude.reshape(-1).contiguous()
