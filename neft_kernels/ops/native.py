"""Loads the C++ and CUDA extensions. Loading an extension registers its kernels with PyTorch.

``csrc/cpu`` is compiled to ``_C_cpu``, the kernels for CPU tensors, and ``csrc/cuda`` to ``_C_cuda``, those for CUDA tensors.
They are separate files, because ``_C_cuda`` cannot be loaded where torch was built without CUDA. Both use torch's stable ABI.
"""

import functools
import importlib
from types import ModuleType

__all__ = ["INSTRUCTION_SETS", "load"]

INSTRUCTION_SETS = ("avx512", "avx2", "portable")


@functools.cache
def load(name: str) -> tuple[ModuleType | None, str]:
    """Loads extension `name`, "cpu" or "cuda". Returns the module and "", or None and the reason why it does not load."""
    try:
        return importlib.import_module(f"._C_{name}", __package__), ""
    except ModuleNotFoundError:
        return None, "the extension was not built (NEFT_KERNELS_BUILD=1 at installation makes that an error)"
    except ImportError as error:
        return None, f"the extension does not load: {error}"
