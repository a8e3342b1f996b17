"""What the experiment of ``run.py`` says: the page's paragraphs, table and picture, from the records alone.

python -m experiments.effect.report [--preset gpu]
"""

import argparse
import math
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.sections import DOCS, write_section
from experiments.effect import analysis
from experiments.effect.analysis import NAME, OUTCOMES, PRIMARY, Arm, Effect, Results, cell, has_runs, seeds_of, signed
from experiments.effect.plan import HOOK, OURS, PACKED, PADDED

ARMS = (
    Arm("padded", PADDED, OURS, "#1f6feb"),
    Arm("packed", PACKED, OURS, "#2a9d8f"),
    Arm("packed with the hook", PACKED, HOOK, "#d1495b"),
)
LARGE_WIDTH, LARGE_TOKENS, LARGE_RMS = 4096, 512, 0.02  # such as a model has that the paper is about
RIGHT_LENGTH, WRONG_LENGTH = ARMS[1:]


def verdict(effects: dict[float, Effect]) -> str:
    """In words, by alpha, what the intervals allow to say."""
    directions: dict[str, list[str]] = {}
    for alpha, effect in effects.items():
        directions.setdefault(effect.direction, []).append(str(alpha))
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
        values = ", ".join(cell(each, outcome) for each in effects.values())
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
            cells = [cell(each[alpha], outcome) for each, outcome in zip(effects, OUTCOMES, strict=True)]
            rows.append(f"| {arm.title} | {alpha} | {results.noise_ratio(arm, alpha):.2f} | {' | '.join(cells)} |")
    return "\n".join(rows)


def section(results: Results, preset: str) -> str:
    """The section of the page."""
    pretraining, settings = results.pretraining, results.settings
    references = pretraining["references"]
    any_record = next(iter(results.runs.values()))
    return "\n".join(
        [
            f"A Llama of {pretraining['parameters'] / 1e6:.1f} million parameters was pretrained on the source of Python's "
            f"standard library without its docstrings. It was then tuned for {settings['epochs']} epochs on "
            f"{settings['training_pairs']} questions with docstrings as answers, with {seeds_of(results, preset)} for each "
            "condition. Hypotheses and decision rule were fixed [before the first run](../experiments/effect/run.py). All "
            "outcomes are measured without noise. An effect is a difference to alpha 0, paired by seed, whose 95 % interval "
            "excludes 0; for the held-out loss, also after Holm's correction.",
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
    plot(results, analysis.RESULTS / f"{NAME}.png")
    write_section(page, NAME, section(results, preset))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("small", "gpu"), default="small", help="default: %(default)s")
    main(parser.parse_args().preset)
