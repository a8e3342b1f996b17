"""Launches: all threads of a grid run together, those that are furthest behind first, so that branches meet again."""

from collections.abc import Iterable

import numpy as np

from .accesses import Accesses, Traffic
from .arithmetic import Unsupported, compute, operand_types
from .exchange import reduce, shuffle
from .memory import Memory, MemoryFault
from .ptx import Immediate, Instruction, Kernel, Symbol
from .registers import Registers
from .threads import Grid

RUNNING, WAITING, EXITED = range(3)
_BRANCHES = ("bra", "ret", "exit", "bar")


class Launch:
    """One launch of `kernel`. `blocks` picks blocks of the grid, by number, where the grid is too large to run whole."""

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        threads: tuple[int, int, int],
        parameters: bytes,
        memories: dict[int, Memory],  # by address
        shared_bytes: int = 0,
        blocks: Iterable[int] | None = None,
    ) -> None:
        if len(parameters) < kernel.parameter_bytes:
            raise ValueError(f"{len(parameters)} bytes of parameters, but {kernel.name} has {kernel.parameter_bytes}")
        self.kernel = kernel
        self.grid = Grid(grid, threads, blocks)
        self.registers = Registers(kernel, self.grid.count, self.grid.special)
        shared_bytes = max(shared_bytes, kernel.shared_bytes)
        self.accesses = Accesses(kernel, self.grid, self.registers, parameters, memories, shared_bytes)
        self.state = np.full(self.grid.count, RUNNING)
        self.at = np.zeros(self.grid.count, np.int64)  # the next instruction
        self.targets = {  # of branches
            kernel.labels[operand.name]
            for each in kernel.instructions
            if each.opcode == "bra"
            for operand in each.operands
            if isinstance(operand, Symbol)
        }

    def run(self) -> Traffic:
        with np.errstate(all="ignore"):
            return self._run()

    def _run(self) -> Traffic:
        while True:
            running = self.state == RUNNING
            if not running.any():
                if not (self.state == WAITING).any():
                    return self.accesses.traffic
                self._pass_barriers()
                continue
            first = int(self.at[running].min())
            self._run_until_branch(first, np.flatnonzero(running & (self.at == first)))

    def _pass_barriers(self) -> None:
        """Everybody waits or has left."""
        waiting = np.unique(self.grid.block[self.state == WAITING])
        self.grid.barriers[waiting] += 1
        self.state[self.state == WAITING] = RUNNING

    def _run_until_branch(self, index: int, active: np.ndarray) -> None:
        """Runs the `active` threads from instruction `index` to where others may join or leave them."""
        instructions = self.kernel.instructions
        all_warps = self.grid.num_warps(active)
        while True:
            if index == len(instructions):
                self.state[active] = EXITED
                return
            instruction = instructions[index]
            index += 1
            threads = active
            if instruction.guard is not None:
                holds = self.registers.read(instruction.guard, active)
                threads = active[~holds if instruction.guard_negated else holds]
            if len(threads):
                warps = all_warps if len(threads) == len(active) else self.grid.num_warps(threads)
                self.accesses.traffic.instructions[instruction.opcode] += warps
                self._execute(instruction, threads, index)
            if instruction.opcode in _BRANCHES:
                self.at[np.setdiff1d(active, threads, assume_unique=True)] = index
                return
            if index in self.targets:
                self.at[active] = index
                return

    def _execute(self, instruction: Instruction, threads: np.ndarray, after: int) -> None:
        opcode, modifiers = instruction.opcode, instruction.modifiers
        try:
            match opcode:
                case "bra":
                    (label,) = instruction.operands
                    assert isinstance(label, Symbol)
                    self.at[threads] = self.kernel.labels[label.name]
                case "ret" | "exit":
                    self.state[threads] = EXITED
                case "bar":
                    self._wait(instruction, threads)
                    self.at[threads] = after
                case "ld" | "st" | "red" | "atom":
                    self.accesses.access(instruction, threads)
                case "ldmatrix" | "stmatrix":
                    self.accesses.access_matrices(instruction, threads)
                case "mov" | "cvta":
                    self.registers.move(instruction, threads)
                case "shfl":
                    shuffle(self.grid, self.registers, instruction, threads)
                case "redux":
                    reduce(self.grid, self.registers, instruction, threads)
                case _:
                    types = operand_types(opcode, modifiers)
                    result, *operands = instruction.operands
                    value = self.registers.low_bits if opcode == "cvt" else self.registers.value
                    values = [value(each, kind, threads) for each, kind in zip(operands, types[1:], strict=False)]
                    self.registers.set(result, compute(opcode, modifiers, values), threads)
        except (Unsupported, MemoryFault) as error:
            raise type(error)(f"{error}, in `{instruction.text}` of {self.kernel.name}") from None

    def _wait(self, instruction: Instruction, threads: np.ndarray) -> None:
        if instruction.modifiers not in (("sync",), ("sync", "aligned")) or instruction.operands != (Immediate(0),):
            raise Unsupported("this kind of barrier")
        # An aligned barrier is for whole warps.
        warps = np.unique(self.grid.warp_of[threads])
        here = np.isin(self.grid.warp_of, warps) & (self.state != EXITED)
        if here.sum() != len(threads):
            raise Unsupported("a barrier that a warp meets in parts")
        self.state[threads] = WAITING
