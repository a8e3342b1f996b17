"""PTX text as instructions."""

import re
from dataclasses import dataclass

REGISTER_BITS = {"pred": 1, "b16": 16, "u16": 16, "s16": 16, "b32": 32, "u32": 32, "s32": 32, "f32": 32}
REGISTER_BITS |= {"b64": 64, "u64": 64, "s64": 64, "f64": 64}
_TYPE_BYTES = {name: max(1, bits // 8) for name, bits in REGISTER_BITS.items()} | {"b8": 1, "u8": 1, "s8": 1}


@dataclass(frozen=True)
class Register:
    name: str


@dataclass(frozen=True)
class Immediate:
    """An integer, or the bits of a floating-point number of `float_bits` bits."""

    value: int
    float_bits: int = 0


@dataclass(frozen=True)
class Symbol:
    """A label, a parameter or a variable in shared memory."""

    name: str


@dataclass(frozen=True)
class Address:
    base: "Register | Symbol | Immediate"
    offset: int = 0


Operand = Register | Immediate | Symbol | Address | tuple["Operand", ...]


@dataclass(frozen=True)
class Instruction:
    opcode: str  # ld
    modifiers: tuple[str, ...]  # global, v4, b32
    operands: tuple[Operand, ...]
    guard: Register | None  # runs only where this predicate holds,
    guard_negated: bool  # or does not
    text: str

    @property
    def type(self) -> str:
        return self.modifiers[-1]


@dataclass(frozen=True)
class Kernel:
    name: str
    parameters: dict[str, tuple[int, int]]  # offset and bytes in the block of parameters
    registers: dict[str, int]  # prefix: bits
    shared: dict[str, int]  # variables in shared memory: offset
    shared_bytes: int  # of those whose size is known before the launch
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]  # the number of the instruction behind each

    @property
    def parameter_bytes(self) -> int:
        return max((offset + size for offset, size in self.parameters.values()), default=0)


def _operand(text: str) -> Operand:
    text = text.strip()
    if text.startswith("{"):
        return tuple(_operand(part) for part in text.strip("{}").split(","))
    if text.startswith("["):
        base, sign, offset = re.fullmatch(r"\[\s*([%$\w.]+)\s*(?:([+-])\s*(-?\w+))?\s*\]", text).groups()  # type: ignore[union-attr]
        return Address(_operand(base), int(offset or "0", 0) * (-1 if sign == "-" else 1))  # type: ignore[arg-type]
    if "|" in text:
        return tuple(_operand(part) for part in text.split("|"))
    if text.startswith("%"):
        return Register(text)
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", text):
        return Immediate(int(match[1] or match[2], 16), 32 if match[1] else 64)
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        return Immediate(int(text.rstrip("U"), 0))
    return Symbol(text)


def _split_operands(text: str) -> list[str]:
    return re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", text)


def _instruction(statement: str) -> Instruction:
    guard, negated = None, False
    rest = statement
    if match := re.match(r"@(!?)(%\w+)\s+", statement):
        guard, negated, rest = Register(match[2]), match[1] == "!", statement[match.end() :]
    opcode, _, operands = rest.partition(" ")
    name, *modifiers = opcode.split(".")
    return Instruction(
        name, tuple(modifiers), tuple(_operand(each) for each in _split_operands(operands)), guard, negated, statement
    )


def _parameters(text: str) -> dict[str, tuple[int, int]]:
    found, end = {}, 0
    for declaration in filter(None, (part.strip() for part in text.split(","))):
        align = re.search(r"\.align (\d+) \.b8", declaration)
        name, count = re.search(r"(\w+)(?:\[(\d+)\])?$", declaration).groups()  # type: ignore[union-attr]
        size = int(count) if count else _TYPE_BYTES[re.search(r"\.param \.(\w+)", declaration)[1]]  # type: ignore[index]
        alignment = int(align[1]) if align and count else size
        offset = -(-end // alignment) * alignment
        found[name] = (offset, size)
        end = offset + size
    return found


def parse(text: str) -> dict[str, Kernel]:
    """The kernels of a PTX module, by name."""
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"^\s*\.(loc|file)\b[^\n]*$", "", text, flags=re.MULTILINE)
    shared, shared_bytes = {}, 0
    for alignment, name, count in re.findall(r"\.shared \.align (\d+) \.b8 (\w+)\[(\d*)\]", text):
        shared[name] = -(-shared_bytes // int(alignment)) * int(alignment)
        shared_bytes = shared[name] + int(count or 0)
    kernels = {}
    for entry in re.finditer(r"\.entry (\w+)\s*\((.*?)\)([^{]*)\{", text, re.DOTALL):
        depth, end = 1, entry.end()
        while depth:
            brace = re.compile("[{}]").search(text, end)
            assert brace, f"{entry[1]} has no end"
            depth, end = depth + (1 if brace[0] == "{" else -1), brace.end()
        registers, instructions, labels = {}, [], {}
        for statement in re.split(r";|(?<=:)\s", text[entry.end() : end - 1]):
            statement = " ".join(statement.split()).lstrip("{} ")  # braces of scopes; no name is used in two
            if statement.endswith(":"):
                labels[statement[:-1]] = len(instructions)
            elif match := re.match(r"\.reg \.(\w+) (%\w+)", statement):
                registers[match[2]] = REGISTER_BITS[match[1]]
            elif statement and not statement.startswith(".pragma"):
                instructions.append(_instruction(statement))
        kernels[entry[1]] = Kernel(
            entry[1], _parameters(entry[2]), registers, shared, shared_bytes, tuple(instructions), labels
        )
    return kernels
