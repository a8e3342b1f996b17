"""Compiled GPU kernels: the targets, what the machine code of each kernel may be, and the table of all of them."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from tools.machine_code import MachineCode

TURING = "sm_75"  # T4 and RTX 20; only the CUDA kernels, because Triton keeps fewer loads under way there
ARCHITECTURES = (80, 90, 100, 120)  # A100; H100 and H200; B200; RTX 5090
MAIN_TARGETS = (TURING, *(f"sm_{architecture}" for architecture in ARCHITECTURES), "gfx942")  # ... and MI300
#: Triton compiles for these too; of them, one table of each element type is looked at. RTX 3090; RTX 4090; B300; DGX Spark;
#: MI200; MI350; RX 7900; RX 9070.
OTHER_TARGETS = ("sm_86", "sm_89", "sm_103", "sm_121", "gfx90a", "gfx950", "gfx1100", "gfx1201")
TARGETS = (*MAIN_TARGETS, *OTHER_TARGETS)
# Of Triton's kernels, whose tiles are one row of 512 vectors, one of 128, and sixteen rows of 32.
WIDTHS = {
    "bfloat16": (4096, 1024, 768),
    "float16": (4096, 1024, 768),
    "float32": (4096, 512, 384),
    "float64": (4096, 256, 192),
}
#: Of one thread on NVIDIA's GPUs, for one call of Philox: a tenth more than the narrowest tiles need on sm_90.
MAX_INSTRUCTIONS = {"uniform": 160, "sign": 160, "gaussian": 315}
#: The same for symmetric noise, whose call of Philox is for 16 bytes of two rows. Two calls would need more.
MAX_SYMMETRIC_INSTRUCTIONS = {"uniform": 250, "sign": 250, "gaussian": 410}
#: More of them for a call in bfloat16 on Turing, which has no instruction that rounds to it.
ROUNDING_ON_TURING = 70
PHILOX_MULTIPLIES = 20  # wide ones, of a call
PAST_2_GIB = "past 2 GiB"  # variants whose table and output are that large
SYMMETRIC = "symmetric "  # begins the variants of symmetric noise; the CUDA kernels are the same for it
BYTES_PER_WARP_LANE = 64  # of a row, as the kernels divide the work; a wavefront of AMD has twice the lanes


def lanes(target: str) -> int:
    """The threads of a warp."""
    return 64 if target.startswith("gfx9") else 32


def widths_of(target: str, dtype: str, quick: bool) -> tuple[int, ...]:
    """The widths to check."""
    if target in OTHER_TARGETS:
        return WIDTHS[dtype][:1]
    return WIDTHS[dtype][:: 2 if quick else 1]


@dataclass(frozen=True)
class Kernel:
    target: str
    source: str  # "triton" or "cuda"
    op: str
    dtype: str
    variant: str  # which ids, which magnitude; or the path for rows that are not aligned
    code: MachineCode
    noise: str = "uniform"
    symmetric: bool = False

    @property
    def kind_of_noise(self) -> str:
        return f"symmetric {self.noise}" if self.symmetric else self.noise

    @property
    def unaligned(self) -> bool:
        return self.variant.startswith("unaligned")

    @property
    def row_vectors(self) -> int:
        return BYTES_PER_WARP_LANE // 16 * 32 // lanes(self.target)

    @property
    def more_registers(self) -> int:
        """That a thread may have, because all warps fit with 96 on gfx11 and later."""
        return 16 if self.target.startswith(("gfx11", "gfx12")) else 0

    @property
    def other_loads(self) -> int:
        """The seed, and the id and the magnitude of each row that a thread may have to do with."""
        return 1 + 2 * self.row_vectors

    @property
    def philox_calls(self) -> int:
        """For one thread. A call makes the noise of 16 bytes, CUDA's of 32 bytes in fp64, symmetric noise of two rows."""
        return self.row_vectors // (2 if self.symmetric or (self.dtype == "float64" and self.source == "cuda") else 1)


