"""Loads, stores and additions: from registers to memory and back."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from .arithmetic import NUMPY, Unsupported
from .memory import Memory, MemoryFault
from .ptx import Address, Instruction, Kernel, Operand, Symbol
from .registers import Registers
from .threads import WARP, Grid, check_whole_warps

SECTOR_BYTES = 32  # what DRAM moves at least
_CACHE_HINTS = re.compile(r"L1::\w+|L2::\w+|ca|cg|cs|relaxed|weak|cta|gpu")
_STATE_SPACES = ("param", "global", "shared", "shared::cta")


@dataclass
class Traffic:
    """What a launch moved between its threads and global memory, and what it executed."""

    #: Bytes by "load" and "store".
    bytes: Counter = field(default_factory=Counter)
    #: Sectors that the requests of warps touch, one request after the other: 32 bytes each.
    sectors: Counter = field(default_factory=Counter)
    #: Instructions executed by warps, by opcode.
    instructions: Counter = field(default_factory=Counter)
    shared_bytes: int = 0  # of a block


def read_by(instruction: Instruction) -> Iterator[Operand]:
    """The registers that an instruction reads, its first operand left out where that is what it writes."""
    pending = [instruction.guard, *instruction.operands[instruction.opcode not in ("st", "red", "bra", "stmatrix") :]]
    pending += [each for each in instruction.operands if isinstance(each, Address)]
    while pending:
        operand = pending.pop()
        if isinstance(operand, tuple):
            pending += operand
        elif operand is not None:
            yield operand.base if isinstance(operand, Address) else operand


class Accesses:
    """Those of one launch."""

    def __init__(
        self,
        kernel: Kernel,
        grid: Grid,
        registers: Registers,
        parameters: bytes,
        memories: dict[int, Memory],  # by address
        shared_bytes: int,
    ) -> None:
        self.kernel, self.grid, self.registers = kernel, grid, registers
        self.parameters = np.frombuffer(parameters, np.uint8)
        self.bases = np.array(sorted(memories), np.uint64)
        self.memories = [memories[int(base)] for base in self.bases]
        self.shared_bytes = shared_bytes  # of a block
        self.shared = Memory("shared memory", np.zeros(shared_bytes * grid.num_blocks, np.uint8), shared=True)
        self.traffic = Traffic(shared_bytes=shared_bytes)

    def access(self, instruction: Instruction, threads: np.ndarray) -> None:
        modifiers = list(instruction.modifiers)
        kind, count = modifiers.pop(), 1
        space = next((each for each in modifiers if each in _STATE_SPACES), None)
        if space is None:
            raise Unsupported("a generic address")
        modifiers.remove(space)
        for vector in ("v2", "v4"):
            if vector in modifiers:
                modifiers.remove(vector)
                count = int(vector[1])
        adds = instruction.opcode in ("red", "atom")
        if adds:
            if "cta" not in modifiers or "add" not in modifiers or kind != "u32":
                raise Unsupported("an atomic operation of this kind")
            modifiers.remove("add")
        if any(not _CACHE_HINTS.fullmatch(each) for each in modifiers):
            raise Unsupported(f"the modifiers {modifiers}")
        address, data = instruction.operands[:2] if instruction.opcode != "ld" else instruction.operands[1::-1]
        if instruction.opcode == "atom":
            result, address, data = instruction.operands
            if any(result in read_by(each) for each in self.kernel.instructions):
                raise Unsupported("what was there before an addition")
        assert isinstance(address, Address)
        elements = data if isinstance(data, tuple) else (data,)
        size = NUMPY[kind].itemsize
        if len(elements) != count:
            raise Unsupported("a vector of this length")

        if space == "param":
            assert isinstance(address.base, Symbol)
            offset, _ = self.kernel.parameters[address.base.name]
            value = self.parameters[offset + address.offset :][:size].view(NUMPY[kind])
            self.registers.set_loaded(data, value, threads)
            return
        places = self.registers.spread(address.base, "u64" if space == "global" else "u32", threads)
        places = places + places.dtype.type(address.offset & (1 << 8 * places.dtype.itemsize) - 1)
        if (places % (size * count)).any():
            raise MemoryFault(f"an access of {size * count} bytes at an address that is no multiple")
        values = None
        if instruction.opcode != "ld":
            columns = [np.broadcast_to(self.registers.low_bits(each, kind, threads), len(threads)) for each in elements]
            values = np.ascontiguousarray(np.stack(columns, 1)).view(np.uint8)
        if space == "global":
            self._count_traffic("store" if values is not None else "load", places, size * count, threads)
        loaded = np.empty((len(threads), size * count), np.uint8)
        for memory, offset, picked in self._memories_at(space, places, threads, size * count):
            who = self.grid.who(threads[picked])
            if values is None:
                loaded[picked] = memory.load(offset, size * count, who)
            elif adds:
                memory.add(offset, values[picked].view(NUMPY[kind])[:, 0], who)
            else:
                memory.store(offset, values[picked], who)
        if values is None:
            for number, element in enumerate(elements):
                column = np.ascontiguousarray(loaded[:, number * size : (number + 1) * size]).view(NUMPY[kind])[:, 0]
                self.registers.set_loaded(element, column, threads)

    def access_matrices(self, instruction: Instruction, threads: np.ndarray) -> None:
        """Matrices of 8 x 8 half-words in shared memory. Lane 8 i + r has the address of row r of matrix i, 16 bytes; and

        lane 4 r + c has the columns 2 c and 2 c + 1 of row r of every matrix, a register for each matrix. With ``.trans``
        a load takes the matrices as transposed.
        """
        *how, space, kind = (each for each in instruction.modifiers if each != "trans")
        transposes = "trans" in instruction.modifiers
        count = how.pop()
        if transposes and instruction.opcode != "ldmatrix":
            raise Unsupported("a store of transposed matrices")
        if how != ["sync", "aligned", "m8n8"] or space not in ("shared", "shared::cta") or kind != "b16":
            raise Unsupported("matrices of this kind")
        matrices = int(count.removeprefix("x"))
        loads = instruction.opcode == "ldmatrix"
        registers, address = instruction.operands if loads else instruction.operands[::-1]
        assert isinstance(address, Address)
        assert isinstance(registers, tuple)
        check_whole_warps(self.grid, threads)
        places = self.registers.spread(address.base, "u32", threads) + np.uint32(address.offset)
        if (places % 16).any():
            raise MemoryFault("a row of a matrix at an address that is no multiple of 16")
        rows = np.flatnonzero(self.grid.lane[threads] < 8 * matrices)
        ((memory, offset, _),) = self._memories_at("shared", places[rows], threads[rows], 16)
        warps = len(threads) // WARP
        if loads:  # the row is read by the lane that has its address, as far as races go
            data = memory.load(offset, 16, self.grid.who(threads[rows]))
            halves = np.ascontiguousarray(data).view(np.uint16).reshape(warps, matrices, 8, 8)  # rows, columns
            words = np.ascontiguousarray(halves.swapaxes(2, 3) if transposes else halves).view(np.uint32)
            for matrix, register in enumerate(registers):
                self.registers.set(register, np.ascontiguousarray(words[:, matrix]).reshape(-1), threads)
        else:
            columns = [self.registers.spread(each, "b32", threads) for each in registers]
            words = np.stack([column.reshape(warps, 8, 4) for column in columns], axis=1)
            memory.store(
                offset, np.ascontiguousarray(words).view(np.uint8).reshape(-1, 16), self.grid.who(threads[rows])
            )

    def _memories_at(
        self, space: str, places: np.ndarray, threads: np.ndarray, size: int
    ) -> Iterable[tuple[Memory, np.ndarray, np.ndarray]]:
        """The memories that are accessed: where, and by which of the threads."""
        if space != "global":
            if (places.astype(np.int64) + size > self.shared_bytes).any():
                raise MemoryFault("an access outside shared memory")
            yield (
                self.shared,
                places.astype(np.int64) + self.grid.block[threads].astype(np.int64) * self.shared_bytes,
                np.arange(len(threads)),
            )
            return
        number = np.searchsorted(self.bases, places, side="right").astype(np.int64) - 1
        if (number < 0).any():
            raise MemoryFault(f"an access at {places[number < 0][0]:#x}, where there is no tensor")
        for each in np.unique(number):
            picked = np.flatnonzero(number == each)
            yield self.memories[each], (places[picked] - self.bases[each]).astype(np.int64), picked

    def _count_traffic(self, what: str, places: np.ndarray, size: int, threads: np.ndarray) -> None:
        warps = self.grid.warp_of[threads].astype(np.uint64)
        first, last = places // SECTOR_BYTES, (places + np.uint64(size - 1)) // SECTOR_BYTES
        sectors = np.concatenate((first, last[last != first]))
        warps = np.concatenate((warps, warps[last != first]))
        order = np.lexsort((sectors, warps))
        sectors, warps = sectors[order], warps[order]
        again = (sectors[1:] == sectors[:-1]) & (warps[1:] == warps[:-1])
        self.traffic.bytes[what] += size * len(threads)
        self.traffic.sectors[what] += len(sectors) - int(np.count_nonzero(again))
