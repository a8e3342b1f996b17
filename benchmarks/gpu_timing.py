"""Measurements on a GPU: device time with a cold L2, a copy's bandwidth, memory, the host's time, a CUDA graph's replay."""

import functools
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

CACHE_FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU so far
FLUSHES = 8  # before each timing: most of a millisecond, in which the host queues what is timed
COPY_BYTES = 2 << 30
WARM_UP_ROUNDS = 5
HOST_QUEUES, HOST_CALLS = 5, 20  # few enough calls that no queue of launches fills up
REPLAYS = 50


class Timer:
    """Milliseconds of single calls, by device events, with a cold L2."""

    def __init__(self) -> None:
        self.flush = torch.empty(CACHE_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        #: Whether the device was idle before the last call was queued, so that the time is the host's as well.
        self.host_was_behind = False

    def __call__(self, call: Callable[[], Any]) -> float:
        # The host runs ahead while the device flushes, so that launches do not count as device time.
        for _ in range(FLUSHES):
            self.flush.zero_()
        begin, end = self.events
        begin.record()
        result = call()
        end.record()
        self.host_was_behind = begin.query()
        end.synchronize()
        del result
        return begin.elapsed_time(end)


def interleaved(
    calls: dict[str, Callable[[], Any]], rounds: int, timer: Timer, behind: list[str]
) -> dict[str, list[float]]:
    """First quartile, median and third quartile of each call in milliseconds.

    Names of calls that the host did not queue in time, more often than not, are added to `behind`.
    """
    order, names = random.Random(0), list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    late = dict.fromkeys(names, 0)
    for round_number in range(rounds + WARM_UP_ROUNDS):
        order.shuffle(names)
        for name in names:
            milliseconds = timer(calls[name])
            if round_number >= WARM_UP_ROUNDS:
                samples[name].append(milliseconds)
                late[name] += timer.host_was_behind
    behind += [name for name, times in late.items() if times > rounds / 2]
    quartiles = functools.partial(statistics.quantiles, n=4, method="inclusive")
    return {name: [round(value, 6) for value in quartiles(taken)] for name, taken in samples.items()}


def copy_bandwidth(timer: Timer) -> float:
    """Bytes per second of a device-to-device copy, bytes read and written counted: the ceiling."""
    source = torch.randint(256, (COPY_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    milliseconds = statistics.median(timer(lambda: target.copy_(source)) for _ in range(20))
    return 2 * COPY_BYTES / milliseconds * 1e3


def peak_above_output(call: Callable[[], Tensor]) -> int:
    """Bytes that a call asks the allocator for at its peak, beyond its output.

    The least of two calls: a noisy embedding measures the strength of its noise in a few calls.
    """
    call()
    found = []
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        out = call()
        torch.cuda.synchronize()
        size = out.numel() * out.element_size()
        found.append(torch.cuda.memory_stats()["requested_bytes.all.peak"] - before - size)
        del out
    return min(found)


def host_microseconds(call: Callable[[], Any]) -> float:
    """What a call costs the host: queues of calls, timed before the device has finished them; their median."""
    found = []
    for _ in range(HOST_QUEUES):
        call()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(HOST_CALLS):
            call()
        found.append((time.perf_counter() - begin) / HOST_CALLS * 1e6)
        torch.cuda.synchronize()
    return statistics.median(found)


def capture(module: nn.Module, ids: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of one call, and the output that its replays write."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            module(ids)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module(ids)
    return graph, out


def replay(module: nn.Module, ids: Tensor, timer: Timer) -> dict[str, Any]:
    """Milliseconds of a captured graph's replay; it must draw fresh noise each time."""
    graph, out = capture(module, ids)
    graph.replay()
    first = out.detach().clone()
    graph.replay()
    fresh = not torch.equal(first, out.detach())
    assert fresh, "a replay drew the same noise again"
    return {"milliseconds": statistics.median(timer(graph.replay) for _ in range(REPLAYS)), "fresh_noise": fresh}
