"""What the experiment on a pretrained model says: a section of the page, from the records alone.

python -m experiments.effect.report_pretrained [--preset smollm2-gpu]
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.sections import DOCS, write_section
from experiments.effect import analysis
from experiments.effect.analysis import (
    NAME,
    OUTCOMES,
    Arm,
    Effect,
    Outcome,
    Results,
    TooFewRuns,
    Treatment,
    cell,
    seeds_of,
)
from experiments.effect.plan import OURS, PACKED, PRESETS, RMS, SIGN, SIGN_SYMMETRIC, runs

SECTION = "effect-pretrained"
BY_ALPHA, BY_RMS = Arm("alpha", PACKED, OURS, ""), Arm("rms", PACKED, RMS, "")
BY_SIGN, BY_PAIRS = Arm("sign", PACKED, SIGN, ""), Arm("symmetric sign", PACKED, SIGN_SYMMETRIC, "")
NONE: Treatment = (BY_ALPHA, 0)


def treatments(preset: str) -> list[Treatment]:
    """All noises of the preset, in its order."""
    arms = {arm.noise_by: arm for arm in (BY_ALPHA, BY_RMS, BY_SIGN, BY_PAIRS)}
    return [
        (arms[condition.noise_by], alpha)
        for condition in PRESETS[preset].conditions
        for alpha in condition.alphas
        if alpha
    ]


def title(treatment: Treatment) -> str:
    arm, alpha = treatment
    return f"{arm.title} {alpha}"


def effects(results: Results, noises: list[Treatment], outcome: Outcome) -> dict[str, Effect]:
    """By noise: the difference to no noise."""
    found = results.differences([(noise, NONE) for noise in noises], outcome)
    return dict(zip(map(title, noises), found, strict=True))


def findings(results: Results, noises: list[Treatment], paper: bool = True) -> str:
    """A line for each outcome, with what NEFTune's paper says of it."""
    lines = []
    for outcome in OUTCOMES:
        said: dict[str, list[str]] = {}
        for noise, effect in effects(results, noises, outcome).items():
            said.setdefault(effect.direction, []).append(noise)
        in_paper = f" (in the paper it {outcome.in_paper})" if outcome.in_paper and paper else ""
        words = "; ".join(f"{direction} at {', '.join(names)}" for direction, names in said.items())
        lines.append(f"- **{outcome.title}**{in_paper}: {words}.")
    return "\n".join(lines)


def table(results: Results, noises: list[Treatment]) -> str:
    """Means of the references, the untouched model and the tuned one without noise; then differences to the last."""
    start = results.pretraining

    def means(name: str, ratio: str, found: dict[str, float]) -> str:
        cells = [
            f"{outcome.factor * found[outcome.key]:.{outcome.digits}f}{outcome.unit}" if outcome.key in found else ""
            for outcome in OUTCOMES
        ]
        return f"| {name} | {ratio} | {' | '.join(cells)} |"

    tuned = {each.key: statistics.fmean(results.values(*NONE, each)) / each.factor for each in OUTCOMES}
    rows = [
        "| | noise / embedding | " + " | ".join(outcome.title for outcome in OUTCOMES) + " |",
        "| --- | ---: |" + " ---: |" * len(OUTCOMES),
        means("reference answers", "", start["references"]),
        means("untouched model", "", start["outcomes"]),
        means("tuned without noise", "0", tuned),
    ]
    by_outcome = [effects(results, noises, outcome) for outcome in OUTCOMES]
    for noise in noises:
        cells = [cell(found[title(noise)], outcome) for outcome, found in zip(OUTCOMES, by_outcome, strict=True)]
        rows.append(f"| {title(noise)} | {results.noise_ratio(*noise):.3f} | {' | '.join(cells)} |")
    return "\n".join(rows)


def section(results: Results, preset: str) -> str:
    start, settings = results.pretraining, results.settings
    noises = treatments(preset)
    any_record: dict[str, Any] = next(iter(results.runs.values()))
    pairs = settings["training_pairs"] or start["training_pairs_to_draw_from"]
    return "\n".join(
        [
            f"{settings['model'].split('/')[-1]}, {start['parameters'] / 1e6:.0f} million parameters, was tuned for "
            f"{settings['epochs']} epochs on {pairs} instructions with their answers, {settings['update_pairs']} in "
            f"an update, with {seeds_of(results, preset)} for each condition: no noise, "
            f'{", ".join(map(title, noises))}. "rms" stands for '
            '`scale_by="rms"`. All weights were trained. Hypotheses and decision rule were fixed [before the first '
            "run](../experiments/effect/run.py).",
            "",
            findings(results, noises),
            "",
            table(results, noises),
            "",
            "The first rows show means; the others show differences to tuning without noise with 95 % intervals, paired by "
            "seed, bold where they are an effect by the rule. Losses are in nats per answer token, on "
            f"{min(settings['loss_pairs'], start['held_out_pairs'])} held-out and {min(settings['loss_pairs'], pairs)} "
            "training pairs; that of the untouched model is on other pairs of the training side. The other outcomes are "
            f"those of greedy answers, of at most {settings['answer_tokens']} tokens, to "
            f"{min(settings['answered_pairs'], start['held_out_pairs'])} held-out questions. The ratio of the "
            "noise is that of the first update, against the embeddings of its own tokens; rms is a share of the whole table, "
            f"whose root mean square is {start['embedding_rms']:.3f}. Measured on {any_record['device']}, "
            f"commit {any_record['commit']}; "
            "[the records](../experiments/effect/results/effect.jsonl) contain each run, without the texts.",
        ]
    )


def unfinished(preset: str) -> str:
    """What the page says while there are too few runs for an interval."""
    wanted = set(runs(PRESETS[preset]))
    done = {
        analysis.run_of(record)
        for record in analysis.records.load(NAME, analysis.RESULTS)
        if record["stage"] == "fine-tuning" and record["preset"] == preset
    }
    return (
        f"{len(done & wanted)} of {len(wanted)} runs are recorded. Intervals need two seeds with all conditions. Hypotheses "
        "and decision rule were fixed [before the first run](../experiments/effect/run.py)."
    )


def main(preset: str = "smollm2", page: Path = DOCS / "effect.md") -> None:
    write(preset, page, SECTION, section)


def write(preset: str, page: Path, name: str, text: Callable[[Results, str], str]) -> None:
    """Puts `text` of the results into the section `name` of `page`, or how many runs are still to come."""
    try:
        written = text(Results(preset), preset)
    except TooFewRuns:
        written = unfinished(preset)
    write_section(page, name, written)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("smollm2", "smollm2-gpu"), default="smollm2", help="default: %(default)s")
    main(parser.parse_args().preset)
