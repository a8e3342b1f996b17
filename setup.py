"""Builds the compiled backends where it can; metadata is in pyproject.toml.

``NEFT_KERNELS_BUILD`` decides: unset, build what torch and the compilers here allow and say what was left out; ``1``, build
the CPU extension, and the CUDA one where torch has CUDA, or fail; ``cpu``, build the CPU extension alone, or fail; ``0``,
build nothing. The extensions keep to torch's stable ABI and to Python's: one binary serves torch >= 2.10 and Python >= 3.10.
"""

import os
import sys
from pathlib import Path

from setuptools import setup

SWITCH = "NEFT_KERNELS_BUILD"
TORCH_TARGET_VERSION = "0x020A000000000000"  # torch 2.10, the oldest whose stable ABI has all that is used
PY_LIMITED_API = "0x030A0000"  # Python 3.10
CUDA_ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"

COMMON = [
    "-O3",
    "-std=c++17",
    "-g0",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # the noise contract: no fused multiply-add
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
    f"-DPy_LIMITED_API={PY_LIMITED_API}",
]


def sources(folder: str) -> list[str]:
    return sorted(str(path) for pattern in ("*.cpp", "*.cu") for path in Path("csrc", folder).glob(pattern))


def headers() -> list[str]:
    return sorted(str(path) for pattern in ("*.h", "*.cuh") for path in Path("csrc").rglob(pattern))


def extensions() -> dict:
    """The keyword arguments of setup() that build the extensions."""
    wanted = os.environ.get(SWITCH, "")
    if wanted not in ("", "0", "1", "cpu"):
        raise SystemExit(f"{SWITCH} must be 0, 1, cpu or unset, not {wanted!r}")
    if wanted == "0":
        return {}
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        if wanted:
            raise SystemExit(
                f"{SWITCH}={wanted}, but torch cannot be imported at build time ({error}). Install torch first and build with "
                "`pip install --no-build-isolation`."
            ) from error
        print("neft_kernels: no torch at build time, so this is a pure-Python build", file=sys.stderr)
        return {}

    cpu = cpp_extension.CppExtension(
        "neft_kernels.ops._C_cpu",
        sources("cpu"),
        depends=headers(),
        extra_compile_args=COMMON,
        py_limited_api=True,
        optional=not wanted,
    )
    modules = [cpu]
    if wanted == "1" and has_cuda() and not cpp_extension.CUDA_HOME:
        raise SystemExit(
            f"{SWITCH}=1, and torch has CUDA, but no CUDA toolkit is found (CUDA_HOME, nvcc). {SWITCH}=cpu builds without it: "
            "on GPUs the noise then comes from Triton."
        )
    if wanted != "cpu" and cpp_extension.CUDA_HOME and has_cuda():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
        cuda = cpp_extension.CUDAExtension(
            "neft_kernels.ops._C_cuda",
            sources("cuda"),
            depends=headers(),
            extra_compile_args={"cxx": [*COMMON, "-DUSE_CUDA"], "nvcc": nvcc_arguments()},
            py_limited_api=True,
            optional=not wanted,
        )
        modules.append(cuda)
    elif not wanted and has_cuda():
        print("neft_kernels: no CUDA toolkit, so the CUDA extension is left out", file=sys.stderr)
    return {
        "ext_modules": modules,
        "cmdclass": {"build_ext": cpp_extension.BuildExtension.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def has_cuda() -> bool:
    import torch

    return torch.version.cuda is not None


def nvcc_arguments() -> list[str]:
    host = ("-fvisibility=hidden", "-ffp-contract=off")
    macros = [argument for argument in COMMON if argument.startswith("-D")]
    return ["-O3", "-std=c++17", "-fmad=false", "-DUSE_CUDA", *macros, *(f"-Xcompiler={flag}" for flag in host)]


setup(**extensions())
