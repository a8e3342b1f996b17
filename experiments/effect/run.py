"""Does NEFTune's noise do here what its paper reports? Models that are instruction-tuned with and without it, many times.

    make effect                                          # or: python -m experiments.effect.run --preset small
    python -m experiments.effect.run --preset gpu        # a larger model and more seeds, on one GPU
    python -m experiments.effect.run --preset smollm2 --data alpaca_en_demo.json   # a pretrained model, real instructions
    python -m experiments.effect.run --preset smollm2-sign --data alpaca_en_demo.json    # sign noise, symmetric noise
    python -m experiments.effect.run --preset smollm2-gpu                          # a larger one, all of Alpaca, on one GPU

Everything below was fixed before the first run with noise of each experiment. A run that is in the records with the same
settings is not repeated, so an experiment that was broken off goes on where it was. ``report.py`` draws the conclusions.

FIRST EXPERIMENT: small Llamas (presets small, weaker, gpu)

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

SECOND EXPERIMENT: a pretrained model on real instructions (presets smollm2, smollm2-gpu)

Setting
    Each run fine-tunes all weights of SmolLM2-135M-Instruct, in float32 with AdamW, on instructions and answers in the
    columns of Alpaca, in the model's chat template; the loss is on the answers. Pairs of more than 160 tokens are left out.
    Of the rest a fifth is held out; as above, no held-out answer shares its first paragraph with a training answer. A seed
    draws the training pairs, their order, and the noise. The numbers are in ``plan.py``; the learning rate is the paper's.
    The layout is packed: the first experiment found it to be the same as padded, and it saves the time of padding.

Conditions
    alpha 0, 5, 15      neft_kernels; L is the length of each document, prompt included
    rms 0.1             neft_kernels with scale_by="rms": the root mean square of the noise is 0.1 of that of the embedding
                        table, whatever the length. 0.1 is what the paper's weakest noise comes to on the models of the
                        paper: alpha 5 on 512 tokens of width 4096 has a root mean square of 0.002, LLaMA's table one near
                        its initial 0.02.

Outcomes
    Those of the first experiment. The untouched model is measured, too; it is a reference and no condition.

Hypotheses, from the paper
    For each of the three noises against alpha 0: held_out_loss falls, train_loss rises, answer_tokens rises,
    repeated_4grams does not rise, leaked_8grams does not rise. No direction is assumed for rouge_l.

Decision rule
    That of the first experiment, with Holm's correction over the three noises, over all seeds of the preset. With three
    seeds, a 95 % interval is 4.30 standard errors to each side, so only an effect that is large against the spread of the
    seeds can be shown; "no effect shown" says little against a small one. The interval says how large it may still be.

Scope
    Sixteen updates, short answers, and a model that was instruction-tuned before. The paper tunes base models of 7
    billion parameters on 52,000 pairs; the preset smollm2-gpu is nearer to that.

THIRD EXPERIMENT: sign noise and symmetric noise (preset smollm2-sign)

    Written after the outcomes of the second experiment were known, and before any run with sign noise.

Setting and outcomes
    Those of smollm2. Its runs at alpha 0, 5 and 15 are used again.

Conditions
    sign                noise="sign", +-m instead of uniform in (-m, m)
    sign, symmetric     the same with symmetric=True, as SymNoise (arXiv 2312.01523): each update sees every pair twice, with
                        the noise and with its negative, and the loss is the mean over both
    Both at alpha / sqrt(3) for alpha 5 and 15, so that the root mean square of the noise is that of uniform noise at alpha 5
    and 15. At equal alphas sign noise is sqrt(3) times stronger. With symmetric=True an update costs twice the computation;
    the number of updates is the same.

Hypotheses
    None. The paper reports win rates of answers, which are not measured here; no direction is assumed.

Decision rule
    Compared: sign with uniform, symmetric with uniform, and symmetric with sign, each at both strengths, paired by seed. The
    held-out loss differs where the two-sided paired t-test, corrected by Holm over these six, has p < 0.05. Every condition is
    also compared with alpha 0, corrected over the six conditions. Secondary outcomes and what three seeds can show: as above.
"""

