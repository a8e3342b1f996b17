"""Trainer callbacks of a run: a stopwatch for the token embedding, and a progress bar that asks for evaluations."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from neft_kernels import describe

EVALUATIONS = 3  # after the one before the first step
WARM_UP, REPEATS = 20, 200


class WatchEmbedding(TrainerCallback):
    """Times the training forward of the token embedding, and asks the model to describe its noise.

    At the last step, in the middle of the model's forward and so under the conditions of every step, the embedding is
    called again and again on that step's ids, with all its hooks: the noise that Trainer adds in a forward hook is
    inside the measured time, as is everything that neft_kernels does. The bare look-up of the same ids is timed in turn
    with it, so their ratio means something on a busy machine, too.
    """

    def __init__(self) -> None:
        self.look_up_ms: list[float] = []
        self.embedding_ms: list[float] = []
        self.description = ""
        self._is_last_step = False
        self._handle: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._handle = kwargs["model"].get_input_embeddings().register_forward_hook(self._measure)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._is_last_step = state.global_step == state.max_steps - 1

    def _measure(self, module: nn.Embedding, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        if not self._is_last_step:
            return
        self._is_last_step = False  # the calls below come here again
        (input_ids,) = args
        with torch.random.fork_rng():  # the run goes on with the random numbers that it would have had
            self.look_up_ms, self.embedding_ms = milliseconds_in_turn(
                lambda: F.embedding(input_ids, module.weight), lambda: module(input_ids)
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            self.description = str(describe(kwargs["model"]))  # now, while the model is still in training mode

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._handle.remove()


def milliseconds_in_turn(first: Callable[[], Any], second: Callable[[], Any]) -> tuple[list[float], list[float]]:
    """Times two functions alternately, on the GPU's own clock where there is one."""
    on_gpu = torch.cuda.is_available()

    def now() -> Any:
        if not on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    moments = []
    for _ in range(WARM_UP + REPEATS):
        for function in (first, second):
            start = now()
            function()
            moments.append((start, now()))
    if on_gpu:
        torch.cuda.synchronize()
        milliseconds = [start.elapsed_time(end) for start, end in moments]
    else:
        milliseconds = [(end - start) * 1e3 for start, end in moments]
    return milliseconds[2 * WARM_UP :: 2], milliseconds[2 * WARM_UP + 1 :: 2]


class ProgressBar(TrainerCallback):
    """One bar for the whole run with the latest held-out loss; asks for the evaluations, the last one at the end."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._evaluation_steps: set[int] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._evaluation_steps = {round(state.max_steps * (i + 1) / EVALUATIONS) for i in range(EVALUATIONS)}
        self._bar = tqdm(total=state.max_steps, desc=self._title, unit="step", dynamic_ncols=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._bar.update()
        control.should_evaluate = state.global_step in self._evaluation_steps

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        metrics: dict[str, float] = kwargs["metrics"]
        if "eval_held_out_loss" in metrics:
            self._bar.set_postfix_str(f"held-out loss {metrics['eval_held_out_loss']:.3f}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._bar.close()
