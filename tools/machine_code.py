"""What the machine code of one kernel does, read from its disassembly: NVIDIA's SASS or AMD's amdgcn."""

import re
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

# A half-word h becomes h * 2**-15 + (2**-16 - 1), which is exact, fused or not. These are the two constants as SASS and
# as older and newer LLVM IR print them; no other fused multiply-add of the kernels has a constant.
_HALF_TO_UNIFORM_SASS = re.compile(r"-0\.99998474|3\.0517578125e-05")
_HALF_TO_UNIFORM_IR = re.compile(
    r"@llvm\.fma\.(?:v(\d+))?f32\(.*(?:f0x38000000.*f0xBF7FFF00|0x3F00000000000000.*0xBFEFFFE000000000)"
)

_FUSED_SASS = {"FFMA", "FFMA2", "FFMA32I", "DFMA", "HFMA2"}
_ARITHMETIC_SASS = {"FADD", "FADD2", "FMUL", "FMUL2", "FFMA", "FFMA2"}
_FUSED_AMDGCN = re.compile(r"v_(?:dual_)?(pk_)?(?:fma|fmac|fmaak|fmamk|mad|fma_mix\w*|mad_mix\w*)_(?:f16|f32|f64)")
_SUM_AMDGCN = re.compile(r"v_fma_mix_f32 \S+ \S+ 1\.0, ")  # of a widened fp16 and a float: 1 * a + b
_AMDGCN_MEMORY = re.compile(r"(?:buffer|global|flat)_(load|store)_(\w+)")
_AMDGCN_BITS = {
    "dwordx4": 128,
    "dwordx3": 96,
    "dwordx2": 64,
    "dword": 32,
    "ushort": 16,
    "short": 16,
    "ubyte": 8,
    "byte": 8,
    # gfx11 and later
    "b128": 128,
    "b96": 96,
    "b64": 64,
    "b32": 32,
    "b16": 16,
    "u16": 16,
    "i16": 16,
    "d16": 16,
    "b8": 8,
    "u8": 8,
    "i8": 8,
}
# For other workgroups. That a barrier of one workgroup empties its own cache, as on gfx11 and later, is none.
_AMDGCN_FENCE = re.compile(r"buffer_(?:wbl2|inv|wbinvl1|gl1_inv)|global_(?:inv|wb|wbinv) scope:SCOPE_(?:DEV|SYS)")


@dataclass
class MachineCode:
    """Counts over the whole code of a kernel, each instruction once."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    #: Accesses to global memory by their width in bits.
    loads: Counter = field(default_factory=Counter)
    stores: Counter = field(default_factory=Counter)
    #: Loads of 16 bytes that are under way when the first of their results is used.
    loads_in_flight: int = 0
    #: Multiplications of two 32-bit integers with a 64-bit result.
    multiplies: int = 0
    instructions: int = 0
    #: Fused multiply-adds that may round otherwise than a product and a sum.
    fused: list[str] = field(default_factory=list)
    #: Products and sums that take subnormal numbers for zero.
    flushing: list[str] = field(default_factory=list)
    #: Waits until other threads see what was written.
    fences: list[str] = field(default_factory=list)


def _in_flight(instructions: Iterable[tuple[bool, list[str]]]) -> int:
    """How many loads of 16 bytes come before the first use of what one of them loads. Given for each instruction whether
    it is such a load, and the registers it names; a load's first is what it fills: R4 (to R7) or v[4:7]."""
    filled: set[int] = set()
    loads = 0
    for is_load, registers in instructions:
        ranges = [[int(number) for number in re.findall(r"\d+", name)] for name in registers]
        if any(number in filled for ends in ranges for number in range(ends[0], ends[-1] + 1)):
            break
        if is_load:
            filled |= set(range(ranges[0][0], ranges[0][0] + 4))
            loads += 1
    return loads


def _width(opcode: str) -> int:
    """The bits that one thread moves: LDG.E.128.CONSTANT -> 128."""
    for modifier in opcode.split("."):
        if modifier in ("256", "128", "64"):
            return int(modifier)
        if modifier in ("U16", "S16", "U8", "S8"):
            return int(modifier[1:])
    return 32


def _is_fused_noise(opcode: str, instruction: str) -> bool:
    if opcode.split(".")[0] not in _FUSED_SASS:
        return False
    is_constant = instruction.count("RZ") >= 2  # 0 * 0 + constant, a way to load one
    return not is_constant and not _HALF_TO_UNIFORM_SASS.search(instruction)


