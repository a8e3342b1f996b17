"""Modules: an embedding whose training forward is noisy, and the hook that makes another embedding's output noisy."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from neft_kernels.autograd import add_noise, noisy_embedding
from neft_kernels.noise import Noise, NoiseSettings

__all__ = ["AddNoise", "NEFTuneEmbedding"]


class NEFTuneEmbedding(nn.Embedding):
    """``nn.Embedding`` whose forward in training adds NEFTune's noise, in the same kernel as the look-up.

    In evaluation, under ``torch.no_grad()``, and with ``alpha=0`` it is the plain embedding. The seed is drawn from PyTorch's
    default generator of the weight's device, so ``torch.manual_seed`` reproduces a run.

    Args:
        num_embeddings, embedding_dim, padding_idx, scale_grad_by_freq, sparse, device, dtype: as in ``nn.Embedding``.
        alpha: NEFTune's noise scale, >= 0; 5 to 15 in the paper. A callable is a schedule, see
            :func:`neft_kernels.replace_embeddings`.
        scale_by: "sequence" or "batch", see :func:`neft_kernels.noise_magnitude`.
        noise_on: "all", "prompt" or "completion", see :func:`neft_kernels.noise_magnitude`.
        stream: which of the streams under one seed; None: the rank of this process, 0 without torch.distributed.
        backend: see :func:`neft_kernels.noisy_embedding`.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value; the message names it.
    """

    #: None once :func:`neft_kernels.restore_embeddings` has been here.
    noise: Noise | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        alpha: float | Callable[[int], float] = 5.0,
        scale_by: str = "sequence",
        noise_on: str = "all",
        stream: int | None = None,
        backend: str | None = None,
    ) -> None:
        if max_norm is not None:
            raise ValueError("max_norm is not supported: it rewrites the weight in forward")
        settings = NoiseSettings(alpha, scale_by, noise_on, stream, backend)
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            None,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            _freeze,
            device,
            dtype,
        )
        self.noise = self.built_in_noise = Noise(settings)

    def forward(self, input: Tensor, **sequences: Tensor | None) -> Tensor:
        """``[..., L]`` ids to ``[..., L, embedding_dim]``.

        Args:
            input: token ids, any integer dtype.
            sequences: ``attention_mask``, ``position_ids``, ``cu_seq_lens`` or ``labels``, as in
                :func:`neft_kernels.noise_magnitude`.
                Without them, those that the model around this module was called with, if
                :func:`neft_kernels.replace_embeddings` made it noisy.
        """
        noise = self.noise
        if noise is None or noise.state(self) != "on" or input.ndim == 0:
            return super().forward(input)
        return noisy_embedding(
            input,
            self.weight,
            padding_idx=self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
            **noise.arguments(input, self.embedding_dim, **sequences),
        )


class AddNoise:
    """A forward hook: noise on the output of an embedding that keeps its own forward."""

    def __init__(self, noise: Noise) -> None:
        self.noise = noise

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        embeds = output[0] if isinstance(output, tuple) else output  # [..., L, D]
        if self.noise.state(module) != "on" or embeds.ndim < 2:
            return output
        looked_up = args[0] if args and isinstance(args[0], torch.Tensor) else None
        # Without ids in its arguments, or with several to a token, one column of the output has the tokens' shape.
        ids = embeds[..., 0] if looked_up is None or looked_up.shape != embeds.shape[:-1] else looked_up
        embeds = add_noise(embeds, **self.noise.arguments(ids, embeds.shape[-1]))
        return (embeds, *output[1:]) if isinstance(output, tuple) else embeds
