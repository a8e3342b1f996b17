"""The noise contract, version 1, in prose and then in plain torch.

Every backend returns exactly what this file returns, to the last bit; this file is written to be read, not to be fast.

The noise is a pure function of (seed, stream, token, column) and of the width of the element type. It does not depend
on the block size, the grid, the number of threads, the vector width, the layout of the batch, the device or the
backend.

1.  Generator. Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11): a
    bijection of a 128-bit counter under a 64-bit key, ten rounds, giving four 32-bit words.
2.  Key. The low and the high 32 bits of ``seed``, a 64-bit integer.
3.  Counter. ``(block, low 32 bits of token, high 32 bits of token, stream)``. ``token`` is ``first_token`` plus the
    flattened index into ``input_ids``; ``stream`` tells apart replicas that share a seed. A block is 4 columns of a
    32- or 64-bit element type and 8 columns of a 16-bit one, and every row starts on a fresh block.
4.  Word to uniform. Exact in float32, symmetric about zero, open at both ends and never zero:

    * fp32, fp64: word ``column % 4``; ``u = ((int32(word) >> 8) | 1) * 2**-23``
    * fp16, bf16: half of word ``(column % 8) // 2``, the low half for even columns; with ``h`` in [0, 65535],
      ``u = (2*h + 1 - 65536) * 2**-16``
5.  Uniform to noise ``n``, by the kind of noise:

    * uniform: ``n = u``.
    * sign: ``n = 1`` where ``u > 0``, else ``n = -1``.
    * gaussian: about the normal quantile of ``(1 + u) / 2``, divided by sqrt(3) so that the root mean square is that of
      ``u``. In float32; each product, sum and difference is rounded to nearest even by itself:

      - ``q = (1 - u) * (1 + u)``, where both factors are exact; ``r = q * q``; ``s = r * r``.
      - ``x = float(0x3FFF0000 - (bits(s) >> 7))``, where ``bits`` takes the 32 bits of a float32 as an integer, and ``float``
        is its inverse. So ``x`` is about ``1 - log2(q) / 32``.
      - ``n = ((A * u) * (B - x)) * (((x - C)**2 + D) * ((x - E)**2 + F))``, where A to F are the float32 numbers nearest to
        ``GAUSSIAN_FACTORS``, in this order.
6.  Sum. ``out = round_dtype(round_f32(w + round_f32(m * n)))``, ``m`` the token's magnitude rounded to fp32: two
    separate float32 roundings and no fused multiply-add, round to nearest even, NaN and infinity pass through. fp64
    does the same in float64. Where ``m == 0`` the row is returned unchanged, bit for bit.
7.  Symmetric noise, an option. The ``T`` flattened tokens are two equal halves. The token with index ``t >= T / 2`` gets the
    noise of the token with index ``t - T / 2`` with the other sign: its ``token`` in 3 is ``first_token + t - T / 2``, and its
    sum in 6 is ``out = round_dtype(round_f32(w + round_f32(-(m * n))))``. Its row ``w`` and its magnitude ``m`` are its own.
    The first half is as without the option.
"""

from typing import TypeVar

import torch
from torch import Tensor

__all__ = [
    "GAUSSIAN",
    "NOISE_KINDS",
    "SIGN",
    "UNIFORM",
    "add_noise",
    "noisy_embedding",
    "philox4x32",
    "shape_noise",
    "uniform",
]

NOISE_KINDS = ("uniform", "sign", "gaussian")  # the kinds of noise; the ops take the index
UNIFORM, SIGN, GAUSSIAN = range(3)
GAUSSIAN_FACTORS = (
    13.442853,
    2.2166462,
    1.579746,
    0.51102036,
    0.78377885,
    0.0049715075,
)  # A to F; experiments/randomness/gaussian.py fits them

PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # Salmon et al. 2011, table 2
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1, the per-round key increments

Word = TypeVar("Word", Tensor, int)

_WORD_MASK = 0xFFFFFFFF
_MAX_BLOCKS_AT_ONCE = 1 << 20  # bounds the int64 temporaries to about 100 MB


