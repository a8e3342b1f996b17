"""Contract: what nvcc makes of the CUDA kernels gives what neft_kernels.ops.reference gives, bit for bit.

The compiled kernels run on the emulated GPU, in the launches that the launcher would make: every byte of the output is
written once, nothing beside the tensors is touched, no byte is moved in vain. The sources: test_cuda_sources.py.
"""

import ctypes
import re
import subprocess

import numpy as np
import pytest
import torch

from gpu_doubles.cuda_emulation import (
    IDENTITIES,
    LAYOUTS,
    PER_TOKEN,
    ROOT,
    Launch,
    arguments_of,
    expected_of,
    ids_of,
    table,
)
from gpu_doubles.emulated_gpu import machine, ptx
from gpu_doubles.emulated_gpu.accesses import SECTOR_BYTES
from gpu_doubles.emulated_gpu.driver import memories_of
from gpu_doubles.emulated_gpu.memory import Memory, MemoryFault
from helpers.bits import equal_bits
from helpers.devices import DTYPES
from neft_kernels.ops.reference import GAUSSIAN, SIGN, UNIFORM
from tools.check_gpu import nvcc

ELEMENT_NAMES = {torch.float32: "Fp32", torch.float64: "Fp64", torch.float16: "Fp16", torch.bfloat16: "Bf16"}
ID_NAMES = {None: "RowOfToken", torch.int32: "RowOfIdIi", torch.int64: "RowOfIdIl"}
TARGET = "compute_90"

pytestmark = pytest.mark.xdist_group("cuda")  # shares `library` and `kernels`


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    """By element type, kind of noise, whether rows are aligned, and type of ids."""
    found = {}
    for source in (ROOT / "csrc" / "cuda").glob("*_*.cu"):
        target = tmp_path_factory.mktemp("ptx") / f"{source.stem}.ptx"
        subprocess.run([*nvcc("-ptx", f"-arch={TARGET}", "-fmad=false"), "-o", str(target), str(source)], check=True)
        for name, kernel in ptx.parse(target.read_text()).items():
            constants = r"noisy_rows_kernelINS_\d(\w{4})ELNS_9NoiseKindE(\d)ELb([01])ENS_\d+(RowOf(?:Token|IdI[il]))"
            if match := re.search(constants, name):
                found[match[1], int(match[2]), match[3] == "1", match[4]] = kernel
    assert len(found) == 4 * 3 * 2 * 3
    return found


def seed_of(arguments):
    """The memory that the seed is read from."""
    offset = type(arguments).seed.offset
    return {ctypes.addressof(arguments) + offset: Memory("the seed", np.frombuffer(arguments, np.uint8)[offset:][:8])}


def launch_of(launch, kernel, memories):
    grid, threads = ((index.x, index.y, index.z) for index in (launch.grid, launch.threads))
    return machine.Launch(kernel, grid, threads, bytes(launch.parameters)[: launch.parameter_bytes], memories).run()


def run(library, kernels, rows, ids=None, token_magnitude=None, magnitude=0.0, identity=IDENTITIES[1], **switches):
    """The launch's traffic, and its output, every byte of which was written once."""
    arguments, out = arguments_of(rows, ids, token_magnitude, magnitude, identity, **switches)
    launch = Launch()
    library.launch(ctypes.byref(arguments), ctypes.byref(launch))
    ids_name = ID_NAMES[None if ids is None else ids.dtype]
    kernel = kernels[ELEMENT_NAMES[rows.dtype], switches.get("noise", UNIFORM), bool(launch.aligned), ids_name]
    assert launch.parameter_bytes == kernel.parameter_bytes
    memories = memories_of([each for each in (rows, ids, token_magnitude, out) if each is not None])
    memories |= seed_of(arguments)
    traffic = launch_of(launch, kernel, memories)
    for address, memory in memories.items():
        assert (memory.times_written == (address == out.data_ptr())).all()
    return traffic, out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 8, 9, 64, 130, 516, 1032, 4160, 5003])
def test_equals_the_reference(library, kernels, dtype, width):
    rows = table(dtype, width)
    for ids in (None, ids_of(torch.int32), ids_of(torch.int64)):
        for noise in ({"magnitude": 0.3}, {"token_magnitude": PER_TOKEN if ids is not None else torch.rand(8)}):
            _, out = run(library, kernels, rows, ids, **noise)
            assert equal_bits(out, expected_of(rows, ids, **noise)), (ids, noise)


