"""A GPU that is not there: runs compiled kernels, PTX as Triton and nvcc make it, on the CPU's memory, and watches them.

Slow, but what runs is what a GPU's assembler gets, not an interpreter's idea of the source: rounding modes, predicates,
layouts, shuffles, shared memory and barriers are those of the compiled kernel. All threads of a launch advance together, as
numpy vectors. What compute-sanitizer would report is an error here: accesses outside the elements of a tensor, misaligned
ones, reads of shared memory that nobody wrote, and races between threads that no barrier orders. So is an instruction that
leaves its rounding open, because an assembler may then fuse a product and a sum.

    ptx.py          text -> instructions
    arithmetic.py   what an instruction computes
    memory.py       global and shared memory under watch
    registers.py    those of all threads            threads.py   blocks, warps and lanes
    accesses.py     loads and stores                exchange.py  shuffles and reductions
    machine.py      a launch: branches and barriers
    driver.py       Triton's launches, sent there

It knows the instructions that this package's kernels have, and refuses all others by name. Semantics: PTX ISA 9.0, chapter 9.
"""
