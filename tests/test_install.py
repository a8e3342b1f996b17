"""What a user gets from `pip install`: pure Python without torch at build time, the CPU kernels with it, and an error
wherever the kernels were asked for and cannot be built.

Slow: about a minute, most of it for compiling the kernels once (`compiled`). Every build runs in a copy of the tracked
files, every check of its outcome in a fresh interpreter that starts elsewhere and sees the unpacked wheel only.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("install")  # shares `source_distribution` and `compiled`

REPOSITORY = Path(__file__).parent.parent
VECTORS = REPOSITORY / "tests" / "vectors" / "contract_vectors.json"
# Mangled names, and those of their types and tables, in torch's namespaces.
CPP_OF_TORCH = re.compile(r"_Z(T[ISTV])?(NK?)?(2at|3c10|5torch|8pybind11)")
# The newest versions of the system's symbols that manylinux_2_28 allows.
NEWEST_SYMBOLS = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
NO_COMPILER = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}

USE = """
import json, sys
# An editable installation of the repository finds submodules for other copies of the package too.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import torch
import neft_kernels

backend, vectors = sys.argv[1:]
noise = []
for case in json.load(open(vectors))["cases"]:
    u = torch.tensor(case["numerators"]) * (2.0**-16 if case["bits"] == 16 else 2.0**-23)
    ids = torch.zeros(len(u), dtype=torch.int64)
    where = {name: case[name] for name in ("seed", "stream", "first_token")}
    for dtype in (torch.float16, torch.bfloat16) if case["bits"] == 16 else (torch.float32, torch.float64):
        weight = torch.zeros(1, case["embedding_dim"], dtype=dtype)
        out = neft_kernels.noisy_embedding(ids, weight, 1.0, backend=backend or None, **where)
        noise.append(torch.equal(out, u.to(dtype)))

def error(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

weight = torch.zeros(3, 4)
nan = torch.tensor([float("nan")])
print(json.dumps({
    "file": neft_kernels.__file__,
    "backends": {b.name: [b.devices, b.chosen_for, b.detail] for b in neft_kernels.available_backends()},
    "noise": noise,
    "cpu": error(lambda: neft_kernels.noisy_embedding(torch.tensor([0]), weight, 1.0, backend="cpu")),
    "index": error(lambda: neft_kernels.noisy_embedding(torch.tensor([3]), weight, 1.0, backend=backend or None)),
    "nan": error(lambda: neft_kernels.noisy_embedding(torch.tensor([0]), weight, nan, backend=backend or None)),
}))
"""


def environment(**variables):
    """This process's variables without those that would lead a build or an import elsewhere."""
    ours = ("NEFT_KERNELS_", "TRITON_", "PYTHON", "CUDA_HOME")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)} | variables


