"""Symmetric noise, as in SymNoise (arXiv 2312.01523): the batch is doubled where the model begins.

The second half of the doubled batch gets the noise of the first half with the other sign, and the model's loss is the mean
over both. The outputs that the caller sees are those of the first half, so that they fit the batch that the caller gave.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from dataclasses import replace as dataclass_replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from neft_kernels.models.batch import is_cache
from neft_kernels.models.checkpointing import FirstPasses, in_backward, rng_state_of
from neft_kernels.ops.magnitude import IGNORED_LABEL

if TYPE_CHECKING:
    from neft_kernels.models.model_noise import ModelNoise

__all__ = ["BatchDoubler", "Doubling"]

#: A model that is given one of these computes its loss itself, over the doubled batch.
LABELS = ("labels", "shift_labels", "start_positions")
#: The number of tokens by which a sum over the tokens is divided.
NUMBER_OF_ITEMS = "num_items_in_batch"
#: The output that TRL's SFTTrainer sums up for its loss.
LOG_PROBS = "log_probs"
#: These begin the names of arguments about pictures, in the order of the rows, whatever their number.
OF_PICTURES = ("pixel_", "image_", "video_", "second_per_grid")
#: These are about columns, layers or heads, whatever their shape.
NOT_OF_BATCH = ("cache_position", "logits_to_keep", "head_mask", "decoder_head_mask", "cross_attn_head_mask")

Output = TypeVar("Output")


@dataclass(frozen=True)
class Doubling:
    """How a batch was doubled: along the rows, or along the only row."""

    dim: int  # of the token ids: 0, or -1 along the only row
    half: int  # rows, or tokens in the row, before
    ids_ndim: int = 2

    def fits(self, ids: Tensor) -> bool:
        """Whether `ids` may have been doubled so. A model may have made several rows of each."""
        size = ids.shape[self.dim] if ids.ndim >= 2 else 1
        return size % (2 * self.half) == 0 if self.dim == 0 else size == 2 * self.half

    def first_half(self, values: Tensor) -> Tensor:
        """That of `values` of the doubled batch. Values that are for all rows stay as they are."""
        return values.narrow(self.dim, 0, values.shape[self.dim] // 2) if self.fits(values) else values

    def halves_are_equal(self, ids: Tensor) -> Tensor:
        """Whether the halves of the looked-up `ids` are the same, on their device."""
        first, second = ids.chunk(2, self.dim)
        return (first == second).all()

    def of_sequences(self, sequences: dict[str, Any]) -> dict[str, Any]:
        """The arguments of :func:`neft_kernels.noise_magnitude` for the first half, from those of both."""
        return {
            name: value[: value.shape[0] // 2] if name == "cu_seq_lens" else self.first_half(value)
            for name, value in sequences.items()
            if value is not None
        }

    def of_both(self, magnitude: float | Tensor, ids: Tensor) -> float | Tensor:
        """The magnitudes of the looked-up `ids`, of both halves, from those of the first.

        On a GPU, whose ids the host does not read, they are NaN if the model has rearranged the rows.
        """
        if isinstance(magnitude, Tensor) and magnitude.ndim:
            magnitude = torch.cat((magnitude, magnitude), self.dim)
        if ids.device.type == "cpu" or ids.is_floating_point():
            return magnitude
        return torch.where(self.halves_are_equal(ids), magnitude, math.nan).to(torch.float32)

    def output(self, output: Output) -> Output:
        """What the model returned, with the first half of all tensors that are of the doubled batch.

        The loss is about both halves. A loss of what is left would be about one, so its gradient raises a RuntimeError. Only
        the log-probabilities that TRL takes the loss from are the mean over both.
        """
        if isinstance(output, Tensor):
            return self._output(output)  # type: ignore[return-value]
        if isinstance(output, Mapping):
            for name, value in output.items():
                is_mean = name == LOG_PROBS and isinstance(value, Tensor)
                output[name] = self._output(value, is_mean) if is_mean else self.output(value)  # type: ignore[index]
        elif isinstance(output, (tuple, list)):
            values = [self.output(value) for value in output]
            return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)
        elif is_dataclass(output) and not isinstance(output, type):
            values_by_name = {field.name: self.output(getattr(output, field.name)) for field in fields(output)}
            return dataclass_replace(output, **values_by_name)
        return output

    def _output(self, values: Tensor, is_mean: bool = False) -> Tensor:
        rows = self.dim == 0
        if values.ndim <= 1 - rows or (not rows and values.shape[0] != 1):
            return values
        # The last token of a row has no successor, so log-probabilities may be of one token less.
        length, of_both = values.shape[0 if rows else 1], 2 * self.half
        if length != of_both and (rows or length != of_both - 1):
            return values
        first, second = (values.narrow(0 if rows else 1, begin, length - self.half) for begin in (0, self.half))
        result = (first + second) / 2 if is_mean else first
        if result.requires_grad and not torch.compiler.is_compiling():
            result.register_hook(_check_even_gradient if is_mean else _check_no_gradient)
        return result


def _check_no_gradient(gradient: Tensor | None) -> None:
    """Called only if an output is a part of what is differentiated, as in DDP, which gives it no gradient or one of zeros."""
    if gradient is not None and gradient.any():
        raise RuntimeError(
            "symmetric=True returns the outputs of half of the doubled batch, and a loss was computed from them; use the loss "
            "that the model returns, or replace_embeddings(model, ..., symmetric=False)"
        )


def _check_even_gradient(gradient: Tensor | None) -> None:
    """The mean over both halves gives the loss over both only if the loss is a multiple of the sum. Waits for the device."""
    if gradient is not None and not (gradient == gradient.flatten()[:1]).all():
        _check_no_gradient(gradient)


class BatchDoubler:
    """Doubles the arguments of a module where the module is the outermost one."""

    def __init__(self, positional: Sequence[str], renamed: Mapping[str, str]) -> None:
        self.positional = positional  # the names of the module's positional parameters
        self.usual = {own: name for name, own in renamed.items()}
        self._first_passes = FirstPasses()

    def double(
        self, model_noise: "ModelNoise", module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any], Doubling | None]:
        """The arguments of `module` for the doubled batch, and how it was doubled: None if it was not, as in evaluation.

        Raises:
            ValueError: the model is not given labels, or it is given something that cannot be doubled. The message names it.
        """
        keys = [*self.positional[: len(args)], *(f"number {index}" for index in range(len(self.positional), len(args)))]
        given = {self._usual(key): value for key, value in (*zip(keys, args, strict=True), *kwargs.items())}
        if not self._is_to_be_doubled(model_noise, module, given):
            return args, kwargs, None
        doubling = _doubling(module, given)
        new_args = tuple(
            _doubled(module, self._usual(key), value, doubling) for key, value in zip(keys, args, strict=True)
        )
        return (
            new_args,
            {key: _doubled(module, self._usual(key), value, doubling) for key, value in kwargs.items()},
            doubling,
        )

    def _usual(self, key: str) -> str:
        return self.usual.get(key, key)

    def _is_to_be_doubled(self, model_noise: "ModelNoise", module: nn.Module, given: dict[str, Any]) -> bool:
        """Whether this pass has noise: it is one in training, and not of generation."""
        tokens = next((given[name] for name in ("input_ids", *LABELS) if isinstance(given.get(name), Tensor)), None)
        rng_state = None if tokens is None else rng_state_of(tokens.device)
        if in_backward():  # recomputed: the whole model, or a part of it, which is given the doubled batch
            return tokens is not None and self._first_passes.recall(tokens, rng_state) is not None
        if not module.training or not (torch.is_grad_enabled() or model_noise.options.under_no_grad):
            return False
        if model_noise.paused or model_noise.alpha.is_always_zero():
            return False
        if given.get("labels") is None and any(is_cache(name, value) for name, value in given.items()):
            return False
        if tokens is not None and not torch.compiler.is_compiling():
            self._first_passes.remember(tokens, rng_state, True)
        return True


def _doubling(module: nn.Module, given: dict[str, Any]) -> Doubling:
    """How the batch that is `given` to `module` is to be doubled."""
    labels = next((given[name] for name in LABELS if isinstance(given.get(name), Tensor)), None)
    if labels is None:
        raise ValueError(
            "symmetric=True doubles the batch, so the model has to compute the loss: pass labels to it, as an argument of "
            "model(...), or use symmetric=False; losses that are computed outside of the model, such as those of GRPO, DPO "
            "and label smoothing, would not know of the doubled batch"
        )
    ids = given.get("input_ids")
    tokens = ids if isinstance(ids, Tensor) else labels
    if tokens.ndim == 0 or (isinstance(ids, Tensor) and ids.ndim < 2):
        raise ValueError(f"symmetric=True needs input_ids of shape [B, L], not {list(tokens.shape)}")
    if _is_one_packed_row(module, tokens, given):
        return Doubling(-1, tokens.shape[-1])
    return Doubling(0, tokens.shape[0], tokens.ndim)


def _is_one_packed_row(module: nn.Module, tokens: Tensor, given: dict[str, Any]) -> bool:
    """Whether the sequences of the only row are told apart in a way that holds for one row alone.

    So it is with ``cu_seq_lens``, and with positions for FlashAttention, which drops a mask of ones. The row is then
    lengthened. Waits for the device as FlashAttention does.
    """
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    is_row = tokens.ndim == 2 and tokens.shape[0] == 1 and isinstance(positions, Tensor)
    if any(name.startswith("cu_seq_lens") and value is not None for name, value in given.items()):
        if not is_row or mask is not None:
            raise ValueError(
                "symmetric=True needs position_ids beside cu_seq_lens, input_ids of one row, and no attention_mask"
            )
        return True
    configs = (getattr(each, "config", None) for each in module.modules())
    if not is_row or not any("flash" in str(getattr(config, "_attn_implementation", None)) for config in configs):
        return False
    if torch.compiler.is_compiling():
        return mask is None
    if mask is not None and not (isinstance(mask, Tensor) and mask.shape == tokens.shape and bool(mask.all())):
        return False
    return bool((positions.diff(dim=-1) != 1).any())  # type: ignore[union-attr]


def _shifts_labels(module: nn.Module) -> bool:
    """Whether the model's loss compares each token with the label of the next one, as all but a few losses of transformers."""
    kinds = {getattr(each, "loss_type", None) for each in module.modules()} - {None}
    return not kinds or any(str(kind) in ("ForCausalLM", "ForConditionalGeneration") for kind in kinds)


