"""What the experiment of ``run.py`` says: the page's paragraphs, table and picture, from the records alone.

python -m experiments.effect.report [--preset gpu]
"""

import argparse
import math
import statistics
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks import records
from benchmarks.sections import DOCS, write_section
from experiments.effect.intervals import Interval, holm, paired_interval
from experiments.effect.plan import HOOK, OURS, PACKED, PADDED, PRESETS, STARTS, Run, runs

NAME = "effect"
RESULTS = Path(__file__).parent / "results"
SIGNIFICANT = 0.05
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Outcome:
    """How an outcome is shown; `factor` and `unit` are those of the shown numbers."""

    key: str
    title: str
    in_paper: str
    digits: int
    factor: float = 1
    unit: str = ""


OUTCOMES = (
    Outcome("held_out_loss", "held-out loss", "falls", 3),
    Outcome("train_loss", "train loss", "rises", 3),
    Outcome("answer_tokens", "answer tokens", "rises", 1),
    Outcome("repeated_4grams", "repeated 4-grams", "does not rise", 1, 100, " %"),
    Outcome("rouge_l", "ROUGE-L", "", 2, 100),
    Outcome("leaked_8grams", "8-grams from training", "does not rise", 1, 100, " %"),
)
PRIMARY = OUTCOMES[0]


@dataclass(frozen=True)
class Arm:
    """A layout with one way to add noise."""

    title: str
    layout: str
    noise_by: str
    colour: str


ARMS = (
    Arm("padded", PADDED, OURS, "#1f6feb"),
    Arm("packed", PACKED, OURS, "#2a9d8f"),
    Arm("packed with the hook", PACKED, HOOK, "#d1495b"),
)
Treatment = tuple[Arm, float]  # and its alpha
LARGE_WIDTH, LARGE_TOKENS, LARGE_RMS = 4096, 512, 0.02  # such as a model has that the paper is about
RIGHT_LENGTH, WRONG_LENGTH = ARMS[1:]


@dataclass(frozen=True)
class Effect:
    """A paired difference, and whether the decision rule counts it as an effect."""

    interval: Interval
    is_shown: bool


class TooFewRuns(SystemExit):
    """The records do not allow a report yet; the message says why."""


class Results:
    """The newest experiment of a preset: all its runs have the settings and the pretrained weights of its last one."""

    def __init__(self, preset: str) -> None:
        found = records.load(NAME, RESULTS)
        tuned = [record for record in found if record["stage"] == "fine-tuning"]
        newest = [record for record in tuned if record["preset"] == preset]
        if not newest:
            raise TooFewRuns(f"no run of preset {preset!r} in the records yet: make effect")
        self.settings = _shared(newest[-1])
        # Presets that differ in their alphas alone share their runs.
        wanted = set(runs(PRESETS[preset]))
        self.runs = {
            run_of(record): record for record in tuned if _shared(record) == self.settings and run_of(record) in wanted
        }
        self.pretraining = next(
            record
            for record in reversed(found)
            if record["stage"] in STARTS and record["start"] == self.settings["start"]
        )
        self.alphas = sorted({run.alpha for run in wanted} - {0})
        # Only seeds of which every condition is there count, so that all differences are over the same ones.
        conditions = {(run.layout, run.noise_by, run.alpha) for run in wanted}
        seeds = {run.seed for run in self.runs}
        self.seeds = sorted(
            seed for seed in seeds if all(Run(*condition, seed) in self.runs for condition in conditions)
        )
        if len(self.seeds) < 2:
            raise TooFewRuns(f"preset {preset!r}: intervals need two seeds with all conditions, there are {self.seeds}")

    def values(self, arm: Arm, alpha: float, outcome: Outcome) -> list[float]:
        """By seed; the hook's alpha 0 is that of its layout."""
        noise_by = arm.noise_by if alpha else OURS
        found = [self.runs[Run(arm.layout, noise_by, alpha, seed)] for seed in self.seeds]
        return [outcome.factor * record["outcomes"][outcome.key] for record in found]

    def effects(self, arm: Arm, outcome: Outcome, control: Arm | None = None) -> dict[float, Effect]:
        """By alpha: against alpha 0 of the same arm, or against `control` at the same alpha."""
        effects = self.differences(
            [((arm, alpha), (control or arm, alpha if control else 0)) for alpha in self.alphas], outcome
        )
        return dict(zip(self.alphas, effects, strict=True))

    def differences(self, compared: list[tuple[Treatment, Treatment]], outcome: Outcome) -> list[Effect]:
        """Of each pair, the first minus the second; Holm's correction is over all of them."""
        intervals = [
            paired_interval(self.values(*treated, outcome), self.values(*control, outcome))
            for treated, control in compared
        ]
        if outcome is PRIMARY:
            shown = [p < SIGNIFICANT for p in holm([interval.p for interval in intervals])]
        else:
            shown = [not interval.contains_zero for interval in intervals]
        return [Effect(*each) for each in zip(intervals, shown, strict=True)]

    def noise_ratio(self, arm: Arm, alpha: float) -> float:
        """Root mean square of the noise over that of the embeddings, in the first update; mean over the seeds."""
        firsts = [self.runs[Run(arm.layout, arm.noise_by, alpha, seed)]["first_update"] for seed in self.seeds]
        return statistics.fmean(first["noise_rms"] / first["embedding_rms"] for first in firsts)


