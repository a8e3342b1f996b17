"""Contract: the kernels pass tools/check_gpu.py, and each of its guards fails when what it guards against happens."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from neft_kernels.ops.reference import NOISE_KINDS
from tools import compiled_kernels, machine_code
from tools.compiled_kernels import Kernel, complaints

ROOT = Path(__file__).parent.parent
HAS_NVCC = shutil.which("nvcc") is not None


def check_gpu(*arguments, **environment):
    # Not the suite's TRITON_INTERPRET, for a check of what the tool does with it.
    command = [sys.executable, "-m", "tools.check_gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | environment)


def test_kernels_pass():
    result = check_gpu("--quick", *([] if HAS_NVCC else ["--no-nvcc"]), TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    for noise in NOISE_KINDS:  # two loads of either row
        pattern = rf"sm_90 +triton +noisy_embedding +bfloat16 +symmetric {noise} +16 bytes .* 128:4 .* 0\n"
        assert re.search(pattern, result.stdout)
    for source in ("triton", "cuda") if HAS_NVCC else ("triton",):
        for op, noise in itertools.product(("noisy_embedding", "add_noise"), NOISE_KINDS):
            assert re.search(rf"sm_90 +{source} +{op} +bfloat16 +{noise} +16 bytes .* 128:4 .* 0\n", result.stdout)
    assert re.search(r"gfx942 +triton +noisy_embedding +bfloat16", result.stdout)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (
            "sm_90",
            ("spills", "fuses a multiply-add", "loads rows not", "stores rows not", "multiplies", "registers, more"),
        ),
        ("gfx942", ("fuses a multiply-add", "loads rows not", "stores rows not", "multiplies", "registers, more")),
    ],
)
def test_guards_see_a_bad_triton_kernel(target, expected):
    """Fusion on, a width that no vector divides, too few registers on NVIDIA, and budgets that none keeps."""
    bad = [
        "--width",
        "4097",
        "--triton-option",
        "enable_fp_fusion=True",
        "--max-multiplies",
        "1",
        "--max-registers",
        "9",
    ]
    if target == "sm_90":
        bad += ["--triton-option", "maxnreg=24"]
    result = check_gpu("--no-nvcc", "--target", target, "--dtype", "bfloat16", "--op", "add_noise", *bad)
    assert result.returncode == 1
    for sentence in expected:
        assert sentence in result.stderr, result.stderr


def test_a_triton_kernel_without_a_bound_on_registers_waits_for_its_loads():
    of_one = ("--target", "sm_90", "--dtype", "bfloat16", "--op", "noisy_embedding", "--width", "4096")
    result = check_gpu("--no-nvcc", *of_one, "--triton-option", "maxnreg=None")
    assert result.returncode == 1
    assert "of 4 loads of 16 bytes under way" in result.stderr


TOO_FEW_REGISTERS = "--nvcc-flag=-Xptxas=--override-directive-values,--maxrregcount=24"

if HAS_NVCC:

    def test_guards_see_a_bad_cuda_kernel():
        bad = (TOO_FEW_REGISTERS, "--nvcc-flag=-ftz=true", "--max-multiplies", "1")
        result = check_gpu("--no-triton", "--target", "sm_90", "--op", "add_noise", *bad)
        assert result.returncode == 1
        for sentence in ("spills", "multiplies", "subnormal"):
            assert sentence in result.stderr, result.stderr

    def test_a_kernel_that_does_not_compile():
        broken = ("--op", "add_noise", "--nvcc-flag=-DNEFT_NAMESPACE=1")
        result = check_gpu("--no-triton", "--target", "sm_90", *broken)
        assert result.returncode == 1
        assert "nvcc cannot compile" in result.stderr


def test_a_missing_nvcc_is_an_error(tmp_path):
    result = check_gpu("--no-triton", PATH=str(tmp_path))
    assert result.returncode == 1
    assert "the CUDA kernels WERE NOT CHECKED" in result.stderr


GOOD_SASS = """
        /*0000*/                   LDG.E.64 R2, desc[UR4][R2.64] ;     /* 0x0 */
        /*0010*/                   FFMA R7, R7, R8, -0.9999847412109375 ;  /* 0x0 */
        /*0020*/                   HFMA2.MMA R9, -RZ, RZ, 0, 0 ;  /* 0x0 */
        /*0030*/              @P0  STG.E.128 desc[UR4][R2.64], R4 ;   /* 0x0 */
        /*0040*/                   IMAD.WIDE.U32 R2, R4, -0x2daee0ad, RZ ;   /* 0x0 */
        /*0050*/                   NOP;   /* 0x0 */
