"""Whether a forward pass of an embedding has noise."""

import torch
from torch import Tensor, nn

from neft_kernels.models.checkpointing import OFF, in_backward, rng_state_of
from neft_kernels.models.noise import EmbeddingNoise

__all__ = ["HOOK_ATTRIBUTE", "begin_pass", "warn_of_other_noise", "why_off"]

#: What transformers sets on an embedding that its own NEFTune hook is on, and the name of the hook.
HOOK_ATTRIBUTE = "neftune_noise_alpha"
HOOK_NAME = "neftune_post_forward_hook"


def begin_pass(noise: EmbeddingNoise, module: nn.Module, ids: Tensor) -> bool:
    """Whether this forward pass of `module` on `ids` has noise. A pass that is recomputed has it if the first one had.

    Call it once in each pass: it counts the pass, and remembers one without noise for its recomputation.
    """
    noise.model_noise.reached.embedding_called()
    warn_of_other_noise(noise, module)
    now = not why_off(noise, module)
    if torch.compiler.is_compiling():
        return now
    if in_backward():
        first = noise.first_passes.recall(ids, rng_state_of(ids.device), exactly=not module.training)
        if first is None:
            return now
        if first is OFF and now:
            noise.warn(
                "activation checkpointing recomputed a pass without noise, because its first run had none; if gradients were "
                "disabled in that, set under_no_grad=True, or checkpoint with use_reentrant=False"
            )
        return first is not OFF
    if module.training and not now:
        noise.first_passes.remember(ids, rng_state_of(ids.device), OFF)
    return now


def why_off(noise: EmbeddingNoise, module: nn.Module) -> str:
    """Why `module` has no noise at this moment. Empty if it has."""
    model_noise = noise.model_noise
    if not module.training:
        return "evaluation mode"
    if not torch.is_grad_enabled() and not model_noise.options.under_no_grad:
        return "gradients are disabled"
    if model_noise.paused:
        return "inside no_noise"
    if model_noise.passes.batch.generating:
        return "a cache is passed, so the model is generating"
    if _other_noise_is_on(module):
        return "the Hugging Face hook (neftune_noise_alpha) is on this embedding and adds its own noise"
    return "alpha is 0" if model_noise.alpha.is_always_zero() else ""


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