def run_of(record: dict[str, Any]) -> Run:
    return Run(**{field.name: record["settings"][field.name] for field in fields(Run)})


def _shared(record: dict[str, Any]) -> dict[str, Any]:
    of_run = {field.name for field in fields(Run)}
    return {key: value for key, value in record["settings"].items() if key not in of_run}


def has_runs(preset: str) -> bool:
    """Whether the records have any of this preset's own."""
    return any(record["preset"] == preset for record in records.load(NAME, RESULTS))


def signed(interval: Interval, outcome: Outcome) -> str:
    """The difference and the half-width of its interval."""
    sign = MINUS if interval.mean < 0 else "+"
    return f"{sign}{abs(interval.mean):.{outcome.digits}f} ± {interval.half_width:.{outcome.digits}f}"


def verdict(effects: dict[float, Effect]) -> str:
    """In words, by alpha, what the intervals allow to say."""
    directions: dict[str, list[str]] = {}
    for alpha, effect in effects.items():
        direction = ("falls" if effect.interval.mean < 0 else "rises") if effect.is_shown else "no effect shown"
        directions.setdefault(direction, []).append(str(alpha))
    return ", ".join(f"{direction} at alpha {_list(alphas)}" for direction, alphas in directions.items())


def _list(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def findings(results: Results) -> str:
    """A list: each outcome in each arm, and the right length against the wrong one."""
    lines = []
    for outcome in OUTCOMES:
        by_verdict: dict[str, list[str]] = {}
        for arm in ARMS:
            by_verdict.setdefault(verdict(results.effects(arm, outcome)), []).append(arm.title)
        paper = f" (in the paper it {outcome.in_paper})" if outcome.in_paper else ""
        said = "; ".join(
            words if len(titles) == len(ARMS) else f"{_list(titles)}: {words}" for words, titles in by_verdict.items()
        )
        lines.append(f"- **{outcome.title}**{paper}: {said}.")
    against = results.effects(RIGHT_LENGTH, PRIMARY, WRONG_LENGTH)
    differences = [
        f"{signed(effect.interval, PRIMARY)} at alpha {alpha} ({_against(effect)})" for alpha, effect in against.items()
    ]
    weaker = results.noise_ratio(RIGHT_LENGTH, results.alphas[0]) / results.noise_ratio(WRONG_LENGTH, results.alphas[0])
    lines.append(
        f"- **Packed rows, the right length against the hook's**: the hook uses the length of the whole row, so its noise is "
        f"{weaker:.1f} times weaker. Held-out loss with the right length minus that with the hook's: {_list(differences)}."
    )
    return "\n".join(lines)


def _against(effect: Effect) -> str:
    if not effect.is_shown:
        return "no difference shown"
    return "the right length is better" if effect.interval.mean < 0 else "the hook's is better"


def how_strong(results: Results) -> str:
    """A line: the noise against the embeddings, here and in a large model."""
    alpha = results.alphas[0]
    of_large = alpha / math.sqrt(3 * LARGE_TOKENS * LARGE_WIDTH) / LARGE_RMS
    return (
        f"- **How strong the noise is**: at alpha {alpha} its root mean square is {results.noise_ratio(ARMS[0], alpha):.2f} "
        f"of the embeddings'. With {LARGE_TOKENS} tokens of width {LARGE_WIDTH} and embeddings of root mean square "
        f"{LARGE_RMS} it is {of_large:.2f}. The experiment therefore shows what too much noise does, and says little about "
        "models of that size."
    )


def afterwards(results: Results) -> str:
    """A paragraph on weaker noise, which was tried when the rest was known."""
    arm = ARMS[0]
    ratios = [f"{results.noise_ratio(arm, alpha):.2f}" for alpha in results.alphas]
    outcomes = []
    for outcome in OUTCOMES:
        effects = results.effects(arm, outcome)
        values = ", ".join(
            f"**{signed(each.interval, outcome)}**" if each.is_shown else signed(each.interval, outcome)
            for each in effects.values()
        )
        outcomes.append(f"{outcome.title} {values}")
    alphas = _list([str(alpha) for alpha in results.alphas])
    return (
        f"Weaker noise was tried after these results were known, so it is exploratory and decides nothing: padded rows, alpha "
        f"{alphas}, noise {_list(ratios)} of the embeddings, the same {len(results.seeds)} seeds. Differences to alpha 0, in "
        "this order, "
        f"bold where the rule above would call them an effect: {'; '.join(outcomes)}."
    )


def table(results: Results) -> str:
    """Means at alpha 0, and differences to them, bold where they are an effect."""
    rows = [
        "| | alpha | noise / embedding | " + " | ".join(outcome.title for outcome in OUTCOMES) + " |",
        "| --- | ---: | ---: |" + " ---: |" * len(OUTCOMES),
    ]
    for arm in ARMS:
        if arm.noise_by == OURS:
            means = [statistics.fmean(results.values(arm, 0, outcome)) for outcome in OUTCOMES]
            cells = [f"{mean:.{outcome.digits}f}{outcome.unit}" for mean, outcome in zip(means, OUTCOMES, strict=True)]
            rows.append(f"| {arm.title} | 0 | 0 | {' | '.join(cells)} |")
        effects = [results.effects(arm, outcome) for outcome in OUTCOMES]
        for alpha in results.alphas:
            cells = [signed(each[alpha].interval, outcome) for each, outcome in zip(effects, OUTCOMES, strict=True)]
            cells = [f"**{cell}**" if each[alpha].is_shown else cell for cell, each in zip(cells, effects, strict=True)]
            rows.append(f"| {arm.title} | {alpha} | {results.noise_ratio(arm, alpha):.2f} | {' | '.join(cells)} |")
    return "\n".join(rows)


def section(results: Results, preset: str) -> str:
    """The section of the page."""
    pretraining, settings, count = results.pretraining, results.settings, len(results.seeds)
    references = pretraining["references"]
    any_record = next(iter(results.runs.values()))
    planned = len(PRESETS[preset].seeds)
    seeds = f"{count} seeds" if count >= planned else f"{count} of the {planned} planned seeds"
    return "\n".join(
        [
            f"A Llama of {pretraining['parameters'] / 1e6:.1f} million parameters was pretrained on the source of Python's "
            f"standard library without its docstrings. It was then tuned for {settings['epochs']} epochs on "
            f"{settings['training_pairs']} questions with docstrings as answers, with {seeds} for each condition. Hypotheses "
            "and decision rule were fixed [before the first run](../experiments/effect/run.py). All outcomes are measured "
            "without noise. An effect is a difference to alpha 0, paired by seed, whose 95 % interval excludes 0; for the "
            "held-out loss, also after Holm's correction.",
            "",
            findings(results),
            how_strong(results),
            *(["", afterwards(Results("weaker"))] if preset == "small" and has_runs("weaker") else []),
            "",
            "<details><summary>All differences, with 95 % intervals</summary>",
            "",
            table(results),
            "",
            "Rows with alpha 0 show means; the other rows show differences to them, bold where they are an effect. Losses are "
            f"in nats per answer token, on {min(settings['loss_pairs'], pretraining['held_out_pairs'])} held-out and "
            f"{settings['loss_pairs']} training pairs. The other outcomes are those of greedy answers, of at most "
            f"{settings['answer_tokens']} tokens, to {settings['answered_pairs']} held-out questions. The "
            "reference answers have "
            f"{references['answer_tokens']:.1f} tokens and {100 * references['repeated_4grams']:.1f} % repeated 4-grams; "
            f"{100 * references['leaked_8grams']:.1f} % of their 8-grams occur in the training answers. The "
            "standard deviation "
            f"of the embeddings after pretraining is {pretraining['embedding_std']:.3f}. Measured on {any_record['device']}, "
            f"commit {any_record['commit']}; `make effect` repeats the experiment, and "
            "[the records](../experiments/effect/results/effect.jsonl) contain each run.",
            "",
            "</details>",
            "",
            "![Differences to no noise, by alpha](../experiments/effect/results/effect.png)",
        ]
    )


PLOTTED = (OUTCOMES[0], OUTCOMES[1], OUTCOMES[2], OUTCOMES[3])


def plot(results: Results, to: Path) -> None:
    """Differences to alpha 0 with their intervals, by alpha."""
    figure, grid = plt.subplots(2, 2, figsize=(9, 6.4), dpi=160, sharex=True)
    for axes, outcome in zip(grid.flat, PLOTTED, strict=True):
        axes.axhline(0, color="#24292f", linewidth=0.8)
        for number, arm in enumerate(ARMS):
            intervals = [effect.interval for effect in results.effects(arm, outcome).values()]
            axes.errorbar(
                [alpha + 0.5 * (number - 1) for alpha in results.alphas],
                [interval.mean for interval in intervals],
                [interval.half_width for interval in intervals],
                color=arm.colour,
                label=arm.title,
                marker="o",
                markersize=4,
                capsize=3,
                linewidth=1.5,
            )
        expected = f" (paper: {outcome.in_paper})" if outcome.in_paper else ""
        axes.set_title(f"{outcome.title}{expected}", fontsize=10, loc="left")
        unit = outcome.unit.strip() or ("nats per answer token" if outcome.key.endswith("loss") else "tokens")
        axes.set_ylabel(f"difference, {'points of ' if unit == '%' else ''}{unit}", fontsize=9)
        axes.set_xticks(results.alphas)
        axes.grid(visible=True, alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("alpha")
    grid[0, 0].legend(frameon=False, fontsize=9)
    figure.suptitle(
        f"With noise less without, measured without noise; 95 % intervals, {len(results.seeds)} seeds", fontsize=11
    )
    figure.tight_layout()
    figure.savefig(to)
    plt.close(figure)


def main(preset: str = "small", page: Path = DOCS / "effect.md") -> None:
    results = Results(preset)
    plot(results, RESULTS / f"{NAME}.png")
    write_section(page, NAME, section(results, preset))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("small", "gpu"), default="small", help="default: %(default)s")
    main(parser.parse_args().preset)
