"""The ops with their gradients, and the two public functions on top of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neft_kernels import ops

__all__ = ["NoisyEmbedding", "add_noise", "noisy_embedding"]


def _embedding_grad(
    op: Callable[..., Tensor],  # of the forward
    grad: Tensor,  # [..., D]
    input_ids: Tensor,  # [...]
    num_embeddings: int,
    padding_idx: int,
    scale_grad_by_freq: bool,
    sparse: bool,
) -> Tensor:  # [V, D]
    """The gradient of the table: that of the CPU's kernel where the forward was, else PyTorch's."""
    if op is ops.OVERLOADS["noisy_embedding"]["cpu"] and not sparse and not _is_transformed(grad):
        kernel = ops.OVERLOADS["embedding_grad"]["cpu"]
        return kernel(grad, input_ids, num_embeddings, padding_idx, scale_grad_by_freq)
    return torch.ops.aten.embedding_backward(grad, input_ids, num_embeddings, padding_idx, scale_grad_by_freq, sparse)


def _is_transformed(grad: Tensor) -> bool:
    """Whether `grad` is differentiated or vectorized itself, or a subclass, for all of which PyTorch has rules."""
    if type(grad) is not Tensor or (grad.requires_grad and torch.is_grad_enabled()):
        return True
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


class _NoisyEmbedding(torch.autograd.Function):
    """:class:`NoisyEmbedding` without what torch.func and forward-mode differentiation need.

    It is quicker, and torch.compile, which allows no definition of ``jvp``, traces it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        op: Callable[..., Tensor],
        options: tuple[int, bool, bool],  # of embedding_backward: padding_idx, scale_grad_by_freq, sparse
        input_ids: Tensor,  # [...]
        weight: Tensor,  # [V, D]
        *noise: Any,
    ) -> Tensor:  # [..., D]
        ctx.save_for_backward(input_ids)
        ctx.op, ctx.num_embeddings, ctx.options = op, weight.shape[0], options
        return op(input_ids, weight, *noise)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        (input_ids,) = ctx.saved_tensors
        grad_weight = _embedding_grad(ctx.op, grad, input_ids, ctx.num_embeddings, *ctx.options)
        return None, None, None, grad_weight, *(None,) * NOISE_ARGUMENTS


class NoisyEmbedding(torch.autograd.Function):
    """Embedding look-up plus noise in one kernel; the gradient is that of the plain embedding.

    ``NoisyEmbedding.apply(op, options, input_ids, weight, seed, token_magnitude, magnitude, stream, first_token)``, all
    positional and already checked; :func:`noisy_embedding` is the door to it. `op` is an
    overload of ``torch.ops.neft_kernels.noisy_embedding``, `options` are padding_idx (-1: none), scale_grad_by_freq, sparse.
    The noise does not depend on the weight, so it has no part in the gradient.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        op: Callable[..., Tensor], options: tuple[int, bool, bool], input_ids: Tensor, weight: Tensor, *noise: Any
    ) -> Tensor:
        return op(input_ids, weight, *noise)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.op, ctx.options, input_ids, weight, *_ = inputs
        ctx.save_for_backward(input_ids)
        ctx.save_for_forward(input_ids)
        ctx.num_embeddings = weight.shape[0]

    backward = _NoisyEmbedding.backward

    @staticmethod
    def jvp(ctx: Any, op: None, options: None, input_ids: None, weight: Tensor, *_: None) -> Tensor:
        return torch.nn.functional.embedding(ctx.saved_tensors[0], weight)


class _AddNoise(torch.autograd.Function):
    """:class:`AddNoise` as :class:`_NoisyEmbedding` is :class:`NoisyEmbedding`."""

    @staticmethod
    def forward(ctx: Any, op: Callable[..., Tensor], options: tuple, embeds: Tensor, *noise: Any) -> Tensor:
        return op(embeds, *noise)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return None, None, grad, *(None,) * NOISE_ARGUMENTS


class AddNoise(torch.autograd.Function):
    """Noise on given embeddings; the gradient passes through unchanged. :func:`add_noise` is the door to it.

    ``AddNoise.apply(op, (), embeds, seed, token_magnitude, magnitude, stream, first_token)``
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(op: Callable[..., Tensor], options: tuple, embeds: Tensor, *noise: Any) -> Tensor:  # [..., D]
        return op(embeds, *noise)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    backward = _AddNoise.backward

    @staticmethod
    def jvp(ctx: Any, op: None, options: None, embeds: Tensor, *_: None) -> Tensor:
        return embeds.clone()


NOISE_ARGUMENTS = 5  # seed, token_magnitude, magnitude, stream, first_token
_FUNCTIONS = {"noisy_embedding": (NoisyEmbedding, _NoisyEmbedding), "add_noise": (AddNoise, _AddNoise)}
# Function.apply without what it does for torch.func: at each call it inspects the signature of forward.
_QUICK_APPLY = {
    function: super(torch.autograd.Function, function).apply
    for functions in _FUNCTIONS.values()
    for function in functions
}


