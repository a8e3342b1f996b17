"""Importing the package is cheap and clean: it loads torch and nothing else, changes nothing, builds nothing.

What an import does is looked at from inside a fresh interpreter (`PROBE`); the checks judge the record that comes back.
Each check is also given the record of a small package that breaks its rule, and must object.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import neft_kernels

REPOSITORY = Path(__file__).parent.parent
LIMIT_MS = 50.0  # beyond `import torch`: the one wall-clock requirement of the project
ATTEMPTS = 7  # the best of them counts: another process can make an import slow, but nothing makes it fast

EXPORTED = {
    "NEFTuneEmbedding",
    "NoisyEmbedding",
    "add_noise",
    "available_backends",
    "describe",
    "no_noise",
    "noise_magnitude",
    "noisy_embedding",
    "replace_embeddings",
    "restore_embeddings",
    "set_alpha",
}

PROBE = """
import gc, importlib, json, sys, time

package, *loaded_before = sys.argv[1:]
for name in loaded_before:
    importlib.import_module(name)

def namespaces():
    # Every module and class of the packages loaded before, with what its names are bound to.
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in loaded_before or not hasattr(module, "__dict__"):
            continue
        found[id(module)] = name, module, dict(vars(module))
        for value in list(vars(module).values()):
            if isinstance(value, type) and value.__module__.partition(".")[0] in loaded_before:
                found[id(value)] = f"{value.__module__}.{value.__qualname__}", value, dict(vars(value))
    return list(found.values())

WRITING = 0o3  # the bits of open()'s flags that hold O_WRONLY and O_RDWR
PROCESSES = ("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn")
FILES = ("os.mkdir", "os.rename", "os.remove", "os.link", "os.symlink", "os.truncate", "shutil.copyfile")
effects = []

def watch(event, arguments):
    # An open by number comes after the one that made the number.
    writes = event in FILES or (event == "open" and arguments[2] & WRITING and not isinstance(arguments[0], int))
    if event in PROCESSES or (writes and "__pycache__" not in str(arguments[0])):
        effects.append(f"{event} {arguments[0]}")

modules, before = set(sys.modules), namespaces()
gc.freeze()  # what this probe has made is not to be collected while the import is timed
sys.addaudithook(watch)
started = time.perf_counter()
importlib.import_module(package)
milliseconds = 1e3 * (time.perf_counter() - started)
effects = list(effects)

new = sorted(set(sys.modules) - modules)
missing = object()
changed = []
for where, owner, names in before:
    for name in names.keys() | vars(owner).keys():
        old, now = names.get(name, missing), vars(owner).get(name, missing)
        # A submodule that is imported becomes an attribute of its package.
        if old is not now and not (old is missing and sys.modules.get(f"{where}.{name}", missing) is now):
            changed.append(f"{where}.{name}")
