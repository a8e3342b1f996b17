"""Interleaved timing: every round runs every variant once, so that a noisy machine is equally noisy to all of them."""

import ctypes
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
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


def peak_above_output(call: Callable[[], Any]) -> int | None:
    """Bytes of memory that a call occupies at its peak beyond its output, by the kernel's own count; None where it keeps none.

    In whole pages, and with whatever else the process does meanwhile: a figure for outputs of many megabytes.
    """
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists() or platform.libc_ver()[0] != "glibc":
        return None

    def kilobytes(field: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))

    size = call().nbytes
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator kept of it would not show again
    reset.write_text("5")  # the peak is counted from here
    before = kilobytes("VmRSS:")
    result = call()
    peak = kilobytes("VmHWM:")
    del result
    return max(0, (peak - before) * 1024 - size)


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
