"""The noise contract a second time, in numpy's integers, from the contract's text alone.

It shares no line with the package and no arithmetic with torch, so that a mistake made in one of the two shows.
bfloat16, which numpy lacks, is held as uint16 bit patterns and rounded by integer arithmetic; the other types are
numpy's own.
"""

from fractions import Fraction

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


# --- the kinds of noise ----------------------------------------------------------------------------------------------

GAUSSIAN = ("13.442853", "2.2166462", "1.579746", "0.51102036", "0.78377885", "0.0049715075")  # A to F
WORD_OF_ONE = 0x3FFF0000


def noise_of(numerator, bits, noise):
    """The noise of each numerator, float32."""
    u = numerator.astype(np.float32) * np.float32(scale(bits))  # exact: 24 bits or fewer
    if noise == "uniform":
        return u
    if noise == "sign":
        return np.sign(u)
    assert noise == "gaussian"
    a, b, c, d, e, f = (np.float32(constant) for constant in GAUSSIAN)
    one = np.float32(1)
    q = (one - u) * (one + u)
    r = q * q
    s = r * r
    x = (np.uint32(WORD_OF_ONE) - (s.view(np.uint32) >> np.uint32(7))).view(np.float32)
    from_c, from_e = x - c, x - e
    values = ((a * u) * (b - x)) * ((from_c * from_c + d) * (from_e * from_e + f))
    assert values.dtype == np.float32
    return values


SIGNIFICANT_BITS = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}


def nearest(value, bits):
    """The number of so many significant bits that is nearest to a fraction; ties to even. The exponent has no limits."""
    if value == 0:
        return value
    unit = Fraction(1)  # of the last bit
    while abs(value) >= unit * 2**bits:
        unit *= 2
    while abs(value) < unit * 2 ** (bits - 1):
        unit /= 2
    return round(value / unit) * unit  # Python rounds a fraction to the nearest integer, ties to even


def nearest_float32(value):
    """The float32 nearest to a fraction, as a fraction; ties to even. For what is zero or neither tiny nor huge."""
    return nearest(value, SIGNIFICANT_BITS["float32"])


def word_of(value):
    """The 32 bits of a float32 that is given as a positive fraction."""
    exponent = 0
    while value >= 2:
        value, exponent = value / 2, exponent + 1
    while value < 1:
        value, exponent = value * 2, exponent - 1
    fraction = (value - 1) * 2**23
    assert fraction.denominator == 1
    return (exponent + 127) << 23 | fraction.numerator


def fraction_of(word):
    """The positive float32 of these 32 bits, as a fraction."""
    return (1 + Fraction(word % 2**23, 2**23)) * Fraction(2) ** ((word >> 23) - 127)


def gaussian_by_fractions(numerator, bits):
    """Gaussian noise once more, in integers and fractions, without a floating-point unit; the result as a fraction."""
    a, b, c, d, e, f = (nearest_float32(Fraction(constant)) for constant in GAUSSIAN)
    n = nearest_float32
    u = Fraction(numerator, 2**bits if bits == 16 else 2**23)
    q = n(n(1 - u) * n(1 + u))
    r = n(q * q)
    s = n(r * r)
    x = fraction_of(WORD_OF_ONE - (word_of(s) >> 7))
    from_c, from_e = n(x - c), n(x - e)
    return n(n(n(a * u) * n(b - x)) * n(n(n(from_c * from_c) + d) * n(n(from_e * from_e) + f)))


# --- the sum ---------------------------------------------------------------------------------------------------------


def sum_by_fractions(row, magnitude, noise, dtype_name, negated):
    """The sum of one column in fractions. For results that are zero or neither tiny nor huge."""
    working = SIGNIFICANT_BITS["float64" if dtype_name == "float64" else "float32"]
    product = nearest(magnitude * noise, working)
    return nearest(nearest(row + (-product if negated else product), working), SIGNIFICANT_BITS[dtype_name])


def bfloat16_to_float32(patterns):
    return (patterns.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bfloat16(values):
    """Round to nearest, ties to even: add half a unit in the last place, or just less where that place is even."""
    patterns = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    last_bit = (patterns >> np.uint64(16)) & np.uint64(1)
    rounded = ((patterns + np.uint64(0x7FFF) + last_bit) >> np.uint64(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def add_noise(embeds, dtype_name, magnitude, seed=0, stream=0, first_token=0, noise="uniform", symmetric=False):
    """embeds [..., D] in STORAGE[dtype_name], magnitude a number or broadcastable to embeds.shape[:-1] -> as embeds."""
    assert embeds.dtype == STORAGE[dtype_name]
    rows = embeds.reshape(-1, embeds.shape[-1])
    bits = 8 * rows.itemsize
    tokens = [first_token + index for index in range(len(rows))]
    if symmetric:
        half, odd = divmod(len(rows), 2)
        assert not odd
        tokens = tokens[:half] * 2
    numerator = numerators(tokens, rows.shape[1], bits, seed, stream)
    m = np.broadcast_to(np.asarray(magnitude, np.float32), embeds.shape[:-1]).reshape(-1, 1)
    working = np.float64 if dtype_name == "float64" else np.float32
    n = noise_of(numerator, bits, noise).astype(working)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        wide = bfloat16_to_float32(rows) if dtype_name == "bfloat16" else rows.astype(working)
        product = m.astype(working) * n
        if symmetric:
            product[half:] = -product[half:]
        noisy = wide + product
        assert noisy.dtype == product.dtype == working
        narrow = float32_to_bfloat16(noisy) if dtype_name == "bfloat16" else noisy.astype(rows.dtype)
    return np.where(m == 0, rows, narrow).reshape(embeds.shape)


def noisy_embedding(ids, weight_array, dtype_name, magnitude, **noise):
    """ids: integers of any shape, weight_array [V, D] in STORAGE[dtype_name] -> [*ids.shape, D]."""
    return add_noise(weight_array[np.asarray(ids)], dtype_name, magnitude, **noise)
