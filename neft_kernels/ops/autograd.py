"""The ops with their gradients, and the two public functions on top of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import checks
from .backends import choose_backend
from .registration import OVERLOADS, kernel_of, library
from .seed import draw_seed

__all__ = ["NoisyEmbedding", "add_noise", "noisy_embedding"]


class _OpFunction(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(op: Callable[..., Tensor], *args: Any) -> Tensor:  # [..., D]
        return _without_gradient(op, args)


class NoisyEmbedding(_OpFunction):
    """Embedding look-up plus noise in one kernel. The gradient is that of the plain embedding.

    ``NoisyEmbedding.apply(op, input_ids, weight, seed, token_magnitude, magnitude, stream, first_token, padding_idx,
    scale_grad_by_freq, sparse, noise, symmetric)``

    All arguments are positional and already checked; :func:`noisy_embedding` checks them and calls this. `op` is an overload
    of ``torch.ops.neft_kernels.noisy_embedding``, and the others are its arguments. A `padding_idx` of -1 is none. The noise
    does not depend on the weight, so it has no part in the gradient.
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.op, input_ids, weight, *rest = inputs
        _, _, _, _, _, padding_idx, scale_grad_by_freq, sparse, *_ = rest
        ctx.save_for_backward(input_ids)
        ctx.num_embeddings, ctx.options = weight.shape[0], (padding_idx, scale_grad_by_freq, sparse)
        ctx.no_gradients = (None,) * len(rest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        (input_ids,) = ctx.saved_tensors
        grad_weight = _embedding_grad(ctx.op, grad, input_ids, ctx.num_embeddings, *ctx.options)
        return None, None, grad_weight, *ctx.no_gradients


class AddNoise(_OpFunction):
    """Noise on given embeddings. The gradient passes through unchanged.

    ``AddNoise.apply(op, embeds, seed, token_magnitude, magnitude, stream, first_token, noise, symmetric)``, see
    :func:`add_noise`.
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.no_gradients = (None,) * len(inputs[2:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return None, grad, *ctx.no_gradients


def _embedding_grad(
    op: Callable[..., Tensor],  # of the forward
    grad: Tensor,  # [..., D]
    input_ids: Tensor,  # [...]
    num_embeddings: int,
    padding_idx: int,
    scale_grad_by_freq: bool,
    sparse: bool,
) -> Tensor:  # [V, D]
    """The gradient of the table: from the CPU kernel if the forward ran on it, else PyTorch's."""
    if op is OVERLOADS["noisy_embedding"]["cpu"] and not sparse and not _is_transformed(grad):
        kernel = OVERLOADS["embedding_grad"]["cpu"]
        return kernel(grad, input_ids, num_embeddings, padding_idx, scale_grad_by_freq)
    return torch.ops.aten.embedding_backward(grad, input_ids, num_embeddings, padding_idx, scale_grad_by_freq, sparse)


def _is_transformed(grad: Tensor) -> bool:
    """Whether `grad` is differentiated or vectorized itself, or is of a subclass. PyTorch has rules for these."""
    if type(grad) is not Tensor or (grad.requires_grad and torch.is_grad_enabled()):
        return True
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


# Registers autograd for the ops themselves. Traced and exported graphs contain the ops without the functions above.
def _register(op: torch._ops.OpOverload, function: type[torch.autograd.Function]) -> None:
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        function.setup_context(ctx, (op, *inputs), output)

    def backward(ctx: Any, grad: Tensor) -> tuple:
        return function.backward(ctx, grad)[1:]

    torch.library.register_autograd(op, backward, setup_context=setup_context, lib=library)


for _name, _function in (("noisy_embedding", NoisyEmbedding), ("add_noise", AddNoise)):
    for _op in OVERLOADS[_name].values():
        _register(_op, _function)


def _without_gradient(op: Callable[..., Tensor], args: tuple) -> Tensor:
    """Calls the op below autograd, which saves the dispatcher's look-up of its formula."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return op(*args)
    call = kernel_of(op, args)
    with torch._C._AutoDispatchBelowAutograd():
        return call(*args)


def _call(function: type[torch.autograd.Function], values: Tensor, op: Callable[..., Tensor], *args: Any) -> Tensor:
    """Calls ``op(*args)``. The gradient of `values`, the weight or the embeddings, comes from `function`."""
    if torch.compiler.is_compiling():
        if torch._C._functorch.maybe_current_level() is not None:
            raise RuntimeError("torch.compile around a torch.func transform of a noisy embedding is not supported")
        return op(*args)  # by the formula of the op itself
    if torch._C._are_functorch_transforms_active():
        return function.apply(op, *args)
    if torch.is_grad_enabled() and values.requires_grad:
        # Function.apply inspects the signature of forward at each call, for torch.func alone. This skips it.
        return super(torch.autograd.Function, function).apply(op, *args)  # type: ignore[misc]
    return _without_gradient(op, args)


def _with_tangent(noisy: Tensor, plain: Tensor) -> Tensor:
    """`noisy` with the derivatives of `plain`, from which it differs by a constant, for forward-mode differentiation.

    An autograd function with a formula for forward mode could not be compiled by torch.compile.
    """
    return noisy + (plain - plain.detach())


def noisy_embedding(
    input_ids: Tensor,
    weight: Tensor,
    magnitude: float | Tensor,
    *,
    noise: str = "uniform",
    symmetric: bool = False,
    seed: int | Tensor | None = None,
    stream: int = 0,
    first_token: int = 0,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``weight[input_ids] + magnitude * n``, ``n`` noise, in one kernel.

    Args:
        input_ids: token ids, any shape ``[...]`` and any integer dtype.
        weight: the embedding table, ``[V, D]``; float32, float64, float16 or bfloat16.
        magnitude: what the noise is multiplied by, >= 0: a number, or a float32 tensor broadcastable to ``input_ids.shape``.
            A token of magnitude 0 gets its row unchanged. :func:`neft_kernels.noise_magnitude` computes NEFTune's.
        noise: "uniform": in (-1, 1), as in NEFTune. "sign": 1 or -1, each as likely, as in SymNoise. "gaussian": normally
            distributed to within 0.004 standard deviations, and never beyond 5.3 of them. The root mean square is 1/sqrt(3)
            for "uniform" and "gaussian", and 1 for "sign".
        symmetric: whether the second half of the flattened tokens gets the noise of the first half with the other sign, each
            token times its own magnitude. The number of tokens must then be even. The ids of the halves are usually equal,
            as in SymNoise: ``torch.cat((input_ids, input_ids))`` for ids of shape ``[B, L]``.
        seed: an int64 tensor of one element, on the device or on the CPU, or an int. None draws a seed from the device's
            default generator. The same seed gives the same noise on every backend and device.
        stream: in [0, 2**32). Replicas that share a seed use different streams.
        first_token: the number of the first token, for callers that hold a part of a batch.
        padding_idx, scale_grad_by_freq, sparse: as in :func:`torch.nn.functional.embedding`. They affect the gradient only.
        backend: "triton", "cuda", "cpu" or "reference". None takes the best one for the device.

    Returns:
        ``[..., D]``, contiguous, of the dtype of `weight`.

    Raises:
        IndexError: an id is outside ``[0, V)``. On a GPU this is checked only with ``NEFT_KERNELS_CHECK_IDS=1``, because the
            host has to wait for it. Without it the row of such an id is NaN.
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value. The message names it.
        RuntimeError: the backend that was asked for cannot run here.

    NEFTune is Jain et al. 2023, arXiv 2310.05914; SymNoise is Yadav and Singh 2023, arXiv 2312.01523, which also shows each
    example with the negative of its noise. :mod:`neft_kernels.ops.reference` defines every bit of the noise.
    """
    checks.check_values(weight, "weight", 2)
    device = weight.device
    input_ids = checks.check_input_ids(input_ids, device)
    token_magnitude, number = checks.check_magnitude(magnitude, input_ids.shape, device)
    kind = checks.check_noise(noise)
    checks.check_symmetric(symmetric, input_ids.shape, "input_ids")
    if stream or first_token:
        checks.check_counters(stream, first_token)
    padding_idx = checks.check_padding_idx(padding_idx, weight.shape[0])
    op = OVERLOADS["noisy_embedding"][choose_backend(device.type, backend)]
    seed = draw_seed(device) if seed is None else checks.check_seed(seed, device)
    gradient = (padding_idx, scale_grad_by_freq, sparse)
    args = (seed, token_magnitude, number, stream, first_token, *gradient, kind, symmetric)
    if forward_ad._current_level >= 0:
        plain = torch.nn.functional.embedding(input_ids, weight, padding_idx if padding_idx >= 0 else None)
        return _with_tangent(op(input_ids, weight.detach(), *args), plain)
    return _call(NoisyEmbedding, weight, op, input_ids, weight, *args)


def add_noise(
    embeds: Tensor,
    magnitude: float | Tensor,
    *,
    noise: str = "uniform",
    symmetric: bool = False,
    seed: int | Tensor | None = None,
    stream: int = 0,
    first_token: int = 0,
    backend: str | None = None,
) -> Tensor:
    """``embeds + magnitude * n``: the noise of :func:`noisy_embedding` on embeddings that are not a plain table look-up.

    Args:
        embeds: ``[..., D]``; float32, float64, float16 or bfloat16.
        magnitude: what the noise is multiplied by, >= 0: a number, or a float32 tensor broadcastable to ``embeds.shape[:-1]``.
        noise, symmetric, seed, stream, first_token, backend: as in :func:`noisy_embedding`.

    Returns:
        ``[..., D]``, contiguous, a new tensor. The gradient passes through unchanged.

    Raises:
        TypeError, ValueError, RuntimeError: as in :func:`noisy_embedding`.
    """
    checks.check_values(embeds, "embeds", None)
    device = embeds.device
    token_magnitude, number = checks.check_magnitude(magnitude, embeds.shape[:-1], device)
    kind = checks.check_noise(noise)
    checks.check_symmetric(symmetric, embeds.shape[:-1], "embeds")
    if stream or first_token:
        checks.check_counters(stream, first_token)
    op = OVERLOADS["add_noise"][choose_backend(device.type, backend)]
    seed = draw_seed(device) if seed is None else checks.check_seed(seed, device)
    args = (seed, token_magnitude, number, stream, first_token, kind, symmetric)
    if forward_ad._current_level >= 0:
        return _with_tangent(op(embeds.detach(), *args), embeds)
    return _call(AddNoise, embeds, op, embeds, *args)
