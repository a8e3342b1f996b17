"""The forward passes under way, and the hook that reads what each says about its batch.

Hooks on the modules around an embedding push a :class:`Batch` while the module's forward runs, and the embedding reads the
innermost one. One hook on the model alone is not enough: a decoder is called with a mask of its own, and a part of the model
may be called directly.
"""

import copy
import inspect
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from neft_kernels.models.batch import CACHES, NO_BATCH, Batch, is_cache
from neft_kernels.models.checkpointing import in_backward
from neft_kernels.models.lookups import input_embeddings
from neft_kernels.models.symmetric import BatchDoubler
from neft_kernels.ops.backends import logger

if TYPE_CHECKING:
    from neft_kernels.models.model_noise import ModelNoise
    from neft_kernels.models.options import NoiseOptions

__all__ = ["BatchHook", "PassStack", "modules_around", "parameters_of_forward"]


@dataclass(frozen=True)
class _Pass:
    """The forward pass of a module, under way."""

    batch: Batch
    owner: object
    outside: "_Pass | None"
    is_traced: bool  # by a compiler. It then belongs to the passes of the graph, in whatever thread


class PassStack:
    """The forward passes of one model that are under way. Each thread has its own, because several may run the model."""

    def __init__(self) -> None:
        self._of_thread: dict[int, _Pass] = {}
        # The pass that began last, in whatever thread. A compiled graph cannot tell threads apart.
        self._last: _Pass | None = None

    @property
    def batch(self) -> Batch:
        """The batch of the innermost pass of this thread."""
        innermost = self._innermost()
        return NO_BATCH if innermost is None else innermost.batch

    @property
    def in_compiled_model(self) -> bool:
        """Whether the outermost pass of this thread is that of a compiled model."""
        outermost = self._innermost()
        while outermost is not None and outermost.outside is not None:
            outermost = outermost.outside
        return outermost is not None and outermost.is_traced

    def push(self, owner: object, batch: Batch) -> None:
        """A pass of `owner` begins inside those that are under way."""
        self._set(_Pass(batch, owner, self._innermost(), torch.compiler.is_compiling()))

    def pop(self, owner: object) -> Batch:
        """The innermost pass of `owner` ends, and with it all passes inside of it. Returns its batch, if there was one."""
        innermost = self._innermost()
        while innermost is not None and innermost.owner is not owner:
            innermost = innermost.outside
        if innermost is None:
            return NO_BATCH
        self._set(innermost.outside)
        return innermost.batch

    def _innermost(self) -> _Pass | None:
        last = self._last
        if torch.compiler.is_compiling():
            return last
        own = self._of_thread.get(threading.get_ident())
        # After a graph break, a module runs eagerly within the pass that the graph opened.
        return last if own is None and last is not None and last.is_traced else own

    def _set(self, innermost: _Pass | None) -> None:
        self._last = innermost
        if torch.compiler.is_compiling():
            return
        if innermost is None or innermost.is_traced:
            self._of_thread.pop(threading.get_ident(), None)
        else:
            self._of_thread[threading.get_ident()] = innermost

    def __reduce__(self) -> tuple:
        return PassStack, ()  # copies and pickles have nothing of the passes under way


# --- the hook --------------------------------------------------------------------------------------------------------

_FIELDS = {
    "attention_mask": "attention_mask",
    "position_ids": "position_ids",
    "cu_seq_lens_q": "cu_seq_lens",
    "labels": "labels",
}
#: For a module that takes ids of the decoder and no others.
_FIELDS_OF_DECODER = {
    "decoder_attention_mask": "attention_mask",
    "decoder_position_ids": "position_ids",
    "labels": "labels",
}
#: The arguments of a module that say something about the batch.
_ARGUMENTS = frozenset((*_FIELDS, *CACHES))


