"""The two ops as PyTorch sees them: schema, backends and the choice among them, fake implementations, checks.

``torch.ops.neft_kernels.noisy_embedding`` and ``.add_noise`` have one overload per backend, all of one schema and all pure
functions: given the seed tensor they draw nothing. An overload is called directly by whoever has chosen its backend, so a
compiled graph names the backend that it was traced with.
"""

import functools
import importlib.util
import logging
import math
import numbers
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neft_kernels import native_backend, reference

__all__ = ["BACKENDS", "Backend", "available_backends", "choose_backend"]

logger = logging.getLogger("neft_kernels")

BACKENDS = ("triton", "cuda", "cpu", "reference")  # in order of preference

_KERNELS = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}

_SCHEMAS = {
    "noisy_embedding": "(Tensor input_ids, Tensor weight, Tensor seed, Tensor? token_magnitude, float magnitude, "
    "int stream, SymInt first_token) -> Tensor",
    "add_noise": "(Tensor embeds, Tensor seed, Tensor? token_magnitude, float magnitude, int stream, "
    "SymInt first_token) -> Tensor",
}

# Every switch of the package that is read at run time. The README lists them.
_CHECK_IDS = os.environ.get("NEFT_KERNELS_CHECK_IDS", "0") == "1"
_PREFERRED_BACKEND = os.environ.get("NEFT_KERNELS_BACKEND") or None
_INSTRUCTION_SET = os.environ.get("NEFT_KERNELS_INSTRUCTION_SET") or None
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_INTERPRET_TRITON = os.environ.get("TRITON_INTERPRET", "0") == "1"  # Triton's own switch


# --- schema, implementations and fakes -------------------------------------------------------------------------------

_library = torch.library.Library("neft_kernels", "DEF")


