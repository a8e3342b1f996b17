"""What the forward pass around an embedding knows of its sequences: masks, positions, labels, and whether it generates."""

import copy
import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from neft_kernels.noise import NoiseSettings, is_recomputed

__all__ = ["WatchSequences", "modules_to_watch"]

_CACHES = ("past_key_values", "past_key_value", "cache_params")
_FROM_ARGUMENT = {
    "attention_mask": "attention_mask",
    "position_ids": "position_ids",
    "cu_seq_lens_q": "cu_seq_lens",
    "labels": "labels",
}


class WatchSequences:
    """Hooks on a module around an embedding: what it is called with holds while its forward runs.

    The innermost module that takes an argument decides on it: a decoder's ``attention_mask`` is its own, not the encoder's.
    """

    def __init__(self, settings: NoiseSettings, module: nn.Module, outermost: bool) -> None:
        self.settings = settings
        self.parameters = _parameters_of_forward(module)
        self.outermost = outermost

    def attach(self, module: nn.Module) -> None:
        """Registers both hooks."""
        module.register_forward_pre_hook(self.enter, with_kwargs=True)
        module.register_forward_hook(self.leave, always_call=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> "WatchSequences":
        # A module's hooks are copied before its submodules, so the embeddings below follow.
        if id(self) not in memo:
            twin = memo[id(self)] = copy.copy(self)
            twin.settings = self.settings.own_copy(memo)
        return memo[id(self)]

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = dict.fromkeys(self.parameters) | dict(zip(self.parameters, args, strict=False)) | kwargs
        known = {
            attribute: given[argument] if isinstance(given[argument], torch.Tensor) else None
            for argument, attribute in _FROM_ARGUMENT.items()
            if argument in given
        }
        passes = self.settings.passes
        outside = passes.sequences
        inside = replace(outside, **known)  # type: ignore[arg-type]
        # With labels there is training, whatever the cache is for: prefix tuning passes its prefix as one.
        has_cache = any(given.get(name) is not None for name in _CACHES)
        passes.begin(self, replace(inside, generating=outside.generating or (has_cache and inside.labels is None)))
        # A compiled graph would be tied to the count of one pass, and a pass that is recomputed has been counted.
        is_repeated = torch.compiler.is_compiling() or is_recomputed()
        if self.outermost and module.training and torch.is_grad_enabled() and not is_repeated:
            self.settings.count_pass()

    def leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.settings.passes.end(self)


def modules_to_watch(model: nn.Module, embeddings: list[nn.Module]) -> list[nn.Module]:
    """`model`, and the modules between it and its embeddings that are called with what tells of sequences."""
    names = [name for name, module in model.named_modules(remove_duplicate=False) if module in embeddings]
    paths = {name.rsplit(".", depth)[0] for name in names for depth in range(1, name.count(".") + 1)}
    found = [model]
    for path in sorted(paths):
        module = model.get_submodule(path)
        if module not in found and set(_parameters_of_forward(module)) & {*_FROM_ARGUMENT, *_CACHES}:
            found.append(module)
    return found


def _parameters_of_forward(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(module.forward).parameters)
