"""The results of the three runs as a table, answers side by side, a figure and a JSON file."""

import itertools
import json
import shutil
import textwrap
from dataclasses import asdict
from pathlib import Path
from statistics import median, quantiles

import torch
import transformers
import trl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import neft_kernels
from records import Noise, RunResult, RunSettings

COLOURS = {Noise.OFF: "#7a7f87", Noise.TRAINER: "#d9822b", Noise.NEFT_KERNELS: "#1f6feb"}
INK, FAINT = "#24292f", "#d8dee4"
GAP, MIN_COLUMN = "  ", 24
PACKAGES = (neft_kernels, torch, transformers, trl)


def table(results: list[RunResult]) -> str:
    """The last losses, the time in the embedding and the peak memory of each run, aligned for a terminal."""
    baseline = results[0].curve[-1].held_out_loss
    rows = [("", "train loss", "held-out loss", "vs no noise", "embedding", "bare look-up", "peak memory")]
    for result in results:
        last = result.curve[-1]
        rows.append(
            (
                result.noise.value,
                f"{last.train_loss:.3f}",
                f"{last.held_out_loss:.3f}",
                f"{last.held_out_loss - baseline:+.3f}" if result.noise is not Noise.OFF else "",
                f"{median(result.embedding_ms):.3f} ms",
                f"{median(result.look_up_ms):.3f} ms",
                f"{result.peak_memory_bytes / 2**20:.0f} MiB",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def answers(results: list[RunResult]) -> str:
    """Each question, the expected answer, and those of the untrained model and of all runs in columns."""
    columns = [("untrained", results[0].untrained_answers), *((each.noise.value, each.answers) for each in results)]
    width = max(MIN_COLUMN, shutil.get_terminal_size((120, 24)).columns // len(columns) - len(GAP))
    lines = []
    for number, asked in enumerate(results[0].answers):
        lines += [asked.question, *textwrap.wrap(f"expected: {asked.expected}", len(columns) * width), ""]
        cells = [
            [*textwrap.wrap(title, width), "-" * width, *(textwrap.wrap(given[number].answer, width) or ["(nothing)"])]
            for title, given in columns
        ]
        rows = itertools.zip_longest(*cells, fillvalue="")
        lines += [*(GAP.join(cell.ljust(width) for cell in row).rstrip() for row in rows), ""]
    return "\n".join(lines).rstrip()


def save_json(path: Path, settings: RunSettings, results: list[RunResult]) -> None:
    runs = []
    for result in results:
        run = asdict(result)
        for timing in ("embedding_ms", "look_up_ms"):
            run[timing] = dict(zip(("first_quartile", "median", "third_quartile"), quantiles(run[timing]), strict=True))
        runs.append(run)
    record = {
        "settings": {name: value for name, value in asdict(settings).items() if name != "noise"},
        "versions": {package.__name__: package.__version__ for package in PACKAGES},
        "runs": runs,
    }
    path.write_text(json.dumps(record, indent=2) + "\n")


def save_figure(path: Path, title: str, results: list[RunResult]) -> None:
    """The losses over the steps, the held-out losses beside those without noise, and the time in the embedding."""
    figure = Figure(figsize=(13, 4.6), dpi=160, layout="constrained")
    figure.suptitle(title, fontsize=13, fontweight="bold", color=INK, x=0.008, ha="left")
    losses, differences, times = figure.subplots(1, 3, width_ratios=(1.35, 1, 1))
    draw_losses(losses, results)
    draw_differences(differences, results)
    draw_times(times, results)
    figure.savefig(path)


def draw_losses(axes: Axes, results: list[RunResult]) -> None:
    decorate(axes, "Loss, measured without noise", "step", "nats per token")
    for result in results:
        steps = [point.step for point in result.curve]
        colour = COLOURS[result.noise]
        axes.plot(steps, [point.held_out_loss for point in result.curve], color=colour, marker="o", markersize=3.5)
        axes.plot(steps, [point.train_loss for point in result.curve], color=colour, linestyle=(0, (4, 2)), alpha=0.7)
    trained = [
        loss for result in results for point in result.curve[1:] for loss in (point.train_loss, point.held_out_loss)
    ]
    margin = 0.06 * (max(trained) - min(trained)) + 1e-3
    axes.set_ylim(min(trained) - margin, max(trained) + margin)  # the untrained model's loss would dwarf the rest
    axes.set_xlim(left=0)
    handles = [
        Line2D([], [], color=COLOURS[result.noise], linewidth=2.5, label=result.noise.value) for result in results
    ]
    handles += [
        Line2D([], [], color=INK, marker="o", markersize=3.5, label="held-out"),
        Line2D([], [], color=INK, linestyle=(0, (4, 2)), label="train"),
    ]
    axes.legend(handles=handles, frameon=False, fontsize=9, labelcolor=INK)


def draw_differences(axes: Axes, results: list[RunResult]) -> None:
    decorate(axes, "Held-out loss, difference from no noise", "step", "nats per token (below 0: the noise helps)")
    baseline = [point.held_out_loss for point in results[0].curve]
    for result in results:
        points = zip(result.curve, baseline, strict=True)
        difference = [point.held_out_loss - loss for point, loss in points]
        steps = [point.step for point in result.curve]
        axes.plot(steps, difference, color=COLOURS[result.noise], marker="o", markersize=3.5)
    axes.set_xlim(left=0)


def draw_times(axes: Axes, results: list[RunResult]) -> None:
    decorate(axes, "Time in the embedding per step", "", "ms per training forward, median and quartiles")
    axes.grid(visible=False, axis="x")
    firsts, medians, thirds = zip(*(quantiles(result.embedding_ms) for result in results), strict=True)
    positions = range(len(results))
    axes.bar(positions, medians, width=0.55, color=[COLOURS[result.noise] for result in results])
    highest = 1.3 * max(medians)  # quartiles of a busy machine may be far above
    axes.vlines(positions, firsts, [min(third, highest) for third in thirds], color=INK, linewidth=1.2)
    for position, third, result in zip(positions, thirds, results, strict=True):
        milliseconds, look_up = median(result.embedding_ms), median(result.look_up_ms)
        axes.annotate(
            f"{milliseconds:.3g} ms\n{milliseconds / look_up:.1f} x look-up",
            (position, min(third, highest)),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=9,
            color=INK,
        )
    axes.set_ylim(0, 1.2 * min(highest, max(thirds)))
    axes.set_xlim(-0.6, len(results) - 0.4)
    axes.set_xticks(positions, [result.noise.value.replace("Trainer ", "Trainer\n") for result in results])


def decorate(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, fontsize=11, color=INK, loc="left")
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.tick_params(colors=INK, length=0)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
