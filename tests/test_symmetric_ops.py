"""Contract: with symmetric=True the second half of the tokens gets the noise of the first half with the other sign.

To the bit, on every backend, whatever the ids and the magnitudes of the halves are.
"""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import independent
from helpers.bits import equal_bits
from helpers.contract import INTEGERS, differences, to_storage_array, to_tensor
from helpers.devices import CPU_BACKENDS, DTYPES
from helpers.symmetric_ops import IDENTITY, IDS, KINDS, OTHER_IDS, OTHER_PER_TOKEN, PER_TOKEN, WIDTHS, table
from neft_kernels import add_noise, noisy_embedding
from neft_kernels.ops.registration import OVERLOADS

pytestmark = pytest.mark.usefixtures("poisoned_memory")

CASES = json.loads((Path(__file__).parent / "vectors" / "symmetric.json").read_text())["cases"]


def name_of(case):
    return f"{case['dtype']}-{case['noise']}"


def array_of(words, dtype_name):
    storage = np.dtype(independent.STORAGE[dtype_name])
    return np.array([[int(word, 16) for word in row] for row in words], INTEGERS[storage.itemsize]).view(storage)


def arguments_of(case):
    """ids, weight and magnitude as arrays, and the rest by name."""
    magnitude = array_of([case["magnitude"]], "float32")[0]
    identity = {name: case[name] for name in ("seed", "stream", "first_token", "noise")}
    return np.array(case["ids"]), array_of(case["weight"], case["dtype"]), magnitude, identity


