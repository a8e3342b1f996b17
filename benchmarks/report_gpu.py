"""Writes the GPU table and picture of docs/performance.md, and the README's sentence, from the newest GPU records alone.

python -m benchmarks.report_gpu
"""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks import records
from benchmarks.records import RESULTS
from benchmarks.report import COLOURS, LABELS, PERFORMANCE
from benchmarks.sections import README, write_section
from benchmarks.variants import PASSES

Record = dict[str, Any]
IN_TABLE = (
    "32000 x 4096, 128 tokens, bfloat16",
    "32000 x 4096, 16384 tokens, bfloat16",
    "32000 x 4096, 16384 tokens, float32",
    "128256 x 4096, 65536 tokens, bfloat16",
    "151936 x 2048, 65536 tokens, bfloat16",
)
PLOTTED = "32000 x 4096"
NOT_MEASURED = "Nothing was measured on a GPU yet; `make gpu` does it."


def newest(distribution: str) -> dict[str, Record]:
    """The newest record of each shape on the device that was measured last, by shape; of comparisons that did not fail."""
    found = [record for record in records.load("gpu") if record["ids"] == distribution and "forward" in record]
    return {record["shape"]: record for record in found if record["device"] == found[-1]["device"]}


def is_plotted(shape: str) -> bool:
    return shape.startswith(PLOTTED) and shape.endswith("bfloat16")


def share_of_copy(record: Record, variant: str) -> float:
    """Bytes that the forward must move, over those that a copy moves in the same time."""
    tokens, width = _tokens(record), int(record["shape"].split(" x ")[1].split(",")[0])
    element_size = 4 if record["shape"].endswith("float32") else 2
    bytes_moved = PASSES["ours"] * tokens * width * element_size
    return bytes_moved / (record["forward"][variant][1] / 1e3) / record["copy_bytes_per_second"]


def _tokens(record: Record) -> int:
    return int(record["shape"].split(", ")[1].split()[0])


def table(found: dict[str, Record]) -> str:
    """Medians in microseconds, ratios of medians, and the share of a device copy's bandwidth."""
    rows = [
        "| forward in training, vocabulary x width | plain | **ours** | hook | compiled hook | ours / plain | hook / ours "
        "| compiled hook / ours | of a copy's bandwidth |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for shape in (shape for shape in IN_TABLE if shape in found):
        record = found[shape]
        median = {name: values[1] * 1e3 for name, values in record["forward"].items()}
        hooks = [median.get(name) for name in ("hook", "hook, compiled")]  # None: left out, because it failed
        times = ["—" if time is None else f"{time:.3g}" for time in hooks]
        ratios = ["—" if time is None else f"{time / median['ours']:.1f}" for time in hooks]
        rows.append(
            f"| {shape} | {median['plain']:.3g} | **{median['ours']:.3g}** | {' | '.join(times)} | "
            f"{median['ours'] / median['plain']:.2f} | {' | '.join(ratios)} | {share_of_copy(record, 'ours'):.0%} |"
        )
    any_record = next(iter(found.values()))
    rows += [
        "",
        f"Microseconds, medians of interleaved runs with a cold L2; one {any_record['device']}, torch {any_record['torch']}, "
        f"commit {any_record['commit']}. [The records](../benchmarks/results/gpu.jsonl) also contain backward passes, "
        "memory, launch overhead and CUDA graphs.",
        "",
        "![Time of one forward pass on a GPU by number of tokens](../benchmarks/results/gpu.png)",
    ]
    return "\n".join(rows)


def sentence(found: dict[str, Record]) -> str:
    """The ratios of the first large comparison of the table, for the README."""
    shape = next(shape for shape in (*IN_TABLE[1:], *IN_TABLE[:1]) if shape in found)
    record = found[shape]
    median = {name: values[1] for name, values in record["forward"].items()}
    ratios = [f"ours / plain {median['ours'] / median['plain']:.2f}"]
    for name, title in (("hook", "hook"), ("hook, compiled", "compiled hook")):
        if name in median:
            ratios.append(f"{title} / ours {median[name] / median['ours']:.1f}")
    return (
        f"On one {record['device']}, {shape}: {', '.join(ratios)}, {share_of_copy(record, 'ours'):.0%} of a copy's bandwidth "
        "([GPU table](docs/performance.md#gpu))."
    )


def plot(found: dict[str, Record], to: Path) -> None:
    """Time against tokens, and the share of a copy's bandwidth."""
    series = sorted(
        (record for shape, record in found.items() if is_plotted(shape)),
        key=_tokens,
    )
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), dpi=160)
    for name in ("hook", "hook, compiled", "ours", "plain"):
        measured = [record for record in series if name in record["forward"]]
        if not measured:
            continue
        xs = [_tokens(record) for record in measured]
        low, middle, high = zip(*(record["forward"][name] for record in measured), strict=True)
        style = {"marker": "o", "markersize": 4, "color": COLOURS[name], "linewidth": 1.8}
        left.plot(xs, middle, label=LABELS[name], **style)
        left.fill_between(xs, low, high, color=COLOURS[name], alpha=0.18, linewidth=0)
        right.plot(xs, [share_of_copy(record, name) for record in measured], **style)
    xs = [_tokens(record) for record in series]
    left.set_yscale("log")
    left.set_ylabel("milliseconds, median and quartiles")
    right.set_ylabel("share of a copy's bandwidth")
    right.set_ylim(0, 1.1)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(xs, [str(x) for x in xs])
        axes.set_xlabel("tokens")
        axes.grid(visible=True, which="major", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=9)
    figure.suptitle(f"One forward pass in training, {PLOTTED}, bfloat16 — {series[0]['device']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(to)
    plt.close(figure)


def main() -> None:
    found = newest("uniform")
    if any(is_plotted(shape) for shape in found):
        plot(found, RESULTS / "gpu.png")
    write_section(PERFORMANCE, "gpu", table(found) if found else NOT_MEASURED)
    write_section(README, "gpu", sentence(found) if found else NOT_MEASURED)


if __name__ == "__main__":
    main()