def _fake_noisy_embedding(input_ids: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return weight.new_empty((*input_ids.shape, weight.shape[1]))


def _fake_add_noise(embeds: Tensor, *_: Any) -> Tensor:
    return torch.empty(embeds.shape, dtype=embeds.dtype, device=embeds.device)


def _fake_token_magnitude(attention_mask: Tensor | None, position_ids: Tensor | None, *_: Any) -> Tensor:
    given = position_ids if attention_mask is None else attention_mask
    assert given is not None
    return given.new_empty(given.shape, dtype=torch.float32)


_FAKES: dict[str, Callable[..., Tensor]] = {"noisy_embedding": _fake_noisy_embedding, "add_noise": _fake_add_noise}


def _checked(implementation: Callable[..., Tensor], op: str) -> Callable[..., Tensor]:
    """`implementation` behind the checks of values, which the C++ kernels make themselves."""

    def checked(*args: Any) -> Tensor:
        token_magnitude, magnitude = args[-4], args[-3]
        data = args[0]
        # On an accelerator, looking at values would stop the host.
        if data.device.type == "cpu":
            _check_magnitude_values(token_magnitude, magnitude)
        if op == "noisy_embedding" and (data.device.type == "cpu" or _CHECK_IDS):
            _check_ids(data, args[1].shape[0])
        return implementation(*args)

    return checked


def _triton(op: str) -> Callable[..., Tensor]:
    @functools.cache
    def load() -> Callable[..., Tensor]:
        from neft_kernels import triton_backend

        return getattr(triton_backend, op)

    return lambda *args: load()(*args)


def _token_magnitude(*args: Any) -> Tensor:
    from neft_kernels import triton_magnitude

    return triton_magnitude.token_magnitude(*args)


#: The backends that compute magnitudes in one kernel; the others do it in plain torch, see magnitude.py.
MAGNITUDE_BACKENDS = ("triton", "cpu")
for _backend in MAGNITUDE_BACKENDS:
    _library.define(
        f"token_magnitude.{_backend}(Tensor? attention_mask, Tensor? position_ids, float alpha, int embedding_dim) -> Tensor",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    torch.library.register_fake(f"neft_kernels::token_magnitude.{_backend}", _fake_token_magnitude, lib=_library)
_library.impl("token_magnitude.triton", _token_magnitude, "CompositeExplicitAutograd")

for _op, _schema in _SCHEMAS.items():
    for _backend in BACKENDS:
        _library.define(f"{_op}.{_backend}{_schema}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"neft_kernels::{_op}.{_backend}", _FAKES[_op], lib=_library)
    for _backend, _implementation in (("reference", getattr(reference, _op)), ("triton", _triton(_op))):
        _library.impl(f"{_op}.{_backend}", _checked(_implementation, _op), "CompositeExplicitAutograd")

_cpu_extension, _cpu_error = native_backend.load("cpu")
_cuda_extension, _cuda_error = native_backend.load("cuda") if torch.version.cuda else (None, "torch has no CUDA")
if _cpu_extension is not None and _INSTRUCTION_SET is not None:
    if _INSTRUCTION_SET not in native_backend.INSTRUCTION_SETS:
        known = ", ".join(native_backend.INSTRUCTION_SETS)
        raise ValueError(f"NEFT_KERNELS_INSTRUCTION_SET must be one of {known}, not {_INSTRUCTION_SET!r}")
    _cpu_extension.cap_instruction_set(_INSTRUCTION_SET)

#: The overloads by name of op and backend.
OVERLOADS: dict[str, dict[str, Any]] = {
    op: {backend: getattr(getattr(torch.ops.neft_kernels, op), backend) for backend in BACKENDS} for op in _SCHEMAS
}
OVERLOADS["token_magnitude"] = {
    backend: getattr(torch.ops.neft_kernels.token_magnitude, backend) for backend in MAGNITUDE_BACKENDS
}


# --- which backend ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backend:
    """What :func:`available_backends` says of one backend."""

    name: str
    #: Device types that it runs on here, such as ``("cpu",)``; empty if it cannot run.
    devices: tuple[str, ...]
    #: Device types for which it is the automatic choice.
    chosen_for: tuple[str, ...]
    #: How it runs, or why it cannot.
    detail: str


def _devices(backend: str) -> tuple[str, ...]:
    """The device types that `backend` runs on here. torch.compile traces this."""
    accelerators = ("cuda",) if torch.cuda.is_available() else ()
    if backend == "reference":
        return ("cpu", *accelerators)  # and on any other device
    if backend == "cpu":
        return ("cpu",) if _cpu_extension is not None else ()
    if backend == "cuda":
        return accelerators if _cuda_extension is not None else ()
    if not _TRITON_INSTALLED:
        return ()
    return ("cpu", *accelerators) if _INTERPRET_TRITON else accelerators


def _detail(backend: str) -> str:
    """How `backend` runs here, or why it does not."""
    if backend == "reference":
        return "plain torch; slow"
    if backend == "cpu":
        return str(_cpu_error) if _cpu_extension is None else _cpu_extension.instruction_set()
    if backend == "cuda" and _cuda_extension is None:
        return str(_cuda_error)
    if backend == "triton" and not _TRITON_INSTALLED:
        return 'triton is not installed: pip install "neft-kernels[triton]"'
    if backend == "triton" and _INTERPRET_TRITON:
        return "interpreted, because TRITON_INTERPRET=1; very slow"
    if not _devices(backend):
        return "no GPU"
    return "CUDA C++" if backend == "cuda" else "just-in-time compiled"


def _automatic(device_type: str) -> str:
    for name in BACKENDS:
        if device_type in _devices(name) and not (name == "triton" and _INTERPRET_TRITON):
            return name
    return "reference"


def available_backends() -> list[Backend]:
    """What can run here, which backend is chosen for which device, and why not the others."""
    found = []
    for name in BACKENDS:
        devices = _devices(name)
        chosen_for = tuple(device for device in devices if name == (_PREFERRED_BACKEND or _automatic(device)))
        found.append(Backend(name, devices, chosen_for, _detail(name)))
    return found


_chosen: dict[tuple[str, str | None], str] = {}


def choose_backend(device_type: str, backend: str | None = None) -> str:
    """The backend that runs on tensors of `device_type`: the one asked for, or the best that there is.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: the backend asked for cannot run here; the message says why.
    """
    if torch.compiler.is_compiling():  # traced anew, because a graph would be tied to what the dictionary holds
        return _choose(device_type, backend)
    choice = _chosen.get((device_type, backend))
    if choice is None:
        choice = _chosen[device_type, backend] = _choose(device_type, backend)
        if backend is None:
            is_slow = choice == "reference" and _PREFERRED_BACKEND is None and device_type in ("cpu", "cuda")
            why_not = "".join(f"; {name}: {_detail(name)}" for name in _KERNELS[device_type]) if is_slow else ""
            log = logger.warning if is_slow else logger.info
            log("backend %r for %s tensors: %s%s", choice, device_type, _detail(choice), why_not)
    return choice


@functools.cache
def magnitude_kernel(device_type: str, backend: str | None) -> Callable[..., Tensor] | None:
    """The op ``token_magnitude`` of the backend asked for or the best one, where it has one that runs here."""
    name = backend or _PREFERRED_BACKEND or _automatic(device_type)
    return OVERLOADS["token_magnitude"].get(name) if device_type in _devices(name) else None


def _choose(device_type: str, asked_for: str | None) -> str:
    backend = asked_for or _PREFERRED_BACKEND or _automatic(device_type)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, not {backend!r}")
    devices = _devices(backend)
    if device_type not in (*devices, "meta") and backend != "reference":
        where = f"runs on {', '.join(devices)} tensors, not on {device_type} ones" if devices else "cannot run here"
        raise RuntimeError(f"backend={backend!r} {where} ({_detail(backend)})")
    return backend


# --- checks ----------------------------------------------------------------------------------------------------------

_ID_DTYPES = frozenset((torch.int64, torch.int32))
_OTHER_ID_DTYPES = frozenset(
    (torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)  # converted to int64
)
FLOAT_DTYPES = frozenset((torch.float32, torch.float64, torch.float16, torch.bfloat16))


def check_input_ids(input_ids: Tensor, device: torch.device) -> Tensor:
    """`input_ids` as int32 or int64."""
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids must be a tensor, not {type(input_ids).__name__}")
    if input_ids.device != device:
        raise ValueError(f"input_ids is on {input_ids.device}, but weight is on {device}; move one of them")
    if input_ids.dtype in _ID_DTYPES:
        return input_ids
    if input_ids.dtype not in _OTHER_ID_DTYPES:
        raise TypeError(f"input_ids must have an integer dtype, not {input_ids.dtype}")
    return input_ids.to(torch.int64)


def broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    """Whether a tensor of `shape` can be expanded to the shape `to`."""
    missing = len(to) - len(shape)
    return missing >= 0 and all(have in (1, want) for have, want in zip(shape, to[missing:], strict=True))


def check_values(values: Tensor, name: str, ndim: int | None) -> None:
    """`values` is a floating-point tensor that noise can be added to; `ndim` None allows any but 0."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(values).__name__}")
    if values.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, not {values.dtype}")
    if ndim is None and values.ndim == 0:
        raise ValueError(f"{name} must have at least one dimension, [..., embedding_dim]")
    if ndim is not None and values.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, but has shape {list(values.shape)}")


def check_magnitude(
    magnitude: float | Tensor, tokens_shape: torch.Size, device: torch.device
) -> tuple[Tensor | None, float]:
    """`magnitude` as the ops take it: a tensor of the tokens' shape or None, and a number for the case of None."""
    if isinstance(magnitude, (float, int, numbers.Real)):
        # Also false for NaN.
        if not 0 <= magnitude < math.inf:
            raise ValueError(f"magnitude must be finite and >= 0, not {magnitude}")
        return None, float(magnitude)
    if not isinstance(magnitude, Tensor):
        raise TypeError(f"magnitude must be a number or a float32 tensor, not {type(magnitude).__name__}")
    if magnitude.dtype != torch.float32:
        raise TypeError(f"magnitude must be float32, not {magnitude.dtype}")
    if magnitude.requires_grad:
        raise ValueError("magnitude requires a gradient, but there is none with respect to it; detach it")
    if magnitude.device != device:
        raise ValueError(f"magnitude is on {magnitude.device}, but the embeddings are on {device}; move it")
    if magnitude.shape == tokens_shape:
        return magnitude, 0.0
    if not broadcasts(magnitude.shape, tokens_shape):
        raise ValueError(f"magnitude of shape {list(magnitude.shape)} does not broadcast to {list(tokens_shape)}")
    return magnitude.expand(tokens_shape), 0.0


def check_seed(seed: int | Tensor, device: torch.device) -> Tensor:
    """`seed` as an int64 tensor of one element on `device`."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(f"seed must be one int64 element, not {list(seed.shape)} of {seed.dtype}")
        if seed.device != device:
            raise ValueError(f"seed is on {seed.device}, but the embeddings are on {device}; move it")
        return seed
    if isinstance(seed, int) and not isinstance(seed, bool):
        if not -(1 << 63) <= seed < 1 << 63:
            raise ValueError(f"seed must fit in 64 bits, not {seed}")
        return torch.tensor([seed], dtype=torch.int64, device=device)
    raise TypeError(f"seed must be an int, an int64 tensor of one element or None, not {type(seed).__name__}")


def check_counters(stream: int, first_token: int) -> None:
    """`stream` and `first_token` fit into the generator's counter."""
    if not 0 <= stream < 1 << 32:
        raise ValueError(f"stream must be in [0, 2**32), not {stream}")
    if not 0 <= first_token < 1 << 63:
        raise ValueError(f"first_token must be in [0, 2**63), not {first_token}")


def draw_seed(device: torch.device) -> Tensor:
    """A seed from the default generator of `device`, int64 ``[1]``; it never travels to the host."""
    return torch.randint(-(1 << 63), (1 << 63) - 1, (1,), device=device)


def _check_magnitude_values(token_magnitude: Tensor | None, magnitude: float) -> None:
    if token_magnitude is None:
        token_magnitude = torch.tensor(magnitude, dtype=torch.float64, device="cpu").to(torch.float32)
    bad = ~((token_magnitude >= 0) & (token_magnitude < math.inf))
    if bad.any():
        raise ValueError(f"magnitude must be finite and >= 0, but is {token_magnitude[bad][0].item()}")


def _check_ids(input_ids: Tensor, num_embeddings: int) -> None:
    bad = (input_ids < 0) | (input_ids >= num_embeddings)
    if bad.any():
        position = bad.nonzero()[0].tolist()
        raise IndexError(
            f"input_ids{position} is {input_ids[tuple(position)].item()}, but ids must be in [0, {num_embeddings}), "
            "the rows of weight"
        )
