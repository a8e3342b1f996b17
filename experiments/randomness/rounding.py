"""How much of the noise survives the rounding of the sum to 16 bits, here and in the Hugging Face hook.

Over the embedding's scale and the sequence length, at the width and alpha of a usual run, from real calls of both modules
in training. Of each the *effective* noise is measured, output minus row:

*   ``changed``: the share of elements that differ from their row at all;
*   ``deviation``: its root mean square, over that of the noise which is asked for, ``m / sqrt(3)``;
*   ``mean``: its mean in units of the magnitude m, with its standard error;
*   ``correlation``: with the noise before the sum was rounded. Ours is known to the last bit in fp32. The hook draws its noise
    in the embedding's own element type, so that is what it is compared with; there is no finer noise behind it.
*   ``drawn_mean``: the mean of that noise before the sum.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import records
from benchmarks.variants import ALPHA, training_modules
from experiments.randomness import battery
from experiments.randomness.sources import Source, bits_of

RESULTS = Path(__file__).parent / "results"
DTYPES = (torch.bfloat16, torch.float16)
SCALES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # standard deviation of the rows' elements
LENGTHS = tuple(1 << power for power in range(4, 14))
WIDTH = 4096
NUM_EMBEDDINGS = 1024
TOKENS = 1024  # looked at of each batch; batches have at least that many


def magnitude_of(length: int) -> float:
    return ALPHA / (length * WIDTH) ** 0.5


def our_noise(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> Tensor:
    """The noise that our module adds after ``torch.manual_seed(seed)``, before it is rounded, ``[TOKENS, WIDTH]``."""
    torch.manual_seed(seed)
    levels = Source().levels((TOKENS, WIDTH), dtype, battery.draw_seeds(1)[0])
    bits = bits_of(dtype)
    return (2 * levels + (1 - (1 << bits))).float() * (2.0**-bits * magnitude_of(shape[1]))


def hook_noise(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> Tensor:
    """The noise that the hook adds after ``torch.manual_seed(seed)``, ``[TOKENS, WIDTH]``."""
    torch.manual_seed(seed)
    bound = float(ALPHA / torch.sqrt(torch.tensor(shape[1] * WIDTH)))
    noise = torch.zeros(*shape, WIDTH, dtype=dtype).uniform_(-bound, bound)
    return noise.flatten(0, 1)[:TOKENS]


def average(values: Tensor) -> float:
    return float(values.mean(dtype=torch.float64))


def compare(rows: Tensor, out: Tensor, noise: Tensor, magnitude: float) -> dict[str, float]:
    """What is left of `noise` in `out`; all ``[TOKENS, WIDTH]``."""
    effective, drawn = out.float() - rows.float(), noise.float()
    power, drawn_power, product = (average(t) for t in (effective * effective, drawn * drawn, effective * drawn))
    mean, drawn_mean = average(effective), average(drawn)
    variance, drawn_variance = power - mean**2, drawn_power - drawn_mean**2
    correlation = (product - mean * drawn_mean) / (variance * drawn_variance) ** 0.5 if variance > 0 else 0.0
    return {
        "changed": average((out != rows).float()),
        "deviation": power**0.5 / (magnitude / 3**0.5),
        "mean": mean / magnitude,
        "mean_error": (variance / out.numel()) ** 0.5 / magnitude,
        "correlation": correlation,
        "drawn_mean": drawn_mean / magnitude,
    }


def measure(weight: Tensor, length: int) -> list[dict[str, Any]]:
    """What is left of the noise in batches of sequences of `length`, for both implementations."""
    dtype, shape = weight.dtype, (max(1, TOKENS // length), length)
    ids = torch.randint(NUM_EMBEDDINGS, shape, generator=torch.Generator().manual_seed(length))
    rows = nn.functional.embedding(ids.flatten()[:TOKENS], weight)
    modules = training_modules(weight, compiled=False)
    noise_of: dict[str, Callable[..., Tensor]] = {"ours": our_noise, "hook": hook_noise}
    found = []
    for name, its_noise in noise_of.items():
        torch.manual_seed(length)
        out = modules[name](ids).detach().flatten(0, 1)[:TOKENS]
        noise = its_noise(shape, dtype, seed=length)
        # What the hook adds are numbers of `dtype`, what we add are fp32; either way the sum is rounded once.
        assert torch.equal(out, (rows.float() + noise.float()).to(dtype)), f"{name} adds something else"
        measures = compare(rows, out, noise, magnitude_of(length))
        found.append({"implementation": name} | {key: round(value, 6) for key, value in measures.items()})
    return found


def main() -> int:
    torch.set_num_threads(1)
    environment = records.environment()  # as the run begins
    cells = []
    for dtype in DTYPES:
        for scale in SCALES:
            weight = (
                torch.randn(NUM_EMBEDDINGS, WIDTH, generator=torch.Generator().manual_seed(0)).mul_(scale).to(dtype)
            )
            for length in LENGTHS:
                cell = {"type": str(dtype).removeprefix("torch."), "scale": scale, "length": length}
                ours, hook = (cell | measures for measures in measure(weight, length))
                cells += [ours, hook]
                line = " | ".join(
                    f"{cell['implementation']}: changed {cell['changed']:.3f}, deviation {cell['deviation']:.3f}, mean "
                    f"{cell['mean']:+.5f}, correlation {cell['correlation']:.4f}"
                    for cell in (ours, hook)
                )
                print(f"{ours['type']:8} scale {scale:5} length {length:4} {line}", flush=True)
    settings = {"alpha": ALPHA, "width": WIDTH, "elements": TOKENS * WIDTH}
    records.append("randomness", {**environment, "what": "rounding", **settings, "cells": cells}, RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