def run(*arguments, cwd, **variables):
    """Runs Python; stdout and stderr are one text on `stdout`."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def build(source, out, *options, **variables):
    """`pip wheel`; see `run`."""
    arguments = ("-m", "pip", "wheel", ".", "--no-deps", "--disable-pip-version-check", "--wheel-dir", out)
    return run(*arguments, *options, cwd=source, **variables)


def only_wheel(done, out):
    assert done.returncode == 0, done.stdout
    (wheel,) = out.glob("*.whl")
    return wheel


def unpack(wheel, folder):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
        return {Path(name).name for name in archive.namelist()}


def use(installed, elsewhere, backend):
    """What the package in `installed` does when it is imported from `elsewhere`."""
    elsewhere.mkdir()
    (elsewhere / "use.py").write_text(USE)
    done = subprocess.run(
        [sys.executable, "use.py", backend, VECTORS],
        cwd=elsewhere,
        env=environment(PYTHONPATH=str(installed)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert Path(outcome["file"]).parent == installed / "neft_kernels"
    return outcome


def check_pure(outcome):
    """The reference serves tensors on the CPU, and the CPU kernels say why they do not."""
    devices, chosen_for, detail = outcome["backends"]["cpu"]
    assert (devices, chosen_for) == ([], [])
    assert "not built" in detail
    assert detail.endswith("NEFT_KERNELS_BUILD=cpu pip install --no-build-isolation .")
    assert "cpu" in outcome["backends"]["reference"][1]
    assert outcome["cpu"].startswith("RuntimeError: backend='cpu' cannot run here (the extension was not built")
    check_works(outcome)


def check_works(outcome):
    assert outcome["noise"]
    assert all(outcome["noise"])
    assert outcome["index"].startswith("IndexError")
    assert outcome["nan"].startswith("ValueError")


@pytest.fixture
def source(tmp_path):
    return copy_of_tracked_files(tmp_path / "source")


def copy_of_tracked_files(folder):
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def source_distribution(tmp_path_factory):
    """Unpacked, and made where nothing is known of torch, as on a machine that only publishes."""
    source, out = copy_of_tracked_files(tmp_path_factory.mktemp("sdist") / "source"), tmp_path_factory.mktemp("out")
    hook = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    done = run("-c", hook, out, cwd=source, NEFT_KERNELS_BUILD="0")
    assert done.returncode == 0, done.stdout
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(out, filter="data")
    return out / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def compiled(source_distribution, tmp_path_factory):
    """The wheel with the kernels, from the source distribution."""
    out = tmp_path_factory.mktemp("compiled")
    return only_wheel(build(source_distribution, out, "--no-build-isolation", NEFT_KERNELS_BUILD="cpu"), out)


def test_the_source_distribution_has_what_its_readme_and_its_tests_name(source_distribution):
    readme = (source_distribution / "README.md").read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", readme)
    assert len(links) > 5
    for name in (
        *links,
        "Makefile",
        "tools/check_gpu.py",
        "benchmarks/report.py",
        "examples/instruction_tuning/train.py",
    ):
        assert (source_distribution / name).exists(), name


def test_a_build_without_torch_is_pure_python_and_works(source, tmp_path):
    """pip builds in isolation, with what pyproject.toml names: setuptools, and no torch."""
    wheel = only_wheel(build(source, tmp_path / "out"), tmp_path / "out")
    assert wheel.name.endswith("-py3-none-any.whl")
    files = unpack(wheel, tmp_path / "installed")
    assert "py.typed" in files
    assert not [name for name in files if name.endswith((".so", ".cpp", ".h"))]
    check_pure(use(tmp_path / "installed", tmp_path / "elsewhere", ""))


def test_asking_for_the_kernels_without_torch_is_an_error(source, tmp_path):
    """It names the switch, and what to do."""
    done = build(source, tmp_path / "out", NEFT_KERNELS_BUILD="1")
    assert done.returncode != 0
    assert "NEFT_KERNELS_BUILD=1, but torch cannot be imported" in done.stdout
    assert "--no-build-isolation" in done.stdout


def test_the_source_distribution_has_every_source(source_distribution):
    def below(folder):
        return {path.relative_to(folder) for path in (folder / "csrc").rglob("*") if path.is_file()}

    tracked = subprocess.run(["git", "ls-files", "csrc"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert below(source_distribution) == set(map(Path, tracked.stdout.split()))
    assert {".h", ".cpp"} <= {path.suffix for path in below(source_distribution)}


def test_the_compiled_wheel_serves_every_python_and_works(compiled, tmp_path):
    """One binary for Python >= 3.10, with a backend of its own for tensors on the CPU."""
    assert "-cp310-abi3-" in compiled.name
    assert {"py.typed", "_C_cpu.abi3.so"} <= unpack(compiled, tmp_path / "installed")
    outcome = use(tmp_path / "installed", tmp_path / "elsewhere", "cpu")
    devices, chosen_for, _ = outcome["backends"]["cpu"]
    assert (devices, chosen_for) == (["cpu"], ["cpu"])
    assert outcome["cpu"] is None
    check_works(outcome)


def test_the_compiled_wheel_keeps_to_the_stable_abi(compiled, tmp_path):
    """It asks torch for C functions only: whatever else torch exports is C++, which changes from version to version."""
    unpack(compiled, tmp_path)
    extension = tmp_path / "neft_kernels" / "ops" / "_C_cpu.abi3.so"
    listed = subprocess.run(["nm", "-D", "--undefined-only", extension], capture_output=True, text=True, check=True)
    symbols = [line.split()[-1] for line in listed.stdout.splitlines()]
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    assert not [symbol for symbol in symbols if CPP_OF_TORCH.match(symbol)]


def test_a_cpp_symbol_of_torch_is_found():
    assert CPP_OF_TORCH.match("_ZN3c1019UndefinedTensorImpl10_singletonE")
    assert CPP_OF_TORCH.match("_ZNK2at10TensorBase8data_ptrIfEEPT_v")
    assert CPP_OF_TORCH.match("_ZTIN3c105ErrorE")
    assert not CPP_OF_TORCH.match("_ZNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEEC1Ev@GLIBCXX_3.4.26")
    assert not CPP_OF_TORCH.match("aoti_torch_get_dim")


def too_new(library):
    """The symbols that `library` asks for and that a system of manylinux_2_28 may lack."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    found = re.findall(r"(\S+)@([A-Z]+)_([\d.]+)$", listed.stdout, re.MULTILINE)
    assert found
    return [name for name, family, version in found if tuple(map(int, version.split("."))) > NEWEST_SYMBOLS[family]]


