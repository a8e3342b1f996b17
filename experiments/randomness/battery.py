"""dieharder, a public battery, on the random words of a training run.

The words come from ``words.cpp``, which includes the package's own ``csrc/noise.h``, and are compared with
``neft_kernels.ops.reference`` before the battery sees any.

The rule, fixed before the run: the battery is passed if none of dieharder's p-values, 114 of them, is FAILED, that is below
1e-6 or above 1 - 1e-6 (so sound words fail with probability 2.3e-4 at most). WEAK, below 0.005 or above 0.995, is what one
in a hundred must be; those are listed, and nothing is run again.
"""

import contextlib
import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from neft_kernels.ops import reference
from neft_kernels.ops.seed import draw_seed

HERE = Path(__file__).parent
COMMAND = ("dieharder", "-a", "-g", "200")  # all tests; raw words from stdin, which is never rewound
FIELDS = ("test_name", "ntuple", "tsamples", "psamples", "pvalues", "assessment")
TOKENS = 4096  # of one step
BLOCKS = 512  # of one token: 4096 columns of a 16-bit element type
STEPS = 1 << 16  # 2 TB of words, ten times what dieharder reads


def draw_seeds(count: int) -> list[int]:
    """Seeds of `count` steps, drawn from torch's generator as the package draws them."""
    return [int(draw_seed(torch.device("cpu"))) for _ in range(count)]


def build(to: Path) -> Path:
    """Compiles the program that writes the words."""
    program = to / "words"
    flags = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", f"-I{HERE.parents[1] / 'csrc'}")
    subprocess.run([os.environ.get("CXX", "g++"), *flags, "-o", program, HERE / "words.cpp"], check=True)
    return program


@contextlib.contextmanager
def streaming(program: Path, seeds: list[int], log: IO[bytes] | int = subprocess.DEVNULL) -> Iterator[IO[bytes]]:
    """The words, as a pipe; on leaving it the program has ended, and the number of bytes it wrote is in `log`."""
    with tempfile.TemporaryFile() as file:
        file.write(b"".join(seed.to_bytes(8, "little", signed=True) for seed in seeds))
        file.seek(0)
        command = [str(program), str(TOKENS), str(BLOCKS), "0"]
        with subprocess.Popen(command, stdin=file, stdout=subprocess.PIPE, stderr=log) as process:
            assert process.stdout is not None
            yield process.stdout


def verify(program: Path, seeds: list[int]) -> None:
    """The first two steps, word for word, are those of the reference."""
    with streaming(program, seeds) as words:
        for seed in seeds[:2]:
            key = (torch.tensor(seed) & 0xFFFFFFFF, torch.tensor(seed) >> 32 & 0xFFFFFFFF)
            counter = (torch.arange(BLOCKS), torch.arange(TOKENS)[:, None], torch.tensor(0), torch.tensor(0))
            expected = torch.stack(reference.philox4x32(counter, key), dim=-1).to(torch.int32)  # [T, blocks, 4]
            got = torch.frombuffer(bytearray(words.read(4 * expected.numel())), dtype=torch.int32)
            assert torch.equal(got, expected.flatten()), "words.cpp differs from the reference"


def parse(output: str) -> list[dict[str, Any]]:
    """One entry for each p-value in dieharder's output: test, its parameters, p-value, verdict."""
    found = []
    for line in output.splitlines():
        values = [value.strip() for value in line.split("|")]
        if len(values) != len(FIELDS) or not values[1].isdigit():
            continue
        name, *numbers, p_value, verdict = values
        ntuple, tsamples, psamples = map(int, numbers)
        found.append(
            {
                "test": name,
                "ntuple": ntuple,
                "tsamples": tsamples,
                "psamples": psamples,
                "p": float(p_value),
                "verdict": verdict,
            }
        )
    return found


def run() -> dict[str, Any]:
    """Runs the battery and returns its record. It may be stopped and continued at any time.

    Raises:
        RuntimeError: dieharder is not installed, or it failed.
    """
    if shutil.which(COMMAND[0]) is None:
        raise RuntimeError("dieharder is not installed; on Debian and Ubuntu: apt-get install dieharder")
    version = subprocess.run([COMMAND[0], "-l"], capture_output=True, text=True).stdout
    torch.manual_seed(0)
    seeds = draw_seeds(STEPS)
    output, began = "", time.monotonic()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        program = build(Path(folder))
        verify(program, seeds)
        flags = [flag for field in FIELDS for flag in ("-D", field)]
        with (
            streaming(program, seeds, log) as words,
            subprocess.Popen([*COMMAND, *flags], stdin=words, stdout=subprocess.PIPE, text=True) as dieharder,
        ):
            words.close()  # the child's alone, so that words ends with it
            assert dieharder.stdout is not None
            for line in dieharder.stdout:
                print(line, end="", flush=True)
                output += line
        log.seek(0)
        written = int(log.read())
    if dieharder.returncode:
        raise RuntimeError(f"dieharder exited with {dieharder.returncode}")
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "what": "battery",
        "command": " ".join(COMMAND),
        "version": next(word for word in version.split() if word[:1].isdigit()),
        "walk": f"steps of {TOKENS} tokens x {8 * BLOCKS} columns of a 16-bit type, seeds drawn after manual_seed(0)",
        "bytes": written,
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime),
        "wall_seconds": round(time.monotonic() - began),
        "tests": parse(output),
    }
