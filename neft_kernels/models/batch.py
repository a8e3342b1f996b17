"""What a forward pass says about the sequences in its batch, and how the embedding reads it."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neft_kernels.models.rearrangement import is_rearranged
from neft_kernels.ops.checks import broadcasts
from neft_kernels.ops.magnitude import IGNORED_LABEL

if TYPE_CHECKING:
    from neft_kernels.models.options import NoiseOptions
    from neft_kernels.models.symmetric import Doubling

__all__ = ["CACHES", "NO_BATCH", "Batch", "is_cache"]

#: What a batch may say about its sequences, in the order in which it counts.
FIELDS = ("attention_mask", "position_ids", "cu_seq_lens", "labels")
#: Arguments that hold a cache of any class. transformers calls it `cache` from 5.24 on. Its `mems` and `state` are left out,
#: because models are given those in training too.
CACHES = ("cache", "past_key_values", "cache_params", "past_buckets_states")


@dataclass(frozen=True)
class Batch:
    """What a forward pass says about its batch. Names and shapes are those of :func:`neft_kernels.noise_magnitude`.

    Arguments that are not tensors, such as a BlockMask, are kept unchanged so that a note can name them.
    """

    attention_mask: Any = None
    position_ids: Any = None
    cu_seq_lens: Any = None
    labels: Any = None
    #: The token ids that the others are about, ``[..., L]``, as the model was given them.
    input_ids: Tensor | None = None
    #: A cache was passed: tokens are being generated, and get no noise.
    generating: bool = False
    #: The ids are those of a decoder beside an encoder, so the labels are about them.
    is_decoder: bool = False
    #: The token ids with which the innermost module around was called, whether or not anything is known about them.
    called_with: Tensor | None = None
    #: The mask of the decoder, as the model around both was given it.
    decoder_mask: Any = None
    #: How the model's batch was doubled for symmetric noise.
    doubling: "Doubling | None" = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing is known."""
        return self.input_ids is None and not self.generating and not any(self._given())

    def inside(self, known: dict[str, Any], input_ids: Tensor | None) -> "Batch":
        """The batch of a nested module, which is called with `input_ids` and with what is `known`.

        A None in `known` clears the outer value, unless the module gets the same `input_ids`; then the outer value stays.
        """
        if input_ids is not None and input_ids is self.input_ids:
            length = input_ids.shape[-1] if input_ids.ndim else 1

            def is_news(name: str, value: Any) -> bool:
                """Whether `value` takes the place of the outer one: not if only the outer one can be used."""
                return name not in FIELDS or getattr(self, name) is None or _is_usable(name, value, input_ids, length)

            known = {name: value for name, value in known.items() if value is not None and is_news(name, value)}
        return replace(self, **known)

    def about(
        self, ids: Tensor, row_length: int | None, options: "NoiseOptions"
    ) -> tuple[Tensor, dict[str, Tensor], str]:
        """What this batch says about `ids` ``[..., l]``, which the model looks up.

        Args:
            ids: the token ids.
            row_length: None if `ids` are whole rows, else the length of a whole row. An argument of that length describes the
                whole row.
            options: `scale_by` and `noise_on` decide which arguments are used.

        Returns:
            The ids that the model was given before it rearranged them, or `ids` themselves; the arguments of
            :func:`neft_kernels.noise_magnitude` for these; and a note if an argument could not be used.
        """
        if self is NO_BATCH:
            return ids, {}, _note_without_lengths(ids, options)
        tokens = ids
        if row_length is None and self.input_ids is not None and is_rearranged(self.input_ids, ids):
            tokens = self.input_ids
        row_length = tokens.shape[-1] if row_length is None else row_length
        usable, unusable = {}, []
        for name, value in self._given():
            if options.noise_on == "all" if name == "labels" else options.scale_by == "batch":
                continue
            value = _of_tokens(name, value, tokens, row_length, self.input_ids)
            if _is_usable(name, value, tokens, row_length):
                usable[name] = value
            else:
                unusable.append((name, value))
        by_labels = self.is_decoder and options.scale_by != "batch" and not usable
        if by_labels and _is_usable("labels", self.labels, tokens, row_length):
            # Decoders usually get no mask. Collators pad labels with IGNORED_LABEL, so tokens up to the last label count.
            counts = (self.labels != IGNORED_LABEL).flip(-1).cumsum(-1).flip(-1) > 0
            usable["attention_mask"] = counts.to(torch.int64)
        if torch.compiler.is_compiling():
            return tokens, usable, ""
        notes = [f"{_described(name, value, tokens)} does not tell the lengths of ids of shape {list(tokens.shape)}"
                 for name, value in unusable]  # fmt: skip
        if tokens.shape != ids.shape:
            notes.append(f"ids of shape {list(tokens.shape)} were looked up as {list(ids.shape)}")
        if not notes and not usable.keys() - {"labels"}:
            return tokens, usable, _note_without_lengths(tokens, options)
        return tokens, usable, "; ".join(notes)

    def _given(self) -> Iterator[tuple[str, Any]]:
        for name in FIELDS:
            if (value := getattr(self, name)) is not None:
                yield name, value


