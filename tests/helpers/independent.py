"""The noise contract a second time, in numpy's integers, from the contract's text alone.

It shares no line with the package and no arithmetic with torch, so that a mistake made in one of the two shows.
bfloat16, which numpy lacks, is held as uint16 bit patterns and rounded by integer arithmetic; the other types are
numpy's own.
"""

import numpy as np

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # Philox4x32, Salmon et al., SC'11
WEYL = (0x9E3779B9, 0xBB67AE85)  # the golden ratio and sqrt(3) - 1
ROUNDS = 10
LOW_32 = 0xFFFFFFFF

STORAGE = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


def philox4x32(counter, key):
    """counter: four arrays of uint32 values, key: two of them -> the four words, as arrays of uint64."""
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    k0, k1 = (int(word) for word in key)
    low, half = np.uint64(LOW_32), np.uint64(32)
    for _ in range(ROUNDS):
        p0 = c0 * np.uint64(MULTIPLIERS[0])
        p1 = c2 * np.uint64(MULTIPLIERS[1])
        c0, c1, c2, c3 = (p1 >> half) ^ c1 ^ np.uint64(k0), p1 & low, (p0 >> half) ^ c3 ^ np.uint64(k1), p0 & low
        k0, k1 = (k0 + WEYL[0]) & LOW_32, (k1 + WEYL[1]) & LOW_32
    return c0, c1, c2, c3


def numerators(tokens, embedding_dim, bits, seed, stream):
    """The uniform number of every token and column, as an integer [T, D]; see `scale` for its denominator.

    tokens: absolute token numbers, Python integers below 2**64. bits: 16, 32 or 64, the width of the element type.
    """
    columns_per_block = 8 if bits == 16 else 4
    columns = np.arange(embedding_dim)
    blocks = np.arange(-(-embedding_dim // columns_per_block), dtype=np.uint64)
    token_low = np.array([token & LOW_32 for token in tokens], np.uint64)
    token_high = np.array([token >> 32 for token in tokens], np.uint64)
    key = (seed & LOW_32, (seed >> 32) & LOW_32)
    grid = np.broadcast_arrays(blocks[None, :], token_low[:, None], token_high[:, None], np.uint64(stream))
    words = np.stack(philox4x32(grid, key), axis=-1).astype(np.int64)  # [T, blocks, 4]
    if bits == 16:
        word = words[:, columns // 8, (columns % 8) // 2]
        half_word = np.where(columns % 2 == 0, word & 0xFFFF, word >> 16)
        return 2 * half_word + 1 - 65536
    word = words[:, columns // 4, columns % 4]
    signed = np.where(word >= 1 << 31, word - (1 << 32), word)
    return (signed >> 8) | 1


def scale(bits):
    """What a numerator is multiplied by to give the uniform number in (-1, 1)."""
    return 2.0**-16 if bits == 16 else 2.0**-23


def bfloat16_to_float32(patterns):
    return (patterns.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bfloat16(values):
    """Round to nearest, ties to even: add half a unit in the last place, or just less where that place is even."""
    patterns = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    last_bit = (patterns >> np.uint64(16)) & np.uint64(1)
    rounded = ((patterns + np.uint64(0x7FFF) + last_bit) >> np.uint64(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def add_noise(embeds, dtype_name, magnitude, seed=0, stream=0, first_token=0):
    """embeds [..., D] in STORAGE[dtype_name], magnitude a number or broadcastable to embeds.shape[:-1] -> as embeds."""
    assert embeds.dtype == STORAGE[dtype_name]
    rows = embeds.reshape(-1, embeds.shape[-1])
    bits = 8 * rows.itemsize
    tokens = [first_token + index for index in range(len(rows))]
    numerator = numerators(tokens, rows.shape[1], bits, seed, stream)
    m = np.broadcast_to(np.asarray(magnitude, np.float32), embeds.shape[:-1]).reshape(-1, 1)
    working = np.float64 if dtype_name == "float64" else np.float32
    u = numerator.astype(working) * working(scale(bits))  # exact: 24 bits or fewer
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        wide = bfloat16_to_float32(rows) if dtype_name == "bfloat16" else rows.astype(working)
        product = m.astype(working) * u
        noisy = wide + product
        assert noisy.dtype == product.dtype == working
        narrow = float32_to_bfloat16(noisy) if dtype_name == "bfloat16" else noisy.astype(rows.dtype)
    return np.where(m == 0, rows, narrow).reshape(embeds.shape)


def noisy_embedding(ids, weight_array, dtype_name, magnitude, seed=0, stream=0, first_token=0):
    """ids: integers of any shape, weight_array [V, D] in STORAGE[dtype_name] -> [*ids.shape, D]."""
    return add_noise(weight_array[np.asarray(ids)], dtype_name, magnitude, seed, stream, first_token)
