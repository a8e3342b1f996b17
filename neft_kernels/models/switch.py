"""Whether a forward pass of an embedding has noise."""

import torch
from torch import Tensor, nn

from neft_kernels.models.checkpointing import OFF, generator_state, in_backward
from neft_kernels.models.noise import EmbeddingNoise

__all__ = ["HOOK_ATTRIBUTE", "is_on", "state", "warn_of_other_noise"]

#: What transformers sets on an embedding that its own NEFTune hook is on, and the name of the hook.
HOOK_ATTRIBUTE = "neftune_noise_alpha"
HOOK_NAME = "neftune_post_forward_hook"


def is_on(noise: EmbeddingNoise, module: nn.Module, ids: Tensor) -> bool:
    """Whether this forward pass of `module` on `ids` has noise. A pass that is recomputed has it if the first one had.

    Call it once in each pass: it counts the pass, and remembers one without noise for its recomputation.
    """
    noise.shared.reached.embedding_called()
    warn_of_other_noise(noise, module)
    now = state(noise, module) == "on"
    if torch.compiler.is_compiling():
        return now
    if in_backward():
        first = noise.first_passes.recall(ids, generator_state(ids.device), exactly=not module.training)
        if first is None:
            return now
        if first is OFF and now:
            noise.warn(
                "activation checkpointing recomputed a pass without noise, because its first run had none; if gradients were "
                "disabled in that, set under_no_grad=True, or checkpoint with use_reentrant=False"
            )
        return first is not OFF
    if module.training and not now:
        noise.first_passes.remember(ids, generator_state(ids.device), OFF)
    return now


def state(noise: EmbeddingNoise, module: nn.Module) -> str:
    """ "on", or why `module` has no noise at this moment."""
    shared = noise.shared
    if not module.training:
        return "off: evaluation mode"
    if not torch.is_grad_enabled() and not shared.options.under_no_grad:
        return "off: gradients are disabled"
    if shared.paused:
        return "off: inside no_noise"
    if shared.passes.batch.generating:
        return "off: a cache is passed, so the model is generating"
    if _other_noise_is_on(module):
        return "off: the Hugging Face hook (neftune_noise_alpha) is on this embedding and adds its own noise"
    return "off: alpha is 0" if shared.alpha.is_always_zero() else "on"


def warn_of_other_noise(noise: EmbeddingNoise, module: nn.Module) -> None:
    """Says once that this noise is off because the Hugging Face hook is on."""
    if _other_noise_is_on(module):
        noise.warn(
            "the Hugging Face hook (neftune_noise_alpha) is on this embedding and adds its own noise, so ours is off; to use "
            "neft_kernels instead, unset it"
        )


def _other_noise_is_on(module: nn.Module) -> bool:
    """Whether the hook of transformers is on `module`.

    The attribute alone does not count, because some trainers set it without registering the hook.
    """
    if HOOK_ATTRIBUTE not in module.__dict__:
        return False
    return any(getattr(hook, "__name__", "") == HOOK_NAME for hook in module._forward_hooks.values())
