"""Can pip resolve what `make install` asks of it, with nothing but the public package index? Nothing is installed.

Each case is an environment of its own, without the settings that pip has on this machine, and asks pip what it would
install there: pip says so (`--dry-run`) after reading metadata, a few MB.

    python -m tools.check_install TORCH TRITON       the two requirements, as in the Makefile
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WHAT_MAKE_INSTALLS = f"{ROOT}[test,lint]"
OLDEST_TORCH = "2.10.0"
NO_INDEX = 3  # the exit status where nothing can be checked


def pip(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Runs pip without this machine's settings. How to reach the network (proxies, certificates) is not among them."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "NEFT_KERNELS_BUILD": "0"}
    command = [sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def index_answers() -> bool:
    return pip("index", "versions", "pip", "--retries", "0", "--timeout", "20").returncode == 0


def would_install(torch_there: str | None, requirements: list[str], constraints: Path) -> dict[str, str]:
    """The versions that pip would install, by name, in an environment that has version `torch_there` of torch, or nothing."""
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder, "environment")
        venv.create(environment, with_pip=False)
        if torch_there:
            (packages,) = environment.glob("lib/python*/site-packages")
            metadata = packages / f"torch-{torch_there}.dist-info" / "METADATA"
            metadata.parent.mkdir()
            metadata.write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {torch_there}\n")
        report = Path(folder, "report.json")
        done = pip(
            *("--python", str(environment / "bin" / "python")),
            *("install", "--dry-run", "--quiet", "--report", str(report)),
            *(
                "--use-feature=fast-deps",
            ),  # an index may serve no metadata; then pip reads them in the wheels, not the wheels
            *("--constraint", str(constraints), *requirements),
        )
        if done.returncode:
            raise SystemExit(f"pip cannot resolve {' '.join(requirements)}:\n{done.stderr}")
        found = [each["metadata"] for each in json.loads(report.read_text())["install"]]
        return {each["name"].lower(): each["version"] for each in found}


def check(torch: str, triton: str, constraints: Path) -> None:
    """Prints what would be installed in each case; exits where that cannot be."""
    cases = {
        f"no torch, so {torch} from the index": (None, [torch, WHAT_MAKE_INSTALLS]),
        f"torch {OLDEST_TORCH}+cpu is there": (f"{OLDEST_TORCH}+cpu", [triton, WHAT_MAKE_INSTALLS]),
    }
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(would_install, *case, constraints) for case in cases.values()]
    for (case, (torch_there, _)), job in zip(cases.items(), jobs, strict=True):
        found = job.result()
        shown = ", ".join(
            f"{name} {found[name]}" for name in ("torch", "triton", "transformers", "trl") if name in found
        )
        print(f"{case}: {len(found)} packages, of them {shown}")
        if torch_there and "torch" in found:
            raise SystemExit(f"torch {torch_there} would be replaced by {found['torch']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("torch", help="what is installed where there is no torch")
    parser.add_argument("triton", help="what is installed where torch brought no Triton")
    parser.add_argument("--constraints", type=Path, default=ROOT / "constraints.txt")
    options = parser.parse_args()
    if not index_answers():
        print("no package index can be reached, so NOTHING WAS CHECKED", file=sys.stderr)
        raise SystemExit(NO_INDEX)
    check(options.torch, options.triton, options.constraints)


if __name__ == "__main__":
    main()
