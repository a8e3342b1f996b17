"""Layers for ``kernelize`` of the kernels package; tools/hub_kernel.py puts this file into the kernel repository."""

import torch
from torch import Tensor, nn

from . import noise_magnitude, noisy_embedding  # type: ignore[attr-defined]  # from where it lies there

__all__ = ["NEFTuneEmbedding"]


class NEFTuneEmbedding(nn.Module):
    """The forward of an ``nn.Embedding`` that also has an attribute `alpha`: noisy in training with gradients enabled.

    Each row counts in full length. For masks and packed rows, use the function ``noisy_embedding``.
    """

    has_backward = True
    can_torch_compile = True

    weight: Tensor
    padding_idx: int | None
    max_norm: float | None
    scale_grad_by_freq: bool
    sparse: bool
    alpha: float

    def forward(self, input: Tensor) -> Tensor:  # [..., L] -> [..., L, D]
        options = {"scale_grad_by_freq": self.scale_grad_by_freq, "sparse": self.sparse}
        if not (self.training and torch.is_grad_enabled() and self.alpha):
            return nn.functional.embedding(input, self.weight, self.padding_idx, **options)
        magnitude = noise_magnitude(input, self.weight.shape[1], self.alpha)
        if self.max_norm is not None:
            raise ValueError("max_norm is not supported: it rewrites the weight in forward")
        is_one_of_several = torch.distributed.is_available() and torch.distributed.is_initialized()
        stream = torch.distributed.get_rank() if is_one_of_several else 0  # replicas may share a seed
        return noisy_embedding(input, self.weight, magnitude, stream=stream, padding_idx=self.padding_idx, **options)
