"""The ops as PyTorch sees them: schemas, implementations and fake implementations.

Each op has one overload per backend, such as ``torch.ops.neft_kernels.noisy_embedding.cpu``. All overloads of an op have the
same schema and are pure functions: they are given the seed and draw nothing. The caller chooses the backend and calls its
overload, so a compiled graph names the backend that it was traced with.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference
from .backends import BACKENDS, switches
from .checks import check_id_values, check_magnitude_values, check_symmetric
from .native import NAMESPACE

__all__ = ["OVERLOADS", "kernel_of"]

_NOISE = "Tensor seed, Tensor? token_magnitude, float magnitude, int stream, SymInt first_token"
_GRADIENT = "int padding_idx=-1, bool scale_grad_by_freq=False, bool sparse=False"
# `noise` is the index in NOISE_KINDS. These are last, in the order in which they came, because saved graphs may lack them.
_KIND = "int noise=0, bool symmetric=False"
_SCHEMAS = {
    "noisy_embedding": f"(Tensor input_ids, Tensor weight, {_NOISE}, {_GRADIENT}, {_KIND}) -> Tensor",
    "add_noise": f"(Tensor embeds, {_NOISE}, {_KIND}) -> Tensor",
    "token_magnitude": "(Tensor? attention_mask, Tensor? position_ids, float alpha, int embedding_dim) -> Tensor",
    "embedding_grad": "(Tensor grad, Tensor input_ids, SymInt num_embeddings, int padding_idx, bool scale_grad_by_freq) "
    "-> Tensor",
}
#: The backends of each op. Without a kernel, magnitude.py computes magnitudes in plain torch, and gradients are PyTorch's.
_BACKENDS_OF = {
    "noisy_embedding": BACKENDS,
    "add_noise": BACKENDS,
    "token_magnitude": ("triton", "cpu"),
    "embedding_grad": ("cpu",),
}


# --- fakes: what an op returns, without its values -------------------------------------------------------------------


def _fake_noisy_embedding(input_ids: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return weight.new_empty((*input_ids.shape, weight.shape[1]))


def _fake_add_noise(embeds: Tensor, *_: Any) -> Tensor:
    return torch.empty(embeds.shape, dtype=embeds.dtype, device=embeds.device)


def _fake_token_magnitude(attention_mask: Tensor | None, position_ids: Tensor | None, *_: Any) -> Tensor:
    given = position_ids if attention_mask is None else attention_mask
    assert given is not None
    return given.new_empty(given.shape, dtype=torch.float32)


def _fake_embedding_grad(grad: Tensor, input_ids: Tensor, num_embeddings: int, *_: Any) -> Tensor:
    return grad.new_empty((num_embeddings, grad.shape[-1]))


_FAKES: dict[str, Callable[..., Tensor]] = {
    "noisy_embedding": _fake_noisy_embedding,
    "add_noise": _fake_add_noise,
    "token_magnitude": _fake_token_magnitude,
    "embedding_grad": _fake_embedding_grad,
}


# --- implementations in Python; native.py registers those in C++ --------------------------------------------


def implementation(op: str, backend: str) -> Callable[..., Tensor]:
    """The function that computes `op` on `backend`, "reference" or "triton". Triton is imported at the first call."""
    if backend == "reference":
        return getattr(reference, op)
    module = ".triton_magnitude" if op == "token_magnitude" else ".triton_noise"
    return lambda *args: _load(module, op)(*args)


@functools.cache
def _load(module: str, op: str) -> Callable[..., Tensor]:
    return getattr(importlib.import_module(module, __package__), op)


def with_checks(op: str, compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`compute` after the checks of values that the C++ kernels make themselves.

    On accelerators values are not looked at, because the host would wait for the device.
    """

    def noisy_embedding(
        input_ids: Tensor,
        weight: Tensor,
        seed: Tensor,
        token_magnitude: Tensor | None,
        magnitude: float,
        stream: int,
        first_token: int,
        padding_idx: int = -1,  # these three are for the gradient
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        kind: int = reference.UNIFORM,
        symmetric: bool = False,
    ) -> Tensor:
        check_symmetric(symmetric, input_ids.shape, "input_ids")
        if input_ids.device.type == "cpu":
            check_magnitude_values(token_magnitude, magnitude)
        if input_ids.device.type == "cpu" or switches.check_ids:
            check_id_values(input_ids, weight.shape[0])
        return compute(input_ids, weight, seed, token_magnitude, magnitude, stream, first_token, kind, symmetric)

    def add_noise(
        embeds: Tensor,
        seed: Tensor,
        token_magnitude: Tensor | None,
        magnitude: float,
        stream: int,
        first_token: int,
        kind: int = reference.UNIFORM,
        symmetric: bool = False,
    ) -> Tensor:
        check_symmetric(symmetric, embeds.shape[:-1], "embeds")
        if embeds.device.type == "cpu":
            check_magnitude_values(token_magnitude, magnitude)
        return compute(embeds, seed, token_magnitude, magnitude, stream, first_token, kind, symmetric)

    checked: dict[str, Callable[..., Tensor]] = {"noisy_embedding": noisy_embedding, "add_noise": add_noise}
    return checked.get(op, compute)


#: The types of arguments that the dispatcher passes on as they are.
_PLAIN_TENSORS, _PLAIN_NUMBERS = frozenset((Tensor, torch.nn.Parameter)), frozenset((int, float, bool, type(None)))

library = torch.library.Library(NAMESPACE, "DEF")
_in_python: dict[tuple[str, str], Callable[..., Tensor]] = {}
for _op, _schema in _SCHEMAS.items():
    for _backend in _BACKENDS_OF[_op]:
        library.define(f"{_op}.{_backend}{_schema}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{NAMESPACE}::{_op}.{_backend}", _FAKES[_op], lib=library)
        if _backend in ("reference", "triton"):
            _compute = with_checks(_op, implementation(_op, _backend))
            library.impl(f"{_op}.{_backend}", _compute, "CompositeExplicitAutograd")
            _in_python[_op, _backend] = _compute

#: The overloads by name of op and backend.
OVERLOADS: dict[str, dict[str, Any]] = {
    op: {backend: getattr(getattr(getattr(torch.ops, NAMESPACE), op), backend) for backend in backends}
    for op, backends in _BACKENDS_OF.items()
}
_past_dispatcher = {OVERLOADS[op][backend]: compute for (op, backend), compute in _in_python.items()}


def kernel_of(op: Callable[..., Tensor], arguments: tuple) -> Callable[..., Tensor]:
    """What computes `op` in Python, if PyTorch's dispatcher would only pass the `arguments` on to it. Otherwise `op`.

    The host needs a few microseconds less for the call. Modes, traces and profilers see only what the dispatcher calls.
    """
    compute = _past_dispatcher.get(op)
    if compute is None or (
        torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
        or torch.autograd._profiler_enabled()
    ):
        return op
    for each in arguments:
        if type(each) not in _PLAIN_NUMBERS and (type(each) not in _PLAIN_TENSORS or each.is_meta or each.is_neg()):
            return op
    return compute
