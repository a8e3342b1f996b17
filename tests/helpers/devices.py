"""What the tests run on: devices, backends and instruction sets.

Without a GPU, Triton kernels run in Triton's interpreter; or, with NEFT_KERNELS_TEST_GPU=90, compiled for GPUs of that
compute capability on the emulated GPU of ``gpu_doubles``. Which one is decided here, before anything imports triton.
"""

import contextlib
import os

import torch

HAS_GPU = torch.cuda.is_available()
EMULATED_GPU = None if HAS_GPU else os.environ.get("NEFT_KERNELS_TEST_GPU")
if not HAS_GPU and not EMULATED_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

from gpu_doubles.emulated_gpu.driver import emulated_gpu  # noqa: E402
from neft_kernels.ops.backends import extensions, switches  # noqa: E402

_for_the_session = contextlib.ExitStack()
if EMULATED_GPU:
    switches.interpret_triton = True  # so that CPU tensors are Triton's too
    gpu = _for_the_session.enter_context(emulated_gpu(int(EMULATED_GPU)))

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
DEVICES = ("cpu", "cuda") if HAS_GPU else ("cpu",)
#: What runs on CPU tensors: Triton does in its interpreter, which one cannot have beside a GPU's kernels.
CPU_BACKENDS = ("cpu", "reference") if HAS_GPU else ("cpu", "reference", "triton")


def kernels():
    """Every way to run the kernels here: (device, backend, instruction set or None)."""
    found = [("cpu", "triton", None)] if not HAS_GPU else [("cuda", "triton", None), ("cuda", "cuda", None)]
    return [*found, *(("cpu", "cpu", name) for name in ("avx512", "avx2", "portable"))]


@contextlib.contextmanager
def capped(instruction_set):
    """The CPU's kernels use no more than `instruction_set`; None changes nothing."""
    if instruction_set is None:
        yield
        return
    before = extensions["cpu"][0].instruction_set()
    extensions["cpu"][0].cap_instruction_set(instruction_set)
    try:
        yield
    finally:
        extensions["cpu"][0].cap_instruction_set(before)