# --- the values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_fractions_give_the_vectors(case):
    """Without a floating-point unit: token t of the second half has the numerators of token t - T / 2."""
    name, half = case["dtype"], len(case["ids"]) // 2
    ids, weight, magnitude, identity = arguments_of(case)
    out, bits = array_of(case["out"], name), 8 * weight.itemsize
    tokens = [case["first_token"] + token for token in range(half)]
    numerators = independent.numerators(tokens, weight.shape[1], bits, case["seed"], case["stream"])

    def exact(array):
        values = independent.bfloat16_to_float32(array) if name == "bfloat16" else array
        return [[Fraction(float(value)) for value in row] for row in values]

    def noise_of(numerator):
        if case["noise"] == "gaussian":
            return independent.gaussian_by_fractions(numerator, bits)
        if case["noise"] == "sign":
            return Fraction(1 if numerator > 0 else -1)
        return Fraction(numerator, 2**16 if bits == 16 else 2**23)

    rows, results = exact(weight), exact(out)
    for token, (row, m) in enumerate(zip(ids, magnitude, strict=True)):
        if m == 0:
            assert (out[token] == weight[row]).all()
            continue
        for column, numerator in enumerate(numerators[token % half].tolist()):
            noise = noise_of(numerator)
            expected = independent.sum_by_fractions(rows[row][column], Fraction(float(m)), noise, name, token >= half)
            assert results[token][column] == expected
    assert identity["noise"] == case["noise"]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_the_independent_implementation_gives_the_vectors(case):
    ids, weight, magnitude, identity = arguments_of(case)
    out = independent.noisy_embedding(ids, weight, case["dtype"], magnitude, symmetric=True, **identity)
    integers = INTEGERS[out.itemsize]
    assert np.array_equal(out.view(integers), array_of(case["out"], case["dtype"]).view(integers))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_kernels_give_the_vectors(kernel, case):
    device, backend = kernel
    ids, weight, magnitude, identity = arguments_of(case)
    tensors = (torch.from_numpy(ids), to_tensor(weight, case["dtype"]), torch.from_numpy(magnitude))
    tensors = (each.to(device) for each in tensors)
    out = noisy_embedding(*tensors, symmetric=True, backend=backend, **identity)
    unchanged = magnitude[:, None] == 0
    assert not len(differences(out.cpu(), array_of(case["out"], case["dtype"]), case["dtype"], unchanged))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_kernels_equal_the_independent_implementation(kernel, dtype, width, kind):
    """With one magnitude and one for each token; token numbers whose upper word changes on the way."""
    device, backend = kernel
    name, weight, ids = str(dtype).removeprefix("torch."), table(width, dtype), torch.cat((IDS, OTHER_IDS))
    for magnitude in (0.3, torch.cat((PER_TOKEN, OTHER_PER_TOKEN))):
        given = {**IDENTITY, "noise": kind, "symmetric": True}
        numbers = magnitude.numpy() if isinstance(magnitude, torch.Tensor) else magnitude
        expected = independent.noisy_embedding(ids.numpy(), to_storage_array(weight, name), name, numbers, **given)
        unchanged = np.broadcast_to(np.asarray(numbers) == 0, ids.shape)[..., None]
        magnitude = magnitude.to(device) if isinstance(magnitude, torch.Tensor) else magnitude
        on_device, rows = ids.to(device), weight.to(device)
        for out in (
            noisy_embedding(on_device, rows, magnitude, backend=backend, **given),
            add_noise(rows[on_device], magnitude, backend=backend, **given),
        ):
            assert not len(differences(out.cpu(), expected, name, unchanged))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(kernel, dtype):
    """Ids, magnitudes, tables and embeddings whose elements do not lie side by side."""
    device, backend = kernel
    ids, per_token = torch.cat((IDS, OTHER_IDS)).to(device), torch.cat((PER_TOKEN, OTHER_PER_TOKEN)).to(device)
    given = {**IDENTITY, "symmetric": True, "backend": backend}
    weight = table(72, dtype, device)
    expected = noisy_embedding(ids, weight, per_token, **IDENTITY, symmetric=True, backend="reference")
    apart = torch.cat((weight, weight), dim=1)[:, :72]
    odd = torch.cat((weight, weight[:, :1]), dim=1)[:, :72]
    assert equal_bits(noisy_embedding(ids.int(), weight, per_token, **given), expected)
    for rows in (apart, odd, weight.T.contiguous().T, weight.repeat_interleave(3, dim=1)[:, ::3]):
        assert equal_bits(noisy_embedding(ids, rows, per_token, **given), expected)
        assert equal_bits(add_noise(rows[ids], per_token, **given), expected)
    assert equal_bits(noisy_embedding(ids.T.contiguous().T, weight, per_token.T.contiguous().T, **given), expected)
    embeds = weight[ids]
    assert equal_bits(add_noise(embeds.transpose(0, 1).contiguous().transpose(0, 1), per_token, **given), expected)
    column = torch.tensor([[0.5], [0.0], [0.25], [1.0]], device=device)  # one magnitude for each sequence
    expected = noisy_embedding(ids, weight, column, **IDENTITY, symmetric=True, backend="reference")
    assert equal_bits(noisy_embedding(ids, weight, column, **given), expected)


@pytest.mark.parametrize("shape", [(2,), (6,), (1, 4), (2, 3), (3, 2), (4, 1, 3), (2, 0), (0,), (0, 3)])
def test_halves_are_those_of_the_flattened_tokens(kernel, shape):
    """Of any shape, empty ones among them. The first half is what it is without the option."""
    device, backend = kernel
    weight, ids = table(40, torch.float32, device), torch.randint(7, shape, device=device)
    out = noisy_embedding(ids, weight, 0.3, seed=5, symmetric=True, backend=backend)
    assert out.shape == (*shape, 40)
    half = ids.numel() // 2
    flat, rows = out.reshape(-1, 40), weight[ids.flatten()]
    assert equal_bits(flat[:half], noisy_embedding(ids.flatten()[:half], weight, 0.3, seed=5, backend=backend))
    zeros = torch.zeros(half, 40, device=device)
    negative = -add_noise(zeros, 0.3, seed=5, backend=backend)
    assert equal_bits(flat[half:], rows[half:] + negative)