def test_the_compiled_wheel_asks_for_no_newer_system_than_manylinux_2_28(compiled, tmp_path):
    unpack(compiled, tmp_path)
    assert not too_new(tmp_path / "neft_kernels" / "ops" / "_C_cpu.abi3.so")


def test_torchs_newer_headers_ask_for_no_newer_system_either(tmp_path):
    """They call dlsym. Without csrc/glibc.cpp, a machine with a new glibc links it and what libstdc++ reads as they are."""
    uses = tmp_path / "uses.cpp"
    uses.write_text(
        "#include <dlfcn.h>\n#include <memory>\n"
        'extern "C" void* uses(std::shared_ptr<int>& a) { auto b = a; return dlsym(RTLD_DEFAULT, "malloc"); }\n'
        "int main() { auto a = std::make_shared<int>(1); return uses(a) == nullptr || a.use_count() != 1; }\n"
    )
    ours = REPOSITORY / "csrc" / "glibc.cpp"
    for sources in ([uses], [uses, ours]):
        subprocess.run(["c++", "-O2", "-shared", "-fPIC", *sources, "-o", tmp_path / "uses.so"], check=True)
        newer = too_new(tmp_path / "uses.so")
        assert set(newer) <= ({"dlsym", "__libc_single_threaded"} if sources == [uses] else set())
    subprocess.run(["c++", "-O2", uses, ours, "-o", tmp_path / "uses"], check=True)
    subprocess.run([tmp_path / "uses"], check=True)


def test_a_symbol_that_is_too_new_is_found(compiled, tmp_path, monkeypatch):
    unpack(compiled, tmp_path)
    monkeypatch.setitem(NEWEST_SYMBOLS, "GLIBC", (2, 2))
    assert "memcpy" in too_new(tmp_path / "neft_kernels" / "ops" / "_C_cpu.abi3.so")


def test_asking_for_the_kernels_without_a_compiler_is_an_error(source, tmp_path):
    done = build(source, tmp_path / "out", "--no-build-isolation", NEFT_KERNELS_BUILD="1", **NO_COMPILER)
    assert done.returncode != 0
    assert NO_COMPILER["CXX"] in done.stdout


def test_without_a_compiler_and_unasked_the_build_is_pure_python_and_works(source, tmp_path):
    wheel = only_wheel(build(source, tmp_path / "out", "--no-build-isolation", **NO_COMPILER), tmp_path / "out")
    assert not [name for name in unpack(wheel, tmp_path / "installed") if name.endswith(".so")]
    check_pure(use(tmp_path / "installed", tmp_path / "elsewhere", ""))
