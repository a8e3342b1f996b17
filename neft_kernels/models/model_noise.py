"""What the noisy embeddings of one model share while it trains."""

import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from neft_kernels.models.options import AlphaSchedule, NoiseOptions
from neft_kernels.models.passes import PassStack

__all__ = ["ModelNoise", "ReachedEmbeddings"]


class ReachedEmbeddings:
    """Whether the model's forward passes in training reach a noisy embedding at all."""

    def __init__(self) -> None:
        self.missed = False  # the last pass that had to reach one did not
        self._reached, self._reached_in_graph = 0, False  # a compiled graph cannot count
        self._before: dict[int, int | None] = {}  # by thread: `_reached` when a pass began that must reach one

    def embedding_called(self) -> None:
        """A noisy embedding is called."""
        if torch.compiler.is_compiling():
            self._reached_in_graph = True
        else:
            self._reached += 1

    def pass_begins(self, must_reach: bool) -> None:
        """The model begins a pass, which has to reach a noisy embedding or not."""
        self._before[threading.get_ident()] = self._reached if must_reach else None

    def pass_ends(self) -> bool:
        """The model's pass ends. Returns whether it had to reach a noisy embedding and did not."""
        before = self._before.pop(threading.get_ident(), None)
        if before is None:
            return False
        self.missed = before == self._reached and not self._reached_in_graph
        return self.missed


class ModelNoise:
    """The options of a model's noise, and the state of the run.

    Raises:
        ValueError: alpha is above 1, although `scale_by` makes it the ratio of the noise to the embeddings.
    """

    def __init__(self, options: NoiseOptions, alpha: AlphaSchedule, for_whole_model: bool = False) -> None:
        if options.scale_by == "rms":
            alpha.limit(1.0)
        self.options, self.alpha = options, alpha
        #: True if shared by all embeddings of a model; False if it belongs to one embedding that was built noisy.
        self.for_whole_model = for_whole_model
        self.paused = 0  # number of no_noise() contexts that are active
        self.passes, self.reached = PassStack(), ReachedEmbeddings()
        self.warning = ""  # what is wrong with the model, for `describe`
        #: The modules whose forward tells about the batch.
        self.around: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.embeddings: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def pause(self, times: int) -> None:
        """Adds `times`, 1 or -1, to the number of no_noise() contexts that are active. The noise is on only at 0."""
        self.paused = max(0, self.paused + times)

    def alpha_on(self, device: torch.device) -> float | Tensor:
        """Alpha for this pass: a number, or in a compiled graph a float64 tensor, once alpha has been set at run time.

        Raises:
            RuntimeError: alpha is a schedule that counts forward passes, and the model is compiled, or runs each pass twice.
        """
        alpha = self.alpha
        is_compiling = torch.compiler.is_compiling()
        if alpha.counts_steps and (is_compiling or self.passes.in_compiled_model):
            # Raised while tracing, this error causes a graph break, and the embedding runs eagerly. It then reaches the user
            # if the whole model is compiled.
            raise RuntimeError(
                "a compiled model does not count the steps of a schedule: use NEFTuneCallback, or set_alpha(..., step=...)"
            )
        if alpha.counts_steps and self.options.under_no_grad:
            raise RuntimeError(
                "with under_no_grad=True a pass may run twice, so the steps of a schedule are not counted: "
                "use NEFTuneCallback, or set_alpha(..., step=...)"
            )
        if is_compiling and alpha.tensor is not None:
            return alpha.tensor if alpha.tensor.device == device else alpha.tensor.to(device)
        return alpha.now()

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModelNoise":
        """An embedding that is copied alone, as PEFT does with those it trains, keeps the noise of its model.

        When the whole model is copied, the hooks around its embeddings call :meth:`own_copy` first.
        """
        return self if self.for_whole_model else self.own_copy(memo)

    def own_copy(self, memo: dict[int, Any]) -> "ModelNoise":
        """A copy for the twin of the model. The deepcopy under way uses it for all that it has yet to copy."""
        if id(self) not in memo:
            twin = memo[id(self)] = ModelNoise(self.options, self.alpha.copy(), self.for_whole_model)
            twin.pause(self.paused)
        return memo[id(self)]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "around": None, "embeddings": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, around=weakref.WeakSet(), embeddings=weakref.WeakSet())
