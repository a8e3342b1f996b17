"""Tests the package with several versions of torch and of transformers: ``make test-versions``.

Each version of torch gets an environment in ``.versions/``, for which the extensions are built; each version of transformers
gets one on top, which borrows this torch. Of all other packages the newest versions that fit are installed.

A cell of the matrix that passed is not run again, as long as neither the sources nor the tests nor the list of packages have
changed. The results are kept in :data:`RECORD`, and the table in :data:`TABLE` is written from them.
"""

import argparse
import datetime
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import venv
import xml.etree.ElementTree as xml
from pathlib import Path
from typing import Any

TORCH = ("2.10.0", "2.13.0", "2.14.1")
TRANSFORMERS = ("4.57.6", "5.0.0", "5.24.0")

#: Run once with each torch, and the others with each torch and transformers.
OPS_TESTS = ("contract", "backends", "choice", "ops", "autograd", "embedding_grad", "magnitude", "errors")
MODEL_TESTS = (
    *("modules", "huggingface", "lookups", "copies", "alpha", "log", "situations", "decoder", "under_no_grad", "parts"),
    *("strength", "rms", "checkpointing", "first_passes", "trainer", "patch_transformers", "sft", "peft"),
)

#: Beside torch, and beside transformers.
TEST_PACKAGES = ("setuptools>=77", "numpy", "scipy", "triton>=3.5", "pytest", "pytest-xdist", "hypothesis")
MODEL_PACKAGES = ("trl", "peft", "accelerate", "datasets")
#: For the tests with one version of torch alone: the interpreter of its Triton 3.6 fails with newer NumPys.
PINNED = {"2.10.0": ("numpy<2.4",)}
#: The versions that the table tells, beside those of Python and torch.
SHOWN = ("triton", "transformers", "trl", "peft", "accelerate")

REPOSITORY = Path(__file__).resolve().parent.parent
ENVIRONMENTS = REPOSITORY / ".versions"
RECORD = REPOSITORY / "tests" / "versions.json"
TABLE = REPOSITORY / "docs" / "versions.md"
#: What is copied to each torch, so that the extensions that are built for it lie beside the sources.
SOURCES = ("neft_kernels", "csrc", "tests", "setup.py", "pyproject.toml", "README.md", "LICENSE")

#: A deprecated function of torch or transformers that the package calls fails the test that calls it.
WARNINGS = "\n".join(f"error::{kind}:neft_kernels" for kind in ("DeprecationWarning", "FutureWarning"))

#: Loads every extension that was built, and prints what there is.
PROBE = """
import importlib, importlib.metadata, json, pathlib, sys
import torch
extensions = sorted(pathlib.Path("neft_kernels").rglob("*.so"))
for path in extensions:
    importlib.import_module(".".join((*path.parent.parts, path.name.split(".")[0])))
versions = {"torch": torch.__version__}
for name in sys.argv[1:]:
    try:
        versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps({"versions": versions, "extensions": [path.name.split(".")[0] for path in extensions]}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", nargs="*", default=TORCH, help="only these versions")
    parser.add_argument("--transformers", nargs="*", default=TRANSFORMERS, help="only these versions")
    parser.add_argument("--again", action="store_true", help="also what has passed")
    parser.add_argument("--table", action="store_true", help="write the table from the record, and run nothing")
    options = parser.parse_args()
    if not options.table:
        print(
            f"Tests torch {', '.join(options.torch)} with transformers {', '.join(options.transformers)}, in environments in "
            f"{ENVIRONMENTS}.\nA CUDA build of torch is a download of 3 GB and takes 6 GB of disk.",
            flush=True,
        )
        for torch in options.torch:
            for transformers in (None, *options.transformers):
                test(torch, transformers, options.again)
    results = json.loads(RECORD.read_text())
    TABLE.write_text(table(results))
    failed = [name for name, result in results.items() if result["failed"]]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def test(torch: str, transformers: str | None, again: bool) -> None:
    """Runs one cell of the matrix, unless it has passed, and puts the result into the record."""
    name = f"torch {torch}" + (f", transformers {transformers}" if transformers else "")
    results = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    tests = MODEL_TESTS if transformers else OPS_TESTS
    base, packages = ENVIRONMENTS / f"torch-{torch}", [f"torch=={torch}", *TEST_PACKAGES, *PINNED.get(torch, ())]
    environment = base
    of_transformers = [f"transformers=={transformers}", *MODEL_PACKAGES] if transformers else []
    inputs = hashlib.sha256(json.dumps([tests, packages, of_transformers]).encode())
    for path in sources():
        inputs.update(path.encode() + (REPOSITORY / path).read_bytes())
    before = results.get(name, {"failed": None, "inputs": None})
    if before["failed"] == 0 and before["inputs"] == inputs.hexdigest() and not again:
        print(f"{name}: has passed", flush=True)
        return

    print(f"{name}: installing", flush=True)
    install(base, packages)
    if transformers:
        environment = ENVIRONMENTS / f"torch-{torch}-transformers-{transformers}"
        install(environment, of_transformers, borrowed=base)
    copy_sources(base / "source")
    build(base)

    print(f"{name}: testing", flush=True)
    found = json.loads(run(environment, "-c", PROBE, *SHOWN, cwd=base / "source", capture=True))
    report = environment / "junit.xml"
    report.unlink(missing_ok=True)
    files = [f"tests/test_{each}.py" for each in tests]
    arguments = [
        "-q",
        "--need-extension",
        "--numprocesses",
        "2",
        "--override-ini",
        f"filterwarnings={WARNINGS}",
        f"--junitxml={report}",
    ]
    run(environment, "-m", "pytest", *arguments, *files, cwd=base / "source", may_fail=True)
    counts = xml.parse(report).getroot()[0].attrib
    failed, skipped = int(counts["failures"]) + int(counts["errors"]), int(counts["skipped"])
    results[name] = {
        **found,
        "python": platform.python_version(),
        "tests": list(tests),
        "passed": int(counts["tests"]) - failed - skipped,
        "failed": failed,
        "skipped": skipped,
        "seconds": round(float(counts["time"])),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "inputs": inputs.hexdigest(),
    }
    RECORD.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
    print(f"{name}: {results[name]['passed']} passed, {failed} failed, {skipped} skipped", flush=True)


def sources() -> list[str]:
    """The files that count, as they are in the working tree, by their path in the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *SOURCES],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    return sorted(
        path for path in listed if path != str(RECORD.relative_to(REPOSITORY)) and (REPOSITORY / path).is_file()
    )


