"""GPU benchmark: forward, backward and both, peak memory, launch overhead and a CUDA graph's replay.

    make bench-gpu          # or: python -m benchmarks.gpu --quick

Everything is verified before it is timed. Variants are timed in turns, in random order, by device events, with the L2 cache
flushed before each timing; medians and quartiles go to ``results/gpu.jsonl`` with device, driver, versions and commit.
The ceiling is the bandwidth of a device-to-device copy, measured in the same run. Draw with ``make plots``.

The most telling comparisons come first, each is recorded as soon as it is done, and those that are recorded for the same
commit and device are not repeated: a run that was broken off, or ended by ``--minutes``, is continued by another. A
variant that fails is left out and its error recorded.
"""

import argparse
import functools
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from benchmarks import records
from benchmarks.gpu_timing import Timer, copy_bandwidth, host_microseconds, interleaved, peak_above_output, replay
from benchmarks.variants import PASSES, Shape, builders, verify

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
TABLES = ((32000, 4096), (128256, 4096), (151936, 2048))
TOKENS = (16384, 128, 65536, 1024, 4096)
KINDS = ((BF16, "uniform"), (FP32, "uniform"), (BF16, "zipf"), (FP16, "uniform"), (FP32, "zipf"), (FP16, "zipf"))
REQUIRED = ("plain", "ours", "forward")  # without which there is no record

T = TypeVar("T")


def batches(shape: Shape, distribution: str) -> list[Tensor]:  # of [1, tokens]
    """Eight batches of ids: uniform, or Zipf-distributed as words are."""
    if distribution == "uniform":
        return [torch.randint(shape.num_embeddings, (1, shape.tokens), device="cuda") for _ in range(8)]
    frequency = 1 / torch.arange(1, shape.num_embeddings + 1, dtype=torch.float64, device="cuda")
    return [torch.multinomial(frequency, shape.tokens, replacement=True)[None] for _ in range(8)]


def those_that_run(attempts: Mapping[str, Callable[[], T]], errors: dict[str, str]) -> dict[str, T]:
    """What each attempt returns; the errors of the others go to `errors`, so that one does not cost the rest."""
    found: dict[str, T] = {}
    for name, attempt in attempts.items():
        try:
            found[name] = attempt()
        except Exception as error:
            if name in REQUIRED:
                raise
            errors[name] = f"{type(error).__name__}: {error}"[:1000]
            print(f"left out: {name}: {errors[name]}", file=sys.stderr, flush=True)
    return found


def verified(name: str, build: Callable[[], nn.Module], ids: Tensor, weight: Tensor) -> nn.Module:
    module = build()
    verify({name: module}, ids, weight)
    return module


def in_turn(module: nn.Module, ids: list[Tensor]) -> Callable[[], Tensor]:
    """A call of `module` on the next batch."""
    turns: Iterator[int] = iter(range(1 << 60))
    return lambda: module(ids[next(turns) % len(ids)])


def call_of(module: nn.Module, ids: list[Tensor], upstream: Tensor, passes: str) -> Callable[[], Any]:
    """Forward, backward or both of `module`, which have run once."""
    forward, weights = in_turn(module, ids), list(module.parameters())
    call: Callable[[], Any] = forward
    if passes == "backward":  # the graph is kept, so that nothing else runs
        call = functools.partial(torch.autograd.grad, forward(), weights, upstream, retain_graph=True)
    elif passes == "both":
        call = functools.partial(forward_and_backward, forward, weights, upstream)
    call()
    return call


def forward_and_backward(forward: Callable[[], Tensor], weights: list[nn.Parameter], upstream: Tensor) -> Any:
    return torch.autograd.grad(forward(), weights, upstream)


