"""Adds the table of ratios and goals below pytest-benchmark's own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

torch.set_num_threads(2)
torch.set_grad_enabled(True)

_lines: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="append the results to benchmarks/results/")


@pytest.fixture
def summary() -> Callable[[str], None]:
    """Takes the lines of the summary that is printed at the end."""
    return _lines.append


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _lines:
        terminalreporter.section("forward on the CPU: medians, and ratios of medians")
        for line in _lines:
            terminalreporter.write_line(line)
