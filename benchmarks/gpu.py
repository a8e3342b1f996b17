"""GPU benchmark: forward, backward and both, peak memory, launch overhead and a CUDA graph's replay.

    make bench-gpu          # or: python benchmarks/gpu.py --quick

Everything is verified before it is timed. Variants are timed in turns, in random order, by device events, with the L2 cache
flushed before each timing; medians and quartiles go to ``results/gpu.jsonl`` with device, driver, versions and commit.
The ceiling is the bandwidth of a device-to-device copy, measured in the same run. Draw with ``make plots``.
"""

import argparse
import functools
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import records
import torch
from torch import Tensor, nn
from variants import PASSES, Shape, training_modules, verify

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
TABLES = ((32000, 4096), (128256, 4096), (151936, 2048))
TOKENS = (128, 1024, 4096, 16384, 65536)
CACHE_FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU so far
COPY_BYTES = 2 << 30


class Timer:
    """Milliseconds of single calls, by device events, with a cold L2."""

    def __init__(self) -> None:
        self.flush = torch.empty(CACHE_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def __call__(self, call: Callable[[], Any]) -> float:
        self.flush.zero_()
        # The host runs ahead while the device flushes, so that launches do not count as device time.
        begin, end = self.events
        begin.record()
        result = call()
        end.record()
        end.synchronize()
        del result
        return begin.elapsed_time(end)


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int, timer: Timer) -> dict[str, list[float]]:
    """First quartile, median and third quartile of each call in milliseconds."""
    order, names = random.Random(0), list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(rounds + 5):
        order.shuffle(names)
        for name in names:
            milliseconds = timer(calls[name])
            if round_number >= 5:
                samples[name].append(milliseconds)
    return {name: [round(value, 6) for value in statistics.quantiles(taken, n=4)] for name, taken in samples.items()}


