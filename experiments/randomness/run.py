"""Is the noise random? Hypothesis tests on what the package's op returns, planned before they are run, with records.

    make randomness             # this program, its self-check, and rounding.py
    make randomness BATTERY=1   # dieharder on the raw words besides, half an hour; see battery.py

The plan is in ``plan.py``. The program prints it, records it, and then keeps to it: what is tested, on samples of
which size, and what counts as a rejection.

``--break NAME`` runs the same tests on known-bad noise, with smaller samples and ``torch.manual_seed(1)``. They must reject
it, else the exit status is 1.
"""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import records
from experiments.randomness import battery, uniformity
from experiments.randomness import plan as the_plan
from experiments.randomness.plan import FULL, LAGS, LEVEL, SMALL, Identity, Sizes, make_plan, related
from experiments.randomness.sources import BEYOND_STATISTICS, BROKEN, Source, bits_of, broken

RESULTS = Path(__file__).parent / "results"
ORDINATE_BINS = np.arange(0, 40.5, 0.5)


def count(cells: Tensor, number: int) -> np.ndarray:
    """How many of `cells` are each of 0 to `number` - 1."""
    return np.bincount(cells.numpy().reshape(-1), minlength=number)


def byte_pairs(first: Tensor, second: Tensor, bits: int) -> np.ndarray:
    """Counts of the pairs of the upper 8 bits."""
    return count((first >> (bits - 8)) << 8 | (second >> (bits - 8)), 1 << 16)


def run_step_tests(source: Source, dtype: torch.dtype, sizes: Sizes) -> dict[str, dict[str, Any]]:
    """The results of ``TESTS``."""
    bits, shape = bits_of(dtype), (sizes.tokens, sizes.columns)
    counts, columns, tokens = (np.zeros(size, np.int64) for size in (1 << bits, 1 << 16, 1 << 16))
    ordinates = []

    def images() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal counts, columns, tokens
        for seed in battery.draw_seeds(sizes.steps):
            levels = source.levels(shape, dtype, seed)
            counts += count(levels, 1 << bits)
            columns += byte_pairs(levels[:, ::2], levels[:, 1::2], bits)
            tokens += byte_pairs(levels[::2], levels[1::2], bits)
            ordinates.append(uniformity.periodogram(uniformity.normal_scores(levels, bits)).numpy())
            image = uniformity.standardised(levels, bits)
            yield image, image

    shifts = uniformity.correlations(images())
    n, sample = sizes.elements, np.concatenate(ordinates)
    results: dict[str, dict[str, Any]] = {}

    distance = uniformity.lattice_distance(counts)
    p = uniformity.kolmogorov_smirnov(distance, n, counts.size)
    results["distribution"] = {"value": distance, "p": p}
    for name, cells in (
        ("all values", counts),
        ("256 cells", counts.reshape(256, -1).sum(axis=1)),
        ("neighbouring columns", columns),
        ("neighbouring tokens", tokens),
    ):
        statistic, p = uniformity.chi_square(cells)
        results[name] = {"value": statistic, "degrees": cells.size - 1, "p": p}
    results |= uniformity.moments(counts)

    for name, deviates in (("columns", shifts[0, list(LAGS)]), ("tokens", shifts[list(LAGS), 0])):
        statistic = float(deviates.square().sum())
        p = uniformity.sum_of_squares(statistic, len(LAGS))
        by_lag = [round(float(z) / math.sqrt(n), 8) for z in deviates]
        results[f"correlation of {name}"] = {"value": statistic, "degrees": len(LAGS), "by_lag": by_lag, "p": p}
    results["correlation at any shift"] = largest_deviate(uniformity.half_plane(shifts, sizes.columns))

    distance, top = uniformity.exponential_distance(sample), float(sample.max())
    histogram = np.histogram(sample, ORDINATE_BINS)[0].tolist()
    p = uniformity.kolmogorov_smirnov(distance, sample.size)
    results["spectrum"] = {"value": distance, "ordinates": sample.size, "histogram": histogram, "p": p}
    results["spectral line"] = {"value": top, "p": uniformity.largest(math.exp(-top), sample.size)}
    return results


def largest_deviate(deviates: Tensor) -> dict[str, Any]:
    """The result of the test of the largest of independent normal deviates."""
    z, number = float(deviates.abs().max()), deviates.numel()
    return {"value": z, "shifts": number, "p": uniformity.largest(uniformity.normal(z), number)}