def philox4x32(counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]) -> tuple[Word, Word, Word, Word]:
    """Philox4x32-10: four counter words and two key words in, four random words out.

    Words are ints in [0, 2**32), or int64 tensors of such values, of any mutually broadcastable shapes.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        # The 64-bit products wrap around in int64; their bits are those of the unsigned product.
        product0 = c0 * PHILOX_MULTIPLIERS[0]
        product1 = c2 * PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> 32) & _WORD_MASK ^ c1 ^ k0,
            product1 & _WORD_MASK,
            (product0 >> 32) & _WORD_MASK ^ c3 ^ k1,
            product0 & _WORD_MASK,
        )
        k0 = (k0 + PHILOX_WEYL[0]) & _WORD_MASK
        k1 = (k1 + PHILOX_WEYL[1]) & _WORD_MASK
    return c0, c1, c2, c3


def uniform(tokens: Tensor, embedding_dim: int, dtype: torch.dtype, seed: Tensor, stream: int = 0) -> Tensor:
    """Uniform numbers in (-1, 1) for the given token numbers.

    Args:
        tokens: int64, ``[T]``, the absolute token numbers (``first_token`` already added).
        embedding_dim: the number of columns ``D``.
        dtype: the element type of the embedding; it decides between 23- and 16-bit uniforms.
        seed: int64, one element, on the device of ``tokens``.
        stream: 0 <= stream < 2**32.

    Returns:
        ``[T, D]``, float64 for fp64 and float32 otherwise; every value is exact in float32.
    """
    half_precision = dtype.itemsize == 2
    columns_per_block = 8 if half_precision else 4
    num_blocks = -(-embedding_dim // columns_per_block)

    seed = seed.reshape(())
    key = (seed & _WORD_MASK, (seed >> 32) & _WORD_MASK)
    block = torch.arange(num_blocks, device=tokens.device).expand(tokens.numel(), num_blocks)
    token = tokens[:, None]
    counter = (block, token & _WORD_MASK, (token >> 32) & _WORD_MASK, torch.full_like(block, stream))
    words = torch.stack(philox4x32(counter, key), dim=-1)  # [T, blocks, 4]

    if half_precision:
        halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1)  # [T, blocks, 4, 2], low half first
        numerator, scale = 2 * halves + 1 - 65536, 2.0**-16
    else:
        signed = words.to(torch.int32)  # keeps the 32 bits
        numerator, scale = (signed >> 8) | 1, 2.0**-23
    u = numerator.to(_compute_dtype(dtype)) * scale
    return u.reshape(tokens.numel(), -1)[:, :embedding_dim]


def shape_noise(u: Tensor, kind: int) -> Tensor:
    """The noise that `kind` makes of uniforms, in their type."""
    if kind == UNIFORM:
        return u
    if kind == SIGN:
        return torch.where(u > 0, 1.0, -1.0).to(u.dtype)
    single = u.to(torch.float32)  # exact
    x = _octaves(single)
    a, b, c, d, e, f = torch.tensor(GAUSSIAN_FACTORS, dtype=torch.float32, device=u.device)
    n = ((a * single) * (b - x)) * (((x - c) * (x - c) + d) * ((x - e) * (x - e) + f))
    return n.to(u.dtype)


def _octaves(u: Tensor) -> Tensor:
    """About ``1 - log2(1 - u**2) / 32``: exponent and fraction of a float, as one integer, are a rough logarithm."""
    q = (1 - u) * (1 + u)
    r = q * q
    s = r * r
    return (0x3FFF0000 - (s.view(torch.int32) >> 7)).view(torch.float32)


def noisy_embedding(
    input_ids: Tensor,  # [...], int32 or int64
    weight: Tensor,  # [V, D]
    seed: Tensor,  # [1], int64
    token_magnitude: Tensor | None,  # [...], fp32; None: every token gets `magnitude`
    magnitude: float,
    stream: int,
    first_token: int,
    kind: int = UNIFORM,  # the index in NOISE_KINDS
    symmetric: bool = False,
) -> Tensor:  # [..., D]
    """``weight[input_ids] + magnitude * noise``; ids are taken to be in range."""
    embeds = weight.index_select(0, input_ids.reshape(-1)).reshape(*input_ids.shape, weight.shape[1])
    return add_noise(embeds, seed, token_magnitude, magnitude, stream, first_token, kind, symmetric)


def add_noise(
    embeds: Tensor,  # [..., D]
    seed: Tensor,  # [1], int64
    token_magnitude: Tensor | None,  # [...], fp32; None: every token gets `magnitude`
    magnitude: float,
    stream: int,
    first_token: int,
    kind: int = UNIFORM,  # the index in NOISE_KINDS
    symmetric: bool = False,
) -> Tensor:  # [..., D]
    """``embeds + magnitude * noise``."""
    *leading, embedding_dim = embeds.shape
    out = torch.empty(embeds.shape, dtype=embeds.dtype, device=embeds.device)
    num_tokens = out[..., 0].numel() if embedding_dim else 0
    if num_tokens == 0:
        return out

    rows, out_rows = embeds.reshape(num_tokens, embedding_dim), out.view(num_tokens, embedding_dim)
    if token_magnitude is None:
        token_magnitude = torch.full((), magnitude, dtype=torch.float32, device=embeds.device)
    magnitudes = token_magnitude.expand(leading).reshape(num_tokens, 1)

    first_negated = num_tokens // 2 if symmetric else num_tokens
    tokens_at_once = max(1, _MAX_BLOCKS_AT_ONCE * 4 // embedding_dim)
    for start in range(0, num_tokens, tokens_at_once):
        part = slice(start, min(start + tokens_at_once, num_tokens))
        index = torch.arange(part.start, part.stop, device=embeds.device)
        negated = index >= first_negated
        tokens = first_token + torch.where(negated, index - first_negated, index)
        n = shape_noise(uniform(tokens, embedding_dim, embeds.dtype, seed, stream), kind)
        out_rows[part] = _add(rows[part], magnitudes[part], torch.where(negated[:, None], -n, n))
    return out


def _add(w: Tensor, m: Tensor, n: Tensor) -> Tensor:
    noisy = w.to(n.dtype) + m.to(n.dtype) * n
    return torch.where(m == 0, w, noisy.to(w.dtype))


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
