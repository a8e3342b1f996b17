"""Compiles every GPU kernel for every GPU that it is meant for, and looks at the machine code. Needs no GPU.

    python -m tools.check_gpu            about ten minutes on two processors
    python -m tools.check_gpu --quick    two GPUs, fewer element types

Triton's kernels are compiled as a launch on an aligned table compiles them: the package's own launcher runs, on a driver
that is a stub, and what it asks the compiler for is compiled for each GPU. The CUDA kernels are compiled by nvcc. Fails if
a kernel spills registers, fuses a product and a sum of the noise, takes subnormal numbers for zero or has a memory fence,
and, where rows are aligned, if it uses shared memory, accesses rows in less than 16 bytes at a time, waits for one part of
them before it asks for the next, or needs more registers, integer multiplications or instructions than it should.
"""

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from neft_kernels.ops.reference import NOISES
from tools.machine_code import MachineCode, disassemble, from_amdgcn

ROOT = Path(__file__).resolve().parent.parent
TURING = "sm_75"  # T4 and RTX 20; only the CUDA kernels, because Triton keeps fewer loads under way there
ARCHITECTURES = (80, 90, 100, 120)  # A100; H100 and H200; B200; RTX 5090
MAIN_TARGETS = (TURING, *(f"sm_{architecture}" for architecture in ARCHITECTURES), "gfx942")  # ... and MI300
#: Triton compiles for these too; of them, one table of each element type is looked at. RTX 3090; RTX 4090; B300; DGX Spark;
#: MI200; MI350; RX 7900; RX 9070.
OTHER_TARGETS = ("sm_86", "sm_89", "sm_103", "sm_121", "gfx90a", "gfx950", "gfx1100", "gfx1201")
TARGETS = (*MAIN_TARGETS, *OTHER_TARGETS)
QUICK_TARGETS = ("sm_90", "gfx942")
DTYPES = ("float32", "float64", "float16", "bfloat16")
OPS = ("noisy_embedding", "add_noise")
QUICK_DTYPES = ("float64", "bfloat16")
CUDA_DTYPES = {"Fp32": "float32", "Fp64": "float64", "Fp16": "float16", "Bf16": "bfloat16"}

# Of Triton's kernels, whose tiles are one row of 512 vectors, one of 128, and sixteen rows of 32.
WIDTHS = {
    "bfloat16": (4096, 1024, 768),
    "float16": (4096, 1024, 768),
    "float32": (4096, 512, 384),
    "float64": (4096, 256, 192),
}
#: Of one thread on NVIDIA's GPUs, for one call of Philox: a tenth more than the narrowest tiles need on sm_90.
MAX_INSTRUCTIONS = {"uniform": 160, "sign": 160, "gaussian": 315}
#: The same for symmetric noise, whose call of Philox is for 16 bytes of two rows. Two calls would need more.
MAX_SYMMETRIC_INSTRUCTIONS = {"uniform": 250, "sign": 250, "gaussian": 410}
PAST_2_GIB = "past 2 GiB"  # variants whose table and output are that large
SYMMETRIC = "symmetric "  # begins the variants of symmetric noise; the CUDA kernels are the same for it
BYTES_PER_WARP_LANE = 64  # of a row, as the kernels divide the work; a wavefront of AMD has twice the lanes


def lanes(target: str) -> int:
    """The threads of a warp."""
    return 64 if target.startswith("gfx9") else 32


@dataclass(frozen=True)
class Kernel:
    target: str
    source: str  # "triton" or "cuda"
    op: str
    dtype: str
    variant: str  # which ids, which magnitude; or the path for rows that are not aligned
    code: MachineCode
    noise: str = "uniform"
    symmetric: bool = False

    @property
    def kind_of_noise(self) -> str:
        return f"symmetric {self.noise}" if self.symmetric else self.noise

    @property
    def unaligned(self) -> bool:
        return self.variant.startswith("unaligned")

    @property
    def row_vectors(self) -> int:
        return BYTES_PER_WARP_LANE // 16 * 32 // lanes(self.target)

    @property
    def more_registers(self) -> int:
        """That a thread may have, because all warps fit with 96 on gfx11 and later."""
        return 16 if self.target.startswith(("gfx11", "gfx12")) else 0

    @property
    def other_loads(self) -> int:
        """The seed, and the id and the magnitude of each row that a thread may have to do with."""
        return 1 + 2 * self.row_vectors

    @property
    def philox_calls(self) -> int:
        """For one thread. A call makes the noise of 16 bytes, CUDA's of 32 bytes in fp64, symmetric noise of two rows."""
        return self.row_vectors // (2 if self.symmetric or (self.dtype == "float64" and self.source == "cuda") else 1)


