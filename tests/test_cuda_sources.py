"""Contract: the CUDA kernels' own code, run on the host, gives what neft_kernels.ops.reference gives, bit for bit.

csrc/noise.h function by function, then whole launches of csrc/cuda/rows.cuh, thread by thread: every element is written
exactly once, no byte beside the tensors is touched, and the index arithmetic holds beyond 2**31 elements. What a GPU adds
to this (nvcc's code, CUDA's conversions to half precision) is seen by tools/check_gpu.py and by the tests on a GPU.
"""

import ctypes
import json
from pathlib import Path

import pytest
import torch

from gpu_doubles.cuda_emulation import (
    ELEMENTS,
    IDENTITIES,
    LAYOUTS,
    PER_TOKEN,
    WIDTHS,
    Index,
    arguments_of,
    expected_of,
    ids_of,
    pointer,
    table,
)
from helpers.bits import equal_bits
from helpers.devices import DTYPES
from neft_kernels.ops import reference

KNOWN_ANSWERS = json.loads((Path(__file__).parent / "vectors" / "philox4x32_10.json").read_text())
FAULT = -1
UNIFORM = ctypes.c_int64(reference.UNIFORM)

pytestmark = pytest.mark.xdist_group("cuda")  # shares `library`


# --- csrc/noise.h ----------------------------------------------------------------------------------------------------


def words_of(hexadecimal):
    return (ctypes.c_uint32 * len(hexadecimal))(*(int(word, 16) for word in hexadecimal))


@pytest.mark.parametrize("case", KNOWN_ANSWERS["cases"], ids=lambda case: case["counter"][0])
def test_philox_known_answers(library, case):
    output = (ctypes.c_uint32 * 4)()
    library.philox(words_of(case["counter"]), words_of(case["key"]), output)
    assert list(output) == list(words_of(case["output"]))
    counter, key = ([torch.tensor(int(word, 16)) for word in case[name]] for name in ("counter", "key"))
    assert [int(word) for word in reference.philox4x32(tuple(counter), tuple(key))] == list(output)


@pytest.mark.parametrize("kind", range(len(reference.NOISE_KINDS)), ids=reference.NOISE_KINDS)
@pytest.mark.parametrize(("seed", "stream", "first_token"), IDENTITIES)
def test_noise_of_a_block(library, seed, stream, first_token, kind):
    """Counter and key are put together, and words made into numbers, as the reference does."""
    tokens = first_token + torch.arange(3)
    for dtype, columns, convert in (
        (torch.float32, 4, library.noise_from_words),
        (torch.bfloat16, 8, library.noise_from_halves),
    ):
        u = reference.uniform(tokens, 5 * columns, dtype, torch.tensor([seed]), stream)
        expected = reference.shape_noise(u, kind)
        for row, token in enumerate(tokens.tolist()):
            for block in range(5):
                words, noise = (ctypes.c_uint32 * 4)(), torch.empty(columns)
                arguments = (ctypes.c_uint32(block), ctypes.c_int64(token), ctypes.c_uint32(stream))
                library.block_words(*arguments, ctypes.c_int64(seed), words)
                convert(ctypes.c_int64(kind), words, ctypes.c_int64(4), pointer(noise))
                assert torch.equal(noise, expected[row, block * columns : (block + 1) * columns])


def test_noise_of_every_half_word(library):
    words = torch.arange(65536, dtype=torch.int64)
    words = (words | (65535 - words) << 16).to(torch.int32)
    u = torch.empty(65536, 2)
    library.noise_from_halves(UNIFORM, pointer(words), ctypes.c_int64(65536), pointer(u))
    exact = (2 * torch.arange(65536, dtype=torch.float64) - 65535) / 65536
    assert torch.equal(u.double(), torch.stack((exact, exact.flip(0)), dim=1))
    for kind in (reference.SIGN, reference.GAUSSIAN):
        noise = torch.empty_like(u)
        library.noise_from_halves(ctypes.c_int64(kind), pointer(words), ctypes.c_int64(65536), pointer(noise))
        assert torch.equal(noise, reference.shape_noise(u, kind))


