"""What the experiment on sign noise and symmetric noise says: a section of the page, from the records alone.

python -m experiments.effect.report_sign
"""

from pathlib import Path

from benchmarks.sections import DOCS
from experiments.effect.analysis import OUTCOMES, PRIMARY, Effect, Outcome, Results, Treatment, cell, seeds_of
from experiments.effect.plan import PRESETS
from experiments.effect.report_pretrained import BY_ALPHA, BY_PAIRS, BY_SIGN, findings, table, title, treatments, write

PRESET, SECTION = "smollm2-sign", "effect-sign"
STRENGTHS = tuple(alpha for alpha in PRESETS[PRESET].conditions[0].alphas if alpha)
#: Which noises are compared with each other at each strength.
COMPARED: list[tuple[Treatment, Treatment]] = [
    ((one, alpha), (other, alpha))
    for one, other in ((BY_SIGN, BY_ALPHA), (BY_PAIRS, BY_ALPHA), (BY_PAIRS, BY_SIGN))
    for alpha in STRENGTHS
]


def comparisons(results: Results, outcome: Outcome) -> list[tuple[str, Effect]]:
    """Each comparison in words, and the difference."""
    names = [f"{title(one)} against {title(other)}" for one, other in COMPARED]
    return list(zip(names, results.differences(COMPARED, outcome), strict=True))


def compared(results: Results) -> str:
    """A table: the noises against each other."""
    by_outcome = [[effect for _, effect in comparisons(results, outcome)] for outcome in OUTCOMES]
    rows = [
        "| difference | " + " | ".join(outcome.title for outcome in OUTCOMES) + " |",
        "| --- |" + " ---: |" * len(OUTCOMES),
    ]
    for index, (name, _) in enumerate(comparisons(results, PRIMARY)):
        cells = [cell(found[index], outcome) for found, outcome in zip(by_outcome, OUTCOMES, strict=True)]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def section(results: Results, preset: str) -> str:
    noises = treatments(preset)
    shown = [name for name, effect in comparisons(results, PRIMARY) if effect.is_shown]
    of_loss = f"it differs for {'; '.join(shown)}" if shown else "no difference between the kinds of noise is shown"
    commits = ", ".join(sorted({record["commit"] for record in results.runs.values()}))
    device = " and ".join(sorted({record["device"] for record in results.runs.values()}))
    return "\n".join(
        [
            f"{seeds_of(results, preset)} for each condition: {', '.join(map(title, noises))}. The number is the alpha of the "
            "uniform noise that has the same root mean square; sign noise was given alpha / sqrt(3). Hypotheses and decision "
            "rule were fixed [before the first run](../experiments/effect/run.py), after the outcomes with uniform noise "
            "were known.",
            "",
            f"- **Held-out loss, the noises against each other**: {of_loss}.",
            *(f"{line}" for line in findings(results, noises, paper=False).splitlines()),
            "",
            table(results, noises),
            "",
            compared(results),
            "",
            "The first table shows means and then differences to tuning without noise, the second one the noises against each "
            "other; 95 % intervals, paired by seed, bold where they are an effect by the rule. With symmetric sign an update "
            "costs twice the computation; the number of updates is the same. Everything else is as above. Measured on "
            f"{device}, commits {commits}; the noise of a seed is the same in all of them.",
        ]
    )


def main(page: Path = DOCS / "effect.md") -> None:
    write(PRESET, page, SECTION, section)


if __name__ == "__main__":
    main()