def complaints(kernel: Kernel, max_registers: int, max_multiplies: float) -> Iterator[str]:
    """What is wrong with a kernel, one sentence each."""
    code = kernel.code
    if code.spill_bytes and not (kernel.unaligned and kernel.target in OTHER_TARGETS):
        yield f"spills {code.spill_bytes} bytes of registers to memory"
    if code.fused:
        yield f"fuses a multiply-add {len(code.fused)} times, as in `{code.fused[0]}`: the noise rounds twice"
    if code.flushing:
        yield f"takes subnormal numbers for zero, as in `{code.flushing[0]}`"
    if code.fences:
        yield f"waits for its memory accesses to be seen, as in `{code.fences[0]}`"
    if kernel.unaligned:
        return  # right, but not fast
    if code.shared_bytes:
        yield f"uses {code.shared_bytes} bytes of shared memory, so data moves between threads"
    if code.registers > max_registers + kernel.more_registers:
        yield f"needs {code.registers} registers, more than {max_registers + kernel.more_registers}"
    if code.loads[128] != kernel.row_vectors or sum(code.loads.values()) - code.loads[128] > kernel.other_loads:
        yield f"loads rows not in {kernel.row_vectors} times 16 bytes, but by bits: {widths(code.loads)}"
    elif code.loads_in_flight < kernel.row_vectors and not kernel.variant.startswith(PAST_2_GIB):
        yield f"uses what it loads with {code.loads_in_flight} of {kernel.row_vectors} loads of 16 bytes under way"
    if set(code.stores) != {128}:
        yield f"stores rows not in 16 bytes at a time, but by bits: {widths(code.stores)}"
    # Symmetric noise has half as many calls, but as many rows to address.
    most = PHILOX_MULTIPLIES * kernel.philox_calls + (max_multiplies - PHILOX_MULTIPLIES) * kernel.row_vectors
    if code.multiplies > most:
        yield f"multiplies {code.multiplies} times in {kernel.philox_calls} calls of Philox, more than {most:g} times"
    budget = MAX_SYMMETRIC_INSTRUCTIONS if kernel.symmetric else MAX_INSTRUCTIONS
    rounding = ROUNDING_ON_TURING if kernel.target == TURING and kernel.dtype == "bfloat16" else 0
    most = (budget[kernel.noise] + rounding) * kernel.philox_calls
    if kernel.target.startswith("sm_") and code.instructions > most:
        yield f"has {code.instructions} instructions for {kernel.kind_of_noise} noise, more than {most}"


def widths(accesses: Counter) -> str:
    return " ".join(f"{bits}:{count}" for bits, count in sorted(accesses.items(), reverse=True)) or "none"


HEADER = (
    "target",
    "kernel",
    "op",
    "dtype",
    "noise",
    "path",
    "regs",
    "spill",
    "shared",
    "loads",
    "ahead",
    "stores",
    "mul",
    "instr",
    "fused",
)

LEGEND = """
loads, stores: bits:count, of one thread; the seed, the id and the magnitude are the loads of less than 128 bits. ahead: the
loads of 128 bits that are under way when what one of them loads is used. mul, instr: wide integer multiplications and all
instructions, for one call of Philox, that is for 16 bytes of a row (CUDA in fp64: 32; symmetric: of two rows). fused:
multiply-adds that could round otherwise than the contract says, so not the exact ones that make numbers of half-words."""


def print_table(kernels: list[Kernel]) -> None:
    """One row for all variants of a kernel: the largest of each number."""
    groups: dict[tuple[str, ...], list[Kernel]] = {}
    for kernel in kernels:
        path = "unaligned" if kernel.unaligned else "16 bytes"
        of_kernel = (kernel.target, kernel.source, kernel.op, kernel.dtype, kernel.kind_of_noise, path)
        groups.setdefault(of_kernel, []).append(kernel)
    rows: list[tuple[str, ...]] = [HEADER]
    for key, variants in groups.items():
        codes, calls = [kernel.code for kernel in variants], variants[0].philox_calls
        most = max(codes, key=lambda code: sum(code.loads.values()))
        rows.append(
            (
                *key,
                str(max(code.registers for code in codes)),
                str(max(code.spill_bytes for code in codes)),
                str(max(code.shared_bytes for code in codes)),
                widths(most.loads),
                str(min(code.loads_in_flight for code in codes)),
                widths(most.stores),
                f"{max(code.multiplies for code in codes) / calls:.1f}",
                f"{max(code.instructions for code in codes) / calls:.0f}",
                str(max(len(code.fused) for code in codes)),
            )
        )
    columns = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, columns, strict=True)).rstrip())
    print(LEGEND)
