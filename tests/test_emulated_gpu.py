"""Contract of the emulated GPU: instructions compute what PTX says, and whatever a kernel must not do is an error."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from gpu_doubles.emulated_gpu import arithmetic, ptx
from gpu_doubles.emulated_gpu.arithmetic import Unsupported
from gpu_doubles.emulated_gpu.machine import Launch
from gpu_doubles.emulated_gpu.memory import Memory, MemoryFault, Threads

OUT, IN = 1 << 20, 1 << 30  # addresses


def run(body, given=None, *, threads=32, blocks=1, results=None, shared_bytes=0):
    """What a kernel of `body` stores: it finds its thread in %r0, and its own 8 bytes at %rd0 (out) and %rd1 (in)."""
    text = f"""
    .version 9.0
    .target sm_90
    .extern .shared .align 16 .b8 exchange[];
    .visible .entry kernel(.param .u64 out, .param .u64 given) {{
        .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<40>; .reg .f32 %f<9>; .reg .b64 %rd<20>; .reg .f64 %fd<9>;
        mov.u32 %r0, %tid.x;
        mov.u32 %r38, %ctaid.x;
        mov.u32 %r39, %ntid.x;
        mad.lo.s32 %r38, %r38, %r39, %r0;
        ld.param.u64 %rd0, [out];
        ld.param.u64 %rd1, [given];
        mad.wide.u32 %rd0, %r38, 8, %rd0;
        mad.wide.u32 %rd1, %r38, 8, %rd1;
        {body}
        ret;
    }}"""
    count = threads * blocks
    out = np.zeros(count if results is None else results, np.uint64)
    given = np.arange(count, dtype=np.uint64) if given is None else np.asarray(given).view(np.uint64)
    memories = {OUT: Memory("out", out.view(np.uint8)), IN: Memory("in", given.view(np.uint8))}
    parameters = np.array([OUT, IN], np.uint64).tobytes()
    Launch(ptx.parse(text)["kernel"], (blocks, 1, 1), (threads, 1, 1), parameters, memories, shared_bytes).run()
    return out


def store(register, kind="b32"):
    return f"st.global.{kind} [%rd0], {register};"


# --- arithmetic ------------------------------------------------------------------------------------------------------


def nearest_fp32(exact):
    """The fp32 number nearest to a fraction, ties to even."""
    below = np.float32(float(exact))  # close, so that one of its neighbours or itself is the one
    candidates = [np.nextafter(below, np.float32(way), dtype=np.float32) for way in (-np.inf, np.inf)] + [below]
    return min(candidates, key=lambda each: (abs(Fraction(float(each)) - exact), each.view(np.uint32) & 1))


def test_a_fused_multiply_add_rounds_once():
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((2, 4000)).astype(np.float32)
    # Sums that cancel, and sums whose product is far below the last place of the addend, on a tie or next to one.
    c = np.where(generator.random(4000) < 0.5, -(a * b), 2.0 ** generator.integers(0, 40, 4000)).astype(np.float32)
    # Just below a tie, by less than fp64 can tell.
    a[:1000], b[:1000] = 1 - 2.0**-23, (1 + 2.0**-23) * 2.0**-24
    c[:1000] = 1 + generator.integers(0, 1 << 20, 1000).astype(np.float32) * np.float32(2.0**-23)
    got = arithmetic.fma(a, b, c)
    for x, y, z, result in zip(*(each.tolist() for each in (a, b, c, got)), strict=True):
        assert result == nearest_fp32(Fraction(x) * Fraction(y) + Fraction(z))
    assert (got != (a * b + c)).any()
    twice_rounded = (a.astype(np.float64) * b + c).astype(np.float32)
    assert (got != twice_rounded).any()


def test_rounding_to_bf16():
    bits = np.concatenate([np.arange(0, 1 << 32, 65521), (np.arange(1 << 16) << 16) | 0x8000]).astype(np.uint32)
    values = bits.view(np.float32)
    expected = torch.from_numpy(values).bfloat16()
    got = torch.from_numpy(arithmetic.round_to_bf16(values).view(np.int16)).view(torch.bfloat16)
    assert ((got == expected) | (got.isnan() & expected.isnan())).all()


M1 = 0xFFFFFFFF
CASES = {  # what is stored of thread 5, and how it is computed
    "add wraps around": (4, "add.s32 %r1, %r0, -1;"),
    "sub": (M1, "sub.s32 %r1, %r0, 6;"),
    "mul.lo": (5 * 0x10001 * 0x10001 & M1, "mul.lo.s32 %r1, %r0, 0x10001; mul.lo.s32 %r1, %r1, 0x10001;"),
    "mul.hi is unsigned": (4, "mul.hi.u32 %r1, %r0, -1;"),
    "mul.hi is signed": (M1, "mul.hi.s32 %r1, %r0, -1;"),
    "mul.wide is unsigned": (
        5 * M1 >> 32,
        "mul.wide.u32 %rd2, %r0, -1; shr.u64 %rd2, %rd2, 32; cvt.u32.u64 %r1, %rd2;",
    ),
    "mul.wide is signed": (M1, "mul.wide.s32 %rd2, %r0, -1; shr.u64 %rd2, %rd2, 32; cvt.u32.u64 %r1, %rd2;"),
    "mad.wide": (7, "mad.wide.u32 %rd2, %r0, 1, 2; cvt.u32.u64 %r1, %rd2;"),
    "shl of all bits": (0, "shl.b32 %r1, %r0, 32;"),
    "shr of all bits": (0, "shr.u32 %r1, %r0, 40;"),
    "shr keeps the sign": (M1, "neg.s32 %r1, %r0; shr.s32 %r1, %r1, 40;"),
    "bfe": (2, "bfe.u32 %r1, %r0, 1, 2;"),
    "bfe of a sign": (M1 - 1, "bfe.s32 %r1, %r0, 1, 2;"),
    "popc": (2, "popc.b32 %r1, %r0;"),
    "prmt": (0x05000005, "prmt.b32 %r1, %r0, %r0, 0x0114;"),
    "prmt of a sign": (0xFF, "prmt.b32 %r1, 0x80, 0, 0x4448;"),
    "min is signed": (M1, "min.s32 %r1, %r0, -1;"),
    "min is unsigned": (5, "min.u32 %r1, %r0, -1;"),
    "setp is signed": (0, "setp.lt.s32 %p1, %r0, -1; selp.b32 %r1, 1, 0, %p1;"),
    "setp is unsigned": (1, "setp.lt.u32 %p1, %r0, -1; selp.b32 %r1, 1, 0, %p1;"),
    "predicates": (1, "setp.eq.s32 %p1, %r0, 5; not.pred %p2, %p1; or.pred %p1, %p1, %p2; selp.b32 %r1, 1, 0, %p1;"),
    "a NaN equals nothing": (0, "mov.f32 %f1, 0f7FC00000; setp.eq.f32 %p1, %f1, %f1; selp.b32 %r1, 1, 0, %p1;"),
    "a NaN differs, unordered": (1, "mov.f32 %f1, 0f7FC00000; setp.neu.f32 %p1, %f1, %f1; selp.b32 %r1, 1, 0, %p1;"),
    "cvt of a sign": (M1, "neg.s32 %r1, %r0; cvt.s64.s32 %rd2, %r1; shr.u64 %rd2, %rd2, 32; cvt.u32.u64 %r1, %rd2;"),
    "cvt to float rounds": (0x4B800002, "add.s32 %r1, %r0, 16777214; cvt.rn.f32.s32 %f1, %r1; mov.b32 %r1, %f1;"),
    "halves of a word": (5 << 16, "mov.b32 {%rs1, %rs2}, %r0; mov.b32 %r1, {%rs2, %rs1};"),
    "both halves converted": (0x3F804000, "cvt.rn.bf16x2.f32 %r1, 0f3F800000, 0f40000000;"),
    "pairs of floats": (
        0x40A00000,
        "mov.b64 %rd2, {0f00000000, 0f40A00000}; mov.b64 %rd3, 0; add.rn.f32x2 %rd2, %rd2, %rd3;"
        "shr.u64 %rd2, %rd2, 32; cvt.u32.u64 %r1, %rd2;",
    ),
    "a guard": (9, "mov.u32 %r1, 1; setp.eq.s32 %p1, %r0, 5; @%p1 mov.u32 %r1, 9; @!%p1 mov.u32 %r1, 8;"),
    "what was never written": (0xA5A5A5A5, "setp.eq.s32 %p1, %r0, 4; @%p1 mov.u32 %r1, 9;"),
    "another's guard": (8, "mov.u32 %r1, 1; setp.eq.s32 %p1, %r0, 4; @%p1 mov.u32 %r1, 9; @!%p1 mov.u32 %r1, 8;"),
}


@pytest.mark.parametrize("name", CASES)
def test_instructions(name):
    expected, body = CASES[name]
    assert run(body + store("%r1"))[5] == expected


# --- control ---------------------------------------------------------------------------------------------------------


def test_threads_part_and_meet_again():
    """Each thread takes as many turns as its number says, odd ones another way; then a shuffle needs them all."""
    body = """
        mov.u32 %r1, 0; mov.u32 %r2, 0;
        LOOP: setp.ge.u32 %p1, %r2, %r0; @%p1 bra DONE;
        and.b32 %r3, %r2, 1; setp.eq.s32 %p2, %r3, 1; @%p2 bra ODD;
        add.s32 %r1, %r1, 1; bra NEXT;
        ODD: add.s32 %r1, %r1, 100;
        NEXT: add.s32 %r2, %r2, 1; bra LOOP;
        DONE: shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1;"""
    own = [(n + 1) // 2 + 100 * (n // 2) for n in range(32)]
    assert run(body + store("%r4")).tolist() == [own[n ^ 1] for n in range(32)]


@pytest.mark.parametrize(
    ("instruction", "source"),
    [
        ("up.b32 %r1|%p1, %r0, 3, 0", lambda n: n - 3 if n >= 3 else None),
        ("down.b32 %r1|%p1, %r0, 3, 31", lambda n: n + 3 if n + 3 < 32 else None),
        ("bfly.b32 %r1|%p1, %r0, 9, 31", lambda n: n ^ 9),
        ("idx.b32 %r1|%p1, %r0, 9, 31", lambda n: 9),
        ("up.b32 %r1|%p1, %r0, 35, 0", lambda n: n - 3 if n >= 3 else None),  # five bits of a distance count
        ("up.b32 %r1|%p1, %r0, 1, 0x1800", lambda n: n - 1 if n % 8 else None),  # within eight lanes
    ],
)
def test_shuffles(instruction, source):
    body = f"shfl.sync.{instruction}, -1; selp.b32 %r2, 1000, 0, %p1; add.s32 %r1, %r1, %r2;"
    expected = [n if source(n) is None else source(n) + 1000 for n in range(32)]
    assert run(body + store("%r1"), threads=64).tolist() == expected + [
        n + 32 if source(n) is None else source(n) + 1032 for n in range(32)
    ]


def test_reductions_are_of_a_warp():
    assert run("redux.sync.add.s32 %r1, %r0, -1;" + store("%r1"), threads=64).tolist() == [496] * 32 + [1520] * 32
    assert run("redux.sync.max.s32 %r1, %r0, -1;" + store("%r1"), threads=64).tolist() == [31] * 32 + [63] * 32


MIRROR = """
    mov.u32 %r9, exchange; mad.lo.s32 %r1, %r0, 4, %r9; st.shared.b32 [%r1], %r38;
    {barrier}
    sub.s32 %r2, 63, %r0; mad.lo.s32 %r2, %r2, 4, %r9; ld.shared.b32 %r3, [%r2];"""


def test_a_barrier_orders_the_threads_of_a_block():
    got = run(MIRROR.format(barrier="bar.sync 0;") + store("%r3"), threads=64, blocks=3, shared_bytes=256)
    assert got.reshape(3, 64).tolist() == [[64 * block + 63 - n for n in range(64)] for block in range(3)]


MATRICES = """
    mov.u32 %r9, exchange; mad.lo.s32 %r1, %r0, 16, %r9;
    mul.lo.s32 %r2, %r0, 4; mov.b32 {%rs1, %rs2}, %r2; add.s32 %r3, %r2, 1;"""


def test_matrices():
    """Lane 8 i + r holds row r of matrix i; lane 4 r + c gets columns 2 c and 2 c + 1 of row r of each."""
    fill = "".join(
        f"add.s32 %r4, %r2, {pair}; st.shared.b32 [%r1+{4 * pair}], %r4;" for pair in range(4)
    )  # word number 4 * lane + pair
    load = "bar.sync 0; ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r5, %r6, %r7, %r8}, [%r1];"
    for matrix in range(4):
        got = run(MATRICES + fill + load + store(f"%r{5 + matrix}"), shared_bytes=512)
        assert got.tolist() == [32 * matrix + lane for lane in range(32)]
        # Transposed, row r of a matrix is its column: the halves 2 c and 2 c + 1 of it, of words that are small.
        got = run(MATRICES + fill + load.replace("x4", "x4.trans") + store(f"%r{5 + matrix}"), shared_bytes=512)
        halves = np.array([[[32 * matrix + 4 * row + pair, 0] for pair in range(4)] for row in range(8)]).reshape(8, 8)
        expected = [halves[2 * c, r] | halves[2 * c + 1, r] << 16 for r in range(8) for c in range(4)]
        assert got.tolist() == expected
    # And back: what one lane stores, the row's lane reads.
    values = "".join(f"add.s32 %r{5 + matrix}, %r0, {100 * matrix};" for matrix in range(4))
    back = (
        values
        + "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r1], {%r5, %r6, %r7, %r8}; bar.sync 0; ld.shared.b32 %r4, [%r1+8];"
    )
    assert run(MATRICES + back + store("%r4"), shared_bytes=512).tolist() == [
        100 * (lane // 8) + 4 * (lane % 8) + 2 for lane in range(32)
    ]


# --- what must not be --------------------------------------------------------------------------------------------------

SHARED = "mov.u32 %r9, exchange; mad.lo.s32 %r1, %r0, 4, %r9;"
FAULTS = {  # the error, and its cause
    "a write of 4 bytes outside": "st.global.b32 [%rd0+256], %r0;",
    "a read of 8 bytes outside": "ld.global.b64 %rd2, [%rd1-8];",
    "where there is no tensor": "mov.b64 %rd2, 64; ld.global.b64 %rd2, [%rd2];",
    "no multiple": "ld.global.b32 %r1, [%rd1+2];",
    "no multiple ": "ld.global.v2.b64 {%rd2, %rd3}, [%rd1];",
    "outside shared memory": SHARED + "st.shared.b32 [%r1+256], %r0;",
    "before anything was written": SHARED + "ld.shared.b32 %r2, [%r1];",
    "races with a write": MIRROR.format(barrier=""),
    "races with a read": MIRROR.format(barrier="bar.sync 0;") + "st.shared.b32 [%r1], %r3;",
    "races with a write by another": "st.global.b32 [%rd0], %r0; @%p1 ret; ld.global.b32 %r1, [%rd0+8];",
    "two threads write the same byte": "ld.param.u64 %rd2, [out]; st.global.b32 [%rd2], %r0;",
    "two threads write the same byte of shared": SHARED + "st.shared.b32 [%r9], %r0;",
    "an addition of out by thread 40 races with a write": "ld.param.u64 %rd2, [out]; setp.eq.s32 %p1, %r38, 0;"
    "setp.eq.s32 %p2, %r38, 40; @%p1 st.global.b32 [%rd2], %r0; @%p1 red.global.cta.relaxed.add.u32 [%rd2], 1;"
    "@%p2 red.global.cta.relaxed.add.u32 [%rd2], 1;",
    "a write of out by thread 64 races with a read": "ld.param.u64 %rd2, [out]; ld.global.b32 %r1, [%rd2]; bar.sync 0;"
    "setp.eq.s32 %p1, %r38, 64; @%p1 ld.global.b32 %r1, [%rd2]; bar.sync 0; @%p1 st.global.b32 [%rd2], %r0;",
    "only atomically within a block": "ld.param.u64 %rd2, [out]; red.global.cta.relaxed.add.u32 [%rd2], 1;",
}


@pytest.mark.parametrize("message", FAULTS)
def test_memory_is_watched(message):
    body = "setp.eq.s32 %p1, %r0, 63;" + FAULTS[message]
    with pytest.raises(MemoryFault, match=message.strip()):
        run(body, threads=64, blocks=2, results=128 if "outside" not in message else 96, shared_bytes=256)


@pytest.mark.parametrize("add", ["red.global.cta.relaxed.add.u32 ", "atom.global.cta.relaxed.add.u32 %r9, "])
def test_additions_within_a_block_are_no_race(add):
    body = f"ld.param.u64 %rd2, [out]; mad.wide.u32 %rd2, %r38, 0, %rd2; {add}[%rd2], %r0;"
    assert run(body, threads=64, results=1).tolist() == [2016]
    for reader in ("", "setp.eq.s32 %p1, %r0, 63; @%p1 "):  # the thread whose addition came last is no exception
        with pytest.raises(MemoryFault, match="races with an addition"):
            run(body + reader + "ld.global.b32 %r1, [%rd2];", threads=64, results=1)
    assert run(body + "bar.sync 0; ld.global.b32 %r1, [%rd2];", threads=64, results=1).tolist() == [2016]


UNSUPPORTED = {  # what it says, and of what
    "mul.f32": "mov.f32 %f1, 0f3F800000; mul.f32 %f1, %f1, %f1;",  # an assembler may fuse it with a sum
    "add.ftz.f32": "mov.f32 %f1, 0f3F800000; add.ftz.f32 %f1, %f1, %f1;",
    "add.rn.ftz.f32": "mov.f32 %f1, 0f3F800000; add.rn.ftz.f32 %f1, %f1, %f1;",
    "sin.approx.f32": "mov.f32 %f1, 0f3F800000; sin.approx.f32 %f1, %f1;",
    "how it rounds": "cvt.rz.f32.s32 %f1, %r0;",
    "which nothing has written": "add.s32 %r1, %r2, 1;",
    "this kind of barrier": "bar.sync 1;",
    "the modifiers": "ld.global.nc.b32 %r1, [%rd1];",
    "a constant of 64 bits as f32": "mov.f32 %f1, 0d3FF0000000000000;",
    "%r0 as s64": "add.s64 %rd2, %r0, 1;",
    "a generic address": "ld.b32 %r1, [%rd1];",
    "what was there before": "atom.global.cta.add.u32 %r1, [%rd0], %r0; add.s32 %r2, %r1, 1;",
    "an exchange within a part": "shfl.sync.up.b32 %r1, %r0, 1, 0, 0xFFFF;",
    "an exchange that a warp meets": "sub.s32 %r2, %r0, 16; setp.lt.u32 %p1, %r2, 32; @%p1 redux.sync.add.s32 %r1, %r0, -1;",
    "a barrier that a warp meets in parts": "setp.lt.s32 %p1, %r0, 7; @%p1 bar.sync 0;",
}


@pytest.mark.parametrize("message", UNSUPPORTED)
def test_what_it_does_not_know_it_refuses(message):
    with pytest.raises(Unsupported, match=message):
        run(UNSUPPORTED[message], threads=64)


def test_a_launch_that_no_gpu_would_make():
    kernel = ptx.parse(".target sm_90\n.entry kernel(.param .u64 out) { ret; }")["kernel"]
    for grid, threads, parameters, message in (
        ((1, 65536, 1), (32, 1, 1), bytes(8), "grid"),
        ((0, 1, 1), (32, 1, 1), bytes(8), "grid"),
        ((1, 1, 1), (2048, 1, 1), bytes(8), "threads"),
        ((1, 1, 1), (32, 1, 1), bytes(4), "parameters"),
    ):
        with pytest.raises(ValueError, match=message):
            Launch(kernel, grid, threads, parameters, {})


def test_writes_are_counted_to_the_end():
    memory = Memory("a byte", np.zeros(1, np.uint8))
    one = np.ones(1, np.int32)
    for _ in range(257):
        memory.store(np.zeros(1, np.int64), np.zeros((1, 1), np.uint8), Threads(one, one, one))
    assert memory.times_written == [255]
