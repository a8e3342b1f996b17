"""Options, markers and fixtures of all tests. What they import stands in ``helpers``."""

import os
import shutil

import pytest
import torch

pytest.register_assert_rewrite("helpers")

from helpers.devices import EMULATED_GPU, HAS_GPU, capped, kernels  # noqa: E402
from helpers.options import OPTIONS  # noqa: E402
from helpers.skips import EXPECTED_SKIPS, NO_CPU_EXTENSION, NO_GPU  # noqa: E402

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
collect_ignore = (
    []
    if EMULATED_GPU
    else ["test_compiled_triton.py", "test_triton_launch.py", "test_gpu_programs.py", "test_stand_in.py"]
)
if shutil.which("nvcc") is None:
    collect_ignore.append("test_compiled_cuda.py")


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
        marker = item.get_closest_marker("gpu")
        if marker and not HAS_GPU and not (EMULATED_GPU and marker.kwargs.get("stand_in")):
            item.add_marker(pytest.mark.skip(reason=NO_GPU))
        elif NO_CPU_EXTENSION and needs_the_cpu_extension(item):
            item.add_marker(pytest.mark.skip(reason=NO_CPU_EXTENSION))


_skipped = dict.fromkeys(EXPECTED_SKIPS, 0)
_unexpected_skips = []


def pytest_runtest_logreport(report):
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    for reason in EXPECTED_SKIPS:
        if reason in str(report.longrepr):
            _skipped[reason] += 1
            return
    _unexpected_skips.append(report.nodeid)


def pytest_sessionfinish(session, exitstatus):
    """A skip for any other reason fails the run: what cannot run here must not look as if it had."""
    if _unexpected_skips and exitstatus == 0:
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter):
    if "test_compiled_cuda.py" in collect_ignore:
        terminalreporter.write_line("nvcc is not on the PATH: test_compiled_cuda.py WAS NOT RUN", yellow=True)
    for reason, skipped in _skipped.items():
        if skipped and reason != NO_GPU:
            terminalreporter.write_line(f"{skipped} tests WERE NOT RUN: {reason}", yellow=True)
    for nodeid in _unexpected_skips:
        terminalreporter.write_line(f"FAILED: skipped, but should have run: {nodeid}", red=True)


@pytest.fixture(params=kernels(), ids=lambda kernel: "-".join(filter(None, kernel)))
def kernel(request):
    """A (device, backend) pair, with the CPU's instruction set capped as the parameter says."""
    device, backend, instruction_set = request.param
    with capped(instruction_set):
        yield device, backend


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """The CUDA kernels' own code, compiled for the host."""
    from gpu_doubles import cuda_emulation

    return cuda_emulation.build(tmp_path_factory.mktemp("cuda_emulation"))


@pytest.fixture
def stand_in():
    """A stand-in for a GPU, where there is none."""
    if HAS_GPU:
        yield None
        return
    from gpu_doubles.stand_in import stand_in_gpu

    with stand_in_gpu() as device:
        yield device


@pytest.fixture
def poisoned_memory():
    """New tensors are full of NaN, so that an element that a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
