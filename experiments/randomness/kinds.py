"""Are sign and gaussian noise random, and distributed as they should be? Planned before it is run, with records.

    python -m experiments.randomness.kinds           # part of make randomness
    python -m experiments.randomness.kinds --broken  # the same on known-bad noise, with smaller samples; it must be rejected

*   Hypothesis: the noise of each element is independent of all other noise. Sign noise is 1 or -1, each as likely. Gaussian
    noise takes each value of the contract, one for each of 2**16 or 2**23 levels, with equal probability. How far these
    values are from normal quantiles is no question of statistics: ``gaussian.py`` compares all of them.
*   Sample, for each kind and for one element type of each width: 2 steps of 1024 tokens x 4096 columns, 2**23 elements,
    with seeds drawn as the package draws them after ``torch.manual_seed(19)``; and for each relation of ``plan.py`` 64 pairs
    of related noise of 64 tokens x 512 columns, 2**21 elements.
*   Rule: two-sided p-values; Holm's method over all tests of both kinds, at a family-wise level of 0.01. Every p-value is
    reported, and nothing is run again with other seeds.
*   Self-check, ``torch.manual_seed(20)``: noise of ``BROKEN`` in ``sources.py`` that both kinds must show, and gaussian noise
    without its tail. Each must be rejected.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks import records
from experiments.randomness import battery, uniformity
from experiments.randomness.plan import LAGS, LEVEL, RELATIONS, Identity, Sizes, related
from experiments.randomness.run import RESULTS, count, largest_deviate, report
from experiments.randomness.sources import bits_of, broken
from neft_kernels import add_noise
from neft_kernels.ops import reference

SEED, SELF_CHECK_SEED = 19, 20
SIZES = Sizes(2, 1024, 4096, 64, 64, 512)
SMALL = Sizes(1, 512, 1024, 64, 16, 128)
DTYPES = (torch.float32, torch.bfloat16)
PATTERN = 16  # signs in a row
CELLS = 1 << 12
COMMON = {
    "correlation of columns": "sum of squared correlations at distances of 1-64, 128 and 256 columns: chi-square",
    "correlation of tokens": "sum of squared correlations at distances of 1-64, 128 and 256 tokens: chi-square",
    "correlation at any shift": "largest correlation over all shifts by tokens and columns at once",
}
TESTS = {
    "sign": {
        "mean": "normal deviate of the mean from 0",
        "patterns of columns": "chi-square over the 2**16 patterns of the signs of 16 neighbouring columns",
        "patterns of tokens": "chi-square over the 2**16 patterns of the signs of 16 neighbouring tokens",
        **COMMON,
    },
    "gaussian": {
        "distribution": "Kolmogorov-Smirnov distance from the law of the contract, at 2**12 quantiles",
        "mean": "normal deviate of the mean from 0",
        "variance": "normal deviate of the variance from that of the law",
        "skewness": "normal deviate of the skewness from 0",
        "kurtosis": "normal deviate of the kurtosis from that of the law",
        **COMMON,
        "spectrum": "Kolmogorov-Smirnov distance of the two-dimensional periodogram from the exponential law",
        "spectral line": "largest ordinate of that periodogram",
    },
}
PAIR_TESTS = {
    "same place": "sum over the pairs of the squared correlation element by element: chi-square",
    "any shift": "largest correlation over all shifts by tokens and columns at once",
}
SHOWN_BY_BOTH = ("three-rounds", "low-half-twice", "token-high-word", "seed-high-word", "stream-shifts-tokens")
WITHOUT_TAIL = "gaussian-without-tail"
TAIL = 0.9973  # the uniform at 3 standard deviations


def make_plan(sizes: Sizes, seed: int) -> dict[str, Any]:
    """What is going to be tested, on how much, and what counts as a rejection."""
    tests = {
        kind: of_kind
        | {f"{relation}: {name}": statistic for relation in RELATIONS for name, statistic in PAIR_TESTS.items()}
        for kind, of_kind in TESTS.items()
    }
    types = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    number = len(types) * sum(map(len, tests.values()))
    rule = f"reject where Holm's adjusted p-value over {number} two-sided tests is below {LEVEL}"
    sizes_of = {"elements": sizes.elements, "pair elements": sizes.pair_elements}
    return {"sizes": sizes_of, "types": types, "manual_seed": seed, "rule": rule, "tests": tests}


# --- the noise -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Where noise of a kind comes from: a backend of the package; None takes the one that a user gets."""

    backend: str | None = None

    def sign(self, shape: tuple[int, int], dtype: torch.dtype, **identity: Any) -> Tensor:
        """``[T, D]``, of variance 1."""
        noise = add_noise(torch.zeros(shape, dtype=dtype), 1.0, noise="sign", backend=self.backend, **identity).float()
        assert (noise.abs() == 1).all(), "neither 1 nor -1"
        return noise

    def gaussian(self, shape: tuple[int, int], dtype: torch.dtype, **identity: Any) -> Tensor:
        """``[T, D]``.

        Noise of magnitude 1 on a row of zeros is rounded to `dtype`; the same noise on the negative of that is the rest of
        it, rounded again. The sum is the noise to within 2**-17 of itself, less than the distance of two values.
        """

        def noisy(embeds: Tensor) -> Tensor:
            return add_noise(embeds, 1.0, noise="gaussian", backend=self.backend, **identity)

        rounded = noisy(torch.zeros(shape, dtype=dtype))
        return rounded.float() + noisy(-rounded).float()


