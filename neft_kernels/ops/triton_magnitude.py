"""The magnitude of every token on GPUs, in one Triton kernel: what :mod:`neft_kernels.ops.magnitude` says in plain torch.

There it takes some twenty kernels, which together would take as long as the noisy embedding itself. A program has a tile of a
row. It looks up the rest of the row only for the sequences that its tile has a part of: with positions, to where the first
one begins and the last one ends; with a mask alone, whose numbers may stand anywhere, once through the row.
"""

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import MAX_GRID_Y, launch_kernel
from .triton_positions import by_masked_position, by_position, load_row

__all__ = ["token_magnitude"]

MOST_TOKENS = 1024  # of a tile
MOST_TOKENS_AT_ONCE = 1024  # in the rest of the row
# With a mask and positions a token needs about twice the registers.
NUM_WARPS, NUM_WARPS_OF_BOTH = 4, 8


@triton.jit
def _load_numbers(mask, token, length):
    """The sequences' numbers of a mask, 0 for padding and outside of the row."""
    return tl.minimum(tl.maximum(load_row(mask, token, token < length), 0), length).to(tl.int32)


@triton.jit
def _count_in_row(mask, number, length, STEP: tl.constexpr):
    counts = tl.zeros([STEP], tl.int32)
    for begin in range(0, length, STEP):
        counts += (_load_numbers(mask, begin + tl.arange(0, STEP), length) == number).to(tl.int32)
    return tl.sum(counts, 0)


@triton.jit
def _by_number(mask, begin, length, TILE: tl.constexpr, STEP: tl.constexpr):
    """As :func:`by_position`. Tokens of one number may stand anywhere in the row."""
    NONE: tl.constexpr = 2**31 - 1
    numbers = _load_numbers(mask, begin + tl.arange(0, TILE), length)
    lowest = tl.min(tl.where(numbers > 0, numbers, NONE), 0)
    highest = tl.max(numbers, 0)
    of_lowest = tl.zeros([STEP], tl.int32)
    of_highest = tl.zeros([STEP], tl.int32)
    between = tl.zeros([STEP], tl.int32)
    for other in range(0, length, STEP):
        token = other + tl.arange(0, STEP)
        others = _load_numbers(mask, token, length)
        of_lowest += (others == lowest).to(tl.int32)
        of_highest += (others == highest).to(tl.int32)
        between |= ((others > lowest) & (others < highest) & ((token < begin) | (token >= begin + TILE))).to(tl.int32)
    tokens = tl.where(numbers == highest, tl.sum(of_highest, 0), tl.sum(of_lowest, 0))
    # Most collators number in order. Then all sequences but the first and the last of a tile lie in it.
    is_elsewhere = tl.max(between, 0) > 0
    number = tl.min(tl.where(numbers > lowest, numbers, highest), 0)
    while number < highest:
        count = tl.sum((numbers == number).to(tl.int32), 0)
        if is_elsewhere:
            count = _count_in_row(mask, number, length, STEP)
        tokens = tl.where(numbers == number, count, tokens)
        number = tl.min(tl.where(numbers > number, numbers, highest), 0)
    return tokens, numbers > 0


@triton.jit(do_not_specialize=["alpha_low", "alpha_high", "embedding_dim", "length"])
def token_magnitude_kernel(
    out,  # [B, L], fp32
    attention_mask,  # [B, L], int64, or None
    position_ids,  # [B, L], int64, or None
    alpha_low,  # halves of a float64, because Triton takes floats as float32
    alpha_high,
    embedding_dim,
    length,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin = (tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)) * TILE
    if begin >= length:
        return
    if attention_mask is not None:
        attention_mask += row * length
    if position_ids is None:
        tokens, present = _by_number(attention_mask, begin, length, TILE, STEP)
    elif attention_mask is None:
        tokens, present = by_position(position_ids + row * length, begin, length, TILE, STEP)
    else:
        tokens, present = by_masked_position(attention_mask, position_ids + row * length, begin, length, TILE, STEP)

    alpha_bits = (alpha_high.to(tl.int64) << 32) | (alpha_low.to(tl.int64) & 0xFFFFFFFF)
    alpha = alpha_bits.to(tl.float64, bitcast=True)
    elements = tl.maximum(tokens, 1).to(tl.float64) * embedding_dim
    magnitude = (alpha / tl.sqrt(elements)).to(tl.float32)
    token = begin + tl.arange(0, TILE)
    tl.store(out + row * length + token, tl.where(present, magnitude, 0.0), mask=token < length)


def token_magnitude(
    attention_mask: Tensor | None,  # [..., L], int64, contiguous
    position_ids: Tensor | None,  # [..., L], int64, contiguous
    alpha: float,
    embedding_dim: int,
) -> Tensor:  # [..., L], fp32
    """The magnitudes of tokens whose sequences `attention_mask` or `position_ids` or both tell apart."""
    given = position_ids if attention_mask is None else attention_mask
    assert given is not None
    length = given.shape[-1]
    out = torch.empty(given.shape, dtype=torch.float32, device=given.device)
    if out.numel() == 0:
        return out
    halves = struct.unpack("<ii", struct.pack("<d", alpha))
    tile, step = (min(triton.next_power_of_2(length), most) for most in (MOST_TOKENS, MOST_TOKENS_AT_ONCE))
    tiles = -(-length // tile)
    grid = (given.numel() // length, min(tiles, MAX_GRID_Y), -(-tiles // MAX_GRID_Y))
    tensors, numbers = (out, attention_mask, position_ids), (*halves, embedding_dim, length)
    is_masked_position = attention_mask is not None and position_ids is not None
    num_warps = NUM_WARPS_OF_BOTH if is_masked_position else NUM_WARPS
    launch_kernel(token_magnitude_kernel, grid, tensors, numbers, tile, step, num_warps=num_warps)
    return out
