"""Draws the page on randomness and its pictures from the records alone: the newest of each kind.

python -m experiments.randomness.report
"""

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

from benchmarks.sections import DOCS, write_section

RESULTS = Path(__file__).parent / "results"
TYPES = {"float32": "#1f6feb", "float64": "#6cb4ee", "float16": "#2a9d8f", "bfloat16": "#264653"}
BAD, BATTERY, GUIDE = "#d1495b", "#edae49", "#9aa5b1"
SHOWN_BAD = "low-half-twice"
MUCH = 0.995  # correlations below it are written into the picture
IMPLEMENTATIONS = {"ours": "neft_kernels", "hook": "Hugging Face hook"}
Record = dict[str, Any]


def read() -> dict[str, Record]:
    """The newest record of each kind; self-checks by the name of what is broken."""
    found = {}
    for line in (RESULTS / "randomness.jsonl").read_text().splitlines():
        record = json.loads(line)
        found[record.get("broken", record["what"])] = record
    return found


def results_of(record: Record, test: str) -> dict[str, Record]:
    """The results of `test` by element type."""
    return {result["type"]: result for result in record["results"] if result["test"] == test}


# --- pictures --------------------------------------------------------------------------------------------------------


def plot_p_values(axes: Any, records: dict[str, Record]) -> None:
    """All p-values in order against what uniform ones would be, with the 95 % range of each."""
    sets = [("tests of the noise", TYPES["float32"], [result["p"] for result in records["tests"]["results"]])]
    if "battery" in records:
        sets.append(("dieharder", BATTERY, [test["p"] for test in records["battery"]["tests"]]))
    number = len(sets[0][2])
    ranks = np.arange(1, number + 1)
    low, high = (stats.beta.ppf(q, ranks, number + 1 - ranks) for q in (0.025, 0.975))
    axes.fill_between(ranks / (number + 1), low, high, color=GUIDE, alpha=0.25, linewidth=0)
    axes.plot([0, 1], [0, 1], color=GUIDE, linewidth=1)
    for label, colour, p_values in sets:
        places = np.arange(1, len(p_values) + 1) / (len(p_values) + 1)
        axes.plot(places, sorted(p_values), ".", markersize=4, color=colour, label=f"{label}, {len(p_values)}")
    axes.set_xlabel("expected of uniform p-values")
    axes.set_ylabel("p-value")
    axes.set_title("All p-values, sorted", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def plot_spectrum(axes: Any, records: dict[str, Record]) -> None:
    """How many periodogram ordinates are as large as that, against the exponential law."""
    width = 0.5
    shown = [(name, colour, records["tests"], name) for name, colour in TYPES.items()]
    shown.append((f"known-bad: {SHOWN_BAD}", BAD, records[SHOWN_BAD], "bfloat16"))
    for label, colour, record, element in shown:
        result = results_of(record, "spectrum")[element]
        counts = np.array(result["histogram"])
        seen = counts > 0
        density = counts[seen] / result["ordinates"] / width
        middle = (np.arange(len(counts))[seen] + 0.5) * width
        axes.plot(middle, density, ".", markersize=5, color=colour, label=label)
    law = np.array([0, 17.5])
    axes.plot(law, np.exp(-law), color=GUIDE, linewidth=1, label="exponential law", zorder=0)
    axes.set_yscale("log")
    axes.set_xlim(0, 24)
    axes.set_xlabel("power at a frequency in tokens x columns, mean 1")
    axes.set_ylabel("density")
    axes.set_title("Two-dimensional spectrum", fontsize=10)
    axes.legend(frameon=False, fontsize=8)


def plot_correlations(axes: Any, records: dict[str, Record]) -> None:
    """Correlations by distance, in units of their standard deviation."""
    sizes = records["plan"]["sizes"]
    elements = sizes["steps"] * sizes["tokens"] * sizes["columns"]
    for offset, (direction, marker) in enumerate((("columns", "."), ("tokens", "x"))):
        for name, colour in TYPES.items():
            result = results_of(records["tests"], f"correlation of {direction}")[name]
            deviates = np.array(result["by_lag"]) * elements**0.5
            label = f"{name}, by {direction}"
            distance = np.arange(1, 65) + 0.4 * offset
            axes.plot(distance, deviates[:64], marker, markersize=3.5, color=colour, linewidth=0, label=label)
    axes.axhspan(-1.96, 1.96, color=GUIDE, alpha=0.25, linewidth=0)
    axes.set_ylim(-5, 5)
    axes.set_xlabel("distance in columns (dots) or tokens (crosses)")
    axes.set_ylabel("correlation / its standard deviation")
    axes.set_title("Correlation by distance", fontsize=10)


def draw_tests(records: dict[str, Record]) -> None:
    figure, panels = plt.subplots(1, 3, figsize=(12.6, 4.0), dpi=160)
    for axes, plot in zip(panels, (plot_p_values, plot_spectrum, plot_correlations), strict=True):
        plot(axes, records)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(RESULTS / "randomness.png")


def draw_rounding(record: Record) -> None:
    """Correlation of the noise that is left with the noise that was meant, over embedding scale and length."""
    cells = record["cells"]
    scales, lengths = (sorted({cell[axis] for cell in cells}) for axis in ("scale", "length"))
    by_place = {(c["type"], c["implementation"], c["scale"], c["length"]): c["correlation"] for c in cells}
    figure, panels = plt.subplots(2, 2, figsize=(7.6, 6.2), dpi=160, sharex=True, sharey=True, layout="constrained")
    for row, element in zip(panels, ("bfloat16", "float16"), strict=True):
        for axes, (name, label) in zip(row, IMPLEMENTATIONS.items(), strict=True):
            values = [[by_place[element, name, scale, length] for scale in scales] for length in lengths]
            image = axes.imshow(values, origin="lower", aspect="auto", cmap="viridis", vmin=0, vmax=1)
            for y, line in enumerate(values):
                for x, value in enumerate(line):
                    if value < MUCH:
                        colour = "white" if value < 0.75 else "black"
                        axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
            axes.set_title(f"{element}, {label}", fontsize=10)
            axes.set_xticks(range(len(scales)), [f"{scale:g}" for scale in scales], fontsize=8)
            axes.set_yticks(range(len(lengths)), [str(length) for length in lengths], fontsize=8)
    for axes in panels[1]:
        axes.set_xlabel("standard deviation of the embeddings")
    for axes in panels[:, 0]:
        axes.set_ylabel("sequence length")
    figure.colorbar(image, ax=panels, shrink=0.6, label="correlation with the noise before rounding")
    figure.suptitle(f"What is left of the noise, alpha {record['alpha']:g}, width {record['width']}", fontsize=11)
    figure.savefig(RESULTS / "rounding.png")


# --- prose -----------------------------------------------------------------------------------------------------------


def verdict(plan: Record, tests: Record) -> str:
    """A sentence: what the tests reject, and the smallest p-value."""
    assert plan["plan"] == tests["plan"], "the newest tests are not those of the newest plan"
    rejected = [f"{r['type']} {r['test']} (p = {r['p']:.2g})" for r in tests["results"] if r["rejected"]]
    found = f"rejected are {'; '.join(rejected)}" if rejected else "none rejects"
    least = min(tests["results"], key=lambda result: result["p"])
    return (
        f"At a family-wise level of 0.01 **{found}**; the smallest p-value is {least['p']:.2g} ({least['type']}, "
        f"{least['test']})."
    )


def about_tests(records: dict[str, Record]) -> str:
    plan, tests = records["plan"], records["tests"]
    sizes = plan["sizes"]
    elements = sizes["steps"] * sizes["tokens"] * sizes["columns"]
    relations = {name.partition(":")[0] for name in plan["tests"] if ":" in name}
    pairs = len(relations) * sizes["pairs"] * sizes["pair_tokens"] * sizes["pair_columns"]
    checks = {name: record for name, record in records.items() if record["what"] == "self-check"}
    caught = ", ".join(f"{name} {len(record['rejected'])}" for name, record in checks.items() if record["rejected"])
    uncaught = ", ".join(name for name, record in checks.items() if not record["rejected"])
    return (
        f"`make randomness` applies {len(tests['results'])} tests to the output of the fused op. Their "
        "[plan](../experiments/randomness/plan.py) is fixed before they see the noise. They test the distribution, moments, "
        "correlation along columns, across tokens and at any shift of both, the two-dimensional spectrum, and what "
        "neighbouring seeds, streams and steps, and tokens 2^32 apart, have in common. For each element type they use "
        f"{elements / 1e6:.0f} million elements and {pairs / 1e6:.0f} million pairs of related ones. "
        f"{verdict(plan, tests)}\n\n"
        "The tests can fail. Applied to smaller samples of noise that is broken on purpose, this many of them reject: "
        f"{caught}. They do not find everything: {uncaught}, a Philox that keeps its key in all rounds, passes; the known "
        "answers in the test suite exclude it."
    )


def about_control(record: Record, control: Record) -> str:
    """The p-values of the same tests on a generator of dieharder's own."""
    same = {(test["test"], test["ntuple"]) for test in control["tests"]}
    ours = [test["p"] for test in record["tests"] if (test["test"], test["ntuple"]) in same]
    theirs = [test["p"] for test in control["tests"]]
    high = [sum(p > 0.9 for p in each) for each in (ours, theirs)]
    return (
        f" Many of its p-values are above 0.9. That is a property of dieharder: of the {len(theirs)} p-values "
        "of rgb_bitdist and "
        "rgb_lagged_sum that were also computed for dieharder's own AES generator, "
        f"{high[0]} are above 0.9 here, and {high[1]} there."
    )


def about_kinds(records: dict[str, Record]) -> str:
    plan, tests = records["kinds plan"], records["kinds"]
    checks = {
        name.removeprefix("kinds: "): record for name, record in records.items() if record["what"] == "kinds self-check"
    }
    caught = ", ".join(f"{name} {len(record['rejected'])}" for name, record in checks.items())
    return (
        "[Sign and gaussian noise](contract.md#kinds-of-noise) have [their own "
        f"plan](../experiments/randomness/kinds.py), {len(tests['results'])} tests, on "
        f"{plan['sizes']['elements'] / 1e6:.0f} million elements of each kind in float32 and in bfloat16. "
        f"{verdict(plan, tests)} Of noise that is broken on purpose, this many of them reject, on smaller "
        f"samples: {caught}. How far gaussian noise is from the normal distribution is on the page of the contract, and was "
        "computed over all values."
    )


def about_battery(record: Record, control: Record | None) -> str:
    verdicts = [test["verdict"] for test in record["tests"]]
    count = {verdict: verdicts.count(verdict) for verdict in ("PASSED", "WEAK", "FAILED")}
    others = [test for test in record["tests"] if test["verdict"] != "PASSED"]
    named = ", ".join(f"{test['test']} {test['ntuple']} {test['p']:.6f}" for test in others)
    return (
        f"dieharder {record['version']} (`{record['command']}`) read {record['bytes'] / 1e9:.0f} GB of the raw words, in the "
        f"order in which bf16 training steps of width 4096 use them. Of {len(verdicts)} p-values {count['PASSED']} passed, "
        f"{count['WEAK']} are weak and {count['FAILED']} failed. One in a hundred is expected to be weak, below "
        "0.005 or above "
        "0.995" + (f"; here: {named}." if named else ".") + (about_control(record, control) if control else "")
    )


def about_rounding(record: Record) -> str:
    cells = {(c["type"], c["implementation"], c["scale"], c["length"]): c for c in record["cells"]}
    usual, large = cells["bfloat16", "ours", 0.02, 2048], cells["bfloat16", "ours", 1.0, 8192]
    large_fp16 = cells["float16", "ours", 1.0, 8192]
    apart = max(
        abs(cell["correlation"] - cells[element, "hook", scale, length]["correlation"])
        for (element, _, scale, length), cell in cells.items()
    )
    means = {
        name: [c["drawn_mean"] for (e, n, *_), c in cells.items() if (e, n) == ("bfloat16", name)]
        for name in IMPLEMENTATIONS
    }
    error = (1 / 3 / record["elements"]) ** 0.5
    hook_mean = f"{min(means['hook']):.4f} m to {max(means['hook']):.4f} m"
    our_mean = f"{max(map(abs, means['ours'])):.4f} m"
    return (
        "How much of the noise remains when the sum is rounded to 16 bits depends on the embeddings. At alpha "
        f"{record['alpha']:g} and 2048 tokens, with bf16 embeddings of standard deviation 0.02, {usual['changed']:.0%} of the "
        "elements change, and the remaining noise correlates with the noise before rounding by "
        f"{usual['correlation']:.4f}. With a standard deviation of 1 and 8192 tokens, {large['changed']:.0%} change and the "
        f"correlation is {large['correlation']:.2f}; in fp16 it is {large_fp16['correlation']:.2f}. **The Hugging Face hook "
        f"keeps just as much**: over the whole picture the correlations differ by at most {apart:.4f}, although "
        "the hook rounds "
        "the noise before it adds it. The difference is in the mean. torch draws the hook's noise from [-m, m), and in bf16 "
        f"the missing end shows: its mean on this CPU is {hook_mean}. The mean of our noise is within "
        f"{our_mean} of zero, with "
        f"a standard error of {error:.4f} m. We know of no effect of this on training."
    )


def main() -> None:
    records = read()
    draw_tests(records)
    draw_rounding(records["rounding"])
    tests = records["tests"]
    paragraphs = [
        about_tests(records),
        *([about_kinds(records)] if "kinds" in records else []),
        *([about_battery(records["battery"], records.get("battery control"))] if "battery" in records else []),
        "![All p-values, the spectrum and the correlations](../experiments/randomness/results/randomness.png)",
        about_rounding(records["rounding"]),
        "![What is left of the noise after rounding](../experiments/randomness/results/rounding.png)",
        f"Measured on {tests['device']}, torch {tests['torch']}, commit {tests['commit']}; "
        "[the records](../experiments/randomness/results/randomness.jsonl) contain every p-value.",
    ]
    write_section(DOCS / "randomness.md", "randomness", "\n\n".join(paragraphs))


if __name__ == "__main__":
    main()
