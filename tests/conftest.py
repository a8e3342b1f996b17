"""What all tests share.

Without a GPU, Triton kernels run in Triton's interpreter; or, with NEFT_KERNELS_TEST_GPU=90, compiled for GPUs of that
compute capability on the emulated GPU beside this file.
"""

import contextlib
import os
import shutil

import torch

HAS_GPU = torch.cuda.is_available()
EMULATED_GPU = None if HAS_GPU else os.environ.get("NEFT_KERNELS_TEST_GPU")
if not HAS_GPU and not EMULATED_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, so before anything else

import pytest  # noqa: E402
from emulated_gpu.driver import emulated_gpu  # noqa: E402

from neft_kernels import available_backends, ops  # noqa: E402
from neft_kernels.native_backend import NOT_BUILT  # noqa: E402

_for_the_session = contextlib.ExitStack()
if EMULATED_GPU:
    ops._INTERPRET_TRITON = True  # so that CPU tensors are Triton's too
    gpu = _for_the_session.enter_context(emulated_gpu(int(EMULATED_GPU)))

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
DEVICES = ("cpu", "cuda") if HAS_GPU else ("cpu",)
#: What runs on CPU tensors: Triton does in its interpreter, which one cannot have beside a GPU's kernels.
CPU_BACKENDS = ("cpu", "reference") if HAS_GPU else ("cpu", "reference", "triton")
NO_GPU = "no GPU on this machine"
NO_INDEX = "no package index can be reached"
_cpu = {backend.name: backend.detail for backend in available_backends()}["cpu"]
NO_CPU_EXTENSION = _cpu if _cpu.startswith(NOT_BUILT) else None

# Two processes run the suite side by side; one alone may use two threads.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_addoption(parser):
    parser.addoption(
        "--all-architectures", action="store_true", help="every architecture of transformers, not a sample"
    )
    parser.addoption(
        "--more-examples", type=int, default=1, help="so many times the examples of each property test, drawn anew"
    )
    parser.addoption(
        "--need-extension", action="store_true", help="an error where the CPU extension is not built, instead of skips"
    )


# Each of these needs what a machine may lack without anything being wrong with it.
collect_ignore = [] if EMULATED_GPU else ["test_compiled_triton.py", "test_gpu_programs.py"]
if shutil.which("nvcc") is None:
    collect_ignore.append("test_compiled_cuda.py")

#: Options that test modules read when they are imported.
OPTIONS = {}


def pytest_configure(config):
    OPTIONS["more_examples"] = config.getoption("--more-examples")
    if NO_CPU_EXTENSION and config.getoption("--need-extension"):
        raise pytest.UsageError(f"--need-extension: {NO_CPU_EXTENSION}")


def needs_the_cpu_extension(item):
    """Marked so, or a test of the backend "cpu" among others."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    named = {parameters.get("backend"), parameters.get("computed_by"), *parameters.get("kernel", ())[1:2]}
    return item.get_closest_marker("cpu_extension") is not None or "cpu" in named


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason=NO_GPU))
        elif NO_CPU_EXTENSION and needs_the_cpu_extension(item):
            item.add_marker(pytest.mark.skip(reason=NO_CPU_EXTENSION))


#: What a machine may lack, and how many tests that skipped.
EXPECTED_SKIPS = {reason: 0 for reason in (NO_GPU, NO_CPU_EXTENSION, NO_INDEX) if reason}
_unexpected_skips = []


def pytest_runtest_logreport(report):
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    for reason in EXPECTED_SKIPS:
        if reason in str(report.longrepr):
            EXPECTED_SKIPS[reason] += 1
            return
    _unexpected_skips.append(report.nodeid)


def pytest_sessionfinish(session, exitstatus):
    """A skip for any other reason fails the run: what cannot run here must not look as if it had."""
    if _unexpected_skips and exitstatus == 0:
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter):
    if "test_compiled_cuda.py" in collect_ignore:
        terminalreporter.write_line("nvcc is not on the PATH: test_compiled_cuda.py WAS NOT RUN", yellow=True)
    for reason, skipped in EXPECTED_SKIPS.items():
        if skipped and reason != NO_GPU:
            terminalreporter.write_line(f"{skipped} tests WERE NOT RUN: {reason}", yellow=True)
    for nodeid in _unexpected_skips:
        terminalreporter.write_line(f"FAILED: skipped, but should have run: {nodeid}", red=True)


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
    before = ops._cpu_extension.instruction_set()
    ops._cpu_extension.cap_instruction_set(instruction_set)
    try:
        yield
    finally:
        ops._cpu_extension.cap_instruction_set(before)


@pytest.fixture(params=kernels(), ids=lambda kernel: "-".join(filter(None, kernel)))
def kernel(request):
    """A (device, backend) pair, with the CPU's instruction set capped as the parameter says."""
    device, backend, instruction_set = request.param
    with capped(instruction_set):
        yield device, backend


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """The CUDA kernels' own code, compiled for the host."""
    import cuda_emulation

    return cuda_emulation.build(tmp_path_factory.mktemp("cuda_emulation"))


@pytest.fixture
def poisoned_memory():
    """New tensors are full of NaN, so that an element that a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def equal_bits(a, b):
    """Whether two tensors are equal bit for bit, any NaN being equal to any other."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = a.cpu(), b.cpu()
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    same = a.contiguous().view(integers) == b.contiguous().view(integers)
    return bool((same | (a.isnan() & b.isnan())).all())
