"""What PTX's arithmetic instructions compute, on numpy vectors: one element per thread.

Floating-point arithmetic has to say how it rounds (``.rn``): PTX without it lets the assembler fuse a product and a sum.
"""

from collections.abc import Callable

import numpy as np

NUMPY = {
    f"{kind}{bits}": np.dtype(f"{kind if kind in 'uf' else 'i'}{bits // 8}") for kind in "usf" for bits in (16, 32, 64)
}
NUMPY |= {f"b{bits}": np.dtype(f"u{bits // 8}") for bits in (16, 32, 64)}
NUMPY |= {"pred": np.dtype(bool)}
_WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


class Unsupported(Exception):
    """An instruction that the emulation does not know, or will not run."""


def bits_of(values: np.ndarray) -> np.ndarray:
    """As registers hold them: unsigned integers of the same size, or bool."""
    return values if values.dtype == bool else values.view(f"u{values.dtype.itemsize}")


# --- floating point --------------------------------------------------------------------------------------------------


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c in fp32, rounded once.

    The product is exact in fp64. The sum is rounded there to odd, which a second rounding to fp32 cannot tell from the
    exact one (Boldo and Melquiond 2008: 53 >= 2 * 24 + 2 bits).
    """
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + addend
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)  # Knuth's two-sum
    bits = total.view(np.int64)
    away = (error > 0) == (total > 0)  # the exact sum is further from zero than the rounded one
    to_odd = np.where((bits & 1 == 0) & (error != 0) & np.isfinite(total), np.where(away, bits + 1, bits - 1), bits)
    return to_odd.view(np.float64).astype(np.float32)


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """The bits, rounded to nearest even; any NaN becomes 0x7FFF."""
    bits = values.view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def _pairs(operation: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """`operation` on both fp32 halves of 64-bit registers."""

    def on_pairs(*operands: np.ndarray) -> np.ndarray:
        shape = np.broadcast_shapes(*(each.shape for each in operands))
        halves = [np.ascontiguousarray(np.broadcast_to(each, shape)).view(np.float32) for each in operands]
        return operation(*halves).view(np.uint64)

    return on_pairs


# --- conversions -----------------------------------------------------------------------------------------------------


def _convert(modifiers: tuple[str, ...], values: np.ndarray) -> np.ndarray:
    *how, to, of = modifiers
    if to == "bf16" and how == ["rn"] and of == "f32":
        return round_to_bf16(values)
    if to == "f32" and of == "bf16" and not how:
        return (values.astype(np.uint32) << 16).view(np.float32)
    narrows = NUMPY[to].kind == "f" and (NUMPY[of].kind != "f" or NUMPY[to].itemsize < NUMPY[of].itemsize)
    if NUMPY[to].kind != "f" and NUMPY[of].kind == "f":
        raise Unsupported("a conversion to an integer")
    if how != (["rn"] if narrows else []):
        raise Unsupported("how it rounds")
    return values.astype(NUMPY[to])


def _convert_pair(modifiers: tuple[str, ...], high: np.ndarray, low: np.ndarray) -> np.ndarray:
    half = round_to_bf16 if modifiers[1] == "bf16x2" else lambda values: values.astype(np.float16).view(np.uint16)
    return (half(high).astype(np.uint32) << 16) | half(low)


# --- integers --------------------------------------------------------------------------------------------------------


def _shift_left(value: np.ndarray, by: np.ndarray) -> np.ndarray:
    bits = 8 * value.dtype.itemsize
    return np.where(by < bits, value << np.minimum(by, bits - 1).astype(value.dtype), value.dtype.type(0))


def _shift_right(value: np.ndarray, by: np.ndarray) -> np.ndarray:
    bits = 8 * value.dtype.itemsize
    shifted = value >> np.minimum(by, bits - 1).astype(value.dtype)
    return shifted if value.dtype.kind == "i" else np.where(by < bits, shifted, value.dtype.type(0))


def _multiply_high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The high half of the product of 32-bit integers, signed or not."""
    wider = f"{a.dtype.kind}8"
    return (a.astype(wider) * b.astype(wider) >> 32).astype(a.dtype)


def _bit_field(value: np.ndarray, begin: np.ndarray, length: np.ndarray) -> np.ndarray:
    """`length` bits from `begin`, extended by their sign if the type has one."""
    bits = 8 * value.dtype.itemsize
    if np.any((length == 0) | (begin + length > bits)):
        raise Unsupported("a bit field that is empty or ends beyond its register")
    up = (bits - begin - length).astype(value.dtype)
    return (value << up) >> (bits - length).astype(value.dtype)


def _permute(a: np.ndarray, b: np.ndarray, selection: np.ndarray) -> np.ndarray:
    """The bytes of a and b, numbered from a's lowest: each of the result's picks one, or the sign of one."""
    both = b.astype(np.uint64) << 32 | a
    result = np.zeros(1, np.uint32)
    for byte in range(4):
        choice = (selection >> 4 * byte) & 15
        picked = (both >> (8 * (choice & 7))).astype(np.uint32) & 0xFF
        result = result | np.where(choice & 8, (picked >> 7) * 0xFF, picked).astype(np.uint32) << 8 * byte
    return result


