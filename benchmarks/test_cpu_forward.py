"""CPU forward: the plain embedding, the Hugging Face hook, the compiled hook and ours, side by side.

    make bench

Every group is verified, then timed interleaved; see timing.py. Goals are those of the README's table.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import records
from benchmarks.timing import Replay, Samples, interleaved, peak_above_output
from benchmarks.variants import PASSES, Shape, forwards

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
#: The goals: at most this times the plain embedding, and the hook at least this times ours; for 2048 x 4096.
GOALS = {FP32: (1.15, 8), BF16: (1.5, 12), FP16: (1.5, None)}
MAIN = [Shape(32000, 4096, 2048, dtype) for dtype in (FP32, BF16, FP16)]
SHAPES = [
    *MAIN,
    *(Shape(32000, width, 2048, dtype) for width in (1024, 2048) for dtype in (FP32, BF16)),
    *(Shape(32000, width, 2048, BF16) for width in (256, 512, 8192)),
    *(Shape(32000, 1024, tokens, BF16) for tokens in (128, 512, 8192, 65536)),
    *(Shape(vocabulary, 1024, 2048, BF16) for vocabulary in (1000, 50272, 128256, 256000)),
    Shape(32000, 1024, 128, FP32),
]
VARIANTS = ("plain", "hook", "hook, compiled", "ours", "memcpy")

replay = Replay()


@functools.cache
def measured(shape: Shape) -> tuple[dict[str, Samples], dict[str, int | None]]:
    """The times of each variant, and its memory beyond the output."""
    torch.manual_seed(0)
    calls = forwards(shape)
    # The least of a few: the allocator may still hold on to what was freed before.
    peaks = {name: [peak_above_output(calls[name]) for _ in range(3)] for name in VARIANTS}
    known = {name: [peak for peak in found if peak is not None] for name, found in peaks.items()}
    return interleaved(calls), {name: min(found) if found else None for name, found in known.items()}


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(
    benchmark: Any, summary: Callable[[str], None], request: pytest.FixtureRequest, shape: Shape, variant: str
) -> None:
    samples, peak_bytes = measured(shape)
    replay.load(samples[variant])
    benchmark.group = str(shape)
    benchmark.pedantic(lambda: None, rounds=len(samples[variant].seconds))
    if variant == VARIANTS[-1]:
        summary(line(shape, samples))
        sizes = {name: size for name, size in peak_bytes.items() if size is not None}
        if shape in MAIN and sizes:
            memory = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in sizes.items())
            summary(f"{shape!s:44} memory beyond the output: {memory}")
        if request.config.getoption("--record"):
            records.append(
                "cpu_forward",
                {
                    "shape": str(shape),
                    "elements": shape.elements,
                    "milliseconds": table(samples),
                    "peak_bytes_above_output": peak_bytes,
                },
            )


def table(samples: dict[str, Samples]) -> dict[str, list[float]]:
    """First quartile, median and third quartile of each variant, in milliseconds."""
    quartiles = {name: (each.spread[0], each.median, each.spread[1]) for name, each in samples.items()}
    return {name: [round(value * 1e3, 5) for value in values] for name, values in quartiles.items()}


def line(shape: Shape, samples: dict[str, Samples]) -> str:
    median = {name: sample.median for name, sample in samples.items()}
    to_plain, from_hook = median["ours"] / median["plain"], median["hook"] / median["ours"]
    rate = {
        name: PASSES[name] * shape.elements * shape.dtype.itemsize / median[name] / 1e9 for name in ("ours", "memcpy")
    }
    low, high = samples["ours"].spread
    text = (
        f"{shape!s:44} ours {median['ours'] * 1e3:8.3f} ms ({low * 1e3:.3f}-{high * 1e3:.3f}), "
        f"{to_plain:5.2f} x plain, hook {from_hook:5.1f} x ours, compiled hook "
        f"{median['hook, compiled'] / median['ours']:5.1f} x, {rate['ours']:5.1f} GB/s (memcpy {rate['memcpy']:.1f})"
    )
    if shape in MAIN:
        most, least = GOALS[shape.dtype]
        met = to_plain <= most and (least is None or from_hook >= least)
        text += f"  goal {'met' if met else 'MISSED'}: <= {most}" + (f", >= {least}" if least else "")
    return text
