"""Instruction tuning three times over: without noise, with the Trainer's neftune_noise_alpha, and with neft_kernels.

By default a small Llama learns to answer questions about the Python standard library from its docstrings; nothing is
downloaded. All runs start from the same weights and see the same batches. Prints a table, a sample answer per run and
what `neft_kernels.describe` says; writes the figures into the output folder.

    python examples/instruction_tuning/train.py
    python examples/instruction_tuning/train.py --model facebook/opt-350m --dataset stanfordnlp/imdb --max-length 512
"""

import argparse
import math
import os
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

from records import Noise, RunResult, RunSettings

RUN_PROGRAM = Path(__file__).with_name("run.py")
MIN_LENGTH = 32
SMALL_MODEL_LEARNING_RATE = 2e-3  # from random weights
FINE_TUNING_LEARNING_RATE = 2e-5  # of a pretrained model


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    data = parser.add_argument_group("model and data")
    data.add_argument(
        "--model",
        metavar="NAME_OR_PATH",
        help="causal language model on the hub or in a folder (default: a small Llama, randomly initialised)",
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
    training.add_argument("--steps", type=int, default=300, help="updates in each run (default: %(default)s)")
    training.add_argument("--batch-size", type=int, default=8, help="sequences in a batch (default: %(default)s)")
    training.add_argument(
        "--max-length", type=int, default=128, metavar="TOKENS", help="longer sequences are cut (default: %(default)s)"
    )
    training.add_argument(
        "--learning-rate",
        type=float,
        help=f"peak of the cosine schedule (default: {FINE_TUNING_LEARNING_RATE:g} with --model, "
        f"else {SMALL_MODEL_LEARNING_RATE:g})",
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
        if value < smallest:
            parser.error(f"{option}: expected at least {smallest}, got {value}")
    if options.seed >= 2**32:
        parser.error(f"--seed: expected less than 2**32, got {options.seed}")
    if options.text_column is not None and options.dataset is None:
        parser.error("--text-column: it names a column of --dataset, which is not given")


def prepare(options: argparse.Namespace) -> RunSettings:
    """Checks and saves what the runs share; returns the settings of the first run."""
    # Imported this late so that --help and wrong numbers are answered at once.
    from inputs import check_model, dataset_examples, docstring_examples, fitting, save_small_model

    if options.dataset is None:
        examples = docstring_examples(options.seed)
    else:
        limit = options.steps * options.batch_size
        examples = dataset_examples(options.dataset, options.text_column, limit, options.seed)
    model = options.model
    if model is None:
        model = str(options.output / "model")
        save_small_model(options.output / "model", examples, options.seed)
    tokenizer = check_model(model, options.max_length, options.alpha)
    examples = fitting(examples, tokenizer, options.max_length)
    examples_path = options.output / "examples.json"
    examples.save(examples_path)
    print(f"{len(examples.train)} examples to train on, {len(examples.held_out)} held out")

    default_learning_rate = SMALL_MODEL_LEARNING_RATE if options.model is None else FINE_TUNING_LEARNING_RATE
    return RunSettings(
        noise=Noise.OFF,
        model=model,
        examples=str(examples_path),
        output=str(options.output / "trainer"),
        alpha=options.alpha,
        steps=options.steps,
        batch_size=options.batch_size,
        max_length=options.max_length,
        learning_rate=options.learning_rate or default_learning_rate,
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


def print_answers(results: list[RunResult]) -> None:
    print(f"\nA held-out question, answered greedily:\n{textwrap.indent(results[0].question.strip(), '    ')}")
    expected = ("expected", results[0].expected_answer)
    for title, answer in [expected, *((result.noise.value, result.answer) for result in results)]:
        print(f"\n  {title}:")
        print(textwrap.indent(textwrap.shorten(answer, 300), "    ") or "    (nothing)")


def report(options: argparse.Namespace, settings: RunSettings, results: list[RunResult]) -> None:
    from report import save_figure, save_json, table

    print(f"\n=== After {settings.steps} steps on {results[0].device} ===\n")
    print(table(results))
    print(
        "\nLosses: in eval mode, so without noise; from one seed, so small differences are chance."
        "\nEmbedding: one training forward at the last step, all hooks included, in turn with the bare look-up of the "
        "same ids; medians."
        f"\nPeak memory: {results[0].peak_memory_kind}, each run in a process of its own."
    )
    print_answers(results)
    print(f"\nneft_kernels.describe(model):\n{textwrap.indent(results[-1].description, '    ')}")

    model = options.model or "a small Llama"
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