def measure(shape: Shape, distribution: str, ceiling: float, rounds: int, timer: Timer) -> dict[str, Any]:
    """One record, and one line on the screen."""
    torch.manual_seed(0)
    weight = torch.randn(shape.num_embeddings, shape.embedding_dim, dtype=shape.dtype, device="cuda")
    upstream = torch.randn(1, shape.tokens, shape.embedding_dim, dtype=shape.dtype, device="cuda")
    ids = batches(shape, distribution)
    errors: dict[str, str] = {}
    modules = those_that_run(
        {name: functools.partial(verified, name, build, ids[0], weight) for name, build in builders(weight).items()},
        errors,
    )
    mask = torch.ones_like(ids[0])
    mask[:, shape.tokens * 3 // 4 :] = 0
    padded = {"ours, padded batch": functools.partial(modules["ours"], ids[0], attention_mask=mask)}
    behind: dict[str, list[str]] = {passes: [] for passes in ("forward", "backward", "both")}

    def calls(passes: str) -> dict[str, Callable[[], Any]]:
        attempts = {name: functools.partial(call_of, module, ids, upstream, passes) for name, module in modules.items()}
        return {**those_that_run(attempts, errors), **(padded if passes == "forward" else {})}

    forward = calls("forward")
    steps: dict[str, Callable[[], Any]] = {
        passes: functools.partial(lambda passes: interleaved(calls(passes), rounds, timer, behind[passes]), passes)
        for passes in behind
    }
    steps["peak_bytes_above_output"] = lambda: {name: peak_above_output(call) for name, call in forward.items()}
    steps["host_microseconds"] = lambda: {name: host_microseconds(call) for name, call in forward.items()}
    steps["graph_replay"] = lambda: replay(modules["ours"], ids[0], timer)
    record = {"shape": str(shape), "ids": distribution, "rounds": rounds, "copy_bytes_per_second": ceiling}
    record |= those_that_run(steps, errors)
    record |= {"host_behind": behind, "errors": errors}
    print(line(shape, record), flush=True)
    return record


def line(shape: Shape, record: dict[str, Any]) -> str:
    median = {name: values[1] for name, values in record["forward"].items()}
    floor = PASSES["ours"] * shape.elements * shape.dtype.itemsize / record["copy_bytes_per_second"] * 1e3
    parts = [f"{shape!s:42} {record['ids']:8} ours {median['ours']:.4f} ms = {floor / median['ours']:5.1%} of the copy"]
    parts += [f"{name} / ours {time / median['ours']:.2f}" for name, time in median.items() if name != "ours"]
    for title, unit in (("host_microseconds", "us of the host"), ("peak_bytes_above_output", "bytes above the output")):
        if title in record:
            parts.append(f"{record[title]['ours']:.0f} {unit} (plain {record[title]['plain']:.0f})")
    return ", ".join(parts)


def comparisons(quick: bool) -> list[tuple[Shape, str]]:
    """What is compared, the most telling first: one table in bf16 and fp32, and the most tokens with the others."""
    everything = [
        (Shape(*table, tokens, dtype), distribution)
        for dtype, distribution in KINDS
        for table in TABLES
        for tokens in TOKENS
    ]
    first = [
        (shape, distribution)
        for shape, distribution in everything
        if distribution == "uniform"
        and (
            ((shape.num_embeddings, shape.embedding_dim) == TABLES[0] and shape.dtype in (BF16, FP32))
            or (shape.tokens == max(TOKENS) and shape.dtype == BF16)
        )
    ]
    return first if quick else first + [each for each in everything if each not in first]


def recorded(folder: Path, commit: str) -> set[tuple[str, str]]:
    """What has been compared at this commit on this device; nothing where the commit does not say what was measured."""
    if commit == "unknown" or commit.endswith("+changes"):
        return set()
    device = torch.cuda.get_device_name()
    return {
        (record["shape"], record["ids"])
        for place in {folder, records.RESULTS}
        for record in records.load("gpu", place)
        if record["commit"] == commit and record["device"] == device and "forward" in record
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first comparisons only: a few minutes")
    parser.add_argument("--rounds", type=int, default=50, help="timings of each variant (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no comparison after so many")
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="where to write (default: %(default)s)")
    parser.add_argument("--commit", help="what the records name where this is no git checkout")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error("there are no quartiles of fewer than 2 rounds")
    begin = time.monotonic()
    if not torch.cuda.is_available():
        print("the benchmark needs a GPU, and torch finds none here", file=sys.stderr)
        return 1

    commit = options.commit or records.commit()
    done = recorded(options.results, commit)
    left = [(shape, ids) for shape, ids in comparisons(options.quick) if (str(shape), ids) not in done]
    timer = Timer()
    ceiling = copy_bandwidth(timer)
    print(f"{torch.cuda.get_device_name()}: a copy moves {ceiling / 1e12:.2f} TB/s, read and written", flush=True)
    print({**records.environment(), "commit": commit})
    print(f"{len(left)} comparisons, {len(done)} are recorded already", flush=True)
    failed = 0
    for number, (shape, distribution) in enumerate(left):
        if time.monotonic() - begin > options.minutes * 60:
            print(f"{len(left) - number} comparisons are left; the same command goes on with them")
            break
        try:
            record = measure(shape, distribution, ceiling, options.rounds, timer)
        except Exception as error:
            traceback.print_exc()
            record = {"shape": str(shape), "ids": distribution, "errors": {"comparison": f"{error!r}"[:1000]}}
        failed += bool(record["errors"])
        records.append("gpu", {"commit": commit, **record}, options.results)
        torch.cuda.synchronize()  # an error that the device does not recover from ends the run here
        torch.cuda.empty_cache()
    if failed:
        print(f"{failed} comparisons have errors; see above", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