def test_a_table_without_columns(kernel):
    device, backend = kernel
    weight, ids = torch.empty(7, 0, device=device), IDS.to(device)
    assert noisy_embedding(ids, weight, 0.3, symmetric=True, backend=backend).shape == (2, 3, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_noise_of_a_pair_adds_up_to_zero(kernel, dtype, kind):
    device, backend = kernel
    zeros = torch.zeros(8, 77, dtype=dtype, device=device)
    first, second = add_noise(zeros, 0.1, noise=kind, symmetric=True, backend=backend).chunk(2)
    assert torch.equal(second, -first)
    assert (first != 0).all()


@pytest.mark.parametrize("width", [40, 5003])
def test_any_number_of_threads_gives_the_same_bits(width):
    before = torch.get_num_threads()
    weight, ids = torch.randn(50, width), torch.randint(50, (2, 300))
    per_token = torch.rand(2, 300) * (torch.rand(2, 300) > 0.2)
    expected = noisy_embedding(ids, weight, per_token, seed=4, symmetric=True, backend="reference")
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            assert equal_bits(noisy_embedding(ids, weight, per_token, seed=4, symmetric=True), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_not_numbers_pass_through(kernel, dtype):
    """A token's magnitude of 0 keeps the bits of its row, and the other token of the pair gets its noise."""
    device, backend = kernel
    weight = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1.0]).to(dtype).repeat(4)[None].to(device)
    ids, per_token = torch.zeros(4, dtype=torch.int64, device=device), torch.tensor([0.0, 1.0, 1.0, 0.0]).to(device)
    out = noisy_embedding(ids, weight, per_token, seed=3, symmetric=True, backend=backend)
    expected = noisy_embedding(ids, weight, per_token, seed=3, symmetric=True, backend="reference")
    assert equal_bits(out, expected)
    assert torch.equal(out[0].view(torch.uint8), weight[0].view(torch.uint8))
    assert torch.equal(out[3].view(torch.uint8), weight[0].view(torch.uint8))
    assert (out[1:3, 4::5] != 1).all()


# --- what is refused ---------------------------------------------------------------------------------------------------


def test_an_odd_number_of_tokens_is_an_error_that_draws_nothing():
    weight, state = torch.randn(7, 5), torch.get_rng_state()
    with pytest.raises(
        ValueError, match=r"symmetric=True .*input_ids has 9 tokens.* torch.cat\(\(input_ids, input_ids\)\)"
    ):
        noisy_embedding(torch.zeros(3, 3, dtype=torch.int64), weight, 0.1, symmetric=True)
    with pytest.raises(ValueError, match=r"symmetric=True .*embeds has 1 tokens.* torch.cat\(\(embeds, embeds\)\)"):
        add_noise(weight[0], 0.1, symmetric=True)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("wrong", [None, 0, 1, "yes", np.bool_(True), torch.tensor(True)], ids=repr)
def test_only_a_boolean_says_whether_it_is_symmetric(wrong):
    weight = torch.randn(7, 5)
    for call in (
        lambda: noisy_embedding(IDS, weight, 0.1, symmetric=wrong),
        lambda: add_noise(weight[IDS], 0.1, symmetric=wrong),
    ):
        with pytest.raises(TypeError, match="symmetric must be a bool, not "):
            call()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_the_op_refuses_an_odd_number_too(backend):
    """A graph that was saved for any number of tokens calls it without the check of the function."""
    seed, weight = torch.tensor([3]), torch.randn(7, 5)
    with pytest.raises((ValueError, RuntimeError), match="even number of tokens"):
        OVERLOADS["noisy_embedding"][backend](torch.arange(3), weight, seed, None, 0.1, 0, 0, -1, False, False, 0, True)
    with pytest.raises((ValueError, RuntimeError), match="even number of tokens"):
        OVERLOADS["add_noise"][backend](weight, seed, None, 0.1, 0, 0, 0, True)


@pytest.mark.parametrize("bad", [-1.0, torch.nan, torch.inf])
@pytest.mark.parametrize("position", [0, 3])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_bad_magnitude_in_either_half_is_an_error(backend, position, bad):
    per_token = torch.tensor([0.1, 0.2, 0.3, 0.4])
    per_token[position] = bad
    with pytest.raises(ValueError, match="magnitude must be finite and >= 0"):
        noisy_embedding(torch.arange(4), torch.randn(7, 5), per_token, symmetric=True, backend=backend)
