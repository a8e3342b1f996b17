"""When an embedding has noise, how much, and of which stream: what all its forward passes share."""

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from neft_kernels import distributed, ops
from neft_kernels.distributed import Part
from neft_kernels.layout import lay_out, may_be_laid_out
from neft_kernels.magnitude import NOISE_ON, SCALES, check_alpha, check_choice, magnitude_of_length, noise_magnitude
from neft_kernels.sequences import NO_SEQUENCES, Passes, is_recomputed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from neft_kernels.distributed import Group

__all__ = ["HOOK_ATTRIBUTE", "Noise", "NoiseSettings"]


@dataclass
class NoiseSettings:
    """What the noisy embeddings of one model share."""

    alpha: float | Callable[[int], float] = 5.0  # a callable is a schedule over `step`
    scale_by: str = "sequence"
    noise_on: str = "all"
    stream: int | None = None  # None: that of this process's replica
    backend: str | None = None
    #: The ranks that hold the parts of the same sequences, and which part each of them holds.
    sequence_group: "Group | None" = None
    sequence_layout: str = "contiguous"
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
    passes: Passes = field(default_factory=Passes, compare=False)

    def __post_init__(self) -> None:
        check_choice("scale_by", self.scale_by, SCALES)
        check_choice("noise_on", self.noise_on, NOISE_ON)
        if self.stream is not None and (isinstance(self.stream, bool) or not isinstance(self.stream, int)):
            raise TypeError(f"stream must be an int or None, not {type(self.stream).__name__}")
        if self.stream is not None and not 0 <= self.stream < 1 << 32:
            raise ValueError(f"stream must be None or in [0, 2**32), not {self.stream}")
        if self.backend is not None:
            check_choice("backend", self.backend, ops.BACKENDS)
        check_choice("sequence_layout", self.sequence_layout, distributed.SEQUENCE_LAYOUTS)
        if self.sequence_group is not None:
            distributed.check_group("sequence_group", self.sequence_group)
        elif self.sequence_layout != "contiguous":
            raise ValueError(f"sequence_layout={self.sequence_layout!r} needs a sequence_group")
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

    def __deepcopy__(self, memo: dict[int, Any]) -> "NoiseSettings":
        """An embedding that is copied alone, as PEFT does with those it trains, stays one of its model's.

        A copy of the whole model gets settings of its own, from :meth:`own_copy`.
        """
        return self if self.of_model else self.own_copy(memo)

    def own_copy(self, memo: dict[int, Any]) -> "NoiseSettings":
        """A copy, which takes the place of these settings in all that the deepcopy under way has yet to copy."""
        if id(self) not in memo:
            twin = memo[id(self)] = copy.copy(self)
            twin.passes = Passes()
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
    #: What was told of the sequences of ids that are still in use, by name.
    told: WeakTensorKeyDictionary | None = field(default=None, compare=False)
    #: What the model's noise leaves out, whatever the batch.
    standing_note: str = ""
    #: Whether the table was spread over ranks in that pass, and not merely between passes, as FSDP has it.
    table_was_spread: bool | None = None
    #: Of the Hugging Face hook.
    has_warned: bool = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last_magnitude": None, "told": None}

    def state(self, module: nn.Module) -> str:
        """ "on", or why `module` has no noise at this moment."""
        settings = self.settings
        if not module.training:
            return "off: evaluation mode"
        if not torch.is_grad_enabled():
            return "off: gradients are disabled"
        if not settings.enabled:
            return "off: inside no_noise"
        if settings.passes.sequences.generating:
            return "off: a cache is passed, so the model is generating"
        if HOOK_ATTRIBUTE in module.__dict__:
            return "off: the Hugging Face hook (neftune_noise_alpha) is on this embedding and adds its own noise"
        if is_recomputed() and torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
            return "off: reentrant checkpointing recomputes a pass that had gradients disabled, and so no noise"
        # Once alpha has been set at run time, compiled graphs must not depend on its value.
        return "off: alpha is 0" if settings.alpha_tensor is None and settings.alpha == 0 else "on"

    def is_on(self, module: nn.Module) -> bool:
        """Whether the forward pass of `module` that begins has noise."""
        self.settings.passes.reach()
        self.warn_of_other_noise(module)
        return self.state(module) == "on"

    def warn_of_other_noise(self, module: nn.Module) -> None:
        """Says, once, that this noise steps aside for that of the Hugging Face hook."""
        if HOOK_ATTRIBUTE in module.__dict__ and not self.has_warned and not torch.compiler.is_compiling():
            self.has_warned = True
            ops.logger.warning(
                "%s: the Hugging Face hook (neftune_noise_alpha) is on this embedding and adds its own noise, so ours is off; "
                "to use neft_kernels instead, unset it",
                self.name,
            )

    def part_of(self, tokens: Tensor) -> Part | None:
        """The part that `tokens` ``[..., L]`` are of their sequences; None: the whole."""
        settings = self.settings
        if settings.sequence_group is None:
            return None
        return distributed.part_of_rank(tokens.shape[-1], settings.sequence_group, settings.sequence_layout)

    def arguments(
        self,
        ids: Tensor,
        embedding_dim: int,
        part: Part | None = None,
        groups: "Sequence[ProcessGroup]" = (),
        **sequences: Any,
    ) -> dict[str, Any]:
        """The arguments of the op that say which noise `ids` ``[..., L]`` get.

        `part` is that of :meth:`part_of`, or a part of it; the magnitude is that of the part. `groups` are those over which
        the table is spread. `sequences` are those of :func:`noise_magnitude`, of the part or of the whole; without any, those
        of the model's forward pass are used as far as they can be. Only where their shapes differ from that of `ids` do the
        values of `ids` count.
        """
        settings, note = self.settings, ""
        tokens = ids  # those that the sequences are about
        if not sequences:
            tokens, sequences, note = self._sequences_of_pass(ids, part)
        if settings.noise_on != "all" and sequences.get("labels") is None:
            raise ValueError(
                f"noise_on={settings.noise_on!r} needs labels of the ids' shape, but the model was called without; a Trainer "
                "that computes the loss itself takes them out of the batch"
            )
        if part is not None:
            if settings.sequence_group is not None:
                groups = [*groups, *distributed.groups_of(settings.sequence_group)]
                sequences = {
                    name: value
                    if value is None or name == "cu_seq_lens" or value.shape[-1] == part.length
                    else distributed.gathered(value, settings.sequence_group, settings.sequence_layout)
                    for name, value in sequences.items()
                }
            tokens = tokens[..., :1].expand(*tokens.shape[:-1], part.length)

        magnitude = self._magnitude(tokens, embedding_dim, sequences)
        if part is not None:
            if isinstance(magnitude, Tensor) and magnitude.ndim:
                magnitude = part.of(magnitude)
        elif tokens is not ids:
            by_batch = self._magnitude(ids, embedding_dim, {}) if settings.noise_on == "all" else 0.0
            magnitude = lay_out(magnitude, tokens, ids, by_batch)
            if tokens.shape != ids.shape:
                looked_up = f"ids of shape {list(tokens.shape)} were looked up as {list(ids.shape)}"
                note = "; ".join(filter(None, (note, looked_up)))
        if not torch.compiler.is_compiling() and _can_be_read_later(magnitude):
            first, self.last_magnitude, self.note = self.last_magnitude is None, magnitude, note
            if first and ops.logger.isEnabledFor(logging.INFO) and not _is_capturing(ids):
                self._log_first(ids.device)
        stream = distributed.stream_of_replica(groups) if settings.stream is None else settings.stream
        arguments = {"magnitude": magnitude, "stream": stream, "backend": settings.backend}
        if groups:
            arguments["seed"] = distributed.shared_seed(ops.draw_seed(ids.device), groups)
        return arguments

    def _sequences_of_pass(self, ids: Tensor, part: Part | None) -> tuple[Tensor, dict[str, Tensor], str]:
        """The ids that the model was given, what its pass says of them, and a note on what cannot be used."""
        sequences = self.settings.passes.sequences
        tokens, note = ids, ""
        telling: dict[str, Tensor] = {}
        if sequences is not NO_SEQUENCES:
            given = sequences.input_ids
            if given is not None and part is None and may_be_laid_out(given, ids):
                tokens = given
            telling, note = sequences.telling(tokens, tokens.shape[-1] if part is None else part.length)
        if not torch.compiler.is_compiling():
            self._check_recomputation(ids, telling)
        return tokens, telling, note

    def _check_recomputation(self, ids: Tensor, telling: dict[str, Tensor]) -> None:
        """When a pass is recomputed it must be told of `ids` what it was told the first time, or the noise is another one."""
        counts = {"labels"} if self.settings.noise_on != "all" else set()
        if self.settings.scale_by == "sequence":
            counts |= {"attention_mask", "position_ids", "cu_seq_lens"}
        told = counts & telling.keys()
        if is_recomputed():
            before = told if self.told is None else self.told.get(ids, told)
            if missing := before - told:
                raise RuntimeError(
                    "a checkpointed region that holds the embedding is recomputed outside of the module that got "
                    f"{', '.join(sorted(missing))}; give them to a module inside the region"
                )
        elif told or self.told:
            self.told = WeakTensorKeyDictionary() if self.told is None else self.told
            self.told[ids] = told

    def _magnitude(self, tokens: Tensor, embedding_dim: int, sequences: dict[str, Tensor]) -> float | Tensor:
        alpha = self._alpha(tokens.device)
        if not sequences and tokens.numel():
            return magnitude_of_length(alpha, tokens.shape[-1], embedding_dim, tokens.device)
        scale_by, noise_on = self.settings.scale_by, self.settings.noise_on
        return noise_magnitude(
            tokens,
            embedding_dim,
            alpha,
            scale_by=scale_by,
            noise_on=noise_on,
            backend=self.settings.backend,
            **sequences,
        )

    def _alpha(self, device: torch.device) -> float | Tensor:
        settings = self.settings
        is_compiling = torch.compiler.is_compiling()
        if settings.is_schedule and settings.counts_steps and (is_compiling or settings.passes.in_compiled_model):
            # While it is traced, this only makes the compiler give up on the embedding, which then runs by itself.
            raise RuntimeError(
                "a compiled model does not count the steps of a schedule: use NEFTuneCallback, or set_alpha(..., step=...)"
            )
        if is_compiling and settings.alpha_tensor is not None:
            return settings.alpha_tensor.to(device)
        return settings.current_alpha() if callable(settings.alpha) else settings.alpha

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