def from_sass(sass: str, resource_usage: str) -> MachineCode:
    """From what ``cuobjdump -sass`` and ``cuobjdump --dump-resource-usage`` print of one function."""
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", resource_usage)}
    code = MachineCode(used["REG"], used["STACK"] + used["LOCAL"], used["SHARED"])
    named: list[tuple[bool, list[str]]] = []
    has_waited = False
    for instruction in re.findall(r"/\*[0-9a-f]{4,}\*/\s+([^;/]*?)\s*;", sass):
        opcode = re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]
        name = opcode.split(".")[0]
        if name == "NOP":
            continue
        code.instructions += 1
        has_waited |= name == "DEPBAR" and any(is_load for is_load, _ in named)
        code.multiplies += name == "IMAD" and ("WIDE" in opcode or "HI" in opcode)
        if not has_waited:
            named.append((name in ("LDG", "LD") and _width(opcode) == 128, re.findall(r"\bR\d+", instruction)))
        if name in ("LDG", "LD"):
            code.loads[_width(opcode)] += 1
        elif name in ("STG", "ST"):
            code.stores[_width(opcode)] += 1
        elif name in ("LDL", "STL"):
            code.spill_bytes += _width(opcode) // 8
        elif name in ("MEMBAR", "CCTL"):
            code.fences.append(instruction)
        if _is_fused_noise(opcode, instruction):
            code.fused.append(instruction)
        if name in _ARITHMETIC_SASS and "FTZ" in opcode:
            code.flushing.append(instruction)
    code.loads_in_flight = _in_flight(named)
    return code


def from_amdgcn(assembly: str, ir: str) -> MachineCode:
    """From the assembly of one kernel and the LLVM IR that it was made from."""

    def of(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", assembly).group(1))  # type: ignore[union-attr]

    spills = 4 * (of("vgpr_spill_count") + of("sgpr_spill_count")) + of("private_segment_fixed_size")
    code = MachineCode(of("vgpr_count"), spills, of("group_segment_fixed_size"))
    fused = []
    named: list[tuple[bool, list[str]]] = []
    has_waited = False
    for instruction in re.findall(r"^\s+((?:v|s|ds|buffer|global|flat)_[^;\n]*)", assembly, re.MULTILINE):
        code.instructions += 1
        opcode = instruction.split()[0]
        code.multiplies += opcode.startswith(("v_mad_u64_u32", "v_mad_co_u64_u32", "v_mul_hi_u32", "v_mul_lo_u32"))
        if memory := _AMDGCN_MEMORY.match(opcode):
            (code.loads if memory[1] == "load" else code.stores)[_AMDGCN_BITS[memory[2].split("_")[0]]] += 1
        is_vector = bool(memory) and memory[0].endswith(("load_dwordx4", "load_b128"))  # type: ignore[index]
        waits = opcode == "s_wait_loadcnt" or (opcode == "s_waitcnt" and "vmcnt" in instruction)
        has_waited |= waits and any(is_load for is_load, _ in named)
        if not has_waited:
            named.append((is_vector, re.findall(r"\b[va](?:\d+|\[\d+:\d+\])", instruction)))
        for part in instruction.split(" :: "):  # gfx11 and later can have two operations in one instruction
            if (operation := _FUSED_AMDGCN.match(part)) and not _SUM_AMDGCN.match(part):
                fused += [part] * (2 if operation[1] else 1)
        if _AMDGCN_FENCE.match(instruction):
            code.fences.append(instruction)
    # Registers hold the constants here. So the exact ones are counted in the IR, and what is more comes from fusing.
    exact = sum(int(lanes or 1) for lanes in _HALF_TO_UNIFORM_IR.findall(ir))
    code.fused = fused[exact:]
    code.loads_in_flight = _in_flight(named)
    code.flushing = re.findall(r"\.amdhsa_float_denorm_mode_\w+ [012]\b", assembly)
    return code


def _sections(path: str, flag: str) -> dict[tuple[str, str], str]:
    """What cuobjdump prints of each function in a file of machine code, by architecture and mangled name."""
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, flag, path]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[tuple[str, str], list[str]] = {}
    architecture, lines = "", []
    for line in printed.splitlines():
        if match := re.match(r"arch = (sm_\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function ?:? (\w+)", line):
            lines = found[architecture, match[1]] = []
        else:
            lines.append(line)
    return {key: "\n".join(lines) for key, lines in found.items()}


def disassemble(path: str) -> list[tuple[str, str, MachineCode]]:
    """Architecture, mangled name and code of every kernel in a file of NVIDIA's machine code."""
    usage = _sections(path, "--dump-resource-usage")
    return [(*key, from_sass(sass, usage[key])) for key, sass in _sections(path, "-sass").items()]
