"""The magnitude of every token on GPUs, in one Triton kernel: what :mod:`neft_kernels.ops.magnitude` says in plain torch.

There it takes some twenty kernels, which together would take as long as the noisy embedding itself. A program has a row of
tokens to itself: it numbers and counts the row's sequences from front to back, and writes the magnitudes from back to front,
since the padding that a row ends with is known from there.
"""

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_noise import launch

__all__ = ["token_magnitude"]

MOST_TOKENS_AT_ONCE = 1024  # of a program; with more, registers spill


@triton.jit(do_not_specialize=["alpha_low", "alpha_high", "embedding_dim", "length"])
def token_magnitude_kernel(
    out,  # [B, L], fp32
    tokens_of_sequence,  # [B, L + 1], int32, zeros
    sequences,  # [B, L], int32, for the kernel's own use
    attention_mask,  # [B, L], int64, or None
    position_ids,  # [B, L], int64, or None
    alpha_low,  # halves of a float64, because Triton takes floats as float32
    alpha_high,
    embedding_dim,
    length,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = row * length
    counts = tokens_of_sequence + row * (length + 1)
    columns = tl.arange(0, TILE)

    runs = tl.full([], 0, tl.int64)  # that have ended
    ones = tl.full([TILE], 0, tl.int32)  # tokens of sequence 1, which is all that most masks know
    for begin in range(0, length, TILE):
        token = begin + columns
        inside = token < length
        if position_ids is None:
            numbers = tl.load(attention_mask + first + token, mask=inside, other=0)
            sequence = tl.minimum(tl.maximum(numbers, 0), length)
            ones += (sequence == 1).to(tl.int32)
            present = sequence > 1
        else:
            here = tl.load(position_ids + first + token, mask=inside, other=0)
            before = tl.load(position_ids + first + token - 1, mask=inside & (token > 0), other=0)
            begins = (inside & (token > 0) & (here != before + 1)).to(tl.int64)
            sequence = runs + tl.cumsum(begins, 0)
            runs += tl.sum(begins, 0)
            present = inside
            if attention_mask is not None:
                present = tl.load(attention_mask + first + token, mask=inside, other=0) != 0
        tl.store(sequences + first + token, sequence.to(tl.int32), mask=inside)
        # No other program has to do with the row, so the additions need no order but that of the barrier.
        tl.atomic_add(counts + sequence, 1, mask=present, sem="relaxed", scope="cta")
    if position_ids is None:
        tl.store(counts + 1, tl.sum(ones, 0))
    tl.debug_barrier()  # all of the row is counted

    alpha_bits = (alpha_high.to(tl.int64) << 32) | (alpha_low.to(tl.int64) & 0xFFFFFFFF)
    alpha = alpha_bits.to(tl.float64, bitcast=True)
    last = tl.full([], -1, tl.int64)  # token that is no padding, once it is found
    tiles = tl.cdiv(length, TILE)
    for tile in range(tiles):
        token = (tiles - 1 - tile) * TILE + columns
        inside = token < length
        sequence = tl.load(sequences + first + token, mask=inside, other=0)
        tokens = tl.load(counts + sequence, mask=inside, other=0)
        if attention_mask is None:
            # Collators that pack pad positions with 0 and give no mask: each padding token looks like a sequence.
            last = tl.maximum(last, tl.max(tl.where(inside & ((tokens > 1) | (length == 1)), token, -1), 0))
            present = token <= last
        elif position_ids is None:
            present = sequence > 0
        else:
            present = tl.load(attention_mask + first + token, mask=inside, other=0) != 0
        elements = tl.maximum(tokens, 1).to(tl.float64) * embedding_dim
        magnitude = (alpha / tl.sqrt(elements)).to(tl.float32)
        tl.store(out + first + token, tl.where(present, magnitude, 0.0), mask=inside)


def token_magnitude(
    attention_mask: Tensor | None,  # [..., L], int64, contiguous
    position_ids: Tensor | None,  # [..., L], int64, contiguous
    alpha: float,
    embedding_dim: int,
) -> Tensor:  # [..., L], fp32
    """The magnitudes of tokens whose sequences `attention_mask` or `position_ids` or both tell apart."""
    given = position_ids if attention_mask is None else attention_mask
    assert given is not None
    *leading, length = given.shape
    out = torch.empty(given.shape, dtype=torch.float32, device=given.device)
    if out.numel() == 0:
        return out
    halves = struct.unpack("<ii", struct.pack("<d", alpha))
    tensors = (
        out,
        torch.zeros((*leading, length + 1), dtype=torch.int32, device=given.device),
        torch.empty(given.shape, dtype=torch.int32, device=given.device),
        attention_mask,
        position_ids,
    )
    tile = min(triton.next_power_of_2(length), MOST_TOKENS_AT_ONCE)
    launch(token_magnitude_kernel, (given.numel() // length, 1, 1), tensors, (*halves, embedding_dim, length), tile)
    return out
