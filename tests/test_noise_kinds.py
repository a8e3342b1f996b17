"""Contract: sign and gaussian noise have their exact values on every backend, and are what their names say.

The values are those of an implementation in integers and fractions. How far gaussian noise is from the normal distribution
is checked on all of its values.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import special

import neft_kernels
from helpers import independent
from helpers.bits import equal_bits
from helpers.contract import differences, to_storage
from helpers.devices import DTYPES
from neft_kernels.ops import reference
from neft_kernels.ops.registration import OVERLOADS

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FOLDER = Path(__file__).parent / "vectors"
NUMERATORS = json.loads((FOLDER / "contract_vectors.json").read_text())["cases"]
VECTORS = json.loads((FOLDER / "noise_kinds.json").read_text())
CASES = list(zip(NUMERATORS, VECTORS["cases"], strict=True))
KINDS = ("sign", "gaussian")
IDENTITY = ("bits", "seed", "stream", "first_token", "embedding_dim")
MAX_ERROR = 0.004  # of gaussian noise, in standard deviations
WIDTHS = (1, 9, 64, 130, 515)


def values_of(case, kind):
    """What the vectors say, float32 [T, D]."""
    if kind == "sign":
        return np.array([[1.0 if sign == "+" else -1.0 for sign in row] for row in case["sign"]], np.float32)
    return np.array([[int(word, 16) for word in row] for row in case["gaussian"]], np.uint32).view(np.float32)


def name_of(case):
    return f"{case[0]['bits']}-{case[0]['seed']}-{case[0]['stream']}"


def all_uniforms(bits):
    """The positive numerators of 16 or 32 bits, and their uniforms."""
    numerator = np.arange(1, 1 << (16 if bits == 16 else 23), 2)
    return numerator, numerator * independent.scale(bits)


# --- the values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_the_vectors_are_of_the_same_tokens(case):
    numerators, vectors = case
    assert [numerators[key] for key in IDENTITY] == [vectors[key] for key in IDENTITY]
    assert (np.sign(numerators["numerators"]) == values_of(vectors, "sign")).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_the_independent_implementation_gives_the_vectors(case, kind):
    numerators, vectors = case
    noise = independent.noise_of(np.array(numerators["numerators"]), numerators["bits"], kind)
    assert np.array_equal(noise.view(np.uint32), values_of(vectors, kind).view(np.uint32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_kernels_give_the_vectors(kernel, case, kind):
    """On a table of zeros and with magnitude 1, the output is the noise itself, rounded once where the type has 16 bits."""
    device, backend = kernel
    expected, vectors = values_of(case[1], kind), case[1]
    ids = torch.zeros(len(expected), dtype=torch.int64, device=device)
    identity = {name: vectors[name] for name in ("seed", "stream", "first_token")}
    for dtype_name in ("float16", "bfloat16") if vectors["bits"] == 16 else ("float32", "float64"):
        weight = torch.zeros(1, vectors["embedding_dim"], dtype=getattr(torch, dtype_name), device=device)
        out = neft_kernels.noisy_embedding(ids, weight, 1.0, noise=kind, backend=backend, **identity)
        assert not len(differences(out.cpu(), to_storage(expected, dtype_name), dtype_name))


@pytest.mark.parametrize("bits", [16, 32])
def test_fractions_give_the_vectors_of_single_levels(bits):
    """The smallest and largest uniforms, and those where a float's exponent changes."""
    levels = VECTORS["levels"][str(bits)]
    assert len(levels) == 20
    for numerator, word in levels.items():
        exact = independent.gaussian_by_fractions(int(numerator), bits)
        assert np.float32(float(exact)).view(np.uint32) == int(word, 16)


