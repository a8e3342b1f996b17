"""The ops: functions on tensors that know nothing of modules, models or transformers.

This folder imports torch, triton and itself only, by relative imports, so that it can be used on its own.
"""

from .autograd import NoisyEmbedding, add_noise, noisy_embedding
from .backends import Backend, available_backends
from .magnitude import noise_magnitude

__all__ = ["Backend", "NoisyEmbedding", "add_noise", "available_backends", "noise_magnitude", "noisy_embedding"]
