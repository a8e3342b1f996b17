"""Noise in the modules by which a model looks tokens up, and out of them again."""

from collections.abc import Iterator

from torch import nn

from neft_kernels.lookups import check_model, is_plain
from neft_kernels.modules import AddNoise, NEFTuneEmbedding
from neft_kernels.noise import Noise, NoiseSettings
from neft_kernels.watching import WatchSequences

__all__ = ["noisy_modules", "place_noise", "remove_noise"]


def place_noise(model: nn.Module, embeddings: list[nn.Module], settings: NoiseSettings, note: str = "") -> None:
    """Makes `embeddings`, modules of `model` without noise, noisy: a plain one by its class, another one by a hook."""
    names = {module: name for name, module in model.named_modules()}
    for module in embeddings:
        noise = Noise(settings, names[module], standing_note=note)
        if is_plain(module):
            module.__class__ = NEFTuneEmbedding
            module.noise = noise  # type: ignore[assignment]
        elif isinstance(module, NEFTuneEmbedding):
            module.noise = noise
        else:
            AddNoise(noise).attach(module)
            for part in module.modules():
                if isinstance(part, NEFTuneEmbedding):  # built by the user; what is around it adds the noise now
                    part.noise = None
        noise.warn_of_other_noise(module)


def remove_noise(module: nn.Module) -> None:
    """Undoes :func:`place_noise` on `module`, and the watching of its passes; one without noise stays as it is."""
    if isinstance(module, NEFTuneEmbedding):
        can_be_plain = type(module) is NEFTuneEmbedding and not {"built_in_noise", "forward"} & module.__dict__.keys()
        if can_be_plain:
            module.__class__ = nn.Embedding  # type: ignore[assignment]
            del module.noise
        else:
            # Built by the user; or, in the meantime, given a class derived from ours, as fully_shard() does it, or a forward
            # of its own around ours, as accelerate does it.
            module.noise = module.__dict__.get("built_in_noise")
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), (AddNoise, WatchSequences)):
                for registry in (
                    hooks,
                    module._forward_hooks_always_called,
                    module._forward_hooks_with_kwargs,
                    module._forward_pre_hooks_with_kwargs,
                ):
                    registry.pop(key, None)


def noisy_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, Noise]]:
    """Name, module and noise of each noisy embedding."""
    check_model(model)
    for name, module in model.named_modules():
        if isinstance(module, NEFTuneEmbedding) and module.noise is not None:
            yield name, module, module.noise
        for hook in module._forward_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, AddNoise):
                yield name, module, owner.noise
