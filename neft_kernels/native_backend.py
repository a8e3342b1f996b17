"""The noise contract in C++ and CUDA: loads the compiled extensions, whose loading registers their kernels.

``csrc/cpu`` becomes ``_C_cpu``, the kernels for tensors on the CPU; ``csrc/cuda`` becomes ``_C_cuda``, those for CUDA
tensors. They are separate objects, because the second one cannot be loaded where torch was built without CUDA. Both keep to
torch's stable ABI.
"""

import importlib
from pathlib import Path
from types import ModuleType

__all__ = ["INSTRUCTION_SETS", "load"]

INSTRUCTION_SETS = ("avx512", "avx2", "portable")

NOT_BUILT = "the extension was not built"
_SWITCH = {"cpu": "cpu", "cuda": "1"}


def load(name: str) -> tuple[ModuleType | None, str | None]:
    """Loads extension `name`, "cpu" or "cuda": the module and None, or None and the reason why it cannot be loaded."""
    try:
        return importlib.import_module(f"neft_kernels._C_{name}"), None
    except ModuleNotFoundError:
        folder = Path(__file__).parent
        editable = "--editable " if (folder.parent / "setup.py").exists() else ""
        build = f"NEFT_KERNELS_BUILD={_SWITCH[name]} pip install --no-build-isolation {editable}."
        return None, f"{NOT_BUILT} in {folder}; build it in a checkout: {build}"
    except ImportError as error:
        return None, f"the extension does not load: {error}"
