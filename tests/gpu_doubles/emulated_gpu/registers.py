"""The registers of all threads of a launch: a numpy array each, of unsigned integers or bool."""

import numpy as np

from .arithmetic import NUMPY, Unsupported, bits_of
from .ptx import Immediate, Instruction, Kernel, Operand, Register, Symbol

_POISON = 0xA5  # each byte of what a thread has not written


class Registers:
    """Those of `count` threads. `special` are the ones that say where a thread is, such as ``%tid.x``."""

    def __init__(self, kernel: Kernel, count: int, special: dict[str, np.ndarray]) -> None:
        self.kernel, self.count, self.special = kernel, count, special
        self._values: dict[str, np.ndarray] = {}

    def dtype(self, register: Register) -> np.dtype:
        bits = self.kernel.registers[register.name.rstrip("0123456789")]
        return np.dtype(bool) if bits == 1 else np.dtype(f"u{bits // 8}")

    def read(self, register: Register, threads: np.ndarray) -> np.ndarray:
        if register.name in self.special:
            values = self.special[register.name].astype(np.uint32)
        elif register.name in self._values:
            values = self._values[register.name]
        else:
            raise Unsupported(f"a read of {register.name}, which nothing has written")
        return values[threads] if len(values) > 1 else values

    def value(self, operand: Operand, kind: str, threads: np.ndarray) -> np.ndarray:
        """An operand as numbers of PTX type `kind`; of length 1 if it is the same for all threads."""
        dtype = NUMPY[kind]
        if isinstance(operand, Register):
            values = self.read(operand, threads)
            if values.dtype.itemsize != dtype.itemsize or (values.dtype == bool) != (kind == "pred"):
                raise Unsupported(f"{operand.name} as {kind}")
            return values.view(dtype)
        if isinstance(operand, Immediate):
            if operand.float_bits not in (0, 8 * dtype.itemsize):
                raise Unsupported(f"a constant of {operand.float_bits} bits as {kind}")
            bits = operand.value & (1 << 8 * dtype.itemsize) - 1
            if kind == "pred":
                return np.array([bool(operand.value)])
            return np.array([bits], f"u{dtype.itemsize}").view(dtype)
        if isinstance(operand, Symbol) and operand.name in self.kernel.shared:
            return np.array([self.kernel.shared[operand.name]], f"u{dtype.itemsize}").view(dtype)
        raise Unsupported(f"the operand {operand}")

    def spread(self, operand: Operand, kind: str, threads: np.ndarray) -> np.ndarray:
        """:meth:`value`, one for each thread."""
        return np.broadcast_to(self.value(operand, kind, threads), len(threads))

    def low_bits(self, operand: Operand, kind: str, threads: np.ndarray) -> np.ndarray:
        """:meth:`value`, for conversions and stores: they take the low bits of registers that are too large."""
        if not isinstance(operand, Register):
            return self.value(operand, kind, threads)
        bits = 8 * max(self.dtype(operand).itemsize, NUMPY[kind].itemsize)
        return self.value(operand, f"b{bits}", threads).astype(f"u{NUMPY[kind].itemsize}").view(NUMPY[kind])

    def set(self, operand: Operand, values: np.ndarray, threads: np.ndarray) -> None:
        assert isinstance(operand, Register)
        dtype = self.dtype(operand)
        bits = bits_of(values)
        if bits.dtype != dtype:
            bits = bits.astype(dtype)
        if len(threads) < self.count:
            # A new array, because another register may share the old one.
            before = self._values.get(operand.name)
            poison = np.frombuffer(bytes([_POISON]) * dtype.itemsize, dtype)[0]
            whole = np.full(self.count, poison) if before is None else before.copy()
            whole[threads] = bits
            bits = whole
        self._values[operand.name] = bits if len(bits) == self.count else np.full(self.count, bits[0])

    def set_loaded(self, operand: Operand, values: np.ndarray, threads: np.ndarray) -> None:
        """What was loaded into a register that may be wider, and is then extended by sign or zero."""
        assert isinstance(operand, Register)
        size = self.dtype(operand).itemsize
        self.set(operand, values if values.itemsize >= size else values.astype(f"{values.dtype.kind}{size}"), threads)

    def move(self, instruction: Instruction, threads: np.ndarray) -> None:
        """Registers, constants, addresses, and vectors of small registers as one large one and back."""
        to, of = instruction.operands
        kind = instruction.type
        if isinstance(to, tuple):
            whole = np.ascontiguousarray(self.spread(of, kind, threads))
            parts = whole.view(f"u{whole.itemsize // len(to)}").reshape(-1, len(to))
            for number, part in enumerate(to):
                if part != Symbol("_"):
                    self.set(part, parts[:, number], threads)
        elif isinstance(of, tuple):
            size = NUMPY[kind].itemsize // len(of)
            columns = [self.spread(part, f"b{8 * size}", threads) for part in of]
            self.set(to, np.ascontiguousarray(np.stack(columns, 1)).view(f"u{NUMPY[kind].itemsize}")[:, 0], threads)
        else:
            self.set(to, self.value(of, kind, threads), threads)
