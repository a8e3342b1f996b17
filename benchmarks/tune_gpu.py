"""Which tile is the fastest on this GPU? Tries sizes of tiles, numbers of warps and of registers of the Triton kernel.

    make tune-gpu          # or: python -m benchmarks.tune_gpu

Each is verified bit for bit, then all are timed in turns, with a cold L2; see gpu_timing.py. Prints the share of a copy's
bandwidth that each reaches, and appends to ``results/gpu_tuning.jsonl``. The constants are in triton_noise.py.
"""

import argparse
import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import records
from benchmarks.gpu import batches
from benchmarks.gpu_timing import Timer, copy_bandwidth, interleaved
from benchmarks.variants import PASSES, Shape
from neft_kernels import noisy_embedding
from neft_kernels.ops import triton_launch, triton_noise

BF16, FP32 = torch.bfloat16, torch.float32
SHAPES = (
    (Shape(32000, 4096, 16384, BF16), "uniform"),
    (Shape(32000, 4096, 16384, FP32), "uniform"),
    (Shape(32000, 4096, 16384, BF16), "zipf"),
    (Shape(151936, 2048, 16384, BF16), "uniform"),
    (Shape(32000, 4096, 1024, BF16), "uniform"),
)
TILES = (128, 256, 512, 1024, 2048)  # vectors of 16 bytes
WARPS = (1, 2, 4, 8)
VECTORS_OF_THREAD = range(1, 17)
REGISTERS = (None, 64, 80)  # the most that a thread may have; None: ptxas decides
CHECKED_TOKENS = 512  # the first ones, against the reference

Tile = tuple[int, int, int | None, bool]  # vectors, warps, registers, whether narrower tiles have one row


@contextlib.contextmanager
def launched_as(tile: Tile) -> Iterator[None]:
    """Within this context the kernel is compiled and launched for `tile`."""
    before, kept = [getattr(triton_noise, name) for name in _CONSTANTS], triton_launch._compiled
    for name, value in zip(_CONSTANTS, tile, strict=True):
        setattr(triton_noise, name, value)
    triton_launch._compiled = _compiled_for.setdefault(tile, {})
    triton_noise._tile.cache_clear()
    try:
        yield
    finally:
        for name, value in zip(_CONSTANTS, before, strict=True):
            setattr(triton_noise, name, value)
        triton_launch._compiled = kept
        triton_noise._tile.cache_clear()


_CONSTANTS = ("TILE_VECTORS", "NUM_WARPS", "MAX_REGISTERS", "ONE_TOKEN")
_compiled_for: dict[Tile, dict[tuple, Any]] = {}


def forward(tile: Tile, ids: Tensor, weight: Tensor, seed: Tensor) -> Tensor:
    with launched_as(tile):
        return noisy_embedding(ids, weight, 0.1, seed=seed, backend="triton")


def measure(shape: Shape, distribution: str, ceiling: float, rounds: int, timer: Timer) -> dict[str, Any]:
    """One record, and a table on the screen."""
    torch.manual_seed(0)
    weight = torch.randn(shape.num_embeddings, shape.embedding_dim, dtype=shape.dtype, device="cuda")
    ids, seed = batches(shape, distribution)[0], torch.tensor([3], device="cuda")
    head = ids[:, :CHECKED_TOKENS]
    expected = noisy_embedding(head, weight, 0.1, seed=seed, backend="reference")
    calls: dict[str, Callable[[], Any]] = {"F.embedding": lambda: torch.nn.functional.embedding(ids, weight)}
    programs = set()
    for tile in itertools.product(TILES, WARPS, REGISTERS, (True, False)):
        if tile[0] // (32 * tile[1]) not in VECTORS_OF_THREAD:
            continue
        with launched_as(tile):
            program = (tile[2], *triton_noise._tile(shape.embedding_dim, shape.dtype.itemsize))
        if program in programs:
            continue
        programs.add(program)
        call = functools.partial(forward, tile, ids, weight, seed)
        assert torch.equal(call()[:, :CHECKED_TOKENS], expected), f"{tile} differs from the reference"
        calls["{1} x {2} vectors, {3} warps, registers {0}".format(*program)] = call
    behind: list[str] = []
    times = interleaved(calls, rounds, timer, behind)
    floor = PASSES["ours"] * shape.elements * shape.dtype.itemsize / ceiling * 1e3
    print(f"\n{shape}, {distribution} ids: a copy of as many bytes takes {floor:.4f} ms")
    for name, (first, median, third) in sorted(times.items(), key=lambda item: item[1][1]):
        late = ", launched late" if name in behind else ""
        print(f"  {name:40} {median:.4f} ms ({first:.4f} to {third:.4f}), {floor / median:.1%} of the copy{late}")
    return {
        "shape": str(shape),
        "ids": distribution,
        "rounds": rounds,
        "copy_bytes_per_second": ceiling,
        "forward": times,
        "host_behind": behind,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="timings of each tile (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="folder of the records (default: benchmarks/results)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("the tuner needs a GPU, and torch finds none here", file=sys.stderr)
        return 1
    timer = Timer()
    ceiling = copy_bandwidth(timer)
    print(f"{torch.cuda.get_device_name()}: a copy moves {ceiling / 1e12:.2f} TB/s, read and written", flush=True)
    for shape, distribution in SHAPES:
        records.append("gpu_tuning", measure(shape, distribution, ceiling, options.rounds, timer), options.results)
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
