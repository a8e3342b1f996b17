"""What the user chooses: the options of the noise, and alpha as a number or a schedule."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from neft_kernels.models.sharding import SEQUENCE_LAYOUTS, check_group
from neft_kernels.ops.backends import BACKENDS
from neft_kernels.ops.checks import check_alpha, check_bool, check_choice, check_counters
from neft_kernels.ops.magnitude import NOISE_ON, SCALES
from neft_kernels.ops.reference import NOISE_KINDS

if TYPE_CHECKING:
    from neft_kernels.models.sharding import Group

__all__ = ["AlphaSchedule", "NoiseOptions"]

#: The arguments of a model's forward that may have other names there.
RENAMABLE = ("input_ids", "attention_mask", "position_ids", "cu_seq_lens", "labels")


@dataclass(frozen=True)
class NoiseOptions:
    """The options of :func:`neft_kernels.replace_embeddings`, which documents them. They do not change during a run.

    Raises:
        TypeError, ValueError: an option has a wrong type or value. The message names it.
    """

    scale_by: str = "sequence"
    noise_on: str = "all"
    stream: int | None = None
    backend: str | None = None
    sequence_group: "Group | None" = None
    sequence_layout: str = "contiguous"
    under_no_grad: bool = False
    argument_names: Mapping[str, str] | None = field(default=None, hash=False)
    noise: str = "uniform"
    symmetric: bool = False

    def __post_init__(self) -> None:
        check_choice("scale_by", self.scale_by, SCALES)
        check_choice("noise_on", self.noise_on, NOISE_ON)
        check_choice("noise", self.noise, NOISE_KINDS)
        if isinstance(self.stream, bool):  # which the ops take for a number
            raise TypeError("stream must be an int or None, not bool")
        if self.stream is not None:
            check_counters(self.stream, 0)
        if self.backend is not None:
            check_choice("backend", self.backend, BACKENDS)
        check_choice("sequence_layout", self.sequence_layout, SEQUENCE_LAYOUTS)
        if self.sequence_group is not None:
            check_group("sequence_group", self.sequence_group)
        elif self.sequence_layout != "contiguous":
            raise ValueError(f"sequence_layout={self.sequence_layout!r} needs a sequence_group")
        check_bool("under_no_grad", self.under_no_grad)
        check_bool("symmetric", self.symmetric)
        if self.symmetric and self.sequence_group is not None:
            raise ValueError(
                "symmetric=True does not work with a sequence_group, whose ranks hold parts of the sequences; leave one out"
            )
        if self.argument_names is not None:
            if not isinstance(self.argument_names, Mapping):
                raise TypeError(f"argument_names must be a dict, not {type(self.argument_names).__name__}")
            for name, theirs in self.argument_names.items():
                check_choice("a key of argument_names", name, RENAMABLE)
                if not isinstance(theirs, str):
                    raise TypeError(f"argument_names[{name!r}] must be a str, not {type(theirs).__name__}")


class AlphaSchedule:
    """Alpha at the current step: a number, or a function of the step.

    Raises:
        TypeError, ValueError: `value`, or what it returns for step 0, is not a number >= 0.
    """

    def __init__(self, value: float | Callable[[int], float]) -> None:
        self.value = value
        #: Whether `value` is a function. An attribute, so that a compiled graph does not depend on `value` itself.
        self.is_function = callable(value)
        #: The number of forward passes in training before this one, or the step that NEFTuneCallback or set_alpha gave.
        self.step = 0
        self.counts_passes, self.has_begun = True, False
        #: The largest alpha that is allowed: 1 where it is the ratio of the noise to the embeddings.
        self.most = math.inf
        #: Alpha for compiled graphs once it has been set at run time, float64. A number would be a constant of the graph.
        self.tensor: Tensor | None = None
        if callable(value):
            self.set(value)
        else:
            check_alpha(value)

    def set(
        self, value: float | Callable[[int], float], step: int | None = None, device: torch.device | None = None
    ) -> None:
        """Changes alpha. `step` fixes the step of a schedule until the next call. If None, forward passes are counted.

        `device` is that of the table. Beside it, alpha does not cut a compiled graph into two CUDA graphs.
        """
        at = self.step if step is None else step
        now = value(at) if callable(value) else value
        self._check(now)
        self.value, self.is_function = value, callable(value)
        self.step, self.counts_passes, self.has_begun = at, step is None, self.has_begun and step is None
        place = device if device is not None and device.type in ("cuda", "xpu") else torch.device("cpu")
        if self.tensor is None or self.tensor.device != place:
            self.tensor = torch.zeros((), dtype=torch.float64, device=place)
        self.tensor.fill_(now)

    def count_pass(self) -> None:
        """A forward pass in training begins: moves a schedule to its step."""
        if self.counts_passes:
            self.step += self.has_begun
            self.has_begun = True

    def now(self) -> float:
        """Alpha at the current step. Raises as the constructor does if the schedule returns no number >= 0."""
        if not callable(self.value):
            return self.value
        alpha = self.value(self.step)
        self._check(alpha)
        return alpha

    def limit(self, most: float) -> None:
        """Allows no alpha above `most`, now or later."""
        self.most = most
        self._check(self.now())

    def _check(self, alpha: float) -> None:
        check_alpha(alpha)
        if alpha > self.most:
            raise ValueError(
                f'with scale_by="rms" alpha is the ratio of the noise to the embeddings, such as 0.1, not {alpha:g}'
            )

    @property
    def counts_steps(self) -> bool:
        """Whether this is a schedule over forward passes, which only run outside of compiled graphs."""
        return self.is_function and self.counts_passes

    def is_always_zero(self) -> bool:
        """Whether alpha is the number 0 and never was set at run time, so that compiled graphs may depend on it."""
        return self.tensor is None and self.value == 0

    def copy(self) -> "AlphaSchedule":
        """A schedule of its own at the same step."""
        twin = AlphaSchedule.__new__(AlphaSchedule)
        twin.__dict__.update(self.__dict__, tensor=None if self.tensor is None else self.tensor.clone())
        return twin
