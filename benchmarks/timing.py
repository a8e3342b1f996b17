"""Interleaved timing: every round runs every variant once, so that a noisy machine is equally noisy to all of them."""

import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Samples:
    """Wall-clock seconds of one variant, one per round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """The first and the third quartile."""
        first, _, third = statistics.quantiles(self.seconds, n=4)
        return first, third


def interleaved(
    calls: dict[str, Callable[[], Any]], seconds: float = 4.0, most_rounds: int = 2000
) -> dict[str, Samples]:
    """Times `calls` in turns for about `seconds` altogether, at least 15 rounds, after three rounds that do not count.

    The order is drawn anew for each round, so that no variant always finds the cache as the same other one left it.
    """
    names = list(calls)
    order = random.Random(0)
    found: dict[str, list[float]] = {name: [] for name in names}
    begin = None
    for round_number in range(most_rounds + 3):
        if round_number == 3:
            found = {name: [] for name in names}
            begin = time.perf_counter()
        order.shuffle(names)
        for name in names:
            call = calls[name]
            before = time.perf_counter()
            result = call()
            found[name].append(time.perf_counter() - before)
            del result  # the output is freed outside the timed region, for all variants alike
        if begin is not None and len(found[names[0]]) >= 15 and time.perf_counter() - begin > seconds:
            break
    return {name: Samples(tuple(samples)) for name, samples in found.items()}


class Replay:
    """A timer for pytest-benchmark that tells samples taken before: even calls begin a round, odd ones end it.

    pytest-benchmark runs one variant after the other; so the samples are taken interleaved, and it keeps the statistics,
    the groups and the table.
    """

    def __init__(self) -> None:
        self.seconds: Iterator[float] = iter(())
        self.running = False

    def load(self, samples: Samples) -> None:
        self.seconds, self.running = iter(samples.seconds), False

    def __call__(self) -> float:
        self.running = not self.running
        return 0.0 if self.running else next(self.seconds)
