"""Contract: the backend that runs is the one asked for, else the first in order of preference that can; never in silence."""

import logging
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from neft_kernels import available_backends
from neft_kernels.ops import backends
from neft_kernels.ops.backends import choose_backend
from neft_kernels.ops.magnitude import magnitude_kernel
from neft_kernels.ops.registration import OVERLOADS


@pytest.mark.cpu_extension
def test_available_backends_and_the_automatic_choice(caplog, monkeypatch):
    found = {backend.name: backend for backend in available_backends()}
    assert tuple(found) == backends.BACKENDS
    assert [backend.name for backend in found.values() if "cpu" in backend.chosen_for] == ["cpu"]
    assert found["reference"].devices
    assert all(backend.detail for backend in found.values())

    monkeypatch.setattr(backends, "_chosen", {})
    with caplog.at_level(logging.INFO, logger="neft_kernels"):
        choose_backend("cpu")
        choose_backend("cpu")
    assert [record.message for record in caplog.records] == [f"backend 'cpu' for cpu tensors: {found['cpu'].detail}"]


def test_without_the_extension_the_reference_is_chosen_with_a_warning(monkeypatch, caplog):
    """It is slower than the hook that the package replaces. Who asks for it has asked for it."""
    monkeypatch.setitem(backends.extensions, "cpu", (None, "not built"))
    monkeypatch.setattr(backends, "_chosen", {})
    with caplog.at_level(logging.WARNING, logger="neft_kernels"):
        assert choose_backend("cpu") == "reference"
        assert choose_backend("cpu") == "reference"
        assert choose_backend("cpu", "reference") == "reference"
        assert choose_backend("meta") == "reference"
    (record,) = caplog.records
    assert record.message == "backend 'reference' for cpu tensors: plain torch; slow; cpu: not built"
    with pytest.raises(RuntimeError, match=r"backend='cpu' cannot run here \(not built"):
        choose_backend("cpu", "cpu")