def test_noise_of_words(library):
    edges = torch.tensor([0, 1, 255, 256, 2**31 - 1, 2**31, 2**32 - 256, 2**32 - 1])
    words = torch.cat((edges, torch.randint(2**32, (10000,)))).to(torch.int32)
    u = torch.empty(len(words))
    library.noise_from_words(UNIFORM, pointer(words), ctypes.c_int64(len(words)), pointer(u))
    assert torch.equal(u.double(), ((words >> 8) | 1).double() / 2**23)
    for kind in (reference.SIGN, reference.GAUSSIAN):
        noise = torch.empty_like(u)
        library.noise_from_words(ctypes.c_int64(kind), pointer(words), ctypes.c_int64(len(words)), pointer(noise))
        assert torch.equal(noise, reference.shape_noise(u, kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_product_and_sum_round_separately(library, dtype):
    w, m, u = torch.randn(3, 100000, dtype=dtype)
    out = torch.empty_like(w)
    add = library.add_scaled_fp32 if dtype == torch.float32 else library.add_scaled_fp64
    add(pointer(w), pointer(m), pointer(u), ctypes.c_int64(len(w)), pointer(out))
    assert torch.equal(out, w + m * u)
    if dtype == torch.float32:
        fused = (w.double() + m.double() * u.double()).float()
        assert (fused != out).float().mean() > 0.05  # so a fused multiply-add would show


# --- whole launches --------------------------------------------------------------------------------------------------


def emulate(library, rows, ids=None, token_magnitude=None, magnitude=0.0, identity=IDENTITIES[1], **switches):
    """What the launch returns (1: 16-byte accesses, 0: not, FAULT) and its output, every byte of it written once."""
    arguments, out = arguments_of(rows, ids, token_magnitude, magnitude, identity, **switches)
    times_written = torch.zeros(out.numel() * out.element_size(), dtype=torch.uint8)
    arguments.times_written = times_written.data_ptr()
    result = library.emulate(ctypes.byref(arguments))
    assert result == FAULT or (times_written == 1).all()
    return result, out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_launches(library, dtype, width):
    rows = table(dtype, width)
    columns_per_block = 8 if dtype.itemsize == 2 else 4
    for ids in (None, ids_of(torch.int32), ids_of(torch.int64)):
        noises = [{"magnitude": 0.3}, {"token_magnitude": PER_TOKEN if ids is not None else torch.rand(8)}]
        for noise in noises:
            for switches in ({"guard_after": 1}, {"guard_after": 0, "few_threads": 1}):
                aligned, out = emulate(library, rows, ids, **noise, **switches)
                assert aligned == (width % columns_per_block == 0)
                assert equal_bits(out, expected_of(rows, ids, **noise)), (ids, noise, switches)


@pytest.mark.parametrize("kind", [reference.SIGN, reference.GAUSSIAN], ids=["sign", "gaussian"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [9, 64])
def test_kinds_of_noise(library, dtype, width, kind):
    rows = table(dtype, width)
    for ids in (None, ids_of(torch.int32), ids_of(torch.int64)):
        noise = {"token_magnitude": PER_TOKEN if ids is not None else torch.rand(8), "noise": kind}
        _, out = emulate(library, rows, ids, **noise)
        assert equal_bits(out, expected_of(rows, ids, **noise)), (ids, noise)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [9, 64, 2048])
def test_symmetric_noise(library, dtype, width):
    """Pairs of ids that are equal, that differ, and that are out of range; each row is still written once."""
    rows = table(dtype, width)
    for ids in (None, ids_of(torch.int32)[[0, 1, 2, 5, 0, 4, 3, 5]], ids_of(torch.int64)[[0, 1, 2, 5, 0, 4, 3, 5]]):
        for noise in ({"magnitude": 0.3}, {"token_magnitude": torch.cat((PER_TOKEN, torch.ones(1)))}):
            for switches in ({"guard_after": 1}, {"guard_after": 0, "few_threads": 1}):
                _, out = emulate(library, rows, ids, **noise, symmetric=1, **switches)
                assert equal_bits(out, expected_of(rows, ids, **noise, symmetric=True)), (ids, noise, switches)


@pytest.mark.parametrize("identity", IDENTITIES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_seeds_streams_and_tokens(library, dtype, identity):
    rows = table(dtype, 40)
    expected = expected_of(rows, magnitude=0.3, identity=identity)
    for by_value in (0, 1):
        _, out = emulate(library, rows, magnitude=0.3, identity=identity, seed_by_value=by_value)
        assert equal_bits(out, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(library, layout, dtype):
    make, aligned = LAYOUTS[layout]
    rows = make(table(dtype, 64, 9))
    for ids in (None, ids_of(torch.int64, 9)):
        for guard_after in (0, 1):
            got, out = emulate(library, rows, ids, magnitude=0.3, guard_after=guard_after)
            if not (
                guard_after and rows.untyped_storage().nbytes() % 16
            ):  # an odd size ends on the guard, so starts off 16
                assert got == aligned
            assert equal_bits(out, expected_of(rows, ids, magnitude=0.3))


def test_magnitude_zero_copies_the_bits(library):
    for dtype, bits in ((torch.bfloat16, torch.int16), (torch.float16, torch.int16), (torch.float32, torch.int32)):
        rows = torch.randint(-(2**15), 2**15, (8, 64)).to(bits).view(dtype)  # signalling NaN among them
        for view in (rows, rows[:, :63]):
            _, out = emulate(library, view, magnitude=0.0)
            assert torch.equal(out.view(bits), view.contiguous().view(bits))


def test_a_touch_beside_the_table_is_noticed(library):
    """The guard of the tests above: an id that is in range of no row but passes for one."""
    result, _ = emulate(
        library, table(torch.float32, 1024), ids_of(torch.int64), num_rows=9, magnitude=0.3, guard_after=1
    )
    assert result == FAULT


# --- large launches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_columns", [1, 64, 4096, 5120, 2**30, 2**32])
@pytest.mark.parametrize("num_tokens", [1, 65536, 70001, 2**31 + 5, 2**33 - 1, 2**36 + 1])
def test_grids_keep_to_the_limits_and_reach_every_token_once(library, num_tokens, num_columns, dtype):
    found = (ctypes.c_uint32 * 6)()
    element = ELEMENTS.index(dtype)
    library.plan(element, ctypes.c_int64(num_tokens), ctypes.c_int64(num_columns), found)
    grid, threads = Index(*found[:3]), Index(*found[3:])
    assert 1 <= grid.x <= 2**31 - 1
    assert 1 <= grid.y <= 65535
    assert 1 <= grid.z <= 65535
    assert threads.x * threads.y * threads.z == 128

    def token(block, thread):
        return library.token_of(*(ctypes.byref(index) for index in (grid, threads, block, thread)))

    # Consecutive tokens: along the threads, from one block to the next, from one z to the next, and to the very last.
    rows_of_block = threads.z
    assert token(Index(0, 0, 0), Index(0, 0, 0)) == 0
    assert token(Index(0, 0, 0), Index(5, 0, rows_of_block - 1)) == rows_of_block - 1
    assert token(Index(grid.x - 1, 0, 0), Index(0, 0, 0)) == (grid.x - 1) * rows_of_block
    assert token(Index(0, 0, grid.z - 1), Index(0, 0, 0)) == (grid.z - 1) * grid.x * rows_of_block
    beyond = token(grid.last(), threads.last()) + 1
    assert beyond == grid.x * grid.z * rows_of_block
    assert num_tokens <= beyond < num_tokens + (grid.z + 1) * rows_of_block


def test_more_than_two_to_the_31_elements(library):
    """The last row of an output of 2**33 elements, of which memory holds that row only."""
    num_tokens, num_columns, seed = 2**21 + 3, 4097, 11
    row, last_row = torch.randn(num_columns), torch.empty(num_columns)
    sizes = (ctypes.c_int64(num_tokens), ctypes.c_int64(num_columns))
    result = library.emulate_last_row(
        pointer(row), *sizes, ctypes.c_int64(seed), ctypes.c_float(0.3), pointer(last_row)
    )
    assert result == 0
    identity = (seed, 0, num_tokens - 1)
    assert equal_bits(last_row[None], expected_of(row[None], magnitude=0.3, identity=identity))


@pytest.mark.parametrize(
    ("num_columns", "warps", "rows", "turns"),
    [(512, 1, 4, 1), (768, 1, 4, 1), (2048, 2, 2, 1), (4096, 4, 1, 1), (5120, 1, 4, 5), (8192, 4, 1, 2)],
)
def test_no_warp_is_without_work_on_usual_widths(library, num_columns, warps, rows, turns):
    """In half precision a warp takes 1024 columns; blocks of threads have four."""
    found = (ctypes.c_uint32 * 6)()
    library.plan(ELEMENTS.index(torch.bfloat16), ctypes.c_int64(64), ctypes.c_int64(num_columns), found)
    assert list(found) == [64 // rows, turns, 1, 32, warps, rows]
