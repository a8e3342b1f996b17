"""Contract: the compiled Triton kernels move each byte once, right up to the largest grids, and none fuses or races.

On the emulated GPU, with NEFT_KERNELS_TEST_GPU. That their numbers are those of the reference, whatever the widths, strides
and seeds, is for the other tests, which `make test` runs there too.
"""

import math

import numpy as np
import pytest
import torch

from gpu_doubles.emulated_gpu.accesses import SECTOR_BYTES
from gpu_doubles.emulated_gpu.arithmetic import Unsupported
from gpu_doubles.emulated_gpu.driver import Window
from helpers import independent
from helpers.bits import equal_bits
from helpers.devices import DTYPES, gpu
from neft_kernels import noise_magnitude
from neft_kernels.ops import reference, triton_launch, triton_magnitude, triton_noise

SEED = torch.tensor([2**40 + 7])


def table(num_embeddings, embedding_dim, dtype):
    generator = torch.Generator().manual_seed(embedding_dim)
    return torch.randn(num_embeddings, embedding_dim, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [768, 4096, 5120])
def test_no_byte_is_moved_in_vain(dtype, width):
    """Each row is read once and written once, in whole sectors, and no data passes through shared memory."""
    rows, ids = table(20, width, dtype), torch.tensor([3, 19, 0, 3, 7])
    per_token = torch.tensor([0.5, 0.0, 0.1, 0.3, 1.0])  # a row without noise is stored once as well
    triton_noise.noisy_embedding(ids, rows, SEED, per_token, 0.0, 0, 0)
    launch = gpu.launches[-1]
    row_bytes = 5 * width * dtype.itemsize
    assert launch.traffic.bytes["store"] == launch.traffic.sectors["store"] * SECTOR_BYTES == row_bytes
    assert (launch.times_written("out") == 1).all()
    assert launch.traffic.shared_bytes == 0
    assert launch.traffic.instructions["bar"] == 0
    # Besides, a warp reads a seed and, for each row that it has, an id and a magnitude: a sector each.
    tokens_of_tile, vectors, warps_of_tile, _ = triton_noise._tile(width, dtype.itemsize)
    rows_of_warp = max(1, tokens_of_tile * 32 // vectors)
    warps = warps_of_tile * math.prod(launch.grid)
    beside = launch.traffic.sectors["load"] * SECTOR_BYTES - row_bytes
    assert 0 < beside <= warps * (1 + 2 * rows_of_warp) * SECTOR_BYTES


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [768, 4096, 5120])
def test_symmetric_noise_draws_once_and_moves_no_byte_in_vain(dtype, width):
    """A thread has as many bytes as without it, half of them of either row, and draws half as often."""
    rows, ids, per_token = table(20, width, dtype), torch.arange(32) % 20, torch.arange(32) % 5 / 4.0
    out_bytes, multiplications = len(ids) * width * dtype.itemsize, []
    for symmetric in (False, True):
        triton_noise.noisy_embedding(ids, rows, SEED, per_token, 0.0, 0, 0, reference.UNIFORM, symmetric)
        launch = gpu.launches[-1]
        assert launch.traffic.bytes["store"] == launch.traffic.sectors["store"] * SECTOR_BYTES == out_bytes
        assert (launch.times_written("out") == 1).all()
        assert launch.traffic.shared_bytes == 0
        assert launch.traffic.instructions["bar"] == 0
        multiplications.append(launch.traffic.instructions["mul"])
    # Half of the calls are saved, of 20 wide multiplications each. The others of a thread share less of their first rounds.
    calls_of_warps = out_bytes // (16 * 32)
    assert multiplications[0] - multiplications[1] > 15 * calls_of_warps / 2


