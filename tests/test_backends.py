"""Contract: every backend returns what neft_kernels.ops.reference returns, bit for bit.

On every dtype, width, shape, stride, seed, stream, offset and magnitude; every element is written.
"""

import itertools

import pytest
import torch

from helpers.bits import equal_bits
from helpers.devices import CPU_BACKENDS, DTYPES, HAS_GPU
from neft_kernels import add_noise, available_backends, noisy_embedding
from neft_kernels.ops.backends import extensions

pytestmark = pytest.mark.usefixtures("poisoned_memory")

WIDTHS = (1, 3, 4, 8, 9, 31, 64, 127, 130, 513)  # around a Philox block, a vector and a batch of the widest kernel
IDENTITIES = (
    {"seed": 0},
    {"seed": -1, "stream": 2**32 - 1, "first_token": 2**32 - 3},  # the low word of the token number overflows
    {"seed": 2**62 + 13, "stream": 7, "first_token": 2**61},
    {"seed": -(2**63)},
)


def table(num_embeddings, embedding_dim, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(embedding_dim)
    weight = torch.randn(num_embeddings, embedding_dim, generator=generator, dtype=torch.float64)
    return weight.to(dtype).to(device)


def ids_like(shape, num_embeddings, dtype=torch.int64, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(num_embeddings, shape, generator=generator).to(dtype).to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("embedding_dim", WIDTHS)
def test_equals_the_reference(kernel, dtype, embedding_dim):
    device, backend = kernel
    weight = table(20, embedding_dim, dtype, device)
    ids = ids_like((2, 3), 20, device=device)
    per_token = torch.tensor([[0.5, 0.0, 1e-3], [0.25, 3.0, 1e-20]], device=device)
    cases = [*itertools.product(IDENTITIES, (0.3, per_token))]
    cases += [(IDENTITIES[1], magnitude) for magnitude in (0.0, per_token[:, :1], per_token[0])]
    if backend == "triton":  # each identity is compiled for itself, so they take turns
        turn = WIDTHS.index(embedding_dim) + DTYPES.index(dtype)
        cases = [(IDENTITIES[turn % 4], magnitude) for _, magnitude in cases[-5:]]
    for identity, magnitude in cases:
        expected = noisy_embedding(ids, weight, magnitude, backend="reference", **identity)
        got = noisy_embedding(ids, weight, magnitude, backend=backend, **identity)
        assert equal_bits(got, expected), (identity, magnitude)
        assert equal_bits(add_noise(weight[ids], magnitude, backend=backend, **identity), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wide_rows(kernel, dtype):
    device, backend = kernel
    weight = table(5, 5003, dtype, device)
    ids = ids_like((3,), 5, device=device)
    expected = noisy_embedding(ids, weight, 0.1, seed=3, backend="reference")
    assert equal_bits(noisy_embedding(ids, weight, 0.1, seed=3, backend=backend), expected)


@pytest.mark.parametrize("shape", [(), (5,), (1, 1), (2, 3, 4), (0,), (2, 0), (300, 1)], ids=str)
def test_shapes(kernel, shape):
    device, backend = kernel
    weight = table(11, 12, torch.float32, device)
    ids = ids_like(shape, 11, device=device)
    expected = noisy_embedding(ids, weight, 0.1, seed=9, backend="reference")
    assert expected.shape == (*shape, 12)
    got = noisy_embedding(ids, weight, 0.1, seed=9, backend=backend)
    assert equal_bits(got, expected)
    assert got.is_contiguous()
    assert equal_bits(add_noise(weight[ids], 0.1, seed=9, backend=backend), expected)


def test_width_zero(kernel):
    device, backend = kernel
    empty = torch.empty(4, 0, device=device)
    assert noisy_embedding(ids_like((3,), 4, device=device), empty, 0.1, backend=backend).shape == (3, 0)
    assert add_noise(empty, 0.1, backend=backend).shape == (4, 0)


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
)
def test_integer_dtypes_of_ids(kernel, dtype):
    device, backend = kernel
    weight = table(100, 8, torch.float32, device)
    ids = ids_like((4, 5), 100, dtype, device)
    expected = noisy_embedding(ids.to(torch.int64), weight, 0.1, seed=2, backend="reference")
    assert equal_bits(noisy_embedding(ids, weight, 0.1, seed=2, backend=backend), expected)


STRIDES = {
    "rows apart": lambda t: torch.cat([t, t], dim=-1)[..., : t.shape[-1]],
    "columns apart": lambda t: t.repeat_interleave(3, dim=-1)[..., ::3],
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "off by one element": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "one row for all": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("layout", STRIDES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(kernel, layout, dtype):
    device, backend = kernel
    stride = STRIDES[layout]
    weight = stride(table(9, 37, dtype, device))
    ids = stride(ids_like((4, 6), 9, device=device))
    magnitude = stride(torch.rand(4, 6, device=device))
    expected = noisy_embedding(
        ids.contiguous(), weight.contiguous(), magnitude.contiguous(), seed=5, backend="reference"
    )
    assert equal_bits(noisy_embedding(ids, weight, magnitude, seed=5, backend=backend), expected)
    embeds = stride(weight[ids])
    expected = add_noise(embeds.contiguous(), magnitude.contiguous(), seed=5, backend="reference")
    assert equal_bits(add_noise(embeds, magnitude, seed=5, backend=backend), expected)
    assert equal_bits(add_noise(embeds, magnitude, seed=5, backend="reference"), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_vectors_in_rows_that_do_not_begin_on_one(kernel, dtype):
    device, backend = kernel
    for weight in (table(20, 65, dtype, device)[:, :64], table(20, 72, dtype, device)[:, :60]):
        ids = ids_like((2, 3), 20, device=device)
        expected = noisy_embedding(ids, weight.contiguous(), 0.3, seed=5, backend="reference")
        assert equal_bits(noisy_embedding(ids, weight, 0.3, seed=5, backend=backend), expected)
        expected = add_noise(weight.contiguous(), 0.3, seed=5, backend="reference")
        assert equal_bits(add_noise(weight, 0.3, seed=5, backend=backend), expected)


@pytest.mark.parametrize("backend", [each for each in CPU_BACKENDS if each != "reference"])
def test_rows_further_apart_than_32_bits_count(backend, tmp_path):
    """Two rows 2**31 elements apart, in a file that takes no room, and as many whole vectors."""
    path = tmp_path / "sparse"
    size = 2**31 + 64
    with path.open("wb") as file:
        file.truncate(2 * size)
    flat = torch.from_file(str(path), shared=True, size=size, dtype=torch.bfloat16)
    weight = flat.as_strided((2, 64), (2**31, 1))
    weight[1] = 3.0
    expected = noisy_embedding(torch.tensor([1]), weight, 0.1, seed=3, backend="reference")
    assert equal_bits(noisy_embedding(torch.tensor([1]), weight, 0.1, seed=3, backend=backend), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_awkward_values_in_the_table(kernel, dtype):
    """NaN and infinity pass through, sums round to nearest even and overflow to infinity, subnormals survive."""
    device, backend = kernel
    limits = torch.finfo(dtype)
    values = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), limits.max, -limits.max, limits.smallest_normal]
    values += [limits.smallest_normal / 4, -limits.smallest_normal / 4, 1.0, 1.0 + limits.eps, -1.0]
    weight = torch.tensor(values, dtype=torch.float64).to(dtype).repeat(3, 1).to(device)
    ids = torch.arange(3, device=device)
    for magnitude in (0.0, limits.eps, 1.0, limits.smallest_normal, min(limits.max / 8, 1e30)):
        expected = noisy_embedding(ids, weight, magnitude, seed=1, backend="reference")
        assert equal_bits(noisy_embedding(ids, weight, magnitude, seed=1, backend=backend), expected), magnitude


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_magnitude_zero_returns_the_row_bit_for_bit(kernel, dtype):
    """-0.0 stays -0.0, though -0.0 + 0.0 is 0.0."""
    device, backend = kernel
    weight = torch.tensor([[-0.0, 0.0, 1.0]], dtype=dtype, device=device)
    for magnitude in (0.0, torch.zeros(1, device=device)):
        got = noisy_embedding(torch.zeros(1, dtype=torch.int64, device=device), weight, magnitude, backend=backend)
        assert got.signbit().tolist() == [[True, False, False]]


def test_a_token_draws_the_same_wherever_it_stands(kernel):
    """The noise depends on (seed, stream, token, column) and on nothing else."""
    device, backend = kernel
    weight = table(7, 40, torch.float32, device)
    ids = ids_like((6, 5), 7, device=device)
    whole = noisy_embedding(ids, weight, 0.2, seed=8, backend=backend)
    assert equal_bits(noisy_embedding(ids.view(-1), weight, 0.2, seed=8, backend=backend).view(whole.shape), whole)
    part = noisy_embedding(ids[2:4], weight, 0.2, seed=8, first_token=10, backend=backend)
    assert equal_bits(part, whole[2:4])
    narrow = noisy_embedding(ids, weight[:, :17], 0.2, seed=8, backend=backend)
    assert equal_bits(narrow, whole[..., :17])
    for other in ({"seed": 9}, {"stream": 1}, {"first_token": 1}):
        changed = noisy_embedding(ids, weight, 0.2, **{"seed": 8, **other}, backend=backend)
        assert (changed != whole).float().mean() > 0.99, other


@pytest.mark.cpu_extension
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(threads):
    weight, ids = table(50, 4100, torch.bfloat16), ids_like((37,), 50)
    expected = noisy_embedding(ids, weight, 0.2, seed=8, backend="reference")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert equal_bits(noisy_embedding(ids, weight, 0.2, seed=8, backend="cpu"), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.cpu_extension
def test_more_than_two_to_the_31_elements():
    """The last rows of an output of more than 2**31 elements, from a table whose last row lies beyond 2**31 too."""
    width, rows = 1 << 16, (1 << 15) + 3
    torch.use_deterministic_algorithms(False)  # no need to fill 4 GB twice
    weight = torch.zeros(1, width, dtype=torch.bfloat16).expand(rows, width)
    ids = torch.arange(rows)
    out = noisy_embedding(ids, weight, 0.1, seed=4, backend="cpu")
    assert out.numel() > 1 << 31
    tail = noisy_embedding(ids[-2:], weight, 0.1, seed=4, first_token=rows - 2, backend="reference")
    assert equal_bits(out[-2:], tail)
    again = add_noise(out[:, :1].expand(rows, width), 0.0, backend="cpu")
    assert equal_bits(again[-1, -5:], out[-1, :1].expand(5))
    del again
    far = torch.as_strided(out, (rows, 8), (width, 1))  # row offsets beyond 2**31
    got = noisy_embedding(ids[-1:], far, 0.1, seed=4, backend="cpu")
    assert equal_bits(
        got, noisy_embedding(torch.zeros(1, dtype=torch.int64), far[-1:], 0.1, seed=4, backend="reference")
    )


def test_each_instruction_set_is_in_use_when_asked_for(kernel):
    """The cap does what the tests above rely on, on a machine that has AVX-512."""
    _, backend = kernel
    if backend != "cpu":
        assert backend in ("triton", "cuda")
        return
    in_use = extensions["cpu"][0].instruction_set()
    assert in_use in ("avx512", "avx2", "portable")
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512":
        extensions["cpu"][0].cap_instruction_set("avx512")
        assert extensions["cpu"][0].instruction_set() == "avx512"
        extensions["cpu"][0].cap_instruction_set(in_use)
    with pytest.raises(ValueError, match="sse9"):
        extensions["cpu"][0].cap_instruction_set("sse9")


@pytest.mark.gpu
def test_gpu_backends_are_there():
    assert HAS_GPU
    assert {backend.name for backend in available_backends() if "cuda" in backend.devices} >= {
        "triton",
        "reference",
    }
