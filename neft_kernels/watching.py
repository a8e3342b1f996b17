"""What the forward pass around an embedding knows of its sequences: masks, positions, labels, and whether it generates."""

import copy
import inspect
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from neft_kernels.noise import NoiseSettings
from neft_kernels.ops import logger
from neft_kernels.sequences import NO_SEQUENCES, is_recomputed

__all__ = ["WatchSequences", "modules_to_watch"]

#: Arguments that hold a cache, whatever its class: transformers calls it `cache` from 5.24, the others before. Its `mems` and
#: `state` are left out, because models are given those in training too.
_CACHES = ("cache", "past_key_values", "cache_params", "past_buckets_states")
_FROM_ARGUMENT = {
    "attention_mask": "attention_mask",
    "position_ids": "position_ids",
    "cu_seq_lens_q": "cu_seq_lens",
    "labels": "labels",
}
#: For what takes a decoder's ids and no others.
_FROM_ARGUMENT_OF_DECODER = {
    "decoder_attention_mask": "attention_mask",
    "decoder_position_ids": "position_ids",
    "labels": "labels",
}


class WatchSequences:
    """Hooks on a module around an embedding: what it is called with holds while its forward runs.

    The innermost module that takes an argument decides on it: a decoder's ``attention_mask`` is its own, not the encoder's.
    """

    def __init__(self, settings: NoiseSettings, module: nn.Module) -> None:
        self.settings = settings
        self.warned: set[str] = set()
        self.parameters = _parameters_of_forward(module)
        self.positional = _parameters_of_forward(module, positional=True)
        # Without transformers there is none, and with it no import is needed for a model of its own.
        self.cache_class: Any = getattr(sys.modules.get("transformers.cache_utils"), "Cache", ())

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
        given = dict.fromkeys(self.parameters) | dict(zip(self.positional, args, strict=False)) | kwargs
        has_cache = any(self._is_cache(name, value) for name, value in given.items())
        given = {name: value if isinstance(value, torch.Tensor) else None for name, value in given.items()}
        passes = self.settings.passes
        is_decoder = "decoder_input_ids" in given and "input_ids" not in given
        arguments = _FROM_ARGUMENT_OF_DECODER if is_decoder else _FROM_ARGUMENT
        known = {attribute: given[name] for name, attribute in arguments.items() if name in given}
        if is_decoder or given.get("encoder_hidden_states") is not None:
            # Its ids are its own, and what the module around it was told is not about them.
            known = dict.fromkeys(("attention_mask", "position_ids", "cu_seq_lens")) | known
        input_ids = given.get("decoder_input_ids" if is_decoder else "input_ids")
        if "attention_mask" in known:  # and so the ids that it is about
            known["input_ids"] = input_ids
        passes.end(self)  # one that an interrupt cut off, if there is any: hooks do not run after it
        outside = passes.sequences
        inside = outside.inside(known, input_ids)
        # A cache that the model fills and passes on within itself is none; nor is there generation with labels, whatever
        # the cache is for: prefix tuning passes its prefix as one.
        generating = has_cache and outside.is_empty and inside.labels is None
        inside = replace(inside, generating=outside.generating or generating)
        # A compiled graph would be tied to the count of one pass, and a pass that is recomputed has been counted.
        is_repeated = torch.compiler.is_compiling() or is_recomputed()
        if outside is not NO_SEQUENCES or not module.training or not torch.is_grad_enabled() or is_repeated:
            passes.begin(self, inside)
            return
        self.settings.count_pass()
        if inside.generating:
            self._warn("a cache was passed to the model in training: taken for generation, which gets no noise")
        has_embeds = any(given.get(name) is not None for name in ("inputs_embeds", "decoder_inputs_embeds"))
        must_reach = input_ids is not None and input_ids.ndim > 0 and not has_embeds
        passes.begin(self, inside, must_reach)

    def leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self.settings.passes.end(self) and output is not None:  # None: it failed
            self._warn(
                "the model's pass in training reached no noisy embedding, so there is no noise: something put on since, as an "
                "adapter is, looks tokens up past it; call replace_embeddings() again"
            )

    def _is_cache(self, name: str, value: Any) -> bool:
        """Whether the argument `name` passes a cache: by its class, or by its name unless it is a switch."""
        return isinstance(value, self.cache_class) or (
            name in _CACHES and value is not None and not isinstance(value, bool)
        )

    def _warn(self, message: str) -> None:
        if message not in self.warned:
            self.warned.add(message)
            logger.warning(message)


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


def _parameters_of_forward(module: nn.Module, positional: bool = False) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    return tuple(each.name for each in parameters if not positional or each.kind in kinds)
