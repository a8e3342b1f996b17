"""Contract: every example trains from its configuration, here for two steps, and trains with noise.

torchrun starts the distributed example with two processes, as its users do.
"""

import importlib
import logging
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from neft_kernels.models.replace import noisy_modules

# Together they import four frameworks, which takes longer than the training.
pytestmark = pytest.mark.xdist_group("examples")

EXAMPLES = Path(__file__).parent.parent / "examples"
FOLDERS = sorted(path.parent.name for path in EXAMPLES.glob("*/config.yaml"))
WITH_TRAINER = ("trainer", "sft", "dpo", "sentence_transformers")
STEPS = 2


def run(folder, tmp_path, **changes):
    config = yaml.safe_load((EXAMPLES / folder / "config.yaml").read_text())
    changes |= {"steps": STEPS} if folder == "accelerate" else {"max_steps": STEPS, "output_dir": str(tmp_path / "out")}
    if folder in WITH_TRAINER:
        changes |= {"logging_steps": 1, "disable_tqdm": True}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**config, **changes}))
    return importlib.import_module(f"examples.{folder}.train").main(str(path))


def test_all_are_tested():
    assert sorted([*WITH_TRAINER, "accelerate"]) == FOLDERS


@pytest.mark.parametrize("folder", WITH_TRAINER)
def test_an_example_with_a_trainer(folder, tmp_path, caplog):
    """The first batch has noise, and after training the model has none."""
    caplog.set_level(logging.INFO, "neft_kernels")
    trainer = run(folder, tmp_path)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    assert all(math.isfinite(float(loss)) for loss in losses)
    assert "noise is on, alpha=5 scaled by sequence" in caplog.text
    assert not list(noisy_modules(trainer.model))


def test_packed_rows_are_scaled_by_the_length_of_each_sequence(tmp_path, caplog):
    caplog.set_level(logging.INFO, "neft_kernels")
    run("sft", tmp_path)
    (line,) = (message for message in caplog.messages if "noise is on" in message)
    low, high = map(float, re.search(r"within \+-([\d.]+) to ([\d.]+)", line).groups())
    # The strongest noise is that of the shortest sequence; a whole row of 128 tokens of width 64 has 5 / sqrt(128 * 64).
    assert low > 5 / math.sqrt(128 * 64)
    assert high > 1.2 * low


def test_the_loop_of_ones_own(tmp_path, capsys):
    losses = run("accelerate", tmp_path)
    assert len(losses) == STEPS
    assert "noise on; alpha=5 by sequence" in capsys.readouterr().out


def test_several_processes_under_torchrun():
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "examples/distributed/train.py"]
    done = subprocess.run(
        [sys.executable, "-m", *command, "--engine", "ddp", "--steps", "2"],
        cwd=EXAMPLES.parent,
        env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "noise on" in done.stdout
