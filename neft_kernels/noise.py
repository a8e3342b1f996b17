"""When an embedding has noise, how much, and of which stream: what all its forward passes share."""

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from neft_kernels import ops
from neft_kernels.layout import lay_out, may_be_laid_out
from neft_kernels.magnitude import NOISE_ON, SCALES, check_alpha, check_choice, magnitude_of_length, noise_magnitude

__all__ = ["HOOK_ATTRIBUTE", "NO_SEQUENCES", "Noise", "NoiseSettings", "Sequences"]


@dataclass(frozen=True)
class Sequences:
    """What a forward pass says of the sequences in its batch. Names and shapes are those of :func:`noise_magnitude`."""

    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    cu_seq_lens: Tensor | None = None
    labels: Tensor | None = None
    #: The token ids that the others are about, ``[..., L]``, as the model was given them.
    input_ids: Tensor | None = None
    #: A cache was passed, so tokens are being generated and get no noise.
    generating: bool = False

    def inside(self, known: dict[str, Tensor | None]) -> "Sequences":
        """What holds inside a module that is called with what is `known`, None included.

        A module that is called with the very ids of the one around it need not be told again what is known of them.
        """
        if known.get("input_ids") is not None and known["input_ids"] is self.input_ids:
            known = {name: value for name, value in known.items() if value is not None}
        return replace(self, **known)  # type: ignore[arg-type]

    def telling(self, tokens: Tensor) -> tuple[dict[str, Tensor], str]:
        """Those that :func:`noise_magnitude` can use for `tokens`, and a note on those that it cannot."""
        kept, unusable = {}, []
        for name, value in self._given():
            if name == "attention_mask" and value.ndim == tokens.ndim:
                value = value[..., -tokens.shape[-1] :]  # what comes before is about a cache, such as a prefix
            if self._tells(name, value, tokens):
                kept[name] = value
            else:
                unusable.append(
                    f"{name} of shape {list(value.shape)} does not tell the lengths of ids of shape {list(tokens.shape)}"
                )
        return kept, "; ".join(unusable)

    def _given(self) -> Iterator[tuple[str, Tensor]]:
        for name in ("attention_mask", "position_ids", "cu_seq_lens", "labels"):
            if (value := getattr(self, name)) is not None:
                yield name, value

    @staticmethod
    def _tells(name: str, value: Tensor, tokens: Tensor) -> bool:
        length = tokens.shape[-1]
        if value.device != tokens.device:
            return False
        if name in ("attention_mask", "labels"):
            return value.shape == tokens.shape
        if name == "position_ids":
            return value.shape[-1:] == tokens.shape[-1:] and ops.broadcasts(value.shape, tokens.shape)
        return tokens.numel() == length and value.ndim == 1 and 2 <= value.shape[0] <= length + 1


NO_SEQUENCES = Sequences()


