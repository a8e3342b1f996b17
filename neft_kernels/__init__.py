"""Noisy embeddings (NEFTune, arXiv 2310.05914) in one fused kernel, bit for bit the same on every backend.

from neft_kernels import replace_embeddings
replace_embeddings(model, alpha=5.0)          # then train as usual
"""

from neft_kernels.autograd import NoisyEmbedding, add_noise, noisy_embedding
from neft_kernels.huggingface import describe, no_noise, replace_embeddings, restore_embeddings
from neft_kernels.magnitude import noise_magnitude
from neft_kernels.modules import NEFTuneEmbedding
from neft_kernels.ops import available_backends

__all__ = [
    "NEFTuneEmbedding",
    "NoisyEmbedding",
    "add_noise",
    "available_backends",
    "describe",
    "no_noise",
    "noise_magnitude",
    "noisy_embedding",
    "replace_embeddings",
    "restore_embeddings",
]

__version__ = "0.1.0"