record = {"file": sys.modules[package].__file__, "modules": new, "changed": sorted(changed), "effects": effects}
print(json.dumps(record | {"milliseconds": milliseconds}))
"""


def record_of_import(package, folder, *loaded_before):
    """What importing `package` from `folder` does in a fresh interpreter after importing the modules named."""
    switches = ("NEFT_KERNELS_", "TRITON_", "PYTHON")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(switches)}
    environment["PYTHONPATH"] = str(folder)
    arguments = [sys.executable, "-c", PROBE, package, *loaded_before]
    done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert Path(record["file"]).is_relative_to(folder)
    return record


def foreign_modules(record, package):
    """Modules beyond the standard library and the package that were loaded, but not by `import torch`."""
    return [name for name in record["modules"] if name.partition(".")[0] not in {package, *sys.stdlib_module_names}]


def slowness(package, folder, *loaded_before):
    """None if one of ATTEMPTS imports keeps within LIMIT_MS, or else how long each took."""
    times = []
    while len(times) < ATTEMPTS:
        times.append(record_of_import(package, folder, *loaded_before)["milliseconds"])
        if times[-1] <= LIMIT_MS:
            return None
    return times


def undocumented(module):
    return [name for name in module.__all__ if not getattr(module, name).__doc__]


@pytest.fixture(scope="module")
def record():
    return record_of_import("neft_kernels", REPOSITORY, "torch")


@pytest.fixture
def bad_package(tmp_path):
    """Makes a package of one file that has the given source, and returns its folder."""

    def make(source):
        (tmp_path / "bad_package").mkdir()
        (tmp_path / "bad_package" / "__init__.py").write_text(source)
        return tmp_path

    return make


def test_import_loads_torch_and_nothing_else(record):
    """Neither triton nor transformers, nor parts of torch such as torch._dynamo that `import torch` leaves out."""
    assert "neft_kernels.ops" in record["modules"]
    assert foreign_modules(record, "neft_kernels") == []


def test_a_package_that_loads_more_is_found(bad_package):
    source = "import transformers, triton, torch._dynamo"
    found = record_of_import("bad_package", bad_package(source), "torch")
    assert {"transformers", "triton", "torch._dynamo"} <= set(foreign_modules(found, "bad_package"))


def test_import_builds_nothing(record):
    """No process is started and no file is written."""
    assert record["effects"] == []


@pytest.mark.parametrize(
    ("source", "event"),
    [
        ("import subprocess; subprocess.run(['true'])", "subprocess.Popen true"),
        ("open('built.txt', 'w').close()", "open built.txt"),
        ("import os; os.mkdir('built')", "os.mkdir built"),
    ],
)
def test_a_package_that_builds_is_found(bad_package, source, event):
    assert event in record_of_import("bad_package", bad_package(source))["effects"]


def test_import_patches_nothing():
    """Every module and class of torch and transformers has the attributes that it had; new are only our own ops."""
    parts = ("transformers.modeling_utils", "transformers.trainer", "transformers.integrations")
    found = record_of_import("neft_kernels", REPOSITORY, "torch", "transformers", *parts)
    assert found["changed"] == ["torch.ops.neft_kernels"]
    assert foreign_modules(found, "neft_kernels") == []


def test_a_package_that_patches_is_found(bad_package):
    """A method replaced, a function replaced, a name added, a name removed."""
    source = """
import torch
torch.nn.Embedding.forward = lambda self, input_ids: None
torch.nn.functional.embedding = print
torch.neftune = None
del torch.nn.functional.embedding_bag
"""
    found = record_of_import("bad_package", bad_package(source), "torch")
    assert found["changed"] == [
        "torch.neftune",
        "torch.nn.functional.embedding",
        "torch.nn.functional.embedding_bag",
        "torch.nn.modules.sparse.Embedding.forward",
    ]


def test_import_is_cheap():
    """At most 50 ms beyond `import torch`."""
    assert slowness("neft_kernels", REPOSITORY, "torch") is None


def test_a_package_that_is_slow_is_found(bad_package):
    source = f"import time\nend = time.perf_counter() + {LIMIT_MS / 1e3}\nwhile time.perf_counter() <= end: pass"
    assert len(slowness("bad_package", bad_package(source))) == ATTEMPTS


def test_exported_names():
    """`__all__` is the documented list, and a star import gives it and nothing else."""
    assert sorted(neft_kernels.__all__) == sorted(EXPORTED)
    names = {}
    exec("from neft_kernels import *", names)
    assert names.keys() - {"__builtins__"} == EXPORTED


def test_exported_names_are_documented():
    assert undocumented(neft_kernels) == []


def test_an_undocumented_name_is_found(bad_package, monkeypatch):
    source = "import torch\nclass Silent(torch.nn.Embedding): pass\ndef silent(): pass\n__all__ = ['Silent', 'silent']"
    monkeypatch.syspath_prepend(bad_package(source))
    import bad_package as module

    assert undocumented(module) == ["Silent", "silent"]
    monkeypatch.delitem(sys.modules, "bad_package")
