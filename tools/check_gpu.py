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
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from neft_kernels.ops.reference import NOISE_KINDS
from tools.compiled_kernels import (
    MAIN_TARGETS,
    PAST_2_GIB,
    SYMMETRIC,
    TARGETS,
    TURING,
    Kernel,
    complaints,
    lanes,
    print_table,
    widths_of,
)
from tools.machine_code import MachineCode, disassemble, from_amdgcn

ROOT = Path(__file__).resolve().parent.parent
QUICK_TARGETS = ("sm_90", "gfx942")
DTYPES = ("float32", "float64", "float16", "bfloat16")
OPS = ("noisy_embedding", "add_noise")
QUICK_DTYPES = ("float64", "bfloat16")
CUDA_DTYPES = {"Fp32": "float32", "Fp64": "float64", "Fp16": "float16", "Bf16": "bfloat16"}


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
    for kind, name in enumerate(NOISE_KINDS):
        of_pairs = (seed, torch.zeros(64), 0.1, 0, 0, kind, True)
        launches["noisy_embedding", f"{SYMMETRIC}{name}"] = partial(triton_noise.noisy_embedding, ids, rows, *of_pairs)
        if name == NOISE_KINDS[0]:
            launches["add_noise", f"{SYMMETRIC}{name}"] = partial(triton_noise.add_noise, rows, *of_pairs)
    for kind, name in enumerate(NOISE_KINDS[1:], start=1):
        of_kind = (seed, torch.zeros(64), 0.1, 0, 0, kind)
        launches["noisy_embedding", f"{name}, {ids_name}"] = partial(triton_noise.noisy_embedding, ids, rows, *of_kind)
        launches["add_noise", name] = partial(triton_noise.add_noise, rows, *of_kind)
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
        noise_kind = next((kind for kind in NOISE_KINDS if kind_of_noise.startswith(kind)), NOISE_KINDS[0])
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
            kernels.append(
                Kernel(target, "cuda", source.stem, CUDA_DTYPES[element], variant, code, NOISE_KINDS[int(kind)])
            )
    return kernels


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