def _doubled(module: nn.Module, name: str, value: Any, doubling: Doubling) -> Any:
    """`value`, the argument `name`, for both halves."""
    along_row, half = doubling.dim == -1, doubling.half
    if name == NUMBER_OF_ITEMS and value is not None:
        return value * 2
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)) or name in NOT_OF_BATCH:
        return value
    if is_cache(name, value):
        raise ValueError(
            f"symmetric=True doubles the batch, and cannot double the cache {name!r}; leave it out, use symmetric=False, or, "
            "if an adapter of PEFT such as prefix tuning passes it, call replace_embeddings() on the PEFT model"
        )
    if isinstance(value, Mapping):  # of masks, by kind of attention; or the outputs of an encoder
        parts = {key: _doubled(module, name, part, doubling) for key, part in value.items()}
        return type(value)(**parts) if is_dataclass(value) else parts
    if isinstance(value, tuple):
        return tuple(_doubled(module, name, part, doubling) for part in value)
    if isinstance(value, Tensor):
        if value.ndim == 0:
            return value
        if name.startswith(OF_PICTURES):
            return torch.cat((value, value))
        if name.startswith("cu_seq_lens"):
            return torch.cat((value, value + half))
        if along_row and value.ndim >= 2 and value.shape[-2] == 1 and value.shape[-1] == half:
            both = torch.cat((value, value + value[..., -1:] + 1 if name == "seq_idx" else value), -1)
            if name == "labels" and _shifts_labels(
                module
            ):  # the first label must not become that of the last token's successor
                both[..., half] = IGNORED_LABEL
            return both
        if not along_row:
            # Positions of text, time, height and width have a dimension before the rows.
            rows = max(0, value.ndim - doubling.ids_ndim) if name == "position_ids" else 0
            if value.shape[rows] == half:
                return torch.cat((value, value), rows)
            if value.shape[rows] == 1:
                return value  # for all rows
    shape = f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
    raise ValueError(
        f"symmetric=True doubles the batch, and cannot double the argument {name!r} of {shape}; leave it out, or use "
        "symmetric=False"
    )
