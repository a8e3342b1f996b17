"""The outcomes that the records of ``run.py`` hold, by condition: paired differences, intervals, and which are effects."""

import statistics
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks import records
from experiments.effect.intervals import Interval, holm, paired_interval
from experiments.effect.plan import OURS, PRESETS, STARTS, Run, runs

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


Treatment = tuple[Arm, float]  # and its alpha


@dataclass(frozen=True)
class Effect:
    """A paired difference, and whether the decision rule counts it as an effect."""

    interval: Interval
    is_shown: bool

    @property
    def direction(self) -> str:
        """In words, what the interval allows to say."""
        if not self.is_shown:
            return "no effect shown"
        return "falls" if self.interval.mean < 0 else "rises"


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


def seeds_of(results: Results, preset: str) -> str:
    """In words: how many seeds there are."""
    count, planned = len(results.seeds), len(PRESETS[preset].seeds)
    return f"{count} seeds" if count >= planned else f"{count} of the {planned} planned seeds"


def signed(interval: Interval, outcome: Outcome) -> str:
    """The difference and the half-width of its interval."""
    sign = MINUS if interval.mean < 0 else "+"
    return f"{sign}{abs(interval.mean):.{outcome.digits}f} ± {interval.half_width:.{outcome.digits}f}"


def cell(effect: Effect, outcome: Outcome) -> str:
    """A difference as tables have it: bold where it is an effect."""
    text = signed(effect.interval, outcome)
    return f"**{text}**" if effect.is_shown else text
