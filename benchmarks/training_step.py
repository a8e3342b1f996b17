"""The embedding's share of a training step: a small Llama under the real Trainer, with no noise, the Trainer's own, and ours.

    python -m benchmarks.training_step

Every step is timed whole, and within it the embedding with all its hooks. The three variants train in turns, several rounds of
them, so that a noisy machine is equally noisy to all; medians and quartiles over all steps but the first ones of each round go
to ``results/training_step.jsonl``.
"""

import argparse
import random
import tempfile
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from benchmarks import records
from benchmarks.timing import Samples
from neft_kernels import replace_embeddings

ALPHA = 5.0
VARIANTS = ("no noise", "Trainer's hook", "neft_kernels")
MODEL: dict[str, Any] = {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 2}
WARM_UP = 2


class Stopwatch(TrainerCallback):
    """Seconds of each step, and of the embedding within it."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.embedding: list[float] = []
        self._begin = self._entered = 0.0
        self._handles: list[Any] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._handles:  # only now, to come after the Trainer's hook
            embedding = kwargs["model"].get_input_embeddings()
            self._handles = [
                embedding.register_forward_pre_hook(self._enter, prepend=True),
                embedding.register_forward_hook(self._leave),
            ]
        self._begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(time.perf_counter() - self._begin)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: torch.nn.Module, args: Any) -> None:
        self._entered = time.perf_counter()

    def _leave(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        self.embedding.append(time.perf_counter() - self._entered)


def train(variant: str, steps: int, batch: int, tokens: int, folder: str) -> Stopwatch:
    """One training run of `steps` + WARM_UP steps on random tokens, padded on the right."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**MODEL, num_attention_heads=8, num_key_value_heads=8))
    if variant == "neft_kernels":
        replace_embeddings(model, alpha=ALPHA)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(batch * (steps + WARM_UP)):
        length = int(torch.randint(tokens // 2, tokens + 1, (), generator=generator))
        ids = torch.randint(1, MODEL["vocab_size"], (tokens,), generator=generator)
        mask = (torch.arange(tokens) < length).long()
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    watch = Stopwatch()
    on_gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        folder,
        max_steps=steps + WARM_UP,
        per_device_train_batch_size=batch,
        neftune_noise_alpha=ALPHA if variant == "Trainer's hook" else None,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=rows, callbacks=[watch]).train()
    return watch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of all variants (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="sequences in a batch (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a sequence (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(2 if not torch.cuda.is_available() else torch.get_num_threads())

    order, names = random.Random(0), list(VARIANTS)
    steps: dict[str, list[float]] = {name: [] for name in VARIANTS}
    embedding: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            order.shuffle(names)
            for name in names:
                watch = train(name, options.steps, options.batch, options.tokens, folder)
                steps[name] += watch.steps[WARM_UP:]
                embedding[name] += watch.embedding[WARM_UP:]

    def milliseconds(values: list[float]) -> list[float]:
        samples = Samples(tuple(values))
        return [round(value * 1e3, 4) for value in (samples.spread[0], samples.median, samples.spread[1])]

    record = {
        "model": {**MODEL, "parameters": "random"},
        "batch": [options.batch, options.tokens],
        "step_milliseconds": {name: milliseconds(values) for name, values in steps.items()},
        "embedding_milliseconds": {name: milliseconds(values) for name, values in embedding.items()},
        "steps": options.steps * options.rounds,
    }
    records.append("training_step", record)
    for name in VARIANTS:
        step, look_up = record["step_milliseconds"][name], record["embedding_milliseconds"][name]
        print(
            f"{name:16} step {step[1]:8.1f} ms ({step[0]:.1f}-{step[2]:.1f}), embedding {look_up[1]:7.3f} ms "
            f"({look_up[0]:.3f}-{look_up[2]:.3f}), {look_up[1] / step[1]:.2%} of the step"
        )


if __name__ == "__main__":
    main()