def complaints(kernel: Kernel, max_registers: int, max_multiplies: float) -> Iterator[str]:
    """What is wrong with a kernel, one sentence each."""
    code = kernel.code
    if code.spill_bytes and not (kernel.unaligned and kernel.target in OTHER_TARGETS):
        yield f"spills {code.spill_bytes} bytes of registers to memory"
    if code.fused:
        yield f"fuses a multiply-add {len(code.fused)} times, as in `{code.fused[0]}`: the noise rounds twice"
    if code.flushing:
        yield f"takes subnormal numbers for zero, as in `{code.flushing[0]}`"
    if code.fences:
        yield f"waits for its memory accesses to be seen, as in `{code.fences[0]}`"
    if kernel.unaligned:
        return  # right, but not fast
    if code.shared_bytes:
        yield f"uses {code.shared_bytes} bytes of shared memory, so data moves between threads"
    if code.registers > max_registers + kernel.more_registers:
        yield f"needs {code.registers} registers, more than {max_registers + kernel.more_registers}"
    if code.loads[128] != kernel.row_vectors or sum(code.loads.values()) - code.loads[128] > kernel.other_loads:
        yield f"loads rows not in {kernel.row_vectors} times 16 bytes, but by bits: {widths(code.loads)}"
    elif code.loads_in_flight < kernel.row_vectors and not kernel.variant.startswith(PAST_2_GIB):
        yield f"uses what it loads with {code.loads_in_flight} of {kernel.row_vectors} loads of 16 bytes under way"
    if set(code.stores) != {128}:
        yield f"stores rows not in 16 bytes at a time, but by bits: {widths(code.stores)}"
    if code.multiplies > max_multiplies * kernel.philox_calls:
        calls = kernel.philox_calls
        yield f"multiplies {code.multiplies} times in {calls} calls of Philox, more than {max_multiplies} times a call"
    budget = MAX_SYMMETRIC_INSTRUCTIONS if kernel.symmetric else MAX_INSTRUCTIONS
    most = budget[kernel.noise] * kernel.philox_calls
    if kernel.target.startswith("sm_") and code.instructions > most:
        yield f"has {code.instructions} instructions for {kernel.kind_of_noise} noise, more than {most}"


def widths(accesses: Counter) -> str:
    return " ".join(f"{bits}:{count}" for bits, count in sorted(accesses.items(), reverse=True)) or "none"


# --- Triton ----------------------------------------------------------------------------------------------------------


def requests_of_launch(target: Any, launch: Callable[[], object]) -> list[tuple[Any, dict[str, Any]]]:
    """The kernels that `launch` would compile for `target`, and how."""
    from triton import knobs
    from triton.runtime.driver import driver

    class Stub:
        def get_current_target(self) -> Any:
            return target

        def get_current_device(self) -> str:
            return repr(target)

        def get_current_stream(self, device: str) -> int:
            return 0

    requests = []

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        requests.append((fn.jit_function, compile))
        return True  # and do not compile

    driver.set_active(Stub())
    knobs.runtime.jit_cache_hook = note
    launch()
    return requests