@dataclass
class NoiseSettings:
    """What the noisy embeddings of one model share."""

    alpha: float | Callable[[int], float] = 5.0  # a callable is a schedule over `step`
    scale_by: str = "sequence"
    noise_on: str = "all"
    stream: int | None = None  # None: the rank of this process
    backend: str | None = None
    enabled: bool = True
    #: Forward passes in training before this one, or the step that NEFTuneCallback or set_alpha last told.
    step: int = 0
    counts_steps: bool = True
    has_begun: bool = False
    is_schedule: bool = False  # of its own, so that a compiled graph depends on it rather than on alpha
    #: Whether these are a model's, for all its embeddings, or those of one embedding that was built with them.
    of_model: bool = False
    #: `alpha` for compiled graphs, once it has been set at run time: as a number it would be a constant of theirs.
    alpha_tensor: Tensor | None = None
    #: Of the forward pass that is under way.
    sequences: Sequences = NO_SEQUENCES

    def __post_init__(self) -> None:
        check_choice("scale_by", self.scale_by, SCALES)
        check_choice("noise_on", self.noise_on, NOISE_ON)
        if self.stream is not None and not 0 <= self.stream < 1 << 32:
            raise ValueError(f"stream must be None or in [0, 2**32), not {self.stream}")
        if self.backend is not None:
            check_choice("backend", self.backend, ops.BACKENDS)
        if callable(self.alpha):
            self.set_alpha(self.alpha)
        else:
            check_alpha(self.alpha)

    def set_alpha(self, alpha: float | Callable[[int], float], step: int | None = None) -> None:
        """Sets `alpha`, and the step that a schedule is at."""
        at = self.step if step is None else step
        now = alpha(at) if callable(alpha) else alpha
        check_alpha(now)
        self.alpha, self.is_schedule = alpha, callable(alpha)
        self.step, self.counts_steps, self.has_begun = at, step is None, self.has_begun and step is None
        if self.alpha_tensor is None:
            self.alpha_tensor = torch.zeros((), dtype=torch.float64, device="cpu")
        self.alpha_tensor.fill_(now)

    def count_pass(self) -> None:
        """Moves a schedule on to the forward pass in training that begins."""
        if self.counts_steps:
            self.step += self.has_begun
            self.has_begun = True

    def current_alpha(self) -> float:
        """`alpha` at the present step."""
        if not callable(self.alpha):
            return self.alpha
        alpha = self.alpha(self.step)
        check_alpha(alpha)
        return alpha

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle carries no tensors of the pass under way."""
        return {**self.__dict__, "sequences": NO_SEQUENCES}

    def __deepcopy__(self, memo: dict[int, Any]) -> "NoiseSettings":
        """An embedding that is copied alone, as PEFT does with those it trains, stays one of its model's.

        A copy of the whole model gets settings of its own, from :meth:`own_copy`.
        """
        return self if self.of_model else self.own_copy(memo)

    def own_copy(self, memo: dict[int, Any]) -> "NoiseSettings":
        """A copy, which takes the place of these settings in all that the deepcopy under way has yet to copy."""
        if id(self) not in memo:
            twin = memo[id(self)] = copy.copy(self)
            twin.alpha_tensor = None if self.alpha_tensor is None else self.alpha_tensor.clone()
        return memo[id(self)]


@dataclass
class Noise:
    """The noise of one embedding."""

    settings: NoiseSettings
    name: str = "embedding"
    #: The magnitude of the last forward pass that had noise, and why it was not what was asked for.
    last_magnitude: float | Tensor | None = None
    note: str = ""
    #: What the model's noise leaves out, whatever the batch.
    standing_note: str = ""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last_magnitude": None}

    def state(self, module: nn.Module) -> str:
        """ "on", or why `module` has no noise at this moment."""
        settings = self.settings
        if not module.training:
            return "off: evaluation mode"
        if not torch.is_grad_enabled():
            return "off: gradients are disabled"
        if not settings.enabled:
            return "off: inside no_noise"
        if settings.sequences.generating:
            return "off: a cache is passed, so the model is generating"
        if HOOK_ATTRIBUTE in module.__dict__:
            return "off: the Hugging Face hook (neftune_noise_alpha) is on this embedding and adds its own noise"
        # Once alpha has been set at run time, compiled graphs must not depend on its value.
        return "off: alpha is 0" if settings.alpha_tensor is None and settings.alpha == 0 else "on"

    def arguments(self, ids: Tensor, embedding_dim: int, **sequences: Tensor | None) -> dict[str, Any]:
        """The arguments of the op that say which noise `ids` ``[..., L]`` get.

        `sequences` are those of :func:`noise_magnitude`; without any, those of the model's forward pass are used as far as
        they can be. Only where their shapes differ from that of `ids` do the values of `ids` count.
        """
        settings, note = self.settings, ""
        tokens = ids  # those that the sequences are about
        if not sequences and settings.sequences is not NO_SEQUENCES:
            given = settings.sequences.input_ids
            if given is not None and may_be_laid_out(given, ids):
                tokens = given
            sequences, note = settings.sequences.telling(tokens)  # type: ignore[assignment]
        if settings.noise_on != "all" and sequences.get("labels") is None:
            raise ValueError(
                f"noise_on={settings.noise_on!r} needs labels of the ids' shape, but the model was called without"
            )
        compiling = torch.compiler.is_compiling()
        if compiling and settings.is_schedule and settings.counts_steps:
            raise RuntimeError(
                "a compiled model does not count the steps of a schedule: use NEFTuneCallback, or set_alpha(..., step=...)"
            )
        if compiling and settings.alpha_tensor is not None:
            alpha: float | Tensor = settings.alpha_tensor.to(ids.device)
        else:
            alpha = settings.current_alpha() if callable(settings.alpha) else settings.alpha
        magnitude = self._magnitude(tokens, embedding_dim, alpha, sequences)
        if tokens is not ids:
            by_batch = magnitude_of_length(alpha, ids.shape[-1], embedding_dim, ids.device)
            magnitude = lay_out(magnitude, tokens, ids, by_batch)
            note = "; ".join(
                filter(None, (note, f"ids of shape {list(tokens.shape)} were looked up as {list(ids.shape)}"))
            )
        if not compiling and _can_be_read_later(magnitude):
            first, self.last_magnitude, self.note = self.last_magnitude is None, magnitude, note
            if first and ops.logger.isEnabledFor(logging.INFO) and not _is_capturing(ids):
                self._log_first(ids.device)
        stream = _rank() if settings.stream is None else settings.stream
        return {"magnitude": magnitude, "stream": stream, "backend": settings.backend}

    def _magnitude(
        self, tokens: Tensor, embedding_dim: int, alpha: float | Tensor, sequences: dict[str, Tensor | None]
    ) -> float | Tensor:
        if not sequences and tokens.numel():
            return magnitude_of_length(alpha, tokens.shape[-1], embedding_dim, tokens.device)
        scale_by, noise_on = self.settings.scale_by, self.settings.noise_on
        return noise_magnitude(tokens, embedding_dim, alpha, scale_by=scale_by, noise_on=noise_on, **sequences)

    def bounds(self) -> tuple[float, float] | None:
        """Smallest and largest magnitude of the last noisy batch, over the tokens that got noise. Waits for the device."""
        last = self.last_magnitude
        if not isinstance(last, Tensor):
            return None if last is None else (last, last)
        noisy = last[last > 0]
        return (noisy.min().item(), noisy.max().item()) if noisy.numel() else (0.0, 0.0)

    def _log_first(self, device: torch.device) -> None:
        low, high = self.bounds() or (0.0, 0.0)
        ops.logger.info(
            "%s: noise is on, alpha=%g scaled by %s, backend %s, first batch within +-%.3g to %.3g%s",
            self.name,
            self.settings.current_alpha(),
            self.settings.scale_by,
            ops.choose_backend(device.type, self.settings.backend),
            low,
            high,
            f" ({self.note})" if self.note else "",
        )


#: What transformers sets on an embedding that its own NEFTune hook is on.
HOOK_ATTRIBUTE = "neftune_noise_alpha"


def _can_be_read_later(magnitude: float | Tensor) -> bool:
    """Whether `magnitude` is a number or a real tensor, not one that stands for values inside a transform or a trace."""
    if not isinstance(magnitude, Tensor):
        return True
    return type(magnitude) is Tensor and not magnitude.is_meta and not torch._C._are_functorch_transforms_active()


def _is_capturing(tokens: Tensor) -> bool:
    return tokens.is_cuda and torch.cuda.is_current_stream_capturing()


_HAS_DISTRIBUTED = torch.distributed.is_available()


def _rank() -> int:
    return torch.distributed.get_rank() if _HAS_DISTRIBUTED and torch.distributed.is_initialized() else 0