import argparse
import multiprocessing
import os
import tempfile
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from tqdm import tqdm

from benchmarks import records
from experiments.effect.data import CACHE, InputError, Prepared
from experiments.effect.plan import PRESETS, STARTS, FromScratch, Preset, Run, runs
from experiments.effect.prepare import prepare
from experiments.effect.training import fine_tune

NAME = "effect"
RESULTS = Path(__file__).parent / "results"


def settings(preset: Preset, run: Run, start: str) -> dict[str, Any]:
    """What a run depends on: two runs that agree on it are the same run. `start` tells weights and data apart."""
    return {**preset.settings, **asdict(run), "start": start}


def pending(preset: Preset, start: str) -> list[Run]:
    """The runs that are not in the records."""
    done = [record["settings"] for record in records.load(NAME, RESULTS) if record["stage"] == "fine-tuning"]
    return [run for run in runs(preset) if settings(preset, run, start) not in done]


def experiment(preset: Preset, workers: int, cache: Path, stdlib: Path | None = None, data: str | None = None) -> None:
    """Does all runs that are pending, after the preparation where the cache has none; a record each, when it is done.

    A run that fails does not stop the others; SystemExit is raised at the end.
    """
    commit = {"commit": records.environment()["commit"]}  # of the code that runs, whatever is committed meanwhile
    prepared = prepare(preset, cache, stdlib, data)
    start = prepared.record["start"]
    if not any(record["stage"] in STARTS and record["start"] == start for record in records.load(NAME, RESULTS)):
        records.append(NAME, {**commit, **prepared.record}, RESULTS)

    todo, total, failed = pending(preset, start), len(runs(preset)), []
    context = multiprocessing.get_context("spawn")  # CUDA and OpenMP do not survive a fork
    threads = max(1, (os.cpu_count() or 1) // workers)
    with (
        ProcessPoolExecutor(workers, context, begin_worker, (threads,)) as pool,
        tqdm(total=total, initial=total - len(todo), unit="run", smoothing=0) as progress,
    ):
        futures = {pool.submit(work, preset, run, prepared.folder): run for run in todo}
        try:
            for future in as_completed(futures):
                run = futures[future]
                title = f"{run.layout}, {run.noise_by}, alpha {run.alpha}, seed {run.seed}"
                try:
                    result = future.result()
                except Exception:
                    progress.write(f"{title} failed:\n{traceback.format_exc()}")
                    failed.append(title)
                    continue
                record = {"preset": preset.name, "stage": "fine-tuning", "settings": settings(preset, run, start)}
                records.append(NAME, {**commit, **record, **result}, RESULTS)
                progress.set_postfix_str(title)
                progress.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failed:
        raise SystemExit(f"{len(failed)} of {len(todo)} runs failed, see above; another call repeats them")


def begin_worker(threads: int) -> None:
    """Runs of a small model are quicker side by side, with a thread each."""
    torch.set_num_threads(threads)
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
        "--data",
        metavar="NAME_OR_PATH",
        help="instructions to tune a pretrained model on: a data set on the hub, a folder or a file with the columns "
        "instruction, input and output (default: the preset's)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        help="runs side by side, which share the cores (default: one for a GPU or a pretrained model, else one a core)",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=CACHE / "effect",
        metavar="FOLDER",
        help="of what the runs share (default: %(default)s)",
    )
    options = parser.parse_args()
    preset = PRESETS[options.preset]
    is_own = isinstance(preset.start, FromScratch)
    if options.workers is None:
        options.workers = 1 if torch.cuda.is_available() or not is_own else os.cpu_count()
    if options.workers < 1:
        parser.error(f"--workers: expected at least 1, got {options.workers}")
    if options.data is not None and is_own:
        parser.error(f"--data: preset {preset.name!r} has its own data")
    quieten()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        experiment(preset, options.workers, options.cache, data=options.data)
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
