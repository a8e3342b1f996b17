"""Adds the table of ratios and goals below pytest-benchmark's own."""

import pytest
import torch

torch.set_num_threads(2)
torch.set_grad_enabled(True)

_lines: list[str] = []


def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help="append the results to benchmarks/results/")


@pytest.fixture
def summary():
    """Takes the lines of the summary that is printed at the end."""
    return _lines.append


def pytest_terminal_summary(terminalreporter):
    if _lines:
        terminalreporter.section("forward on the CPU: medians, and ratios of medians")
        for line in _lines:
            terminalreporter.write_line(line)
