"""Contract: what `make install` asks of pip, the public package index can serve: with no torch, and with one that is there.

Skipped where no index can be reached.
"""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.skips import NO_INDEX
from tools import check_install

REPOSITORY = Path(__file__).parent.parent


def test_the_index_can_serve_what_make_installs():
    shown = subprocess.run(["make", "-n", "check-install"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    torch, triton = shlex.split(shown.stdout)[-2:]
    command = [sys.executable, "-m", "tools.check_install", torch, triton]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode == check_install.NO_INDEX:
        pytest.skip(NO_INDEX)
    assert done.returncode == 0, done.stderr
    assert f"{torch} from the index" in done.stdout


def test_pins_that_contradict_each_other_are_found(tmp_path):
    """torch's builds with CUDA pin Triton; these two were pinned once."""
    if not check_install.index_answers():
        pytest.skip(NO_INDEX)
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("triton==3.9.0\n")
    with pytest.raises(SystemExit, match="ResolutionImpossible"):
        check_install.would_install(None, ["torch==2.13.0"], constraints)
