"""Noisy embeddings (NEFTune, arXiv 2310.05914) in one fused kernel, bit for bit the same on every backend.

from neft_kernels import replace_embeddings
replace_embeddings(model, alpha=5.0)          # then train as usual
"""

from typing import TYPE_CHECKING, Any

from neft_kernels.models.describe import describe
from neft_kernels.models.embedding import NEFTuneEmbedding
from neft_kernels.models.replace import no_noise, replace_embeddings, restore_embeddings, set_alpha
from neft_kernels.ops import NoisyEmbedding, add_noise, available_backends, noise_magnitude, noisy_embedding

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
    "set_alpha",
]

__version__ = "0.1.0"


# The two names that need transformers, which only they import. For that reason they are not in __all__.
if TYPE_CHECKING:
    from neft_kernels.integrations.trainer import NEFTuneCallback as NEFTuneCallback
    from neft_kernels.integrations.trainer import patch_transformers as patch_transformers
else:

    def __getattr__(name: str) -> Any:
        if name in ("NEFTuneCallback", "patch_transformers"):
            try:
                from neft_kernels.integrations import trainer
            except ModuleNotFoundError as error:
                if error.name != "transformers":
                    raise
                message = f'neft_kernels.{name} needs transformers: pip install "neft-kernels[huggingface]"'
                raise ImportError(message) from error
            return getattr(trainer, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