@pytest.mark.parametrize("kind", [SIGN, GAUSSIAN], ids=["sign", "gaussian"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [9, 520])
def test_kinds_of_noise(library, kernels, dtype, width, kind):
    rows = table(dtype, width)
    for ids in (None, ids_of(torch.int64)):
        _, out = run(library, kernels, rows, ids, magnitude=0.3, noise=kind)
        assert equal_bits(out, expected_of(rows, ids, magnitude=0.3, noise=kind))


@pytest.mark.parametrize("kind", [UNIFORM, GAUSSIAN], ids=["uniform", "gaussian"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [9, 520])
def test_symmetric_noise(library, kernels, dtype, width, kind):
    rows, per_token = table(dtype, width), torch.cat((PER_TOKEN, torch.ones(1)))
    for ids in (None, ids_of(torch.int64)[[0, 1, 2, 5, 0, 4, 3, 5]]):
        noise = {"token_magnitude": per_token, "noise": kind}
        _, out = run(library, kernels, rows, ids, **noise, symmetric=1)
        assert equal_bits(out, expected_of(rows, ids, **noise, symmetric=True))


@pytest.mark.parametrize("identity", IDENTITIES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_seeds_streams_and_tokens(library, kernels, dtype, identity):
    rows = table(dtype, 40)
    expected = expected_of(rows, magnitude=0.3, identity=identity)
    for by_value in (0, 1):
        _, out = run(library, kernels, rows, magnitude=0.3, identity=identity, seed_by_value=by_value)
        assert equal_bits(out, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(library, kernels, layout, dtype):
    make, _ = LAYOUTS[layout]
    rows = make(table(dtype, 64, 9))
    for ids in (None, ids_of(torch.int64, 9)):
        _, out = run(library, kernels, rows, ids, magnitude=0.3)
        assert equal_bits(out, expected_of(rows, ids, magnitude=0.3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_awkward_values(library, kernels, dtype):
    """NaN and infinity pass through, sums round to nearest even and overflow to infinity, subnormals survive."""
    limits = torch.finfo(dtype)
    values = (
        0.0,
        -0.0,
        torch.inf,
        -torch.inf,
        torch.nan,
        limits.max,
        limits.min,
        limits.tiny,
        limits.smallest_normal / 3,
    )
    rows = torch.tensor(values, dtype=torch.float64).to(dtype).repeat_interleave(8)[None].contiguous()
    for magnitude in (1e-30, 1e-6, 0.3, 3e38):
        _, out = run(library, kernels, rows, magnitude=magnitude)
        assert equal_bits(out, expected_of(rows, magnitude=magnitude))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_no_byte_is_moved_in_vain(library, kernels, dtype):
    """On aligned rows: each is read once and written once, in whole sectors, and one that is out of range is not read."""
    rows, ids = table(dtype, 4096, 20), torch.tensor([3, 19, 0, 3, 20])
    traffic, _ = run(library, kernels, rows, ids, magnitude=0.3)
    row_bytes = 4096 * dtype.itemsize
    assert traffic.bytes["store"] == traffic.sectors["store"] * SECTOR_BYTES == 5 * row_bytes
    warps = 5 * row_bytes // (32 * 64)
    assert traffic.bytes["load"] == 4 * row_bytes + warps * 32 * (8 + 8)  # every thread reads the seed and the id
    assert traffic.sectors["load"] * SECTOR_BYTES == 4 * row_bytes + warps * 2 * SECTOR_BYTES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_further_apart_than_32_bits_count(library, kernels, dtype):
    """Row 1 lies 2**31 + 8 elements behind row 0; memory has these two."""
    apart = 2**31 + 8
    rows, ids = table(dtype, 64, 2), torch.tensor([1, 0])
    arguments, out = arguments_of(rows, ids, magnitude=0.3)
    arguments.storage, arguments.row_stride = 1 << 44, apart
    launch = Launch()
    library.launch(ctypes.byref(arguments), ctypes.byref(launch))
    memories = memories_of([ids, out]) | seed_of(arguments)
    for number, row in enumerate(rows.contiguous().view(torch.uint8).numpy()):
        memories[(1 << 44) + number * apart * dtype.itemsize] = Memory("a row", row)
    launch_of(launch, kernels[ELEMENT_NAMES[dtype], UNIFORM, True, "RowOfIdIl"], memories)
    assert equal_bits(out, expected_of(rows, ids, magnitude=0.3))


def test_a_touch_beside_the_table_is_noticed(library, kernels):
    """The guard of the tests above: an id that is in range of no row but passes for one."""
    with pytest.raises(MemoryFault, match="outside the elements"):
        run(library, kernels, table(torch.float32, 1024), torch.tensor([8]), num_rows=9, magnitude=0.3)