@functools.cache
def gaussian_values(bits: int) -> Tensor:
    """The gaussian noise of each level, in increasing order, ``[2**bits]``."""
    return reference.shape_noise(torch.from_numpy(uniformity.values(bits)).float(), reference.GAUSSIAN)


@functools.cache
def borders(bits: int) -> Tensor:
    """Between ``CELLS`` cells of equal probability: the middle of two values of gaussian noise."""
    values = gaussian_values(bits).double()
    first = torch.arange(1, CELLS) * (len(values) // CELLS)
    return ((values[first - 1] + values[first]) / 2).float()


@functools.cache
def law(bits: int) -> np.ndarray:
    """All values of gaussian noise, which are equally likely."""
    return gaussian_values(bits).double().numpy()


@contextlib.contextmanager
def known_bad(name: str) -> Iterator[Source]:
    """Noise of the package's reference, which is broken for as long as the context lasts."""
    if name != WITHOUT_TAIL:
        with broken(name) as source:
            yield Source(source.backend)
        return
    uniform = reference.uniform

    def without_tail(*args: Any) -> Tensor:
        u = uniform(*args)
        return torch.where(u.abs() > TAIL, u - u.sign() / 2, u)

    with mock.patch.object(reference, "uniform", without_tail):
        yield Source("reference")


# --- the tests -------------------------------------------------------------------------------------------------------


def run_step_tests(kind: str, source: Source, dtype: torch.dtype, sizes: Sizes) -> dict[str, dict[str, Any]]:
    """The results of ``TESTS[kind]``."""
    shape, n = (sizes.tokens, sizes.columns), sizes.elements
    counts, sums = np.zeros(CELLS, np.int64), np.zeros(4)
    patterns = {"columns": np.zeros(1 << PATTERN, np.int64), "tokens": np.zeros(1 << PATTERN, np.int64)}
    ordinates, total = [], 0.0

    def images() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal counts, sums, total
        for seed in battery.draw_seeds(sizes.steps):
            if kind == "sign":
                image = source.sign(shape, dtype, seed=seed)
                total += float(image.sum(dtype=torch.float64))
                patterns["columns"] += count(pattern(image), 1 << PATTERN)
                patterns["tokens"] += count(pattern(image.T), 1 << PATTERN)
            else:
                noise = source.gaussian(shape, dtype, seed=seed)
                counts += count(torch.bucketize(noise, borders(bits_of(dtype))), CELLS)
                sums += [float(noise.double().pow(power).sum()) for power in range(1, 5)]
                image = standardised(noise, dtype)
                ordinates.append(uniformity.periodogram(image).numpy())
            yield image, image

    shifts = uniformity.correlations(images())
    results: dict[str, dict[str, Any]] = {}
    if kind == "sign":
        results["mean"] = {"value": total / n, "p": uniformity.normal(total / math.sqrt(n))}
        for name, found in patterns.items():
            statistic, p = uniformity.chi_square(found)
            results[f"patterns of {name}"] = {"value": statistic, "degrees": found.size - 1, "p": p}
    else:
        sample = np.concatenate(ordinates)
        distance = uniformity.lattice_distance(counts)
        p = uniformity.kolmogorov_smirnov(distance, n, counts.size)
        results["distribution"] = {"value": distance, "p": p}
        results |= uniformity.moments_of(list(sums), n, law(bits_of(dtype)))
        distance, top = uniformity.exponential_distance(sample), float(sample.max())
        p = uniformity.kolmogorov_smirnov(distance, sample.size)
        results["spectrum"] = {"value": distance, "ordinates": sample.size, "p": p}
        results["spectral line"] = {"value": top, "p": uniformity.largest(math.exp(-top), sample.size)}
    for name, deviates in (("columns", shifts[0, list(LAGS)]), ("tokens", shifts[list(LAGS), 0])):
        statistic = float(deviates.square().sum())
        p = uniformity.sum_of_squares(statistic, len(LAGS))
        results[f"correlation of {name}"] = {"value": statistic, "degrees": len(LAGS), "p": p}
    results["correlation at any shift"] = largest_deviate(uniformity.half_plane(shifts, sizes.columns))
    return results


def pattern(signs: Tensor) -> Tensor:
    """The signs of each ``PATTERN`` neighbouring columns as one number, ``[T, D / PATTERN]``."""
    bits = (signs > 0).to(torch.int32).unflatten(1, (-1, PATTERN))
    return (bits << torch.arange(PATTERN, dtype=torch.int32)).sum(dim=-1, dtype=torch.int32)


def standardised(noise: Tensor, dtype: torch.dtype) -> Tensor:
    """Gaussian `noise` divided by the standard deviation of its law, float32."""
    return noise / float(np.sqrt(np.square(law(bits_of(dtype))).mean()))


def run_pair_tests(
    kind: str, source: Source, dtype: torch.dtype, sizes: Sizes, pairs: list[tuple[Identity, Identity]]
) -> dict[str, dict[str, Any]]:
    """The results of ``PAIR_TESTS`` for one relation."""
    shape, squares, shifts = (sizes.pair_tokens, sizes.pair_columns), 0.0, []

    def image(identity: Identity) -> Tensor:
        if kind == "sign":
            return source.sign(shape, dtype, **identity)
        return standardised(source.gaussian(shape, dtype, **identity), dtype)

    for first, second in pairs:
        shifts.append(uniformity.correlations([(image(first), image(second))]))
        squares += float(shifts[-1][0, 0]) ** 2
    p = uniformity.sum_of_squares(squares, len(pairs))
    return {
        "same place": {"value": squares, "degrees": len(pairs), "p": p},
        "any shift": largest_deviate(torch.stack(shifts)),
    }


def run_plan(source: Source, plan: dict[str, Any], sizes: Sizes) -> list[dict[str, Any]]:
    """Results of all tests of the plan, with Holm's adjusted p-values."""
    torch.manual_seed(plan["manual_seed"])
    results = []
    for kind, tests in plan["tests"].items():
        for name in plan["types"]:
            dtype = getattr(torch, name)
            found = run_step_tests(kind, source, dtype, sizes)
            for relation, pairs in related(sizes):
                for test, result in run_pair_tests(kind, source, dtype, sizes, pairs).items():
                    found[f"{relation}: {test}"] = result
            assert found.keys() == tests.keys(), "what ran is not what was planned"
            results += [{"kind": kind, "type": name, "test": f"{kind}, {test}", **found[test]} for test in tests]
    for result, adjusted in zip(results, uniformity.holm(result["p"] for result in results), strict=True):
        result |= {"adjusted_p": adjusted, "rejected": adjusted < LEVEL}
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--broken", action="store_true", help="test known-bad noise, on smaller samples")
    options = parser.parse_args()
    torch.set_num_threads(1)
    environment = records.environment()  # as the run begins
    sizes = SMALL if options.broken else SIZES
    plan = make_plan(sizes, SELF_CHECK_SEED if options.broken else SEED)
    digest = hashlib.sha256(json.dumps(plan).encode()).hexdigest()[:16]
    print(__doc__, json.dumps(plan, indent=1), f"plan {digest}\n", sep="\n", flush=True)
    if options.broken:
        missed = []
        for name in (*SHOWN_BY_BOTH, WITHOUT_TAIL):
            with known_bad(name) as source:
                results = run_plan(source, plan, sizes)
            rejected = report(name, results, everything=False)
            kinds = {result["kind"] for result in results if result["rejected"]}
            record = {"what": "kinds self-check", "broken": f"kinds: {name}", "plan": digest, "rejected": rejected}
            records.append("randomness", {**environment, **record, "results": results}, RESULTS)
            missed += [] if kinds >= ({"gaussian"} if name == WITHOUT_TAIL else set(TESTS)) else [name]
        print(f"must be rejected, and is not: {', '.join(missed)}" if missed else "all that must be rejected is")
        return 1 if missed else 0
    records.append("randomness", {**environment, "what": "kinds plan", "plan": digest, **plan}, RESULTS)
    results = run_plan(Source(), plan, sizes)
    rejected = report("sign and gaussian noise", results, everything=True)
    records.append("randomness", {**environment, "what": "kinds", "plan": digest, "results": results}, RESULTS)
    return 1 if rejected else 0


if __name__ == "__main__":
    sys.exit(main())