@pytest.mark.parametrize("bits", [16, 32])
def test_fractions_and_floating_point_agree(bits):
    numerator, _ = all_uniforms(bits)
    some = np.random.default_rng(bits).choice(numerator, 1000, replace=False)
    some = np.concatenate((some, -some[:100]))
    exact = [float(independent.gaussian_by_fractions(int(each), bits)) for each in some]
    assert np.array_equal(independent.noise_of(some, bits, "gaussian"), np.array(exact, np.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_equals_the_independent_implementation_on_all_values(dtype):
    bits = 8 * dtype.itemsize
    numerator, u = all_uniforms(bits)
    numerator, u = np.concatenate((-numerator[::-1], numerator)), np.concatenate((-u[::-1], u))
    working = torch.float64 if dtype == torch.float64 else torch.float32
    for kind in KINDS:
        noise = reference.shape_noise(torch.from_numpy(u).to(working), reference.NOISE_KINDS.index(kind))
        assert noise.dtype == working
        assert np.array_equal(noise.numpy(), independent.noise_of(numerator, bits, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_kernels_equal_the_reference(kernel, dtype, width, kind):
    """At widths around a vector and a batch of the widest kernel, with one magnitude and one for each token."""
    device, backend = kernel
    weight = torch.randn(7, width, generator=torch.Generator().manual_seed(width)).to(dtype).to(device)
    ids = torch.tensor([[0, 6, 3], [2, 2, 5]], device=device)
    per_token = torch.tensor([[0.5, 0.0, 1e-3], [0.25, 3.0, 1e-20]], device=device)
    identity = {"seed": -(2**40) - 3, "stream": 2**32 - 1, "first_token": 2**32 - 3, "noise": kind}
    for magnitude in (0.3, per_token):
        expected = neft_kernels.noisy_embedding(ids, weight, magnitude, backend="reference", **identity)
        got = neft_kernels.noisy_embedding(ids, weight, magnitude, backend=backend, **identity)
        assert equal_bits(got, expected)
        assert equal_bits(neft_kernels.add_noise(weight[ids], magnitude, backend=backend, **identity), expected)


def test_uniform_is_the_default(kernel):
    device, backend = kernel
    weight = torch.randn(5, 24, device=device)
    ids = torch.arange(5, device=device)
    noisy = neft_kernels.noisy_embedding(ids, weight, 0.3, seed=3, backend=backend)
    named = neft_kernels.noisy_embedding(ids, weight, 0.3, seed=3, noise="uniform", backend=backend)
    # Graphs that were saved before there were other kinds do not have the argument.
    saved = OVERLOADS["noisy_embedding"][backend](ids, weight, torch.tensor([3], device=device), None, 0.3, 0, 0)
    assert torch.equal(noisy, named)
    assert torch.equal(noisy, saved)
    for kind in KINDS:
        assert not torch.equal(
            noisy, neft_kernels.noisy_embedding(ids, weight, 0.3, seed=3, noise=kind, backend=backend)
        )


# --- what they are ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [16, 32])
def test_gaussian_noise_is_near_the_normal_quantile_everywhere(bits):
    """The exact quantile of each level, of which 1 - u is exact. The root mean square is that of uniform noise."""
    numerator, u = all_uniforms(bits)
    quantile = -special.ndtri((1 - u) / 2)
    noise = independent.noise_of(numerator, bits, "gaussian").astype(np.float64) * np.sqrt(3)
    assert np.abs(noise - quantile).max() < MAX_ERROR
    assert noise.max() == pytest.approx(4.32 if bits == 16 else 5.29, abs=0.005)
    assert np.mean(noise**2) == pytest.approx(1, abs=1e-4)
    assert (np.diff(noise) > 0).all()
    assert noise[0] > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [16, 32])
def test_noise_of_the_opposite_level_is_the_negative(bits, kind):
    """So its mean over all levels is exactly 0. No value is 0 or NaN."""
    numerator, _ = all_uniforms(bits)
    noise = independent.noise_of(numerator, bits, kind)
    assert (noise > 0).all()
    assert np.array_equal(independent.noise_of(-numerator, bits, kind), -noise)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sign_is_that_of_the_uniform_of_the_same_seed(kernel, dtype):
    device, backend = kernel
    zeros = torch.zeros(6, 40, dtype=dtype, device=device)
    uniform, sign, gaussian = (
        neft_kernels.add_noise(zeros, 1.0, seed=8, noise=kind, backend=backend) for kind in reference.NOISE_KINDS
    )
    assert torch.equal(sign, uniform.sign())
    assert torch.equal(sign, gaussian.sign())


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_plain_embedding(kind):
    ids = torch.tensor([[1, 2], [2, 0]])
    upstream = torch.randn(2, 2, 6)
    weight = torch.randn(4, 6, requires_grad=True)
    neft_kernels.noisy_embedding(ids, weight, 0.1, noise=kind, padding_idx=2).backward(upstream)
    expected = torch.zeros(4, 6).index_put((ids.flatten(),), upstream.flatten(0, 1), accumulate=True)
    expected[2] = 0
    assert torch.equal(weight.grad, expected)
    embeds = torch.randn(2, 2, 6, requires_grad=True)
    neft_kernels.add_noise(embeds, 0.1, noise=kind).backward(upstream)
    assert torch.equal(embeds.grad, upstream)


@pytest.mark.cpu_extension
@pytest.mark.parametrize("op", ["noisy_embedding", "add_noise"])
def test_a_kind_that_does_not_exist_is_an_error_of_the_op(op):
    weight, seed = torch.zeros(3, 4), torch.tensor([1])
    arguments = {
        "noisy_embedding": (torch.tensor([0]), weight, seed, None, 0.1, 0, 0, -1, False, False),
        "add_noise": (weight, seed, None, 0.1, 0, 0),
    }
    for kind in (-1, 3):
        with pytest.raises(RuntimeError, match="noise must be in"):
            OVERLOADS[op]["cpu"](*arguments[op], kind)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_equals_eager(kind):
    weight, ids, seed = torch.randn(9, 12), torch.tensor([[1, 8], [0, 3]]), torch.tensor([5])

    @torch.compile(fullgraph=True)
    def compiled(ids, weight, seed):
        return neft_kernels.noisy_embedding(ids, weight, 0.2, seed=seed, noise=kind)

    assert torch.equal(compiled(ids, weight, seed), neft_kernels.noisy_embedding(ids, weight, 0.2, seed=5, noise=kind))