def launch_last(rows, out, num_rows, width, first, ids, first_token, blocks):
    """Runs `blocks` of a launch on `num_rows` rows, of which memory has those from element `first` on."""
    tokens_of_tile, vectors, num_warps, column_tiles = triton_noise._tile(width, 2)
    launch_grid = triton_launch.tile_grid(num_rows, tokens_of_tile, column_tiles)
    gpu.blocks = blocks(launch_grid)
    try:
        triton_noise.noisy_rows_kernel[launch_grid](
            Window(out, first),
            Window(rows, first, address=1 << 45),
            ids,
            SEED,
            None,
            *(0, 0, 0.1, 3, first_token, num_rows, num_rows, width // 8, width // 8, 1),
            *(8, True, tokens_of_tile, vectors, reference.UNIFORM, False),
            num_warps=num_warps,
            enable_fp_fusion=False,
        )
    finally:
        gpu.blocks = None


def test_more_than_two_to_the_31_elements():
    """The last two of 2**17 + 3 rows of 2**14 columns, written from the same rows of as large a table."""
    width, num_rows = 1 << 14, (1 << 17) + 3
    rows = table(2, width, torch.bfloat16)
    out = torch.full_like(rows, math.nan)

    def of_last_rows(grid):
        first = (num_rows - 2) * grid[0]  # programs have one row
        return range(first, first + 2 * grid[0])

    launch_last(rows, out, num_rows, width, (num_rows - 2) * width, torch.arange(num_rows), 2**33, of_last_rows)
    assert equal_bits(out, reference.add_noise(rows, SEED, None, 0.1, 3, 2**33 + num_rows - 2))


@pytest.mark.parametrize("width", [(1 << 29) + 8, (1 << 32) + 8])
def test_more_columns_than_32_bits_count(width):
    """The last piece of such a row."""
    _, vectors, _, tiles = triton_noise._tile(width, 2)
    tile = tiles - 1
    first = tile * vectors * 8
    rows = table(1, width - first, torch.bfloat16)
    out = torch.full_like(rows, math.nan)
    launch_last(rows, out, 1, width, first, None, 5, lambda grid: [tile])
    blocks = np.arange(first // 8, width // 8)
    seed, token = SEED.item(), np.full_like(blocks, 5)
    words = independent.philox4x32((blocks, token, 0 * token, 0 * token + 3), (seed & 0xFFFFFFFF, seed >> 32))
    halves = np.stack(words, -1).astype(np.uint32).view(np.uint16)  # low half first
    u = torch.from_numpy((2 * halves.astype(np.float32) + 1 - 65536) * np.float32(2.0**-16))
    assert equal_bits(out, (rows.float() + torch.tensor(0.1) * u).bfloat16())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_ids_out_of_range_make_their_rows_nan_and_read_nothing(dtype):
    """On the CPU the checks before the kernel would not let them through."""
    rows = table(10, 100, torch.float32)
    far = 2**40 if dtype == torch.int64 else 2**31 - 1
    ids = torch.tensor([1, 10, -1, far, -far], dtype=dtype)
    for per_token, magnitude in ((None, 0.1), (None, 0.0), (torch.tensor([0.1, 0.0, 0.1, 0.0, 0.1]), 0.0)):
        out = triton_noise.noisy_embedding(ids, rows, SEED, per_token, magnitude, 0, 0)
        assert out.isnan().all(-1).tolist() == [False, True, True, True, True]
        of_first = None if per_token is None else per_token[:1]
        assert equal_bits(out[:1], reference.noisy_embedding(ids[:1], rows, SEED, of_first, magnitude, 0, 0))


def test_magnitudes_of_more_than_two_to_the_31_tokens():
    """The last of 2**20 + 1 rows of 2**11 tokens, of which memory has that one."""
    length, row = 1 << 11, 1 << 20
    mask, positions = (torch.arange(length) < 1700).long(), torch.arange(length) % 700
    for case in ((mask, None), (None, positions), (mask, positions)):
        out = torch.empty(length)
        gpu.blocks = [row, 2 * row + 1]  # both tiles
        try:
            triton_magnitude.token_magnitude_kernel[(row + 1, 2, 1)](
                Window(out, row * length, 1 << 44),
                *(each if each is None else Window(each, row * length, (46 + i) << 40) for i, each in enumerate(case)),
                *(0, 0x40140000, 64, length),  # alpha 5.0
                1024,
                1024,
                num_warps=4,
                enable_fp_fusion=False,
            )
        finally:
            gpu.blocks = None
        assert torch.equal(out, triton_magnitude.token_magnitude(*case, 5.0, 64))


def test_fusing_is_noticed():
    """The guard of all comparisons: with Triton's own default the product and the sum would be one instruction."""
    rows, out = table(4, 64, torch.float32), torch.empty(4, 64)
    arguments = (
        out,
        rows,
        None,
        SEED,
        None,
        0,
        0,
        0.1,
        0,
        0,
        4,
        4,
        16,
        16,
        1,
        4,
        True,
        32,
        16,
        reference.UNIFORM,
        False,
    )
    try:
        triton_noise.noisy_rows_kernel[(1, 1, 1)](*arguments, num_warps=4, enable_fp_fusion=True)
    except Unsupported:
        return  # it left the rounding open
    assert not equal_bits(out, reference.add_noise(rows, SEED, None, 0.1, 0, 0))


@pytest.mark.parametrize("length", [1, 31, 2048, 5000])
def test_magnitudes(length):
    """Several tiles of a row; rows in neighbouring memory do not meet."""
    mask = (torch.arange(length) < torch.tensor([[length], [length // 3], [1], [0]])).long()
    positions = (torch.arange(length) % 700).expand(4, length).contiguous()
    for case in ((mask, None), (None, positions), (mask, positions)):
        got = triton_magnitude.token_magnitude(*case, 5.0, 64)
        expected = noise_magnitude(
            torch.zeros(4, length), 64, 5.0, attention_mask=case[0], position_ids=case[1], backend="reference"
        )
        assert torch.equal(got, expected)
        assert (gpu.launches[-1].times_written("out") == 1).all()


def test_magnitudes_take_one_launch_that_waits_for_no_other_program():
    """Neither atomic additions nor memory that has to be zero."""
    mask = (torch.arange(5000) < torch.tensor([[5000], [1700], [1], [0]])).long()
    positions = (torch.arange(5000) % 700).expand(4, 5000).contiguous()
    for case in ((mask, None), (mask * 3, None), (None, positions), (mask, positions)):
        gpu.launches.clear()
        triton_magnitude.token_magnitude(*case, 5.0, 64)
        (launch,) = gpu.launches
        assert launch.traffic.instructions["red"] + launch.traffic.instructions["atom"] == 0
        assert (launch.times_written("out") == 1).all()