@pytest.fixture
def machine(monkeypatch):
    """Pretends that a machine has a GPU, Triton, the extensions, and what the switches say."""

    def pretend(gpu=False, triton=False, cuda=None, cpu=None, interpret=False, preferred=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(backends, "TRITON_INSTALLED", triton)
        monkeypatch.setattr(backends.switches, "interpret_triton", interpret)
        monkeypatch.setattr(backends.switches, "backend", preferred)
        monkeypatch.setitem(backends.extensions, "cpu", (cpu, "" if cpu else "the reason for the CPU"))
        monkeypatch.setitem(backends.extensions, "cuda", (cuda, "" if cuda else "the reason for CUDA"))
        backends.forget_choices()

    yield pretend
    backends.forget_choices()


NO_TRITON = 'triton is not installed: pip install "neft-kernels[triton]"'
CPU_EXTENSION, CUDA_EXTENSION = SimpleNamespace(instruction_set=lambda: "avx2"), SimpleNamespace()
ALL = {"gpu": True, "triton": True, "cuda": CUDA_EXTENSION, "cpu": CPU_EXTENSION}
#: What a machine has, the choices for CPU and CUDA tensors, and what is said of each backend.
MACHINES = {
    "all": (ALL, "cpu", "triton", ["just-in-time compiled", "CUDA C++", "avx2", "plain torch"]),
    "nothing": (
        {},
        "reference",
        None,
        [NO_TRITON, "the reason for CUDA", "the reason for the CPU", "plain torch"],
    ),
    "no GPU": ({**ALL, "gpu": False}, "cpu", None, ["no GPU", "no GPU", "avx2", "plain torch"]),
    "no Triton": (
        {**ALL, "triton": False},
        "cpu",
        "cuda",
        [NO_TRITON, "CUDA C++", "avx2", "plain torch"],
    ),
    "a GPU alone": (
        {"gpu": True},
        "reference",
        "reference",
        [NO_TRITON, "the reason for CUDA", "the reason for the CPU", "plain torch"],
    ),
    "Triton interpreted": (
        {**ALL, "interpret": True, "cuda": None},
        "cpu",
        "reference",
        ["interpreted, because TRITON_INTERPRET=1", "the reason for CUDA", "avx2", "plain torch"],
    ),
    "one preferred": (
        {**ALL, "preferred": "reference"},
        "reference",
        "reference",
        ["just-in-time compiled", "CUDA C++", "avx2", "plain torch"],
    ),
}


@pytest.mark.parametrize("name", MACHINES)
def test_the_choice_on_other_machines(machine, name):
    has, on_cpu, on_gpu, details = MACHINES[name]
    machine(**has)
    assert choose_backend("cpu") == on_cpu
    chosen = {device: backend.name for backend in available_backends() for device in backend.chosen_for}
    assert chosen == {"cpu": on_cpu} | ({"cuda": on_gpu} if on_gpu else {})
    assert not on_gpu or choose_backend("cuda") == on_gpu
    for backend, detail in zip(available_backends(), details, strict=True):
        assert backend.detail.startswith(detail)
    assert magnitude_kernel("cpu", None) is OVERLOADS["token_magnitude"].get(on_cpu)
    assert magnitude_kernel("cuda", None) is OVERLOADS["token_magnitude"].get(on_gpu)


def test_what_is_asked_for_comes_before_what_is_preferred(machine):
    machine(**ALL, preferred="triton")
    assert choose_backend("cuda") == "triton"
    assert choose_backend("cuda", "cuda") == "cuda"
    assert magnitude_kernel("cuda", "cuda") is None
    assert magnitude_kernel("cpu", "cpu") is OVERLOADS["token_magnitude"]["cpu"]
    assert magnitude_kernel("cpu", None) is None  # of Triton's, which does not run there
    with pytest.raises(RuntimeError, match=r"backend='triton' runs on cuda tensors, not on cpu ones \(just-in-time"):
        choose_backend("cpu")


def test_on_any_other_device_it_is_the_reference_with_a_warning(machine, caplog):
    """Which is slower there too than the hook that the package replaces."""
    machine(**ALL)
    choose_backend("mps", "reference")
    assert not caplog.records
    choose_backend("mps")
    (record,) = caplog.records
    assert (record.levelname, record.message) == (
        "WARNING",
        "backend 'reference' for mps tensors: plain torch; slow; there is no kernel for mps devices",
    )
    assert choose_backend("mps") == choose_backend("mps", "reference") == "reference"
    with pytest.raises(RuntimeError, match=r"backend='cpu' runs on cpu tensors, not on mps ones \(avx2\)"):
        choose_backend("mps", "cpu")


@pytest.mark.parametrize(("vendors", "expected"), [(("nvidia", "intel"), "triton"), (("nvidia", "amd"), "reference")])
def test_triton_serves_intel_gpus_where_it_says_that_it_can(machine, monkeypatch, caplog, vendors, expected):
    machine(triton=True)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(backends, "triton_has", lambda vendor: vendor in vendors)
    assert choose_backend("xpu") == expected
    assert [record.levelname for record in caplog.records] == (["WARNING"] if expected == "reference" else [])
    assert magnitude_kernel("xpu", None) is OVERLOADS["token_magnitude"].get(expected)
    assert ("xpu" in available_backends()[0].devices) == (expected == "triton")


def test_what_triton_compiles_for():
    assert backends.triton_has("nvidia")
    assert not backends.triton_has("no such vendor")


def test_only_the_automatic_choice_is_logged(machine, caplog):
    machine(cpu=CPU_EXTENSION)
    with caplog.at_level(logging.INFO, logger="neft_kernels"):
        choose_backend("cpu", "reference")
        assert not caplog.records
        choose_backend("cpu")
    assert len(caplog.records) == 1


@pytest.mark.cpu_extension
@pytest.mark.parametrize(
    ("switches", "expected"),
    [
        ({"NEFT_KERNELS_BACKEND": "reference"}, r"\+ reference .*, chosen for cpu tensors"),
        ({"NEFT_KERNELS_BACKEND": "", "NEFT_KERNELS_INSTRUCTION_SET": ""}, r"\+ cpu .*, chosen for cpu tensors"),
        ({"NEFT_KERNELS_INSTRUCTION_SET": "portable"}, r"\+ cpu +portable, chosen for cpu tensors"),
    ],
    ids=["backend", "empty", "instruction set"],
)
def test_switches_and_the_program_that_shows_the_choice(switches, expected):
    run = subprocess.run(
        [sys.executable, "-m", "neft_kernels"], env={**os.environ, **switches}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert re.search(expected, run.stdout), run.stdout


@pytest.mark.cpu_extension
def test_the_program_says_that_the_preferred_backend_cannot_run():
    run = subprocess.run(
        [sys.executable, "-m", "neft_kernels"],
        env={**os.environ, "NEFT_KERNELS_BACKEND": "cuda"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "NEFT_KERNELS_BACKEND=cuda names none that can run here" in run.stderr
    assert "+ cpu" in run.stdout
