"""Writes the table and picture of the README, and the tables of docs/performance.md, from the newest records alone.

python -m benchmarks.report
"""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.records import RESULTS, load
from benchmarks.sections import DOCS, README, write_section

PERFORMANCE = DOCS / "performance.md"
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
    return {record["shape"]: record for record in load(name)}


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
    rows += [
        "",
        f"Milliseconds: medians of interleaved runs on {any_record['device']} with {any_record['threads']} threads, torch "
        f"{any_record['torch']}, commit {any_record['commit']}. Results were verified bit for bit before they were timed.",
        "",
        "![Time of one forward pass by tokens, width and vocabulary](benchmarks/results/cpu_forward.png)",
    ]
    return "\n".join(rows)


def remarks(records: dict[str, dict[str, Any]]) -> str:
    """What docs/performance.md adds to the README's table."""
    any_record = records[IN_TABLE[0]]
    sentences = (
        "[The records](../benchmarks/results/cpu_forward.jsonl) contain the spread of each measurement.",
        *memory(any_record),
        *elsewhere(any_record["device"]),
    )
    return "\n".join(f"- {sentence}" for sentence in sentences)


def memory(record: dict[str, Any]) -> list[str]:
    """A sentence on the memory of the first row, if it was measured."""
    peak = record.get("peak_bytes_above_output")
    if peak is None or None in peak.values():
        return []
    sizes = ", ".join(f"{LABELS[name]} {peak[name] / 2**20:.0f} MiB" for name in ("ours", "hook", "hook, compiled"))
    output = record["elements"] * 4 / 2**20
    return [f"Memory beyond the output of {output:.0f} MiB, in the first row of the table: {sizes}."]


def elsewhere(device: str) -> list[str]:
    """A sentence for each other device that has records: its newest ratios on the shapes of the goals."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for record in load("cpu_forward"):
        if record["device"] != device:
            found.setdefault(record["device"], {})[record["shape"]] = record
    sentences = []
    for other, records in found.items():
        ratios = []
        for shape in IN_TABLE[:3]:
            median = {name: values[1] for name, values in records[shape]["milliseconds"].items()}
            ratios.append(
                f"{median['ours'] / median['plain']:.2f} and {median['hook'] / median['ours']:.1f} in {shape.split(', ')[-1]}"
            )
        sentences.append(f"On {other}, ours / plain and hook / ours are, in the first three rows: {', '.join(ratios)}.")
    return sentences


def passes_table() -> str:
    """The table of what is no plain forward."""
    newest_of = {(record["shape"], record["passes"]): record for record in load("cpu_passes")}
    rows = ["| | plain | **ours** | hook | ours / plain | hook / ours |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for (shape, passes), record in newest_of.items():
        median = {name: values[1] for name, values in record["milliseconds"].items()}
        title = "forward and backward" if passes == "both" else passes
        rows.append(
            f"| {title}; {shape} | {median['plain']:.3g} | **{median['ours']:.3g}** | {median['hook']:.3g} | "
            f"{median['ours'] / median['plain']:.2f} | {median['hook'] / median['ours']:.1f} |"
        )
    return "\n".join(rows)


def step_sentence() -> str:
    """The embedding's share of a training step."""
    record = load("training_step")[-1]
    shares = {
        name: record["embedding_milliseconds"][name][1] / record["step_milliseconds"][name][1]
        for name in record["step_milliseconds"]
    }
    model, (batch, tokens) = record["model"], record["batch"]
    look_up = record["embedding_milliseconds"]
    return (
        f"In a step of the Trainer (Llama of width {model['hidden_size']}, {model['num_hidden_layers']} layers, "
        f"{batch} x {tokens} padded tokens, float32; medians of {record['steps']} steps) the embedding takes "
        + ", ".join(f"{look_up[name][1]:.3g} ms ({share:.2%}) with {name}" for name, share in shares.items())
        + ". The handling of the masks is included."
    )


def plot(records: dict[str, dict[str, Any]], to: Path) -> None:
    """How the time of a bfloat16 forward grows with the tokens, the width and the vocabulary."""

    def sizes(shape: str) -> tuple[int, int, int]:
        table, tokens, _ = shape.split(", ")
        vocabulary, width = table.split(" x ")
        return int(tokens.split()[0]), int(width), int(vocabulary)

    base = (2048, 1024, 32000)
    by_sizes = {sizes(shape): record for shape, record in records.items() if shape.endswith("bfloat16")}
    figure, panels = plt.subplots(1, 3, figsize=(13, 4.2), dpi=160, sharey=True)
    titles = ("tokens (width 1024)", "width (2048 tokens)", "vocabulary (width 1024, 2048 tokens)")
    for axis, (axes, title) in enumerate(zip(panels, titles, strict=True)):
        others = [other for other in range(3) if other != axis]
        series = sorted(key for key in by_sizes if all(key[other] == base[other] for other in others))
        xs = [key[axis] for key in series]
        for name in ("hook", "hook, compiled", "ours", "plain"):
            low, middle, high = zip(*(by_sizes[key]["milliseconds"][name] for key in series), strict=True)
            axes.plot(xs, middle, marker="o", markersize=4, color=COLOURS[name], label=LABELS[name], linewidth=1.8)
            axes.fill_between(xs, low, high, color=COLOURS[name], alpha=0.18, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(xs, [f"{x // 1000}k" if x >= 10_000 else str(x) for x in xs])
        axes.set_xlabel(title)
        axes.grid(visible=True, which="major", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("milliseconds, median and quartiles")
    panels[0].legend(frameon=False, fontsize=9)
    device = records[IN_TABLE[0]]["device"]
    figure.suptitle(
        f"One forward pass in training, bfloat16, vocabulary 32000 where not said otherwise — {device}", fontsize=10
    )
    figure.tight_layout()
    figure.savefig(to)


def main() -> None:
    records = newest("cpu_forward")
    plot(records, RESULTS / "cpu_forward.png")
    write_section(README, "measured", table(records))
    write_section(PERFORMANCE, "measured", remarks(records))
    write_section(PERFORMANCE, "passes", f"{passes_table()}\n\n{step_sentence()}")


if __name__ == "__main__":
    main()