def run_pair_tests(
    source: Source, dtype: torch.dtype, sizes: Sizes, pairs: list[tuple[Identity, Identity]]
) -> dict[str, dict[str, Any]]:
    """The results of ``PAIR_TESTS`` for one relation."""
    bits, shape = bits_of(dtype), (sizes.pair_tokens, sizes.pair_columns)
    differing, squares, shifts = np.zeros(1 << 16, np.int64), 0.0, []
    for pair in pairs:
        first, second = (source.levels(shape, dtype, **identity) for identity in pair)
        differing += count((first ^ second) >> (bits - 16), 1 << 16)
        images = uniformity.standardised(first, bits), uniformity.standardised(second, bits)
        shifts.append(uniformity.correlations([images]))
        squares += float(shifts[-1][0, 0]) ** 2
    statistic, p = uniformity.chi_square(differing)
    return {
        "same place": {
            "value": squares,
            "degrees": len(pairs),
            "p": uniformity.sum_of_squares(squares, len(pairs)),
        },
        "any shift": largest_deviate(torch.stack(shifts)),
        "differing bits": {"value": statistic, "degrees": differing.size - 1, "p": p},
    }


def run_plan(source: Source, plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Results of all tests of the plan, with Holm's adjusted p-values."""
    sizes, results = Sizes(**plan["sizes"]), []
    torch.manual_seed(plan["manual_seed"])
    for name in plan["types"]:
        dtype = getattr(torch, name)
        found = run_step_tests(source, dtype, sizes)
        for relation, pairs in related(sizes):
            for test, result in run_pair_tests(source, dtype, sizes, pairs).items():
                found[f"{relation}: {test}"] = result
        assert found.keys() == plan["tests"].keys(), "what ran is not what was planned"
        results += [{"type": name, "test": test, **found[test]} for test in plan["tests"]]
    for result, adjusted in zip(results, uniformity.holm(result["p"] for result in results), strict=True):
        result |= {"adjusted_p": adjusted, "rejected": adjusted < LEVEL}
    return results


def report(title: str, results: list[dict[str, Any]], everything: bool) -> list[str]:
    """Prints the results, and returns the tests that rejected."""
    for result in results if everything else ():
        verdict = "REJECTED" if result["rejected"] else ""
        line = f"{result['type']:9} {result['test']:32} {result['value']:>16.8g}  p {result['p']:.4g}"
        print(f"{line}  {verdict}".rstrip())
    rejected = [f"{result['type']} {result['test']}" for result in results if result["rejected"]]
    print(f"{title}: {len(rejected)} of {len(results)} tests reject; smallest p {min(r['p'] for r in results):.3g}")
    return rejected


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="smaller samples; nothing is recorded")
    parser.add_argument(
        "--break", choices=(*BROKEN, "all"), dest="broken", help="test known-bad noise, on smaller samples"
    )
    parser.add_argument("--battery", action="store_true", help="run dieharder on the raw words, and nothing else")
    options = parser.parse_args()
    torch.set_num_threads(1)
    environment = records.environment()  # as the run begins
    if options.battery:
        print(battery.__doc__)
        records.append("randomness", {**environment, **battery.run()}, RESULTS)
        return 0

    plan = make_plan(SMALL, seed=1) if options.small or options.broken else make_plan(FULL, seed=0)
    text = json.dumps(plan)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    print(the_plan.__doc__, json.dumps(plan, indent=1), f"plan {digest}\n", sep="\n", flush=True)
    if options.broken:
        missed = []
        for name in BROKEN if options.broken == "all" else (options.broken,):
            with broken(name) as source:
                results = run_plan(source, plan)
            rejected = report(name, results, everything=options.broken != "all")
            record = {"what": "self-check", "broken": name, "about": BROKEN[name].__doc__, "plan": digest}
            records.append("randomness", {**environment, **record, "rejected": rejected, "results": results}, RESULTS)
            missed += [] if rejected or name in BEYOND_STATISTICS else [name]
        print(f"must be rejected, and is not: {', '.join(missed)}" if missed else "all that must be rejected is")
        return 1 if missed else 0

    if not options.small:
        records.append("randomness", {**environment, "what": "plan", "plan": digest, **plan}, RESULTS)
    results = run_plan(Source(), plan)
    rejected = report("the noise of the package", results, everything=True)
    if not options.small:
        records.append("randomness", {**environment, "what": "tests", "plan": digest, "results": results}, RESULTS)
    return 1 if rejected else 0


if __name__ == "__main__":
    sys.exit(main())
