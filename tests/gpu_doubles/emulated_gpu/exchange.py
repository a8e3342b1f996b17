"""What the threads of a warp exchange."""

import numpy as np

from .arithmetic import Unsupported
from .ptx import Instruction, Operand
from .registers import Registers
from .threads import WARP, Grid, check_whole_warps


def check_mask(registers: Registers, mask: Operand, threads: np.ndarray) -> None:
    if (registers.value(mask, "u32", threads) != 0xFFFFFFFF).any():
        raise Unsupported("an exchange within a part of a warp")


def shuffle(grid: Grid, registers: Registers, instruction: Instruction, threads: np.ndarray) -> None:
    _, mode, _ = instruction.modifiers
    result, value, distance, clamp, mask = instruction.operands
    check_mask(registers, mask, threads)
    check_whole_warps(grid, threads)
    result, is_from_inside = result if isinstance(result, tuple) else (result, None)
    values = registers.spread(value, "b32", threads)
    lane, by = grid.lane[threads], registers.value(distance, "u32", threads).astype(np.int64) & 31
    bound = registers.value(clamp, "u32", threads).astype(np.int64)
    segment, limit = bound >> 8 & 31, bound & 31
    highest = lane & segment | limit & ~segment & 31
    if mode == "up":
        source = lane - by
        inside = source >= highest
    elif mode in ("bfly", "down"):
        source = lane ^ by if mode == "bfly" else lane + by
        inside = source <= highest
    else:
        source = lane & segment | by & ~segment & 31
        inside = source <= highest
    source = np.where(inside, source, lane)
    registers.set(result, values[np.arange(len(threads)) - lane + source], threads)
    if is_from_inside is not None:
        registers.set(is_from_inside, inside, threads)


def reduce(grid: Grid, registers: Registers, instruction: Instruction, threads: np.ndarray) -> None:
    _, operation, kind = instruction.modifiers
    result, value, mask = instruction.operands
    check_mask(registers, mask, threads)
    check_whole_warps(grid, threads)
    reduce = {"add": np.add, "max": np.maximum, "min": np.minimum}.get(operation)
    if reduce is None:
        raise Unsupported(f"the reduction {operation}")
    values = registers.spread(value, kind, threads).reshape(-1, WARP)
    reduced = reduce.reduce(values, axis=1, dtype=values.dtype)
    registers.set(result, np.repeat(reduced, WARP), threads)
