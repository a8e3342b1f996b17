"""Where the threads of a launch are: their blocks, warps and lanes."""

from collections.abc import Iterable

import numpy as np

from .arithmetic import Unsupported
from .memory import Threads

WARP = 32


class Grid:
    """All threads of a launch, block by block. `blocks` picks blocks of the grid, by number; None: all."""

    def __init__(
        self, grid: tuple[int, int, int], threads: tuple[int, int, int], blocks: Iterable[int] | None = None
    ) -> None:
        if any(size < 1 for size in grid) or grid[0] >= 1 << 31 or max(grid[1:]) > 65535:
            raise ValueError(f"a grid of {grid} is none that a GPU launches")
        per_block = threads[0] * threads[1] * threads[2]
        if not 0 < per_block <= 1024:
            raise ValueError(f"a block of {threads} threads is none that a GPU launches")
        numbers = np.arange(grid[0] * grid[1] * grid[2]) if blocks is None else np.fromiter(blocks, np.int64)
        self.num_blocks = len(numbers)
        self.count = self.num_blocks * per_block
        self.block = np.repeat(np.arange(self.num_blocks, dtype=np.int32), per_block)  # of each thread
        self.warp_of = (
            np.arange(self.count) // per_block * -(-per_block // WARP) + np.arange(self.count) % per_block // WARP
        )
        self.lane = np.arange(self.count) % per_block % WARP
        in_block = np.tile(np.arange(per_block), self.num_blocks)
        block_number = np.repeat(numbers, per_block)
        self.special = {"%laneid": self.lane, "%warpid": in_block // WARP}
        for axis, name in enumerate("xyz"):
            below = int(np.prod(threads[:axis])), int(np.prod(grid[:axis], dtype=np.int64))
            self.special[f"%tid.{name}"] = in_block // below[0] % threads[axis]
            self.special[f"%ctaid.{name}"] = block_number // below[1] % grid[axis]
            self.special[f"%ntid.{name}"] = np.full(1, threads[axis])
            self.special[f"%nctaid.{name}"] = np.full(1, grid[axis])
        self.barriers = np.zeros(self.num_blocks, np.int32)  # that a block has passed

    def who(self, threads: np.ndarray) -> Threads:
        """`threads` for the memory that they access."""
        return Threads(threads + 1, self.block[threads] + 1, self.barriers[self.block[threads]])

    def num_warps(self, threads: np.ndarray) -> int:
        """How many warps `threads`, in order, belong to."""
        warps = self.warp_of[threads]
        return 1 + int(np.count_nonzero(warps[1:] != warps[:-1]))


def check_whole_warps(grid: Grid, threads: np.ndarray) -> None:
    """`threads` are whole warps: others would be waited for, or left out, in ways that are not emulated."""
    if len(threads) % WARP:
        raise Unsupported("an exchange within a part of a warp")
    if (np.unique(grid.warp_of[threads], return_counts=True)[1] != WARP).any():
        raise Unsupported("an exchange that a warp meets in parts")