def _call(name: str, backend: str, args: tuple, options: tuple = ()) -> Tensor:
    """The op on `args`, by way of its autograd function where anything is differentiated."""
    op = ops.OVERLOADS[name][backend]
    if torch.compiler.is_compiling():
        if torch._C._functorch.maybe_current_level() is not None:  # the compiler would drop backward, without a word
            raise RuntimeError("torch.compile around a torch.func transform of a noisy embedding is not supported")
        return _FUNCTIONS[name][1].apply(op, options, *args)
    if torch._C._are_functorch_transforms_active():
        return _FUNCTIONS[name][0].apply(op, options, *args)
    if torch.autograd.forward_ad._current_level >= 0:
        return _QUICK_APPLY[_FUNCTIONS[name][0]](op, options, *args)
    if torch.is_grad_enabled() and (args[0].requires_grad or args[1].requires_grad):
        return _QUICK_APPLY[_FUNCTIONS[name][1]](op, options, *args)
    return op(*args)


def noisy_embedding(
    input_ids: Tensor,
    weight: Tensor,
    magnitude: float | Tensor,
    *,
    seed: int | Tensor | None = None,
    stream: int = 0,
    first_token: int = 0,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``weight[input_ids] + magnitude * u``, ``u`` uniform in (-1, 1), in one kernel.

    Args:
        input_ids: token ids, any shape ``[...]`` and any integer dtype.
        weight: the embedding table, ``[V, D]``; float32, float64, float16 or bfloat16.
        magnitude: the bound of the noise, >= 0: a number, or a float32 tensor broadcastable to ``input_ids.shape``. A
            token of magnitude 0 gets its row unchanged. :func:`neft_kernels.noise_magnitude` computes NEFTune's.
        seed: an int64 tensor of one element on the device, or an int; None draws one from the device's default generator.
            The same seed gives the same noise, on every backend and device.
        stream: in [0, 2**32); tells apart replicas that share a seed.
        first_token: the number of the first token, for callers that hold a part of a batch.
        padding_idx, scale_grad_by_freq, sparse: as in :func:`torch.nn.functional.embedding`; they concern the gradient.
        backend: "triton", "cuda", "cpu" or "reference"; None takes the best for the device.

    Returns:
        ``[..., D]``, contiguous, of the dtype of `weight`.

    Raises:
        IndexError: an id is outside ``[0, V)``. On a GPU this is checked only with ``NEFT_KERNELS_CHECK_IDS=1``, because it
            makes the host wait; without it the row of such an id is NaN.
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value; the message names it.
        RuntimeError: the backend asked for cannot run here.

    The noise is that of NEFTune (Jain et al. 2023, arXiv 2310.05914); :mod:`neft_kernels.reference` defines it to the bit.
    """
    ops.check_values(weight, "weight", 2)
    device = weight.device
    input_ids = ops.check_input_ids(input_ids, device)
    token_magnitude, number = ops.check_magnitude(magnitude, input_ids.shape, device)
    if stream or first_token:
        ops.check_counters(stream, first_token)
    padding_idx = -1 if padding_idx is None else _check_padding_idx(padding_idx, weight.shape[0])
    backend = ops.choose_backend(device.type, backend)
    seed = ops.draw_seed(device) if seed is None else ops.check_seed(seed, device)
    args = (input_ids, weight, seed, token_magnitude, number, stream, first_token)
    return _call("noisy_embedding", backend, args, (padding_idx, scale_grad_by_freq, sparse))


def add_noise(
    embeds: Tensor,
    magnitude: float | Tensor,
    *,
    seed: int | Tensor | None = None,
    stream: int = 0,
    first_token: int = 0,
    backend: str | None = None,
) -> Tensor:
    """``embeds + magnitude * u``: the noise of :func:`noisy_embedding` on embeddings that are no plain table look-up.

    Args:
        embeds: ``[..., D]``; float32, float64, float16 or bfloat16.
        magnitude: the bound of the noise, >= 0: a number, or a float32 tensor broadcastable to ``embeds.shape[:-1]``.
        seed, stream, first_token, backend: as in :func:`noisy_embedding`.

    Returns:
        ``[..., D]``, contiguous, a new tensor. The gradient passes through unchanged.

    Raises:
        TypeError, ValueError, RuntimeError: as in :func:`noisy_embedding`.
    """
    ops.check_values(embeds, "embeds", None)
    device = embeds.device
    token_magnitude, number = ops.check_magnitude(magnitude, embeds.shape[:-1], device)
    if stream or first_token:
        ops.check_counters(stream, first_token)
    backend = ops.choose_backend(device.type, backend)
    seed = ops.draw_seed(device) if seed is None else ops.check_seed(seed, device)
    return _call("add_noise", backend, (embeds, seed, token_magnitude, number, stream, first_token))


def _check_padding_idx(padding_idx: int, num_embeddings: int) -> int:
    """`padding_idx` counted from the front, as the backward takes it."""
    if not -num_embeddings <= padding_idx < num_embeddings:
        raise ValueError(f"padding_idx must be in [-{num_embeddings}, {num_embeddings}), not {padding_idx}")
    return padding_idx % num_embeddings
