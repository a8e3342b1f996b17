"""One line of JSON per comparison, appended and never overwritten, with all that a reader needs to judge it."""

import datetime
import functools
import importlib.util
import json
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

import neft_kernels

RESULTS = Path(__file__).parent / "results"  # of the benchmarks; the experiments have their own


def environment() -> dict[str, Any]:
    """Device, software and commit."""
    gpu = torch.cuda.is_available()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": torch.cuda.get_device_name() if gpu else cpu_name(),
        "threads": torch.get_num_threads(),
        "backends": [f"{each.name}: {each.detail}" for each in neft_kernels.available_backends() if each.devices],
        "torch": torch.__version__,
        "python": platform.python_version(),
        **({"driver": driver(), "triton": triton_version()} if gpu else {}),
    }


def commit() -> str:
    """Of the checkout that this file is in, with a mark where it was changed; "unknown" where there is none."""
    if shutil.which("git") is None:
        return "unknown"
    here = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    # The records themselves are no change to what is measured.
    status = ["git", "status", "--porcelain", "-uno", "--", ":/", ":(top,exclude,glob)**/results/*"]
    changed = subprocess.run(status, cwd=here, capture_output=True, text=True)
    return (head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")) or "unknown"


@functools.cache
def driver() -> str:
    """The version of the GPU's driver, as nvidia-smi says it."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True)
    return answer.stdout.split()[0] if answer.returncode == 0 and answer.stdout.strip() else "unknown"


def triton_version() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    return str(triton.__version__)


def cpu_name() -> str:
    """The processor's model name and highest vector extension, as torch sees it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"


def append(name: str, record: dict[str, Any], folder: Path | None = None) -> None:
    """Adds `record`, with the environment, to ``<name>.jsonl`` in `folder`, by default ``results``.

    What `record` says of the environment holds.
    """
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    line = json.dumps({**environment(), **record}) + "\n"
    with path.open("a+b") as file:
        if file.tell() and not path.read_bytes().endswith(b"\n"):  # a line that was cut off midway stays alone
            file.write(b"\n")
        file.write(line.encode())


def load(name: str, folder: Path | None = None) -> list[dict[str, Any]]:
    """The records of ``<name>.jsonl`` in `folder`, oldest first; a line that was cut off midway is none."""
    path = (folder or RESULTS) / f"{name}.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found
