"""Builds the compiled backends where it can; metadata is in pyproject.toml.

``NEFT_KERNELS_BUILD`` decides: unset, build what torch and the compilers here allow and say what was left out; ``1``, build
the CPU extension, and the CUDA one where torch has CUDA, or fail; ``cpu``, build the CPU extension alone, or fail; ``0``,
build nothing. The extensions keep to torch's stable ABI and to Python's: one binary serves torch >= 2.10 and Python >= 3.10.
The CUDA extension links to the CUDA runtime, so it serves one major version of CUDA.

``CUDA_HOME`` names the CUDA toolkit; unset, the one that nvcc on the PATH belongs to, or the usual one. ninja, where it is
installed, compiles several sources at a time, ``MAX_JOBS`` at most.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.errors import CompileError

SWITCH = "NEFT_KERNELS_BUILD"
TORCH_TARGET_VERSION = "0x020A000000000000"  # torch 2.10, the oldest whose stable ABI has all that is used
PY_LIMITED_API = "0x030A0000"  # Python 3.10
CUDA_ARCHITECTURES = "7.5;8.0;9.0;10.0;12.0+PTX"
USUAL_CUDA_HOME = "/usr/local/cuda"

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
    found = [str(path) for pattern in ("*.cpp", "*.cu") for path in Path("csrc", folder).glob(pattern)]
    return sorted([*found, "csrc/glibc.cpp"])


def headers() -> list[str]:
    return sorted(str(path) for pattern in ("*.h", "*.cuh") for path in Path("csrc").rglob(pattern))


def cuda_toolkit(cuda_version: str) -> tuple[Path, Path]:
    """The home of a CUDA toolkit of `cuda_version`'s major version, and its folder with libcudart.

    torch takes the folder above nvcc's for the home. A link or a wrapper script to nvcc then leads to a folder without
    libcudart, which the linker would notice after minutes of compiling.
    """
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    if named:
        homes = [Path(named)]
    else:
        beside_nvcc = [Path(nvcc).parent.parent, Path(nvcc).resolve().parent.parent] if nvcc else []
        homes = [*beside_nvcc, Path(USUAL_CUDA_HOME)]
    major = cuda_version.partition(".")[0]
    for home in homes:
        for pattern in ("lib64", "lib", "targets/*/lib", "lib/*-linux-gnu"):
            for folder in home.glob(pattern):
                of_that_major = (folder / "libcudart.so").exists() and any(folder.glob(f"libcudart.so.{major}*"))
                if of_that_major and (home / "bin" / "nvcc").exists():
                    return home, folder
    looked_in = ", ".join(map(str, dict.fromkeys(homes)))
    raise LookupError(
        f"no CUDA {major} toolkit with bin/nvcc and libcudart.so.{major} in {looked_in}; set CUDA_HOME to the folder of one "
        f"(torch has CUDA {cuda_version})"
    )


def extensions() -> dict:
    """The keyword arguments of setup() that build the extensions."""
    # For the ninja of an environment that is not activated.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    wanted = os.environ.get(SWITCH, "")
    if wanted not in ("", "0", "1", "cpu"):
        raise SystemExit(f"{SWITCH} must be 0, 1, cpu or unset, not {wanted!r}")
    if wanted == "0":
        return {}
    try:
        import torch
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
    if wanted != "cpu" and torch.version.cuda:
        try:
            cuda_home, cudart_folder = cuda_toolkit(torch.version.cuda)
        except LookupError as error:
            if wanted:
                raise SystemExit(
                    f"{SWITCH}=1 builds the CUDA extension, but there is {error}. {SWITCH}=cpu builds without it: on GPUs the "
                    "noise then comes from Triton."
                ) from error
            print(f"neft_kernels: the CUDA extension is left out: {error}", file=sys.stderr)
        else:
            cpp_extension.CUDA_HOME = str(cuda_home)
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
            cuda = cpp_extension.CUDAExtension(
                "neft_kernels.ops._C_cuda",
                sources("cuda"),
                depends=headers(),
                extra_compile_args={"cxx": [*COMMON, "-DUSE_CUDA"], "nvcc": nvcc_arguments()},
                library_dirs=[str(cudart_folder)],
                py_limited_api=True,
                optional=not wanted,
            )
            modules.append(cuda)

    class BuildExtension(cpp_extension.BuildExtension):
        def build_extensions(self) -> None:
            """torch checks first whether the C++ compiler is there and fits nvcc. That concerns the CUDA extension alone."""
            try:
                super().build_extensions()
            except RuntimeError as error:
                if wanted or self.extensions == [cpu]:
                    raise
                print(f"neft_kernels: the CUDA extension is left out: {error}", file=sys.stderr)
                self.extensions = [cpu]
                super().build_extensions()

        def build_extension(self, ext) -> None:
            """setuptools leaves out an optional extension at its own errors only, and ninja's failure is a RuntimeError."""
            try:
                super().build_extension(ext)
            except RuntimeError as error:
                raise CompileError(str(error)) from error

    return {
        "ext_modules": modules,
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def nvcc_arguments() -> list[str]:
    host = ("-fvisibility=hidden", "-ffp-contract=off")
    macros = [argument for argument in COMMON if argument.startswith("-D")]
    arguments = ["-O3", "-std=c++17", "-fmad=false", "-DUSE_CUDA", *macros, *(f"-Xcompiler={flag}" for flag in host)]
    return [*arguments, "--threads=0"]  # the architectures side by side, as many as there are cores


setup(**extensions())