def machine_code(target_name: str, launch: Callable[[], object], options: dict[str, Any]) -> list[MachineCode]:
    """The machine code of the Triton kernels that `launch` launches."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    is_amd = target_name.startswith("gfx")
    architecture: Any = target_name if is_amd else int(target_name.removeprefix("sm_"))
    target = GPUTarget("hip" if is_amd else "cuda", architecture, lanes(target_name))
    codes = []
    for function, request in requests_of_launch(target, launch):
        source = ASTSource(function, request["signature"], request["constants"], request["configs"][0])
        launched = json.loads(request["specialization_data"])["options"]
        names = {"num_warps", "num_ctas", "num_stages", "enable_fp_fusion", "maxnreg"} & launched.keys()
        compiled = compile(source, target=target, options={name: launched[name] for name in names} | options)
        if is_amd:
            codes.append(from_amdgcn(compiled.asm["amdgcn"], compiled.asm["llir"]))
        else:
            with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
                cubin.write(compiled.asm["cubin"])
                cubin.flush()
                codes += [code for _, _, code in disassemble(cubin.name)]
    return codes


def check_triton(
    target_name: str, dtype_name: str, width: int, ops: Sequence[str], options: dict[str, Any]
) -> list[Kernel]:
    import torch

    from neft_kernels.ops import triton_noise

    rows, seed = torch.zeros(64, width, dtype=getattr(torch, dtype_name)), torch.zeros(1, dtype=torch.int64)
    launches: dict[tuple[str, str], Callable[[], object]] = {}
    for magnitude, per_token in (("one magnitude", None), ("one per token", torch.zeros(64))):
        noise = (seed, per_token, 0.1, 0, 0)
        launches["add_noise", magnitude] = partial(triton_noise.add_noise, rows, *noise)
        for ids_name in ("int64", "int32"):
            ids = torch.zeros(64, dtype=getattr(torch, ids_name))
            variant = f"{ids_name}, {magnitude}"
            launches["noisy_embedding", variant] = partial(triton_noise.noisy_embedding, ids, rows, *noise)
    for kind, name in enumerate(NOISES):
        of_pairs = (seed, torch.zeros(64), 0.1, 0, 0, kind, True)
        launches["noisy_embedding", f"{SYMMETRIC}{name}"] = partial(triton_noise.noisy_embedding, ids, rows, *of_pairs)
        if name == NOISES[0]:
            launches["add_noise", f"{SYMMETRIC}{name}"] = partial(triton_noise.add_noise, rows, *of_pairs)
    for kind, name in enumerate(NOISES[1:], start=1):
        of_kind = partial(triton_noise.noisy_embedding, noise=kind), partial(triton_noise.add_noise, noise=kind)
        noise = (seed, torch.zeros(64), 0.1, 0, 0)
        launches["noisy_embedding", f"{name}, {ids_name}"] = partial(of_kind[0], ids, rows, *noise)
        launches["add_noise", name] = partial(of_kind[1], rows, *noise)
    # AMD's backend compiles other code for these. Their memory is never touched.
    element_size = rows.element_size()
    large = torch.empty((1 << 31) // element_size + rows.numel(), dtype=rows.dtype)[: rows.numel()].view(rows.shape)
    many = torch.zeros(1, dtype=torch.int64).expand((1 << 31) // (width * element_size) + 1).contiguous()
    noise = (seed, None, 0.1, 0, 0)
    launches["noisy_embedding", PAST_2_GIB] = partial(triton_noise.noisy_embedding, many, large, *noise)
    # Where no vector fits; and where a row is narrower than one.
    for variant, odd in (("unaligned", rows[:, 1 : width - 1 : 2]), ("unaligned column", rows[:, :1].contiguous())):
        launches["add_noise", variant] = partial(triton_noise.add_noise, odd, *noise)
        launches["noisy_embedding", variant] = partial(triton_noise.noisy_embedding, ids, odd, *noise)

    kernels = []
    for (op, variant), launch in launches.items():
        if op not in ops:
            continue
        (code,) = machine_code(target_name, launch, options)
        kind_of_noise = variant.removeprefix(SYMMETRIC)
        noise_kind = next((kind for kind in NOISES if kind_of_noise.startswith(kind)), NOISES[0])
        name = f"{variant}, width {rows.shape[1]}"
        symmetric = variant.startswith(SYMMETRIC)
        kernels.append(Kernel(target_name, "triton", op, dtype_name, name, code, noise_kind, symmetric))
    return kernels


def check_magnitude(target_name: str) -> list[str]:
    """What is wrong with the kernel for magnitudes, which has no budget: it has to compile, and neither spill nor wait."""
    import torch

    from neft_kernels.ops import triton_magnitude

    found = []
    zeros = torch.zeros(4, 5000, dtype=torch.int64)
    for name, mask, positions in (("mask", zeros, None), ("positions", None, zeros), ("both", zeros, zeros)):
        (code,) = machine_code(target_name, partial(triton_magnitude.token_magnitude, mask, positions, 5.0, 4096), {})
        if code.spill_bytes:
            found.append(f"triton token_magnitude for {target_name} ({name}) spills {code.spill_bytes} bytes")
        if code.fences:
            found.append(f"triton token_magnitude for {target_name} ({name}) waits, as in `{code.fences[0]}`")
    return found


# --- CUDA ------------------------------------------------------------------------------------------------------------


def nvcc(*flags: str) -> list[str]:
    """The command that compiles a file of csrc/cuda; without -fmad=false, because the sources do not rely on it."""
    import torch  # its cpp_extension, which knows the folder too, warns of a machine without a GPU

    headers = Path(torch.__file__).parent / "include"
    command = ["nvcc", "-std=c++17", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020A000000000000", *flags]
    return [*command, f"-I{headers}", "-Xcompiler", "-fPIC"]


def check_cuda(source: Path, targets: list[str], flags: list[str]) -> list[Kernel]:
    command = nvcc("-Xptxas", "-v", *flags)
    for target in targets:
        command += ["-gencode", f"arch={target.replace('sm', 'compute')},code={target}"]
    with tempfile.TemporaryDirectory() as folder:
        target_file = str(Path(folder) / "kernels.o")
        result = subprocess.run([*command, "-c", "-o", target_file, str(source)], capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(f"nvcc cannot compile {source.name}:\n{result.stderr}")
        kernels = []
        for target, name, code in disassemble(target_file):
            constants = r"(Fp32|Fp64|Fp16|Bf16)ELNS_9NoiseKindE(\d)ELb([01])ENS_\d+RowOf(?:Id)?(\w)"
            element, kind, aligned, ids = re.search(constants, name).groups()  # type: ignore[union-attr]
            variant = {"i": "int32", "l": "int64"}.get(ids, "any") if aligned == "1" else "unaligned"
            kernels.append(Kernel(target, "cuda", source.stem, CUDA_DTYPES[element], variant, code, NOISES[int(kind)]))
    return kernels


# --- the table and the verdict ---------------------------------------------------------------------------------------

HEADER = (
    "target",
    "kernel",
    "op",
    "dtype",
    "noise",
    "path",
    "regs",
    "spill",
    "shared",
    "loads",
    "ahead",
    "stores",
    "mul",
    "instr",
    "fused",
)

LEGEND = """
loads, stores: bits:count, of one thread; the seed, the id and the magnitude are the loads of less than 128 bits. ahead: the
loads of 128 bits that are under way when what one of them loads is used. mul, instr: wide integer multiplications and all
instructions, for one call of Philox, that is for 16 bytes of a row (CUDA in fp64: 32; symmetric: of two rows). fused:
multiply-adds that could round otherwise than the contract says, so not the exact ones that make numbers of half-words."""


def print_table(kernels: list[Kernel]) -> None:
    """One row for all variants of a kernel: the largest of each number."""
    groups: dict[tuple[str, ...], list[Kernel]] = {}
    for kernel in kernels:
        path = "unaligned" if kernel.unaligned else "16 bytes"
        of_kernel = (kernel.target, kernel.source, kernel.op, kernel.dtype, kernel.kind_of_noise, path)
        groups.setdefault(of_kernel, []).append(kernel)
    rows: list[tuple[str, ...]] = [HEADER]
    for key, variants in groups.items():
        codes, calls = [kernel.code for kernel in variants], variants[0].philox_calls
        most = max(codes, key=lambda code: sum(code.loads.values()))
        rows.append(
            (
                *key,
                str(max(code.registers for code in codes)),
                str(max(code.spill_bytes for code in codes)),
                str(max(code.shared_bytes for code in codes)),
                widths(most.loads),
                str(min(code.loads_in_flight for code in codes)),
                widths(most.stores),
                f"{max(code.multiplies for code in codes) / calls:.1f}",
                f"{max(code.instructions for code in codes) / calls:.0f}",
                str(max(len(code.fused) for code in codes)),
            )
        )
    columns = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, columns, strict=True)).rstrip())
    print(LEGEND)


def widths_of(target: str, dtype: str, quick: bool) -> tuple[int, ...]:
    """The widths to check."""
    if target in OTHER_TARGETS:
        return WIDTHS[dtype][:1]
    return WIDTHS[dtype][:: 2 if quick else 1]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two GPUs, and fewer element types of Triton's kernels")
    parser.add_argument("--target", action="append", choices=TARGETS, help="instead of all; can be repeated")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="likewise, of Triton's kernels")
    parser.add_argument("--op", action="append", choices=OPS, help="likewise, and no magnitudes")
    parser.add_argument("--no-nvcc", action="store_true", help="leave the CUDA kernels out")
    parser.add_argument("--no-triton", action="store_true", help="leave the Triton kernels out")
    # 80 registers leave room for 24 warps on a multiprocessor, so for 48 KB of loads in flight.
    parser.add_argument("--max-registers", type=int, default=80)
    # Philox is 20 wide multiplications, and a few address the rows.
    parser.add_argument("--max-multiplies", type=float, default=25, help="for one call of Philox")
    parser.add_argument(
        "--width", type=int, action="append", help="of the embeddings, instead of those of several tiles"
    )
    parser.add_argument("--triton-option", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--nvcc-flag", action="append", default=[], metavar="FLAG")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    os.environ.pop("TRITON_INTERPRET", None)  # for the processes below: an interpreted kernel cannot be compiled
    targets = options.target or (QUICK_TARGETS if options.quick else TARGETS)
    dtypes = options.dtype or (QUICK_DTYPES if options.quick else DTYPES)
    triton_options = dict(option.split("=") for option in options.triton_option)
    triton_options = {name: ast.literal_eval(value) for name, value in triton_options.items()}
    ops = options.op or OPS
    problems = []
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        jobs = []
        if shutil.which("nvcc") and not options.no_nvcc:
            # Those that setup.py builds for.
            nvidia = [target for target in targets if target.startswith("sm_") and target in MAIN_TARGETS]
            sources = [ROOT / "csrc" / "cuda" / f"{op}.cu" for op in ops]
            jobs += [pool.submit(check_cuda, source, nvidia, options.nvcc_flag) for source in sources]
        elif not options.no_nvcc:
            problems.append("nvcc is not on the PATH, so the CUDA kernels WERE NOT CHECKED (--no-nvcc leaves them out)")
        if not options.no_triton:
            for_triton = [target for target in targets if target != TURING]
            jobs += [
                pool.submit(check_triton, target, dtype, width, ops, triton_options)
                for target in for_triton
                for dtype in dtypes
                for width in options.width or widths_of(target, dtype, options.quick)
            ]
            magnitudes = [pool.submit(check_magnitude, target) for target in for_triton if not options.op]
            problems += [problem for job in magnitudes for problem in job.result()]
        kernels = [kernel for job in jobs for kernel in job.result()]
    kernels.sort(key=lambda kernel: (kernel.source, targets.index(kernel.target), kernel.op, kernel.unaligned))

    print_table(kernels)
    for kernel in kernels:
        for complaint in complaints(kernel, options.max_registers, options.max_multiplies):
            what = f"{kernel.kind_of_noise} {kernel.dtype}"
            name = f"{kernel.source} {kernel.op} for {kernel.target}, {what} ({kernel.variant})"
            problems.append(f"{name} {complaint}")
    if not kernels:
        problems.append("nothing was checked")
    for problem in problems:
        print(f"check-gpu: {problem}", file=sys.stderr)
    if problems:
        sys.exit(1)
    print(f"\n{len(kernels)} kernels are as they should be.")


if __name__ == "__main__":
    main()