def install(environment: Path, packages: list[str], borrowed: Path | None = None) -> None:
    """Makes a virtual environment with `packages`, and with those of `borrowed`, unless it is there already."""
    done = environment / "packages.txt"
    if done.is_file() and done.read_text().split("\n") == packages:
        return
    shutil.rmtree(environment, ignore_errors=True)
    venv.create(environment, with_pip=True)
    if borrowed is not None:
        (site_packages(environment) / "borrowed.pth").write_text(f"{site_packages(borrowed)}\n")
    run(environment, "-m", "pip", "install", "--quiet", *packages)
    done.write_text("\n".join(packages))


def site_packages(environment: Path) -> Path:
    return next(environment.glob("lib/python*/site-packages"))


def copy_sources(folder: Path) -> None:
    """Makes `folder` what the working tree is. Files that have not changed keep their time, and so what was built of them."""
    wanted = set(sources())
    for path in wanted:
        target, content = folder / path, (REPOSITORY / path).read_bytes()
        if not target.is_file() or target.read_bytes() != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    for target in folder.rglob("*"):
        is_ours = target.suffix not in (".so", ".o", ".pyc") and "build" not in target.relative_to(folder).parts
        if target.is_file() and is_ours and str(target.relative_to(folder)) not in wanted:
            target.unlink()


def build(base: Path) -> None:
    """Builds the extensions in place: the CUDA one as well where torch and nvcc are of one CUDA major version."""
    cuda = run(base, "-c", "import torch; print(torch.version.cuda or '')", capture=True).strip()
    nvcc = str(Path(os.environ["CUDA_HOME"], "bin", "nvcc")) if "CUDA_HOME" in os.environ else shutil.which("nvcc")
    can_build = False
    if cuda and nvcc:
        said = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
        release = re.search(r"release (\d+)", said)
        can_build = release is not None and release[1] == cuda.split(".")[0]
    print(f"building the {'CPU and CUDA extensions' if can_build else 'CPU extension'}", flush=True)
    for built in (base / "source").glob("neft_kernels/**/*.so"):  # of sources that may have moved since
        built.unlink()
    switch = {"NEFT_KERNELS_BUILD": "1" if can_build else "cpu"}
    run(base, "setup.py", "-q", "build_ext", "--inplace", cwd=base / "source", variables=switch)


def run(
    environment: Path,
    *arguments: str,
    cwd: Path | None = None,
    variables: dict[str, str] | None = None,
    capture: bool = False,
    may_fail: bool = False,
) -> str:
    """Runs the Python of `environment`, and returns what it prints if that is captured."""
    folder = cwd or environment
    return subprocess.run(
        [environment / "bin" / "python", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)} | (variables or {}),
        check=not may_fail,
        stdout=subprocess.PIPE if capture else None,
        text=True,
    ).stdout


def table(results: dict[str, Any]) -> str:
    """The page of the documentation."""
    titles = ("torch", *SHOWN, "extensions", "tests passed", "Python", "date")
    lines = [
        "# Tested versions",
        "",
        "A row without transformers: the tests of the contract and the ops. A row with it: the tests of the modules, the",
        "Hugging Face adapter, reported situations, checkpointing, the Trainer and TRL's SFTTrainer. No GPU was there: a CUDA",
        "extension was built and loaded, and did not run. `make test-versions` writes this page from `tests/versions.json`.",
        "",
        f"| {' | '.join(titles)} |",
        f"|{' --- |' * len(titles)}",
    ]
    for result in results.values():
        versions = result["versions"]
        of_all = str(result["passed"] + result["failed"])
        cells = (
            versions["torch"],
            *(versions.get(name, "") for name in SHOWN),
            ", ".join({"_C_cpu": "CPU", "_C_cuda": "CUDA"}[each] for each in result["extensions"]),
            str(result["passed"]) if not result["failed"] else f"{result['passed']} of {of_all}",
            result["python"],
            result["date"],
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
