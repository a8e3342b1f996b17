"""Draws the README's table and picture from the records alone: the newest of each comparison.

python benchmarks/report.py
"""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
RESULTS = HERE / "results"
IN_TABLE = (
    "32000 x 4096, 2048 tokens, float32",
    "32000 x 4096, 2048 tokens, bfloat16",
    "32000 x 4096, 2048 tokens, float16",
    "32000 x 1024, 2048 tokens, bfloat16",
    "32000 x 1024, 65536 tokens, bfloat16",
    "32000 x 1024, 128 tokens, bfloat16",
)
COLOURS = {"plain": "#9aa5b1", "ours": "#1f6feb", "hook": "#d1495b", "hook, compiled": "#edae49"}
LABELS = {
    "plain": "plain nn.Embedding",
    "ours": "neft_kernels",
    "hook": "Hugging Face hook",
    "hook, compiled": "the hook under torch.compile",
}


def newest(name: str) -> dict[str, dict[str, Any]]:
    """The newest record of each shape."""
    lines = (RESULTS / f"{name}.jsonl").read_text().splitlines()
    return {record["shape"]: record for record in map(json.loads, lines)}


def table(records: dict[str, dict[str, Any]]) -> str:
    """The README's table: medians in milliseconds, and ratios of medians."""
    rows = [
        "| forward in training, vocabulary x width | plain | **ours** | hook | compiled hook | ours / plain | hook / ours |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for shape in IN_TABLE:
        median = {name: values[1] for name, values in records[shape]["milliseconds"].items()}
        times = " | ".join(f"{median[name]:.3g}" for name in ("plain",)) + f" | **{median['ours']:.3g}** | "
        times += " | ".join(f"{median[name]:.3g}" for name in ("hook", "hook, compiled"))
        rows.append(
            f"| {shape} | {times} | {median['ours'] / median['plain']:.2f} | {median['hook'] / median['ours']:.1f} |"
        )
    any_record = records[IN_TABLE[0]]
    rows.append("")
    rows.append(
        f"Milliseconds, medians of interleaved runs; {any_record['device']}, {any_record['threads']} threads, torch "
        f"{any_record['torch']}, commit {any_record['commit']}. Verified bit for bit before they were timed; `make bench` "
        "repeats them, [the records](benchmarks/results/cpu_forward.jsonl) hold the spread. Outputs of 32 MB and more are "
        "faster than plain ones because they ask the kernel for huge pages."
    )
    rows += ["", "![Time of one forward pass by number of tokens](benchmarks/results/cpu_forward.png)"]
    return "\n".join(rows)


def plot(records: dict[str, dict[str, Any]], to: Path) -> None:
    """Time against tokens, for a table of width 1024 in bfloat16."""
    shapes = [shape for shape in records if shape.startswith("32000 x 1024") and shape.endswith("bfloat16")]
    tokens = {shape: int(shape.split(", ")[1].split()[0]) for shape in shapes}
    shapes.sort(key=tokens.__getitem__)
    figure, axes = plt.subplots(figsize=(7.2, 4.2), dpi=160)
    for name in ("hook", "hook, compiled", "ours", "plain"):
        low, middle, high = zip(*(records[shape]["milliseconds"][name] for shape in shapes), strict=True)
        xs = [tokens[shape] for shape in shapes]
        axes.plot(xs, middle, marker="o", markersize=4, color=COLOURS[name], label=LABELS[name], linewidth=1.8)
        axes.fill_between(xs, low, high, color=COLOURS[name], alpha=0.18, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([tokens[shape] for shape in shapes], [str(tokens[shape]) for shape in shapes])
    axes.set_xlabel("tokens")
    axes.set_ylabel("milliseconds, median and quartiles")
    axes.set_title(f"One forward pass in training, width 1024, bfloat16\n{records[shapes[0]]['device']}", fontsize=10)
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(to)


def write_section(readme: Path, name: str, text: str) -> None:
    """Puts `text` between the two comments of `readme` that mark the section `name`."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, _, rest = readme.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{readme} has no section between {begin} and {end}")
    readme.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def main() -> None:
    records = newest("cpu_forward")
    plot(records, RESULTS / "cpu_forward.png")
    write_section(README, "measured", table(records))


if __name__ == "__main__":
    main()
