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

__all__ = ["token_magnitude"]

MOST_TOKENS = 1024  # of a tile
MOST_TOKENS_AT_ONCE = 1024  # in the rest of the row


@triton.jit
def _begins(position, before, HAS_MASK: tl.constexpr):
    """Whether a sequence begins at a token that has a token before it: as in :mod:`neft_kernels.ops.magnitude`."""
    return (position < before) | (position == 0) if HAS_MASK else position != before + 1


@triton.jit
def _load_row(first_of_row, token, inside):
    return tl.load(first_of_row + token, mask=inside, other=0)


@triton.jit
def _load_begins(positions, token, inside, HAS_MASK: tl.constexpr):
    """Whether each token begins a sequence; False outside of the row."""
    here = _load_row(positions, token, inside)
    before = _load_row(positions, token - 1, inside & (token > 0))
    return inside & ((token == 0) | _begins(here, before, HAS_MASK))


@triton.jit
def _load_present(mask, token, inside):
    return inside if mask is None else _load_row(mask, token, inside) != 0


@triton.jit
def _load_numbers(mask, token, length):
    """The sequences' numbers of a mask, 0 for padding and outside of the row."""
    return tl.minimum(tl.maximum(_load_row(mask, token, token < length), 0), length).to(tl.int32)


@triton.jit
def _tokens_before(positions, mask, begin, STEP: tl.constexpr):
    """The number of tokens before `begin` in the same sequence. Token `begin` must not start a sequence."""
    tokens = 0
    searching = True
    end = begin
    while searching:
        token = end - 1 - tl.arange(0, STEP)
        inside = token >= 0
        start = tl.max(tl.where(_load_begins(positions, token, inside, mask is not None), token, -1), 0)
        tokens += tl.sum((_load_present(mask, token, inside) & (token >= start)).to(tl.int32), 0)
        searching = start < 0
        end -= STEP
    return tokens


@triton.jit
def _tokens_after(positions, mask, end, length, STEP: tl.constexpr):
    """How many tokens from `end` on continue the sequence of token `end - 1`; and whether any of them continues the sequence
    of the token before it."""
    tokens = 0
    is_open = True
    is_followed = False
    searching = end < length
    begin = end
    while searching:
        token = begin + tl.arange(0, STEP)
        inside = token < length
        begins = _load_begins(positions, token, inside, mask is not None)
        if is_open:
            next_begin = tl.min(tl.where(begins, token, length), 0)
            tokens += tl.sum((_load_present(mask, token, inside) & (token < next_begin)).to(tl.int32), 0)
            is_open = next_begin == length
        if mask is None:
            is_followed = is_followed | (tl.max((inside & (begins == 0)).to(tl.int32), 0) > 0)
        begin += STEP
        searching = (begin < length) & (is_open | ((mask is None) & (is_followed == 0)))
    return tokens, is_followed


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _by_position(positions, mask, begin, length, TILE: tl.constexpr, STEP: tl.constexpr):
    """For each token of a tile the length of its sequence, and whether it gets noise."""
    token = begin + tl.arange(0, TILE)
    inside = token < length
    begins = _load_begins(positions, token, inside, mask is not None)
    present = _load_present(mask, token, inside)
    continues = tl.sum((begins & (token == begin)).to(tl.int32), 0) == 0
    before = 0
    if continues:
        before = _tokens_before(positions, mask, begin, STEP)
    after, is_followed = _tokens_after(positions, mask, begin + TILE, length, STEP)

    counted = tl.cumsum(present.to(tl.int32), 0)
    in_tile = tl.sum(present.to(tl.int32), 0)
    # Tokens counted before the sequence began, and those when it ended. Counts grow, so the last is the largest.
    at_begin = tl.associative_scan(tl.where(begins, counted - present.to(tl.int32), -before), 0, _larger)
    next_begins = _load_begins(
        positions, token + 1, (token + 1 < length) & (token - begin < TILE - 1), mask is not None
    )
    at_end = tl.associative_scan(tl.where(next_begins, counted, in_tile + after), 0, _smaller, reverse=True)
    tokens = at_end - at_begin
    if mask is None:
        # Collators that pack pad positions with 0 and give no mask: each padding token looks like a sequence.
        last = tl.max(tl.where(inside & ((tokens > 1) | (length == 1)), token, -1), 0)
        # transformers gives padding on the left the position 1, so each token of it looks like a sequence of one.
        is_filling = (tokens == 1) & (_load_row(positions, token, inside) == 1) & (length > 1)
        present = inside & ((token <= last) | is_followed) & (is_filling == 0)
    return tokens, present


@triton.jit
def _count_in_row(mask, number, length, STEP: tl.constexpr):
    counts = tl.zeros([STEP], tl.int32)
    for begin in range(0, length, STEP):
        counts += (_load_numbers(mask, begin + tl.arange(0, STEP), length) == number).to(tl.int32)
    return tl.sum(counts, 0)


@triton.jit
def _by_number(mask, begin, length, TILE: tl.constexpr, STEP: tl.constexpr):
    """As :func:`_by_position`. Tokens of one number may stand anywhere in the row."""
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
    else:
        tokens, present = _by_position(position_ids + row * length, attention_mask, begin, length, TILE, STEP)

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
    launch_kernel(token_magnitude_kernel, grid, tensors, numbers, tile, step)
    return out
