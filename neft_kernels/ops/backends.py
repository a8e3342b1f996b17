"""Which backend runs, and the environment variables that the package reads at run time."""

import functools
import importlib.util
import logging
import os
from dataclasses import dataclass
from typing import Any

import torch

from . import native
from .checks import check_choice

__all__ = ["BACKENDS", "Backend", "available_backends", "choose_backend", "extensions", "logger", "switches"]

logger = logging.getLogger("neft_kernels")

BACKENDS = ("triton", "cuda", "cpu", "reference")  # in order of preference
_KERNELS = {"cpu": ("cpu",), "cuda": ("triton", "cuda"), "xpu": ("triton",)}  # by device type


@dataclass
class Switches:
    """The environment variables that are read at run time, once, at import. The documentation lists them."""

    backend: str | None  # NEFT_KERNELS_BACKEND
    check_ids: bool  # NEFT_KERNELS_CHECK_IDS
    instruction_set: str | None  # NEFT_KERNELS_INSTRUCTION_SET
    interpret_triton: bool  # TRITON_INTERPRET, Triton's own

    @classmethod
    def from_environment(cls) -> "Switches":
        """Raises ValueError if a variable has a value that it cannot have."""
        return cls(
            backend=_choice("NEFT_KERNELS_BACKEND", BACKENDS),
            check_ids=os.environ.get("NEFT_KERNELS_CHECK_IDS", "0") == "1",
            instruction_set=_choice("NEFT_KERNELS_INSTRUCTION_SET", native.INSTRUCTION_SETS),
            interpret_triton=os.environ.get("TRITON_INTERPRET", "0") == "1",
        )


def _choice(variable: str, choices: tuple[str, ...]) -> str | None:
    value = os.environ.get(variable) or None
    if value is not None:
        check_choice(variable, value, choices)
    return value


switches = Switches.from_environment()

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
#: The loaded extension or None, and the reason for None, by backend.
extensions: dict[str, tuple[Any, str]] = {
    "cpu": native.load("cpu"),
    "cuda": native.load("cuda") if torch.version.cuda else (None, "torch has no CUDA"),
}
if extensions["cpu"][0] is not None and switches.instruction_set is not None:
    extensions["cpu"][0].cap_instruction_set(switches.instruction_set)


@dataclass(frozen=True)
class Backend:
    """One backend, as :func:`available_backends` describes it."""

    name: str
    #: Device types that it runs on here, such as ``("cpu",)``. Empty if it cannot run.
    devices: tuple[str, ...]
    #: Device types for which it is the automatic choice.
    chosen_for: tuple[str, ...]
    #: How it runs, or why it cannot.
    detail: str


def available_backends() -> list[Backend]:
    """Every backend: where it can run here, for which devices it is chosen, and why it cannot run elsewhere."""
    found = []
    for name in BACKENDS:
        devices = devices_of(name)
        chosen_for = tuple(device for device in devices if name == (switches.backend or _automatic(device)))
        found.append(Backend(name, devices, chosen_for, _detail(name)))
    return found


@functools.cache
def triton_has(vendor: str) -> bool:
    """Whether the installed Triton compiles for GPUs of `vendor`. This imports Triton."""
    from triton.backends import backends

    return vendor in backends


def devices_of(backend: str) -> tuple[str, ...]:
    """The device types that `backend` runs on here. torch.compile traces this."""
    cuda = ("cuda",) if torch.cuda.is_available() else ()
    xpu = ("xpu",) if torch.xpu.is_available() else ()
    if backend == "reference":
        return ("cpu", *cuda, *xpu)  # and on any other device
    if backend in extensions:
        return (("cpu",) if backend == "cpu" else cuda) if extensions[backend][0] is not None else ()
    if not TRITON_INSTALLED:
        return ()
    accelerators = (*cuda, *(xpu if xpu and triton_has("intel") else ()))
    return ("cpu", *accelerators) if switches.interpret_triton else accelerators


def _detail(backend: str) -> str:
    """How `backend` runs here, or why it does not."""
    if backend == "reference":
        return "plain torch; slow"
    extension, why_not = extensions.get(backend, (None, ""))
    if why_not:
        return why_not
    if backend == "cpu":
        return extension.instruction_set()
    if backend == "triton" and not TRITON_INSTALLED:
        return 'triton is not installed: pip install "neft-kernels[triton]"'
    if backend == "triton" and switches.interpret_triton:
        return "interpreted, because TRITON_INTERPRET=1; very slow"
    if not devices_of(backend):
        return "no GPU"
    return "CUDA C++" if backend == "cuda" else "just-in-time compiled"


def _automatic(device_type: str) -> str:
    for name in BACKENDS:
        if device_type in devices_of(name) and not (name == "triton" and switches.interpret_triton):
            return name
    return "reference"


_chosen: dict[tuple[str, str | None], str] = {}


def choose_backend(device_type: str, backend: str | None = None) -> str:
    """The backend that runs on tensors of `device_type`: `backend` if it is given, else the best one.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: `backend` cannot run here. The message says why.
    """
    if torch.compiler.is_compiling():  # not cached: the graph would depend on the contents of the dictionary
        return _choose(device_type, backend)
    choice = _chosen.get((device_type, backend))
    if choice is None:
        choice = _chosen[device_type, backend] = _choose(device_type, backend)
        if backend is None:
            is_slow = choice == "reference" and switches.backend is None and device_type != "meta"
            why_not = _why_no_kernel(device_type) if is_slow else ""
            log = logger.warning if is_slow else logger.info
            log("backend %r for %s tensors: %s%s", choice, device_type, _detail(choice), why_not)
    return choice


def _why_no_kernel(device_type: str) -> str:
    """Why only the reference runs on `device_type`, to follow a sentence."""
    if device_type not in _KERNELS:
        return f"; there is no kernel for {device_type} devices"
    return "".join(f"; {name}: {_detail(name)}" for name in _KERNELS[device_type])


def _choose(device_type: str, asked_for: str | None) -> str:
    backend = asked_for or switches.backend or _automatic(device_type)
    check_choice("backend", backend, BACKENDS)
    devices = devices_of(backend)
    if device_type not in (*devices, "meta") and backend != "reference":
        where = f"runs on {', '.join(devices)} tensors, not on {device_type} ones" if devices else "cannot run here"
        raise RuntimeError(f"backend={backend!r} {where} ({_detail(backend)})")
    return backend


def forget_choices() -> None:
    """Clears the cached choices. Call it after a change of what can run."""
    _chosen.clear()
    automatic_backend.cache_clear()


@functools.cache
def automatic_backend(device_type: str, backend: str | None) -> str | None:
    """As :func:`choose_backend`, without an error or a log message: None if the backend cannot run on `device_type`."""
    name = backend or switches.backend or _automatic(device_type)
    return name if device_type in devices_of(name) else None