_COMPARISONS: dict[str, Callable[..., np.ndarray]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_UNORDERED = {"equ": "eq", "neu": "ne", "ltu": "lt", "leu": "le", "gtu": "gt", "geu": "ge"}


def _compare(modifiers: tuple[str, ...], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    comparison, type_name = modifiers
    is_nan = np.isnan(a) | np.isnan(b) if NUMPY[type_name].kind == "f" else np.zeros(1, bool)
    if comparison in _UNORDERED:
        return _COMPARISONS[_UNORDERED[comparison]](a, b) | is_nan
    return _COMPARISONS[comparison](a, b) & ~is_nan


# --- by name ---------------------------------------------------------------------------------------------------------

_INTEGER = {f"{kind}{bits}" for kind in "us" for bits in (16, 32, 64)}
_BITWISE = {"b16", "b32", "b64", "pred"}
_SAME_TYPE: dict[str, tuple[set[str], Callable[..., np.ndarray]]] = {
    "add": (_INTEGER, np.add),
    "sub": (_INTEGER, np.subtract),
    "mul.lo": (_INTEGER, np.multiply),
    "mul.hi": ({"u32", "s32"}, _multiply_high),
    "mad.lo": (_INTEGER, lambda a, b, c: a * b + c),
    "min": (_INTEGER, np.minimum),
    "max": (_INTEGER, np.maximum),
    "neg": (_INTEGER | {"f32", "f64"}, np.negative),
    "and": (_BITWISE, np.bitwise_and),
    "or": (_BITWISE, np.bitwise_or),
    "xor": (_BITWISE, np.bitwise_xor),
    "not": (_BITWISE, np.invert),
    "prmt": ({"b32"}, _permute),
    "popc": ({"b32"}, lambda value: np.bitwise_count(value).astype(np.uint32)),
    "add.rn": ({"f32", "f64"}, np.add),
    "sub.rn": ({"f32", "f64"}, np.subtract),
    "mul.rn": ({"f32", "f64"}, np.multiply),
    "div.rn": ({"f32", "f64"}, np.divide),
    "sqrt.rn": ({"f32", "f64"}, np.sqrt),
    "fma.rn": ({"f32"}, fma),
}
_ON_PAIRS = {"add.rn.f32x2": np.add, "mul.rn.f32x2": np.multiply, "fma.rn.f32x2": fma}


def operand_types(opcode: str, modifiers: tuple[str, ...]) -> tuple[str, ...]:
    """The types of an instruction's operands, the result first."""
    kind = modifiers[-1]
    if opcode in ("mul", "mad") and modifiers[0] == "wide":
        wider = _WIDER[kind]
        return (wider, kind, kind, wider)
    if opcode in ("shl", "shr"):
        return (kind, kind, "u32")
    if opcode == "bfe":
        return (kind, kind, "u32", "u32")
    if opcode == "setp":
        return ("pred", kind, kind)
    if opcode == "selp":
        return (kind, kind, kind, "pred")
    if opcode == "popc":
        return ("u32", kind)
    if opcode == "cvt":
        if modifiers[1:2] in (("bf16x2",), ("f16x2",)):
            return ("b32", kind, kind)
        stored = {"bf16": "b16"}
        return (stored.get(modifiers[-2], modifiers[-2]), stored.get(kind, kind))
    if opcode == "add" and modifiers == ("rn", "f32", "f16"):
        return ("f32", "f16", "f32")
    if kind == "f32x2":
        return ("b64",) * 4
    if kind not in NUMPY:
        raise Unsupported(f"the type {kind}")
    return (kind,) * 4


def compute(opcode: str, modifiers: tuple[str, ...], operands: list[np.ndarray]) -> np.ndarray:
    """The result of an instruction on operands that have the types of :func:`operand_types`."""
    name = ".".join((opcode, *modifiers))
    kind = modifiers[-1]
    if name in _ON_PAIRS:
        return _pairs(_ON_PAIRS[name])(*operands)
    if name == "add.rn.f32.f16":
        return operands[0].astype(np.float32) + operands[1]
    if opcode == "cvt":
        return (_convert_pair if len(operands) == 2 else _convert)(modifiers, *operands)
    if opcode == "setp" and len(modifiers) == 2:
        return _compare(modifiers, *operands)
    if opcode == "selp":
        return np.where(operands[2], operands[0], operands[1])
    if opcode in ("shl", "shr") and len(modifiers) == 1:
        return (_shift_left if opcode == "shl" else _shift_right)(*operands)
    if opcode == "bfe":
        return _bit_field(*operands)
    if opcode in ("mul", "mad") and modifiers[:-1] == ("wide",):
        product = operands[0].astype(NUMPY[_WIDER[kind]]) * operands[1].astype(NUMPY[_WIDER[kind]])
        return product if opcode == "mul" else product + operands[2]
    types, operation = _SAME_TYPE.get(".".join((opcode, *modifiers[:-1])), (set(), None))
    if operation is None or kind not in types:
        raise Unsupported(f"the instruction {name}")
    return operation(*operands)