class BatchHook:
    """Hooks on a module around an embedding. They keep the module's arguments available while its forward runs.

    If nested modules take the same argument, the innermost one wins: a decoder has an ``attention_mask`` of its own.
    """

    def __init__(self, model_noise: "ModelNoise", module: nn.Module) -> None:
        self.model_noise = model_noise
        self.parameters = parameters_of_forward(module)
        self.positional = parameters_of_forward(module, positional=True)
        #: The names that this model's forward has for arguments that it calls differently.
        self.names = own_names(model_noise.options)
        self.warned: set[str] = set()
        self.doubler = BatchDoubler(self.positional, self.names)

    def attach(self, module: nn.Module) -> None:
        """Registers both hooks."""
        self.model_noise.around.add(module)
        module.register_forward_pre_hook(self.before, with_kwargs=True)
        module.register_forward_hook(self.after, always_call=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> "BatchHook":
        # A module's hooks are copied before its submodules, so the embeddings below find the copy in `memo`.
        if id(self) not in memo:
            twin = memo[id(self)] = copy.copy(self)
            twin.model_noise = self.model_noise.own_copy(memo)
        return memo[id(self)]

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Reads the arguments, and pushes the batch that they describe. Returns those with which the module goes on."""
        passes = self.model_noise.passes
        passes.pop(self)  # a pass that an interrupt left behind, because hooks do not run after an interrupt
        outside, doubling = passes.batch, None
        if self.model_noise.options.symmetric and outside is NO_BATCH:
            args, kwargs, doubling = self.doubler.double(self.model_noise, module, args, kwargs)
        given = dict.fromkeys(self.parameters) | dict(zip(self.positional, args, strict=False)) | kwargs
        ids_name = self.names.get("input_ids", "input_ids")
        mappings = [value for value in (*args, *kwargs.values()) if isinstance(value, Mapping) and ids_name in value]
        if len(mappings) == 1:  # the batch, as sentence-transformers passes it on to its modules
            given |= mappings[0]
        given |= {name: given[own] for name, own in self.names.items() if given.get(own) is not None}
        has_cache = any(is_cache(name, value) for name, value in given.items())
        given = {name: _readable(value) for name, value in given.items()}

        is_decoder = "decoder_input_ids" in given and "input_ids" not in given
        fields = _FIELDS_OF_DECODER if is_decoder else _FIELDS
        known = {field: given[name] for name, field in fields.items() if name in given}
        input_ids = given.get("decoder_input_ids" if is_decoder else "input_ids")
        if is_decoder or given.get("encoder_hidden_states") is not None:
            # A decoder has its own ids: clear the outer mask and positions, keep the labels.
            known = dict.fromkeys(("attention_mask", "position_ids", "cu_seq_lens")) | known
            # Some encoders read the states of pictures; the labels are not about the ids of the model itself.
            known["is_decoder"] = is_decoder or input_ids is not outside.called_with
            if known["attention_mask"] is None and known["is_decoder"]:
                known["attention_mask"] = outside.decoder_mask
        elif "decoder_attention_mask" in given:
            known["decoder_mask"] = given["decoder_attention_mask"]
        if input_ids is not None:
            known["called_with"] = input_ids
        if "attention_mask" in known:  # and so the ids that it is about
            known["input_ids"] = input_ids
            lengths = given.get("lengths")  # of XLM, which takes them in place of a mask
            if known["attention_mask"] is None and input_ids is not None and isinstance(lengths, Tensor):
                columns = torch.arange(input_ids.shape[-1], device=input_ids.device)
                known["attention_mask"] = (columns < lengths.to(input_ids.device)[..., None]).to(torch.int64)
        batch = outside.inside(known, input_ids)
        # A cache that the model creates and passes to its own parts does not mean generation. Nor does a cache beside labels:
        # prefix tuning passes its prefix as a cache.
        generates = has_cache and outside.is_empty and batch.labels is None
        batch = replace(batch, generating=outside.generating or generates, doubling=doubling or outside.doubling)
        passes.push(self, batch)

        if outside is not NO_BATCH or torch.compiler.is_compiling():  # a graph would depend on the count, and recompile
            return args, kwargs
        self.model_noise.around.add(module)
        in_training = module.training and torch.is_grad_enabled() and not in_backward()
        if in_training:
            self.model_noise.alpha.count_pass()
            if batch.generating:
                self._warn(
                    "a cache was passed to the model in training, without labels: the pass counts as generation, "
                    "which gets no noise; pass labels, or no cache"
                )
            self._check_wrapper(module)
        has_embeds = any(given.get(name) is not None for name in ("inputs_embeds", "decoder_inputs_embeds"))
        must_reach = in_training and input_ids is not None and input_ids.ndim > 0 and not has_embeds
        self.model_noise.reached.pass_begins(must_reach)
        return args, kwargs

    def after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Pops the batch. Returns the output for the batch that the module was given, before it was doubled."""
        batch, outside = self.model_noise.passes.pop(self), self.model_noise.passes.batch
        if batch.doubling is not None and outside is NO_BATCH:
            output = batch.doubling.output(output)
        if torch.compiler.is_compiling() or outside is not NO_BATCH:
            return output
        if self.model_noise.reached.pass_ends() and output is not None:  # None: the forward failed
            self._warn(
                "the model's pass in training reached no noisy embedding, so it has no noise; a module that was added "
                "after replace_embeddings(), such as an adapter, probably looks the tokens up itself; call "
                "replace_embeddings() again"
            )
        return output

    def _check_wrapper(self, module: nn.Module) -> None:
        wrapper, _ = input_embeddings(module)
        self.model_noise.warning = ""
        if getattr(wrapper, "lora_magnitude_vector", None):  # DoRA, which scales the output of the table that it wraps
            hooks = wrapper._forward_hooks.values()  # type: ignore[union-attr]
            if not any(hasattr(getattr(hook, "__self__", None), "noise") for hook in hooks):
                self.model_noise.warning = (
                    "DoRA was added after replace_embeddings() and scales the noise too; call it again"
                )
                self._warn(self.model_noise.warning)

    def _warn(self, message: str) -> None:
        if message not in self.warned:
            self.warned.add(message)
            logger.warning(message)


def own_names(options: "NoiseOptions") -> dict[str, str]:
    """``argument_names`` by the names that transformers uses."""
    names = dict(options.argument_names or {})
    if "cu_seq_lens" in names:
        names["cu_seq_lens_q"] = names.pop("cu_seq_lens")
    return names


def modules_around(model: nn.Module, embeddings: list[nn.Module], options: "NoiseOptions") -> list[nn.Module]:
    """`model`, and the modules between it and its embeddings whose arguments say something about the batch.

    Raises:
        ValueError: no forward of these modules takes an argument that ``argument_names`` names.
    """
    own = set(own_names(options).values())
    names = [name for name, module in model.named_modules(remove_duplicate=False) if module in embeddings]
    paths = {name.rsplit(".", depth)[0] for name in names for depth in range(1, name.count(".") + 1)}
    found = [model]
    for path in sorted(paths):
        module = model.get_submodule(path)
        if module not in found and (_ARGUMENTS | own).intersection(parameters_of_forward(module)):
            found.append(module)
    _check_own_names(own_names(options), found)
    return found


def _check_own_names(names: dict[str, str], around: list[nn.Module]) -> None:
    parameters = [each for module in around for each in inspect.signature(module.forward).parameters.values()]
    known = dict.fromkeys(each.name for each in parameters)
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)
    if takes_any or any(len(parameters_of_forward(module)) == 1 for module in around):  # of a batch in one dictionary
        return
    for own in names.values():
        if own not in known:
            raise ValueError(
                f"argument_names names {own!r}, which no forward of the model takes; they take {', '.join(known)}"
            )


def _readable(value: Any) -> Any:
    """The value that the batch stores. Of a dictionary of masks, by kind of attention, the one of fewest dimensions."""
    if isinstance(value, dict):
        value = min((each for each in value.values() if isinstance(each, Tensor)), key=Tensor.dim, default=value)
    # Drops what is no tensor while compiling, because it would become a guard of the graph.
    return None if torch.compiler.is_compiling() and not isinstance(value, Tensor) else value


def parameters_of_forward(module: nn.Module, positional: bool = False) -> tuple[str, ...]:
    """The names of the parameters of the module's forward, all or those that can be given by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    return tuple(each.name for each in parameters if not positional or each.kind in kinds)