NO_BATCH = Batch()


def is_cache(name: str, value: Any) -> bool:
    """Whether an argument holds a cache: by its class, or by its name unless it is a switch, as ``cache=True``."""
    # transformers' class of caches, if it is imported; a model of transformers has imported it.
    if isinstance(value, getattr(sys.modules.get("transformers.cache_utils"), "Cache", ())):
        return True
    return name in CACHES and value is not None and not isinstance(value, bool)


def _note_without_lengths(ids: Tensor, options: "NoiseOptions") -> str:
    """The note on a batch that says nothing about the lengths of its sequences."""
    if options.scale_by == "batch" or torch.compiler.is_compiling() or ids.numel() == ids.shape[-1]:
        return ""
    return f"no mask or positions were given, so each row of {list(ids.shape)} ids counts in full length"


def _of_tokens(name: str, value: Any, ids: Tensor, row_length: int, given: Tensor | None) -> Any:
    """The part of `value` that is about `ids`, which may be a slice of the ids that the model was `given`."""
    if not isinstance(value, Tensor):
        return value
    if given is not None and value.shape == given.shape and value.shape[-1] != row_length:
        begin = _begin_of_slice(ids, given)
        return value if begin is None else value[..., begin : begin + ids.shape[-1]]
    if name == "attention_mask" and value.ndim == ids.ndim and value.shape[-1] != row_length:
        return value[..., -ids.shape[-1] :]  # the leading columns belong to a cached prefix
    if name == "position_ids" and value.ndim == ids.ndim + 1 and value.shape[0] == 4:
        return value[0]  # of text; transformers' multimodal models put it before time, height and width
    return value


def _begin_of_slice(ids: Tensor, given: Tensor) -> int | None:
    """Where `ids` begin in the rows of `given`, of which they are a view. None if they are not."""
    if torch.compiler.is_compiling() or type(ids) is not Tensor or type(given) is not Tensor or given.stride(-1) == 0:
        return None
    if ids.untyped_storage() is not given.untyped_storage() or ids.stride() != given.stride():
        return None
    begin, rest = divmod(int(ids.storage_offset()) - int(given.storage_offset()), given.stride(-1))
    fits = rest == 0 and 0 <= begin <= given.shape[-1] - ids.shape[-1] and ids.shape[:-1] == given.shape[:-1]
    return begin if fits else None


def _is_usable(name: str, value: Any, ids: Tensor, row_length: int) -> bool:
    """Whether :func:`noise_magnitude` accepts `value` as argument `name` for `ids`."""
    if not isinstance(value, Tensor) or value.device != ids.device:
        return False
    if name == "cu_seq_lens":
        return ids.numel() == ids.shape[-1] and value.ndim == 1 and 2 <= value.shape[0] <= row_length + 1
    if value.ndim == 0 or value.shape[-1] not in (ids.shape[-1], row_length):
        return False
    rows = ids.shape[:-1]
    return value.shape[:-1] == rows or (name == "position_ids" and broadcasts(value.shape[:-1], rows))


def _described(name: str, value: Any, ids: Tensor) -> str:
    if not isinstance(value, Tensor):
        return f"{name} of type {type(value).__name__}"
    where = "" if value.device == ids.device else f" on {value.device}, not on {ids.device},"
    return f"{name} of shape {list(value.shape)}{where}"
