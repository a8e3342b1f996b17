"""The ops with their gradients, and the two public functions on top of them."""

from typing import Any

import torch
from torch import Tensor

from neft_kernels import ops

__all__ = ["NoisyEmbedding", "add_noise", "noisy_embedding"]


class _NoisyEmbedding(torch.autograd.Function):
    """:class:`NoisyEmbedding` without forward-mode differentiation, of which torch.compile allows no definition."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input_ids: Tensor,  # [...]
        weight: Tensor,  # [V, D]
        seed: Tensor,  # [1]
        token_magnitude: Tensor | None,  # [...]
        magnitude: float,
        stream: int,
        first_token: int,
        padding_idx: int,
        scale_grad_by_freq: bool,
        sparse: bool,
        backend: str,
    ) -> Tensor:  # [..., D]
        op = ops.OVERLOADS["noisy_embedding"][backend]
        return op(input_ids, weight, seed, token_magnitude, magnitude, stream, first_token)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        input_ids, weight = inputs[:2]
        ctx.save_for_backward(input_ids)
        ctx.save_for_forward(input_ids)
        ctx.num_embeddings = weight.shape[0]
        ctx.options = inputs[7:10]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        (input_ids,) = ctx.saved_tensors
        grad_weight = torch.ops.aten.embedding_backward(grad, input_ids, ctx.num_embeddings, *ctx.options)
        return None, grad_weight, *(None,) * 9


class NoisyEmbedding(_NoisyEmbedding):
    """Embedding look-up plus noise in one kernel; the gradient is that of the plain embedding.

    ``NoisyEmbedding.apply(input_ids, weight, seed, token_magnitude, magnitude, stream, first_token, padding_idx,
    scale_grad_by_freq, sparse, backend)``, all positional and already checked; :func:`noisy_embedding` is the door to it.
    The noise does not depend on the weight, so it has no part in the gradient.
    """

    @staticmethod
    def jvp(ctx: Any, input_ids: None, weight: Tensor, *_: None) -> Tensor:
        return torch.nn.functional.embedding(ctx.saved_tensors[0], weight)


class _AddNoise(torch.autograd.Function):
    """:class:`AddNoise` without forward-mode differentiation."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        embeds: Tensor,  # [..., D]
        seed: Tensor,  # [1]
        token_magnitude: Tensor | None,  # [...]
        magnitude: float,
        stream: int,
        first_token: int,
        backend: str,
    ) -> Tensor:  # [..., D]
        return ops.OVERLOADS["add_noise"][backend](embeds, seed, token_magnitude, magnitude, stream, first_token)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return grad, *(None,) * 6


class AddNoise(_AddNoise):
    """Noise on given embeddings; the gradient passes through unchanged. :func:`add_noise` is the door to it."""

    @staticmethod
    def jvp(ctx: Any, embeds: Tensor, *_: None) -> Tensor:
        return embeds.clone()


_FUNCTIONS = {"noisy_embedding": (NoisyEmbedding, _NoisyEmbedding), "add_noise": (AddNoise, _AddNoise)}


def _call(op: str, backend: str, args: tuple, options: tuple = ()) -> Tensor:
    """The op on `args`, by way of its autograd function, which takes `options` besides, where anything is differentiated.

    For the sake of torch.func, ``Function.apply`` inspects the signature of ``forward`` at each call. Where no such
    transform is active, the class above it, which does the work, is enough, and four times quicker.
    """
    function, traceable_function = _FUNCTIONS[op]
    if torch.compiler.is_compiling():
        if torch._C._functorch.maybe_current_level() is not None:  # the compiler would drop backward, without a word
            raise RuntimeError("torch.compile around a torch.func transform of a noisy embedding is not supported")
        return traceable_function.apply(*args, *options, backend)
    if torch._C._are_functorch_transforms_active():
        return function.apply(*args, *options, backend)
    differentiated = torch.is_grad_enabled() and (args[0].requires_grad or args[1].requires_grad)
    if differentiated or torch.autograd.forward_ad._current_level >= 0:
        return super(torch.autograd.Function, function).apply(*args, *options, backend)
    return ops.OVERLOADS[op][backend](*args)


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
