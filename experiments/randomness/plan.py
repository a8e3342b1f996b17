"""What ``run.py`` tests, on which samples, and what counts as a rejection: fixed before anything runs.

*   Hypothesis: the noise of each element is uniform on the 2**16 (fp16, bf16) or 2**23 (fp32, fp64) values of the contract
    and independent of all other noise. Each test looks for one way in which that could be false.
*   Sample, for each element type: 16 steps of 1024 tokens x 4096 columns, 2**26 elements, each step with a seed drawn as the
    package draws it, after ``torch.manual_seed(0)``; and for each relation of ``RELATIONS`` 64 pairs of related noise of
    256 tokens x 1024 columns, 2**24 elements.
*   Rule: two-sided p-values; Holm's method over all tests of all element types, at a family-wise level of 0.01. If the
    noise is what it should be, the probability that any test rejects is at most 0.01. Every p-value is reported, and nothing
    is run again with other seeds.
"""

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from experiments.randomness import battery

LEVEL = 0.01
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
#: Distances in columns, or in tokens, of elements that must not be correlated.
LAGS = (*range(1, 65), 128, 256)
#: What each test looks at in the steps, and its statistic.
TESTS = {
    "distribution": "Kolmogorov-Smirnov distance from the uniform distribution on the lattice",
    "all values": "chi-square over all values that the noise can take, equally likely",
    "256 cells": "chi-square over 256 cells of equal probability",
    "mean": "normal deviate of the mean from 0",
    "variance": "normal deviate of the variance from that of the lattice",
    "skewness": "normal deviate of the skewness from 0",
    "kurtosis": "normal deviate of the kurtosis from that of the lattice",
    "neighbouring columns": "chi-square over 256 x 256 cells of pairs (even column, next column)",
    "neighbouring tokens": "chi-square over 256 x 256 cells of pairs (even token, next token), same column",
    "correlation of columns": "sum of squared correlations at distances of 1-64, 128 and 256 columns: chi-square",
    "correlation of tokens": "sum of squared correlations at distances of 1-64, 128 and 256 tokens: chi-square",
    "correlation at any shift": "largest correlation over all shifts by tokens and columns at once",
    "spectrum": "Kolmogorov-Smirnov distance of the two-dimensional periodogram of normal scores from the exponential law",
    "spectral line": "largest ordinate of that periodogram",
}
#: What each test looks at in pairs of related noise, and its statistic.
PAIR_TESTS = {
    "same place": "sum over the pairs of the squared correlation element by element: chi-square",
    "any shift": "largest correlation over all shifts by tokens and columns at once",
    "differing bits": "chi-square over the 2**16 values of the exclusive or of the upper 16 bits of the levels",
}
#: Noise of (seed, stream, first token) that must be independent of each other.
RELATIONS = {
    "seed + 1": "seeds s and s + 1",
    "seed bit": "seeds that differ in one bit, each of the 64 in turn",
    "next step": "seeds drawn one after the other",
    "next stream": "streams r and r + 1 under one seed",
    "token + 2**32": "tokens t and t + 2**32",
}
Identity = dict[str, int]


@dataclass(frozen=True)
class Sizes:
    """Samples of one element type."""

    steps: int
    tokens: int
    columns: int
    pairs: int
    pair_tokens: int
    pair_columns: int

    @property
    def elements(self) -> int:
        return self.steps * self.tokens * self.columns

    @property
    def pair_elements(self) -> int:
        return self.pairs * self.pair_tokens * self.pair_columns


FULL = Sizes(16, 1024, 4096, 64, 256, 1024)
SMALL = Sizes(2, 1024, 1024, 64, 64, 256)


def make_plan(sizes: Sizes, seed: int, dtypes: tuple[torch.dtype, ...] = DTYPES) -> dict[str, Any]:
    """What is going to be tested, on how much, and what counts as a rejection."""
    tests = {name: {"n": sizes.elements, "statistic": statistic} for name, statistic in TESTS.items()}
    for relation, meaning in RELATIONS.items():
        for name, statistic in PAIR_TESTS.items():
            tests[f"{relation}: {name}"] = {"n": sizes.pair_elements, "statistic": f"{meaning}; {statistic}"}
    types = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    rule = f"reject where Holm's adjusted p-value over {len(tests) * len(types)} two-sided tests is below {LEVEL}"
    return {"sizes": asdict(sizes), "types": types, "manual_seed": seed, "rule": rule, "tests": tests}


def related(sizes: Sizes) -> Iterator[tuple[str, list[tuple[Identity, Identity]]]]:
    """For each relation its pairs; the seeds are drawn as the package draws them."""

    def seeds() -> list[int]:
        return battery.draw_seeds(sizes.pairs)

    def changed(seed: int, by: int) -> Identity:
        return {"seed": (seed + by + (1 << 63)) % (1 << 64) - (1 << 63)}

    def flipped(seed: int, bit: int) -> Identity:
        return changed(seed, -(1 << bit) if seed >> bit & 1 else 1 << bit)

    yield "seed + 1", [({"seed": seed}, changed(seed, 1)) for seed in seeds()]
    yield "seed bit", [({"seed": seed}, flipped(seed, index % 64)) for index, seed in enumerate(seeds())]
    drawn = battery.draw_seeds(sizes.pairs + 1)
    yield "next step", [({"seed": before}, {"seed": after}) for before, after in itertools.pairwise(drawn)]
    streams = enumerate(seeds())
    yield "next stream", [({"seed": seed, "stream": r}, {"seed": seed, "stream": r + 1}) for r, seed in streams]
    yield "token + 2**32", [({"seed": seed}, {"seed": seed, "first_token": 1 << 32}) for seed in seeds()]