""" + "".join(
    f"        /*0060*/               @!P0 LDG.E.128.CONSTANT R{first}, desc[UR4][R2.64+0x800] ;   /* 0x0 */\n"
    for first in (12, 16, 20, 24)
)
GOOD_USAGE = "  REG:40 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:640"

BAD = {
    "fuses": (GOOD_SASS + "/*0070*/ FFMA R7, R7, R8, R9 ;", GOOD_USAGE),
    "fuses a multiply-add 1": (GOOD_SASS + "/*0070*/ FFMA2 R6, R6.F32x2.HI_LO, R8.F32, R10.F32x2.HI_LO ;", GOOD_USAGE),
    "`DFMA": (GOOD_SASS + "/*0070*/ DFMA R6, R6, R8, R10 ;", GOOD_USAGE),
    "`HFMA2": (GOOD_SASS + "/*0070*/ HFMA2.BF16_V2 R6, R6, R8, R10 ;", GOOD_USAGE),
    "subnormal": (GOOD_SASS + "/*0070*/ FMUL.FTZ R7, R7, R8 ;", GOOD_USAGE),
    "waits": (GOOD_SASS + "/*0070*/ MEMBAR.SC.GPU ;", GOOD_USAGE),
    "shared memory": (GOOD_SASS, GOOD_USAGE.replace("SHARED:0", "SHARED:2048")),
    "spills 8": (GOOD_SASS, GOOD_USAGE.replace("STACK:0", "STACK:8")),
    "spills 16": (GOOD_SASS + "/*0070*/ STL.128 [R1], R4 ;", GOOD_USAGE),
    "needs 90 registers": (GOOD_SASS, GOOD_USAGE.replace("REG:40", "REG:90")),
    "loads rows": (GOOD_SASS.replace("LDG.E.128", "LDG.E.64"), GOOD_USAGE),
    "uses what it loads with 3 of 4": (GOOD_SASS.replace("R24,", "R24, R15,"), GOOD_USAGE),
    "uses what it loads with 1 of 4": (
        GOOD_SASS.replace("R12, desc[UR4][R2.64+0x800] ;", "R12, desc[UR4][R2.64] ; /*0061*/ DEPBAR.LE SB0, 0x0 ;"),
        GOOD_USAGE,
    ),
    "stores rows": (GOOD_SASS + "/*0070*/ STG.E.U16 desc[UR4][R2.64], R4 ;", GOOD_USAGE),
    "instructions for uniform noise, more than 640": (GOOD_SASS + 640 * "/*0070*/ MOV R2, R4 ;\n", GOOD_USAGE),
    "multiplies": (GOOD_SASS + 110 * "/*0070*/ IMAD.HI.U32 R2, R4, R5, RZ ;\n", GOOD_USAGE),
}


def test_good_machine_code():
    code = machine_code.from_sass(GOOD_SASS, GOOD_USAGE)
    assert (code.registers, code.loads, code.stores, code.multiplies, code.instructions) == (
        40,
        {64: 1, 128: 4},
        {128: 1},
        1,
        9,
    )
    assert not list(complaints(Kernel("sm_90", "triton", "op", "bfloat16", "", code), 80, 25))


@pytest.mark.parametrize("sentence", BAD)
def test_each_guard_alone(sentence):
    code = machine_code.from_sass(*BAD[sentence])
    (complaint,) = complaints(Kernel("sm_90", "triton", "op", "bfloat16", "", code), 80, 25)
    assert sentence in complaint


def test_symmetric_noise_has_less_than_two_draws_may_have():
    """Its budget is for 16 bytes of two rows, and for two calls of a thread."""
    for noise in NOISE_KINDS:
        budget = compiled_kernels.MAX_SYMMETRIC_INSTRUCTIONS[noise]
        assert budget < 2 * compiled_kernels.MAX_INSTRUCTIONS[noise]
        for instructions in (2 * budget, 2 * budget + 1):
            extra = instructions - machine_code.from_sass(GOOD_SASS, GOOD_USAGE).instructions
            code = machine_code.from_sass(GOOD_SASS + extra * "/*0070*/ MOV R2, R4 ;\n", GOOD_USAGE)
            kernel = Kernel("sm_90", "triton", "op", "bfloat16", "", code, noise, symmetric=True)
            found = list(complaints(kernel, 80, 25))
            sentence = f"has {instructions} instructions for symmetric {noise} noise, more than {2 * budget}"
            assert found == ([sentence] if instructions > 2 * budget else [])


@pytest.mark.parametrize(
    ("embedding_dim", "element_size", "expected"),
    [
        (4096, 2, (1, 512, 4, 1)),
        (4096, 4, (1, 512, 4, 2)),
        (2048, 2, (1, 256, 2, 1)),
        (1024, 2, (1, 128, 1, 1)),
        (5120, 2, (1, 128, 1, 5)),  # 640 vectors: two tiles of 512 would leave 384 without work
        (768, 2, (16, 32, 4, 3)),
        (1, 4, (512, 1, 4, 1)),
        (2**31, 2, (1, 512, 4, 2**19)),
    ],
)
def test_tiles_of_the_triton_kernel(embedding_dim, element_size, expected):
    from neft_kernels.ops import triton_noise

    rows, vectors, warps, tiles = triton_noise._tile(embedding_dim, element_size)
    assert (rows, vectors, warps, tiles) == expected
    assert rows * vectors == 4 * 32 * warps  # four vectors of each thread


@pytest.mark.parametrize("num_tokens", [1, 65535, 65536, 70001, 2**31 + 5])
def test_grids_of_the_triton_kernel(num_tokens):
    """They keep to the limits, and less than one program in a thousand has nothing to do."""
    from neft_kernels.ops import triton_launch

    for tokens_of_tile in (1, 16):
        columns, y, z = triton_launch.tile_grid(num_tokens, tokens_of_tile, 3)
        assert columns == 3
        assert max(y, z) <= 65535
        tiles = -(-num_tokens // tokens_of_tile)
        assert tiles <= y * z < tiles + max(1, tiles // 1000) + z


AMDGCN = """
	buffer_load_dwordx4 v[4:7], v14, s[4:7], 0 offen
	{}
	buffer_load_dwordx4 a[0:3], v15, s[4:7], 0 offen
	v_add_f32 v5, v5, v1
	.vgpr_count: 20
	.vgpr_spill_count: 0
	.sgpr_spill_count: 0
	.private_segment_fixed_size: 0
	.group_segment_fixed_size: 0
"""


@pytest.mark.parametrize(
    ("between", "expected"),
    [("v_mov_b32 v8, v9", 2), ("s_waitcnt vmcnt(0)", 1), ("s_waitcnt lgkmcnt(0)", 2), ("v_mov_b32 v8, v7", 1)],
)
def test_loads_under_way_on_amd(between, expected):
    assert machine_code.from_amdgcn(AMDGCN.format(between), "").loads_in_flight == expected
