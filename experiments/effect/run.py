"""Does NEFTune's noise do here what its paper reports? Small Llamas, instruction-tuned with and without it, many times.

    make effect                                          # or: python -m experiments.effect.run --preset small
    python -m experiments.effect.run --preset gpu        # a larger model and more seeds, on one GPU

Everything below was fixed before the first run with noise. A run that is in the records with the same settings is not
repeated, so an experiment that was broken off goes on where it was. ``report.py`` draws the conclusions.

Setting
    One Llama with the usual initialisation is pretrained once on the source of Python's standard library, from which every
    docstring is cut out. Each run fine-tunes it on question/answer pairs made of those docstrings ("What does `x.y` do?"). A
    run's seed draws the training pairs, their order, and the noise; so the runs of one seed start from the same weights and
    see the same pairs in the same updates. Pairs that are held out share no first paragraph with any training pair.

Conditions
    padded          neft_kernels, alpha 0, 5, 10, 15; one document a row, padded to the longest
    packed          neft_kernels, the same; an update's documents in one row, with positions that start anew and attention
                    that keeps to each document. As for padded, L is the length of each document.
    packed, hook    the forward hook of transformers (neftune_noise_alpha), alpha 5, 10, 15; L is the length of the whole row,
                    so the noise is too weak by the root of the number of documents. Its alpha 0 is that of packed.
    The noise is uniform, on all tokens of question and answer, as in the paper.

Outcomes, all in evaluation mode and so without noise
    primary     held_out_loss: nats per answer token of held-out pairs
    secondary   train_loss: the same of training pairs; answer_tokens: length of greedy answers to held-out questions;
                repeated_4grams: share of an answer's 4-grams that it has used before; rouge_l: ROUGE-L with the reference;
                leaked_8grams: share of the answers' 8-grams of tokens that occur verbatim in the training answers

Hypotheses, from the paper (arXiv 2310.05914, section 5)
    For alpha 5, 10 and 15 against alpha 0, padded and packed: held_out_loss falls, train_loss rises, answer_tokens rises,
    repeated_4grams does not rise, leaked_8grams does not rise. No direction is assumed for rouge_l.
    For packed against packed, hook, at the same alpha: held_out_loss is lower with the right length.

Decision rule
    For each condition the difference to alpha 0 of the same layout, paired by seed; its mean and 95 % t interval over the
    seeds. The held-out loss has an effect where the two-sided paired t-test, corrected by Holm over the three alphas of the
    condition, has p < 0.05; else no effect is shown. The same for packed against packed, hook. Secondary outcomes are
    described by their intervals without correction: an interval that contains 0 shows no effect. "Does not rise" is never
    proven by that; the interval says what rise is still possible. All seeds of the preset count, and no setting is changed
    after a look at the outcomes; a preset that is changed is another experiment with other records.

Afterwards
    All of this was run with noise that turned out as strong as the embeddings themselves, and did harm. The preset
    "weaker" was added only then: padded, alpha 0.5, 1 and 2, with the same runs at alpha 0, to see whether noise of a smaller
    proportion does what the paper reports. It was written down before its outcomes were known, but after those: it explores.

Scope
    The intervals are about other draws of training pairs, order and noise, for this one pretrained model and this one set
    of held-out pairs.
"""

import argparse
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from tqdm import tqdm

from benchmarks import records
from experiments.effect.data import Prepared
from experiments.effect.plan import PRESETS, Preset, Run, runs
from experiments.effect.prepare import prepare
from experiments.effect.training import fine_tune

NAME = "effect"
RESULTS = Path(__file__).parent / "results"
CACHE = Path.home() / ".cache" / "neft_kernels" / "effect"


def settings(preset: Preset, run: Run, start: str) -> dict[str, Any]:
    """What a run depends on: two runs that agree on it are the same run. `start` tells pretrained weights and data apart."""
    of_preset = {key: value for key, value in asdict(preset).items() if key not in ("name", "alphas", "seeds")}
    return {**of_preset, **asdict(run), "start": start}


def pending(preset: Preset, start: str) -> list[Run]:
    """The runs that are not in the records."""
    done = [record["settings"] for record in records.load(NAME, RESULTS) if record["stage"] == "fine-tuning"]
    return [run for run in runs(preset) if settings(preset, run, start) not in done]


def experiment(preset: Preset, workers: int, cache: Path, stdlib: Path | None = None) -> None:
    """Pretrains where the cache has no model, then does all runs that are pending; a record each, as soon as it is done."""
    commit = {"commit": records.environment()["commit"]}  # of the code that runs, whatever is committed meanwhile
    prepared = prepare(preset, cache, stdlib)
    start = prepared.record["start"]
    if not any(record["stage"] == "pretraining" and record["start"] == start for record in records.load(NAME, RESULTS)):
        records.append(NAME, {**commit, **prepared.record}, RESULTS)

    todo, total = pending(preset, start), len(runs(preset))
    context = multiprocessing.get_context("spawn")  # CUDA and OpenMP do not survive a fork
    with (
        ProcessPoolExecutor(workers, context, begin_worker) as pool,
        tqdm(total=total, initial=total - len(todo), unit="run", smoothing=0) as progress,
    ):
        futures = {pool.submit(work, preset, run, prepared.folder): run for run in todo}
        try:
            for future in as_completed(futures):
                run = futures[future]
                record = {"preset": preset.name, "stage": "fine-tuning", "settings": settings(preset, run, start)}
                records.append(NAME, {**commit, **record, **future.result()}, RESULTS)
                progress.set_postfix_str(f"{run.layout}, {run.noise_by}, alpha {run.alpha}, seed {run.seed}")
                progress.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def begin_worker() -> None:
    """One thread a process: runs of so small a model are quicker side by side."""
    torch.set_num_threads(1)
    quieten()


def quieten() -> None:
    """Only the program's own progress bars."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def work(preset: Preset, run: Run, prepared_folder: Path) -> dict[str, Any]:
    """One run, in a worker."""
    with tempfile.TemporaryDirectory() as folder:
        return fine_tune(preset, run, Prepared.load(prepared_folder), Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="small", help="default: %(default)s")
    parser.add_argument(
        "--workers",
        type=int,
        default=1 if torch.cuda.is_available() else os.cpu_count(),
        help="runs side by side, one thread each (default: one for each core, or one for a GPU)",
    )
    parser.add_argument(
        "--cache", type=Path, default=CACHE, metavar="FOLDER", help="of the pretrained model (default: %(default)s)"
    )
    options = parser.parse_args()
    if options.workers < 1:
        parser.error(f"--workers: expected at least 1, got {options.workers}")
    quieten()
    torch.set_num_threads(options.workers)
    experiment(PRESETS[options.preset], options.workers, options.cache)


if __name__ == "__main__":
    main()
