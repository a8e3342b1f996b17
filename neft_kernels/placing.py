"""Noise in the modules by which a model looks tokens up, and out of them again."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from neft_kernels import ops
from neft_kernels.lookups import check_model, input_embeddings, is_plain, token_embeddings
from neft_kernels.modules import AddNoise, NEFTuneEmbedding
from neft_kernels.noise import HOOK_ATTRIBUTE, Noise, NoiseSettings
from neft_kernels.sequences import NO_SEQUENCES
from neft_kernels.watching import WatchSequences

__all__ = ["FollowLookups", "noisy_modules", "place_noise", "remove_noise", "stop_following"]


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
        _warn_of_other_noise(module, noise)


def remove_noise(module: nn.Module) -> None:
    """Undoes :func:`place_noise` on `module`; one without noise stays as it is."""
    if isinstance(module, NEFTuneEmbedding):
        can_be_plain = type(module) is NEFTuneEmbedding and not {"built_in_noise", "forward"} & module.__dict__.keys()
        if can_be_plain:
            module.__class__ = nn.Embedding  # type: ignore[assignment]
            del module.noise
        else:
            # Built by the user; or, in the meantime, given a class derived from ours, as fully_shard() does it, or a forward
            # of its own around ours, as accelerate does it.
            module.noise = module.__dict__.get("built_in_noise")
    _remove_hooks(module, AddNoise)


def stop_following(module: nn.Module) -> None:
    """Removes the hooks that tell the embeddings inside `module` of its forward passes."""
    _remove_hooks(module, WatchSequences, FollowLookups)


def noisy_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, Noise]]:
    """Name, module and noise of each noisy embedding."""
    check_model(model)
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, FollowLookups):
                owner.follow(module)
    yield from _noisy(model)


class FollowLookups:
    """A hook before each forward pass of a model in training: the noise goes where its tokens are looked up by now.

    Adapters are put around embeddings that are noisy already, by trainers too, and some of them look tokens up by themselves,
    past the embedding's own forward; merging takes them away again. A compiled model does not follow.
    """

    def __init__(self, settings: NoiseSettings, model: nn.Module) -> None:
        self.settings = settings
        self.lookup = _main_lookup(model)
        self.had_other_noise = self.lookup is not None and HOOK_ATTRIBUTE in self.lookup.__dict__

    def attach(self, model: nn.Module) -> None:
        """Registers the hook."""
        model.register_forward_pre_hook(self.before)

    def __deepcopy__(self, memo: dict[int, Any]) -> "FollowLookups":
        twin = memo[id(self)] = copy.copy(self)
        twin.settings, twin.lookup = self.settings.own_copy(memo), None
        return twin

    def before(self, model: nn.Module, args: tuple) -> None:
        if torch.compiler.is_compiling() or not (model.training and torch.is_grad_enabled()):
            return
        self.follow(model)
        if self.settings.passes.sequences is not NO_SEQUENCES:
            return  # the module around this one has warned
        had, self.had_other_noise = self.had_other_noise, HOOK_ATTRIBUTE in getattr(self.lookup, "__dict__", ())
        if self.had_other_noise and not had:
            for _, module, noise in _noisy(model):
                _warn_of_other_noise(module, noise)

    def follow(self, model: nn.Module) -> None:
        """Moves the noise, if `model` has come to look its tokens up by another module."""
        lookup = _main_lookup(model)
        if lookup is None or lookup is self.lookup or getattr(model, "_is_replica", False):
            return
        self.lookup = lookup
        embeddings, note = token_embeddings(model)
        noisy = [module for _, module, _ in _noisy(model)]
        if set(noisy) == set(embeddings) or not set(embeddings) <= set(model.modules()):
            return
        for module in noisy:
            remove_noise(module)
        place_noise(model, embeddings, self.settings, note)
        ops.logger.info("%s looks tokens up by another module now, and the noise is there", type(model).__name__)


def _warn_of_other_noise(module: nn.Module, noise: Noise) -> None:
    if HOOK_ATTRIBUTE in module.__dict__:
        ops.logger.warning("%s: noise %s; to use neft_kernels instead, unset it", noise.name, noise.state(module))


def _main_lookup(model: nn.Module) -> nn.Module | None:
    while isinstance(model, (DataParallel, DistributedDataParallel)):
        model = model.module
    return input_embeddings(model)[0] if hasattr(model, "get_input_embeddings") else None


def _noisy(model: nn.Module) -> Iterator[tuple[str, nn.Module, Noise]]:
    for name, module in model.named_modules():
        if isinstance(module, NEFTuneEmbedding) and module.noise is not None:
            yield name, module, module.noise
        for hook in module._forward_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, AddNoise):
                yield name, module, owner.noise


def _remove_hooks(module: nn.Module, *owners: type) -> None:
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), owners):
                for registry in (
                    hooks,
                    module._forward_hooks_always_called,
                    module._forward_hooks_with_kwargs,
                    module._forward_pre_hooks_with_kwargs,
                ):
                    registry.pop(key, None)
