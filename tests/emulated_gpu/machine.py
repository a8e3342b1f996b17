"""Launches: all threads of a grid run together, those that are furthest behind first, so that branches meet again."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from emulated_gpu.arithmetic import NUMPY, Unsupported, bits_of, compute, operand_types
from emulated_gpu.memory import Memory, MemoryFault, Threads
from emulated_gpu.ptx import Address, Immediate, Instruction, Kernel, Operand, Register, Symbol

WARP = 32
SECTOR_BYTES = 32  # what DRAM moves at least
_CACHE_HINTS = re.compile(r"L1::\w+|L2::\w+|nc|ca|cg|cs|relaxed|weak|cta|gpu")
_STATE_SPACES = ("param", "global", "shared", "shared::cta")

RUNNING, WAITING, EXITED = range(3)
_BRANCHES = ("bra", "ret", "exit", "bar")


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
        self.kernel, self.parameters = kernel, np.frombuffer(parameters, np.uint8)
        if len(parameters) < kernel.parameter_bytes:
            raise ValueError(f"{len(parameters)} bytes of parameters, but {kernel.name} has {kernel.parameter_bytes}")
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

        self.bases = np.array(sorted(memories), np.uint64)
        self.memories = [memories[int(base)] for base in self.bases]
        self.shared_bytes = max(shared_bytes, kernel.shared_bytes)
        shared = np.zeros(self.shared_bytes * self.num_blocks, np.uint8)
        self.shared = Memory("shared memory", shared, shared=True)

        self.registers: dict[str, np.ndarray] = {}
        self.state = np.full(self.count, RUNNING)
        self.at = np.zeros(self.count, np.int64)  # the next instruction
        self.barriers = np.zeros(self.num_blocks, np.int32)  # passed
        self.traffic = Traffic(shared_bytes=self.shared_bytes)
        self.targets = {  # of branches
            kernel.labels[operand.name]
            for each in kernel.instructions
            if each.opcode == "bra"
            for operand in each.operands
            if isinstance(operand, Symbol)
        }

    # --- control -----------------------------------------------------------------------------------------------------

    def run(self) -> Traffic:
        with np.errstate(all="ignore"):
            return self._run()

    def _run(self) -> Traffic:
        while True:
            running = self.state == RUNNING
            if not running.any():
                if not (self.state == WAITING).any():
                    return self.traffic
                self._pass_barriers()
                continue
            first = int(self.at[running].min())
            self._run_until_branch(first, np.flatnonzero(running & (self.at == first)))

    def _pass_barriers(self) -> None:
        """Everybody waits or has left."""
        waiting = np.unique(self.block[self.state == WAITING])
        self.barriers[waiting] += 1
        self.state[self.state == WAITING] = RUNNING

    def _run_until_branch(self, index: int, active: np.ndarray) -> None:
        """Runs the `active` threads from instruction `index` to where others may join or leave them."""
        instructions = self.kernel.instructions
        all_warps = self._warps(active)
        while True:
            if index == len(instructions):
                self.state[active] = EXITED
                return
            instruction = instructions[index]
            index += 1
            threads = active
            if instruction.guard is not None:
                holds = self._register(instruction.guard, active)
                threads = active[~holds if instruction.guard_negated else holds]
            if len(threads):
                warps = all_warps if len(threads) == len(active) else self._warps(threads)
                self.traffic.instructions[instruction.opcode] += warps
                self._execute(instruction, threads, index)
            if instruction.opcode in _BRANCHES:
                self.at[np.setdiff1d(active, threads, assume_unique=True)] = index
                return
            if index in self.targets:
                self.at[active] = index
                return

    def _warps(self, threads: np.ndarray) -> int:
        warps = self.warp_of[threads]  # in order, as the threads are
        return 1 + int(np.count_nonzero(warps[1:] != warps[:-1]))

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
                    self._access(instruction, threads)
                case "ldmatrix" | "stmatrix":
                    self._access_matrices(instruction, threads)
                case "mov" | "cvta":
                    self._move(instruction, threads)
                case "shfl":
                    self._shuffle(instruction, threads)
                case "redux":
                    self._reduce(instruction, threads)
                case _:
                    types = operand_types(opcode, modifiers)
                    result, *operands = instruction.operands
                    value = self._low_bits if opcode == "cvt" else self._value
                    values = [value(each, kind, threads) for each, kind in zip(operands, types[1:], strict=False)]
                    self._set(result, bits_of(compute(opcode, modifiers, values)), threads)
        except (Unsupported, MemoryFault) as error:
            raise type(error)(f"{error}, in `{instruction.text}` of {self.kernel.name}") from None

    def _wait(self, instruction: Instruction, threads: np.ndarray) -> None:
        if instruction.modifiers not in (("sync",), ("sync", "aligned")) or len(instruction.operands) != 1:
            raise Unsupported("this kind of barrier")
        # An aligned barrier is for whole warps.
        warps = np.unique(self.warp_of[threads])
        here = np.isin(self.warp_of, warps) & (self.state != EXITED)
        if here.sum() != len(threads):
            raise Unsupported("a barrier that a warp meets in parts")
        self.state[threads] = WAITING

    # --- registers ---------------------------------------------------------------------------------------------------

    def _bits(self, name: str) -> int:
        return self.kernel.registers[name.rstrip("0123456789")]

    def _register(self, register: Register, threads: np.ndarray) -> np.ndarray:
        if register.name in self.special:
            values = self.special[register.name].astype(np.uint32)
        elif register.name in self.registers:
            values = self.registers[register.name]
        else:
            raise Unsupported(f"a read of {register.name}, which nothing has written")
        return values[threads] if len(values) > 1 else values

    def _value(self, operand: Operand, kind: str, threads: np.ndarray) -> np.ndarray:
        """As numbers of PTX type `kind`."""
        dtype = NUMPY[kind]
        if isinstance(operand, Register):
            values = self._register(operand, threads)
            if values.dtype != bool and values.dtype.itemsize > dtype.itemsize:
                raise Unsupported(f"{operand.name} as {kind}")
            if values.dtype != bool and values.dtype.itemsize < dtype.itemsize:
                values = values.astype(f"u{dtype.itemsize}")
            return values.view(dtype)
        if isinstance(operand, Immediate):
            bits = operand.value & (1 << 8 * dtype.itemsize) - 1
            if kind == "pred":
                return np.array([bool(operand.value)])
            return np.array([bits], f"u{dtype.itemsize}").view(dtype)
        if isinstance(operand, Symbol) and operand.name in self.kernel.shared:
            return np.array([self.kernel.shared[operand.name]], f"u{dtype.itemsize}").view(dtype)
        raise Unsupported(f"the operand {operand}")

    def _low_bits(self, operand: Operand, kind: str, threads: np.ndarray) -> np.ndarray:
        """Conversions and stores take the low bits of registers that are too large."""
        if not isinstance(operand, Register):
            return self._value(operand, kind, threads)
        bits = max(self._bits(operand.name), 8 * NUMPY[kind].itemsize)
        return self._value(operand, f"b{bits}", threads).astype(f"u{NUMPY[kind].itemsize}").view(NUMPY[kind])

    def _set(self, operand: Operand, bits: np.ndarray, threads: np.ndarray) -> None:
        assert isinstance(operand, Register)
        size = self._bits(operand.name)
        dtype = np.dtype(bool) if size == 1 else np.dtype(f"u{size // 8}")
        if bits.dtype != dtype:
            bits = bits.astype(dtype)
        if len(threads) < self.count:
            # A new array, because another register may share the old one.
            before = self.registers.get(operand.name)
            whole = np.zeros(self.count, dtype) if before is None else before.copy()
            whole[threads] = bits
            bits = whole
        self.registers[operand.name] = bits if len(bits) == self.count else np.full(self.count, bits[0])

    def _move(self, instruction: Instruction, threads: np.ndarray) -> None:
        """Registers, constants, addresses, and vectors of small registers as one large one and back."""
        to, of = instruction.operands
        kind = instruction.type
        if isinstance(to, tuple):
            whole = self._value(of, kind, threads)
            parts = np.ascontiguousarray(np.broadcast_to(whole, len(threads))).view(
                f"u{whole.dtype.itemsize // len(to)}"
            )
            for number, part in enumerate(to):
                if part != Symbol("_"):
                    self._set(part, parts.reshape(-1, len(to))[:, number], threads)
        elif isinstance(of, tuple):
            size = NUMPY[kind].itemsize // len(of)
            parts = [np.broadcast_to(self._value(part, f"b{8 * size}", threads), len(threads)) for part in of]
            self._set(to, np.ascontiguousarray(np.stack(parts, 1)).view(f"u{NUMPY[kind].itemsize}")[:, 0], threads)
        else:
            self._set(to, bits_of(self._value(of, kind, threads)), threads)

    # --- memory ------------------------------------------------------------------------------------------------------

    def _access(self, instruction: Instruction, threads: np.ndarray) -> None:
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
            self._set(data, bits_of(self._extended(value, data)), threads)
            return
        places = np.broadcast_to(
            self._value(address.base, "u64" if space == "global" else "u32", threads), len(threads)
        )
        places = places + places.dtype.type(address.offset & (1 << 8 * places.dtype.itemsize) - 1)
        if (places % (size * count)).any():
            raise MemoryFault(f"an access of {size * count} bytes at an address that is no multiple")
        values = None
        if instruction.opcode != "ld":
            columns = [np.broadcast_to(self._low_bits(each, kind, threads), len(threads)) for each in elements]
            values = np.ascontiguousarray(np.stack(columns, 1)).view(np.uint8)
        if space == "global":
            self._count_traffic("store" if values is not None else "load", places, size * count, threads)
        loaded = np.empty((len(threads), size * count), np.uint8)
        for memory, offset, picked in self._memories_at(space, places, threads, size * count):
            who = self._who(threads[picked])
            if values is None:
                loaded[picked] = memory.load(offset, size * count, who)
            elif adds:
                memory.add(offset, values[picked].view(NUMPY[kind])[:, 0], who)
            else:
                memory.store(offset, values[picked], who)
        if values is None:
            for number, element in enumerate(elements):
                column = np.ascontiguousarray(loaded[:, number * size : (number + 1) * size]).view(NUMPY[kind])[:, 0]
                self._set(element, bits_of(self._extended(column, element)), threads)

    def _access_matrices(self, instruction: Instruction, threads: np.ndarray) -> None:
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
        self._whole_warps(Immediate(-1), threads)
        places = np.broadcast_to(self._value(address.base, "u32", threads), len(threads)) + np.uint32(address.offset)
        if (places % 16).any():
            raise MemoryFault("a row of a matrix at an address that is no multiple of 16")
        rows = np.flatnonzero(self.lane[threads] < 8 * matrices)
        ((memory, offset, _),) = self._memories_at("shared", places[rows], threads[rows], 16)
        warps = len(threads) // WARP
        if loads:  # the row is read by the lane that has its address, as far as races go
            data = memory.load(offset, 16, self._who(threads[rows]))
            halves = np.ascontiguousarray(data).view(np.uint16).reshape(warps, matrices, 8, 8)  # rows, columns
            words = np.ascontiguousarray(halves.swapaxes(2, 3) if transposes else halves).view(np.uint32)
            for matrix, register in enumerate(registers):
                self._set(register, np.ascontiguousarray(words[:, matrix]).reshape(-1), threads)
        else:
            columns = [np.broadcast_to(self._value(each, "b32", threads), len(threads)) for each in registers]
            words = np.stack([column.reshape(warps, 8, 4) for column in columns], axis=1)
            memory.store(offset, np.ascontiguousarray(words).view(np.uint8).reshape(-1, 16), self._who(threads[rows]))

    def _who(self, threads: np.ndarray) -> Threads:
        return Threads(threads + 1, self.block[threads], self.barriers[self.block[threads]])

    def _extended(self, values: np.ndarray, register: Operand) -> np.ndarray:
        """Loads into wider registers extend by sign or zero."""
        assert isinstance(register, Register)
        bits = self._bits(register.name)
        return values if values.dtype.itemsize * 8 >= bits else values.astype(f"{values.dtype.kind}{bits // 8}")

    def _memories_at(
        self, space: str, places: np.ndarray, threads: np.ndarray, size: int
    ) -> Iterable[tuple[Memory, np.ndarray, np.ndarray]]:
        """The memories that are accessed: where, and by which of the threads."""
        if space != "global":
            if (places.astype(np.int64) + size > self.shared_bytes).any():
                raise MemoryFault("an access outside shared memory")
            yield (
                self.shared,
                places.astype(np.int64) + self.block[threads].astype(np.int64) * self.shared_bytes,
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
        warps = self.warp_of[threads].astype(np.uint64)
        first, last = places // SECTOR_BYTES, (places + np.uint64(size - 1)) // SECTOR_BYTES
        sectors = np.concatenate((first, last[last != first]))
        warps = np.concatenate((warps, warps[last != first]))
        order = np.lexsort((sectors, warps))
        sectors, warps = sectors[order], warps[order]
        again = (sectors[1:] == sectors[:-1]) & (warps[1:] == warps[:-1])
        self.traffic.bytes[what] += size * len(threads)
        self.traffic.sectors[what] += len(sectors) - int(np.count_nonzero(again))

    # --- between the threads of a warp -------------------------------------------------------------------------------

    def _whole_warps(self, mask: Operand, threads: np.ndarray) -> None:
        if (self._value(mask, "u32", threads) != 0xFFFFFFFF).any() or len(threads) % WARP:
            raise Unsupported("an exchange within a part of a warp")
        if (np.unique(self.warp_of[threads], return_counts=True)[1] != WARP).any():
            raise Unsupported("an exchange that a warp meets in parts")

    def _shuffle(self, instruction: Instruction, threads: np.ndarray) -> None:
        _, mode, _ = instruction.modifiers
        result, value, distance, clamp, mask = instruction.operands
        self._whole_warps(mask, threads)
        result, is_from_inside = result if isinstance(result, tuple) else (result, None)
        values = np.broadcast_to(self._value(value, "b32", threads), len(threads))
        lane, by = self.lane[threads], self._value(distance, "u32", threads).astype(np.int64)
        bound = self._value(clamp, "u32", threads).astype(np.int64)
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
        self._set(result, values[np.arange(len(threads)) - lane + source], threads)
        if is_from_inside is not None:
            self._set(is_from_inside, inside, threads)

    def _reduce(self, instruction: Instruction, threads: np.ndarray) -> None:
        _, operation, kind = instruction.modifiers
        result, value, mask = instruction.operands
        self._whole_warps(mask, threads)
        reduce = {"add": np.add, "max": np.maximum, "min": np.minimum}.get(operation)
        if reduce is None:
            raise Unsupported(f"the reduction {operation}")
        values = np.broadcast_to(self._value(value, kind, threads), len(threads)).reshape(-1, WARP)
        reduced = reduce.reduce(values, axis=1, dtype=values.dtype)
        self._set(result, bits_of(np.repeat(reduced, WARP)), threads)