def copy_bandwidth(timer: Timer) -> float:
    """Bytes per second of a device-to-device copy, bytes read and written counted: the ceiling."""
    source = torch.randint(256, (COPY_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    milliseconds = statistics.median(timer(lambda: target.copy_(source)) for _ in range(20))
    return 2 * COPY_BYTES / milliseconds * 1e3


def batches(shape: Shape, distribution: str) -> list[Tensor]:
    """Eight batches of ids: uniform, or Zipf-distributed as words are."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(8):
        if distribution == "uniform":
            ids = torch.randint(shape.num_embeddings, (1, shape.tokens), generator=generator)
        else:
            frequency = 1 / torch.arange(1, shape.num_embeddings + 1, dtype=torch.float64)
            ids = torch.multinomial(frequency, shape.tokens, replacement=True, generator=generator)[None]
        found.append(ids.cuda())
    return found


def in_turn(module: nn.Module, ids: list[Tensor]) -> Callable[[], Tensor]:
    """A call of `module` on the next batch."""
    turns: Iterator[int] = iter(range(1 << 60))
    return lambda: module(ids[next(turns) % len(ids)])


def calls_of(modules: dict[str, nn.Module], ids: list[Tensor], passes: str) -> dict[str, Callable[[], Any]]:
    """Forward, backward or both, of each module."""
    calls: dict[str, Callable[[], Any]] = {}
    for name, module in modules.items():
        forward, weights = in_turn(module, ids), list(module.parameters())
        out = module(ids[0])
        upstream = torch.randn_like(out)
        if passes == "forward":
            calls[name] = forward
        elif passes == "backward":  # the graph is kept, so that nothing else runs
            calls[name] = functools.partial(torch.autograd.grad, out, weights, upstream, retain_graph=True)
        else:
            calls[name] = functools.partial(forward_and_backward, forward, weights, upstream)
    return calls


def forward_and_backward(forward: Callable[[], Tensor], weights: list[nn.Parameter], upstream: Tensor) -> Any:
    return torch.autograd.grad(forward(), weights, upstream)


def peak_above_output(call: Callable[[], Tensor]) -> int:
    """Bytes that a call allocates beyond its output."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()


def host_microseconds(call: Callable[[], Any], repeats: int = 200) -> float:
    """What a call costs the host: a queue of calls, timed before the device has finished them."""
    call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    elapsed = time.perf_counter() - begin
    torch.cuda.synchronize()
    return elapsed / repeats * 1e6


def replay(module: nn.Module, ids: Tensor, timer: Timer) -> dict[str, Any]:
    """Milliseconds of a captured graph's replay; it must draw fresh noise each time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            module(ids)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module(ids)
    graph.replay()
    first = out.detach().clone()
    graph.replay()
    fresh = not torch.equal(first, out.detach())
    assert fresh, "a replay drew the same noise again"
    return {"milliseconds": statistics.median(timer(graph.replay) for _ in range(50)), "fresh_noise": fresh}


def measure(shape: Shape, distribution: str, ceiling: float, rounds: int, timer: Timer) -> dict[str, Any]:
    """One record, and one line on the screen."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape.num_embeddings, shape.embedding_dim, generator=generator).to(shape.dtype).cuda()
    ids = batches(shape, distribution)
    modules = training_modules(weight)
    verify(modules, ids[0], weight)
    forward = calls_of(modules, ids, "forward")
    mask = torch.ones_like(ids[0]).index_fill_(1, torch.arange(shape.tokens * 3 // 4, shape.tokens, device="cuda"), 0)
    forward["ours, padded batch"] = functools.partial(modules["ours"], ids[0], attention_mask=mask)
    record: dict[str, Any] = {"shape": str(shape), "ids": distribution, "copy_bytes_per_second": ceiling}
    record["forward"] = interleaved(forward, rounds, timer)
    record["backward"] = interleaved(calls_of(modules, ids, "backward"), rounds, timer)
    record["both"] = interleaved(calls_of(modules, ids, "both"), rounds, timer)
    record["peak_bytes_above_output"] = {name: peak_above_output(call) for name, call in forward.items()}
    record["host_microseconds"] = {name: host_microseconds(call) for name, call in forward.items()}
    record["graph_replay"] = replay(modules["ours"], ids[0], timer)

    median = {name: values[1] for name, values in record["forward"].items()}
    floor = PASSES["ours"] * shape.elements * shape.dtype.itemsize / ceiling * 1e3
    print(
        f"{shape!s:42} {distribution:8} ours {median['ours']:.4f} ms = {floor / median['ours']:5.1%} of the copy, "
        f"{median['ours'] / median['plain']:.2f} x plain; hook {median['hook'] / median['ours']:.1f} x, compiled hook "
        f"{median['hook, compiled'] / median['ours']:.1f} x ours; host {record['host_microseconds']['ours']:.0f} us "
        f"(plain {record['host_microseconds']['plain']:.0f}); peak +{record['peak_bytes_above_output']['ours']} B",
        flush=True,
    )
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one table, bf16 and fp32, uniform ids")
    parser.add_argument("--rounds", type=int, default=50, help="timings of each variant (default: %(default)s)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a GPU, and torch finds none here", file=sys.stderr)
        return 1

    timer = Timer()
    ceiling = copy_bandwidth(timer)
    print(f"{torch.cuda.get_device_name()}: a copy moves {ceiling / 1e12:.2f} TB/s, read and written", flush=True)
    for num_embeddings, embedding_dim in TABLES[:1] if options.quick else TABLES:
        for dtype in (BF16, FP32) if options.quick else (BF16, FP16, FP32):
            for tokens in TOKENS:
                for distribution in ("uniform",) if options.quick else ("uniform", "zipf"):
                    shape = Shape(num_embeddings, embedding_dim, tokens, dtype)
                    records.append("gpu", measure(shape, distribution, ceiling, options.rounds, timer))
                    torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
