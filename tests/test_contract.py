"""The noise contract: exact values, and every backend equal, bit for bit, to a second implementation of its text."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import neft_kernels
from helpers import independent
from helpers.contract import (
    FIRST_TOKENS,
    INTEGERS,
    MAGNITUDES,
    SEEDS,
    STREAMS,
    differences,
    magnitude_bits,
    to_storage,
    to_storage_array,
    to_tensor,
)

VECTORS = json.loads((Path(__file__).parent / "vectors" / "contract_vectors.json").read_text())
DTYPES = ("float32", "float64", "float16", "bfloat16")
BACKENDS = ("reference", "cpu")
WIDTHS = (1, 3, 7, 8, 9, 63, 129, 300)


def table(dtype_name, width):
    """A weight [12, width]: ordinary, subnormal, huge and awkward rows, and rows of arbitrary bits."""
    generator = np.random.default_rng(width)
    storage = independent.STORAGE[dtype_name]
    integer = INTEGERS[np.dtype(storage).itemsize]
    bits = 8 * np.dtype(storage).itemsize
    positive = np.array(magnitude_bits(dtype_name), integer)
    awkward = np.concatenate([positive, positive | integer(1 << (bits - 1))])
    finite = awkward[np.r_[0:6, 9:15]]
    ordinary = to_storage(generator.standard_normal((4, width)) * 0.02, dtype_name)
    wide_range = to_storage(
        generator.standard_normal((2, width)) * 2.0 ** generator.integers(-30, 15, width), dtype_name
    )
    by_bits = np.stack(
        [
            np.resize(awkward, width),
            np.resize(np.roll(awkward, 5), width),
            np.resize(finite, width),
            generator.choice(finite, width),
            generator.integers(0, 2**bits, width, integer),
            generator.integers(0, 2**bits, width, integer),
        ]
    )
    return np.concatenate([ordinary, wide_range, by_bits.view(storage)])


def check(backend, dtype_name, weight, ids, magnitude, **noise):
    """Both ops against the independent implementation; magnitude a number or a float32 array."""
    expected = independent.noisy_embedding(ids, weight, dtype_name, magnitude, **noise)
    unchanged = np.broadcast_to(np.asarray(magnitude, np.float32) == 0, ids.shape)[..., None]
    given = torch.from_numpy(magnitude) if isinstance(magnitude, np.ndarray) else magnitude
    weight_tensor, ids_tensor = to_tensor(weight, dtype_name), torch.from_numpy(ids)
    actual = neft_kernels.noisy_embedding(ids_tensor, weight_tensor, given, backend=backend, **noise)
    assert not len(differences(actual, expected, dtype_name, unchanged)), (magnitude, noise)
    embeds = to_tensor(weight[ids], dtype_name)
    actual = neft_kernels.add_noise(embeds, given, backend=backend, **noise)
    assert not len(differences(actual, expected, dtype_name, unchanged)), (magnitude, noise)


def some_ids(rows, shape=(2, 9)):
    """Every row at least once, and some again."""
    count = int(np.prod(shape))
    return np.random.default_rng(count).permutation(np.resize(np.arange(rows), count)).reshape(shape)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_the_independent_philox_gives_the_known_answers(counter, key, words):
    """Random123: tests/kat_vectors, philox4x32 with 10 rounds."""
    assert tuple(int(word) for word in independent.philox4x32(counter, key)) == words


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: f"{case['bits']}-{case['seed']}-{case['stream']}")
def test_the_independent_implementation_gives_the_contract_vectors(case):
    expected = case["numerators"]
    tokens = [case["first_token"] + index for index in range(len(expected))]
    actual = independent.numerators(tokens, case["embedding_dim"], case["bits"], case["seed"], case["stream"])
    assert actual.tolist() == expected


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: f"{case['bits']}-{case['seed']}-{case['stream']}")
def test_backends_give_the_contract_vectors(backend, case):
    """On a table of zeros and with magnitude 1, the output is u itself, rounded once where the type has 16 bits."""
    expected = np.array(case["numerators"]) * independent.scale(case["bits"])
    ids = torch.zeros(len(expected), dtype=torch.int64)
    noise = {name: case[name] for name in ("seed", "stream", "first_token")}
    for dtype_name in ("float16", "bfloat16") if case["bits"] == 16 else ("float32", "float64"):
        dtype = getattr(torch, dtype_name)
        weight = torch.zeros(1, case["embedding_dim"], dtype=dtype)
        actual = neft_kernels.noisy_embedding(ids, weight, 1.0, backend=backend, **noise)
        assert not len(differences(actual, to_storage(expected, dtype_name), dtype_name))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype_name", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
class TestBackendsAgreeWithTheIndependentImplementation:
    def test_for_every_magnitude(self, backend, dtype_name, width):
        """0, subnormal, usual, so large that float16 overflows, and so large that float32 does."""
        weight = table(dtype_name, width)
        for magnitude in MAGNITUDES:
            check(backend, dtype_name, weight, some_ids(len(weight)), magnitude, seed=7, stream=3, first_token=5)

    def test_for_a_magnitude_per_token(self, backend, dtype_name, width):
        """A tensor of one number per token, per sequence, per position, and one for all."""
        weight = table(dtype_name, width)
        ids = some_ids(len(weight))
        per_token = np.resize(np.array(MAGNITUDES, np.float32), ids.shape)
        per_token[0, 4] = -0.0
        one = np.array(0.1, np.float32)
        for magnitude in (per_token, per_token[:, :1].copy(), per_token[0].copy(), per_token[:, 4:5].copy(), one):
            check(backend, dtype_name, weight, ids, magnitude, seed=-7)

    def test_for_every_seed_stream_and_first_token(self, backend, dtype_name, width):
        """Negative seeds, both ends of int64, streams up to 2**32 - 1, tokens whose upper word changes on the way."""
        weight = table(dtype_name, width)
        ids = some_ids(len(weight))
        for seed in SEEDS:
            check(backend, dtype_name, weight, ids, 0.05, seed=seed)
        for stream in STREAMS:
            check(backend, dtype_name, weight, ids, 0.05, seed=3, stream=stream)
        for first_token in FIRST_TOKENS:
            check(backend, dtype_name, weight, ids, 0.05, seed=3, stream=2**32 - 1, first_token=first_token)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype_name", DTYPES)
def test_a_seed_tensor_means_what_its_number_means(backend, dtype_name):
    weight, ids = to_tensor(table(dtype_name, 9), dtype_name), torch.tensor([[3, 1], [0, 2]])
    for seed in SEEDS:
        by_number = neft_kernels.noisy_embedding(ids, weight, 0.3, seed=seed, backend=backend)
        by_tensor = neft_kernels.noisy_embedding(ids, weight, 0.3, seed=torch.tensor([seed]), backend=backend)
        assert not len(differences(by_tensor, to_storage_array(by_number, dtype_name), dtype_name))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sum_overflows_float16_to_infinity(backend):
    """The largest finite numbers plus noise of up to 100: rounds to infinity from 65520 on, and not before."""
    weight = to_storage(np.array([[65504.0, -65504.0] * 8]), "float16")
    ids = np.zeros(64, np.int64)
    expected = independent.noisy_embedding(ids, weight, "float16", 100.0, seed=11)
    assert np.isinf(expected).any()
    assert np.isfinite(expected).any()
    check(backend, "float16", weight, ids, 100.0, seed=11)


@pytest.mark.parametrize("dtype_name", DTYPES)
def test_the_comparison_can_fail(dtype_name):
    """One bit, a zero of the other sign, a NaN for a number, and another NaN where nothing may change."""
    weight = table(dtype_name, 9)
    integer = INTEGERS[weight.itemsize]
    tensor = to_tensor(weight, dtype_name)
    assert not len(differences(tensor, weight, dtype_name, unchanged=True))
    nan, other_nan = (integer(magnitude_bits(dtype_name)[index]) for index in (7, 8))
    sign = integer(1 << (8 * weight.itemsize - 1))
    for row, column, bits in ((0, 0, weight.view(integer)[0, 0] ^ integer(1)), (6, 0, sign), (6, 1, nan)):
        changed = weight.copy()
        changed.view(integer)[row, column] = bits
        assert differences(tensor, changed, dtype_name).tolist() == [[row, column]]
    changed = weight.copy()
    assert changed.view(integer)[6, 7] == nan
    changed.view(integer)[6, 7] = other_nan
    assert not len(differences(tensor, changed, dtype_name))
    assert differences(tensor, changed, dtype_name, unchanged=True).tolist() == [[6, 7]]
