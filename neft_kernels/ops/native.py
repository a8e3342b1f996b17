"""Loads the C++ and CUDA extensions, and registers their kernels with PyTorch.

``csrc/cpu`` is compiled to ``_C_cpu``, the kernels for CPU tensors, and ``csrc/cuda`` to ``_C_cuda``, those for CUDA tensors.
They are separate files, because ``_C_cuda`` cannot be loaded where torch was built without CUDA. Both use torch's stable ABI.
"""

import functools
import importlib
from pathlib import Path
from types import ModuleType

__all__ = ["INSTRUCTION_SETS", "INTERFACE", "NAMESPACE", "load"]

#: Of the ops in ``torch.ops``: the name of the outermost package. A copy of this folder under another name, as on the Hugging
#: Face Hub, thus has ops of its own.
NAMESPACE = (__package__ or "").partition(".")[0]

INSTRUCTION_SETS = ("avx512", "avx2", "portable")

NOT_BUILT = "the extension was not built"
#: Counts the changes of what the kernels are given: raise it, and `kInterface` of csrc/module.h, with a schema of
#: registration.py.
INTERFACE = 2

_SWITCH = {"cpu": "cpu", "cuda": "1"}


@functools.cache
def load(name: str) -> tuple[ModuleType | None, str]:
    """Loads extension `name`, "cpu" or "cuda". Returns the module and "", or None and the reason why it does not load."""
    try:
        extension = importlib.import_module(f"._C_{name}", __package__)
    except ModuleNotFoundError:
        package = Path(__file__).parent.parent
        editable = "--editable " if (package.parent / "setup.py").exists() else ""
        build = f"NEFT_KERNELS_BUILD={_SWITCH[name]} pip install --no-build-isolation {editable}."
        return None, f"{NOT_BUILT} in {package}; build it in a checkout: {build}"
    except ImportError as error:
        return None, f"the extension does not load: {error}"
    if getattr(extension, "INTERFACE", None) != INTERFACE:
        return None, "the extension is of another version of the package; build it again"
    extension.register_kernels(NAMESPACE)
    return extension, ""
