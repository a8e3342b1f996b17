"""Contract: docs/versions.md says what make test-versions recorded; what has passed is tested again only if it has changed."""

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "tools"))

import test_versions as tool

RESULT = {
    "versions": {"torch": "2.14.1+cu130", "transformers": "5.24.0"},
    "extensions": ["_C_cpu", "_C_cuda"],
    "python": "3.11.7",
    "passed": 7,
    "failed": 0,
    "date": "2026-01-02",
}


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Two sources, an empty record, and environments in which every test passes."""
    runs = []
    report = '<testsuites><testsuite tests="9" failures="0" errors="0" skipped="2" time="1.5"/></testsuites>'

    def run(environment, *arguments, **options):
        runs.append(arguments)
        if "pytest" in arguments:
            (environment / "junit.xml").write_text(report)
        return json.dumps({"versions": {}, "extensions": []})

    def install(environment, packages, borrowed=None):
        environment.mkdir(parents=True, exist_ok=True)

    for name, value in {
        "REPOSITORY": tmp_path,
        "ENVIRONMENTS": tmp_path / "environments",
        "RECORD": tmp_path / "versions.json",
        "sources": lambda: ["one.py", "two.py"],
        "run": run,
        "install": install,
        "build": lambda base: None,
    }.items():
        monkeypatch.setattr(tool, name, value)
    for path in tool.sources():
        (tmp_path / path).write_text("1")
    return tmp_path, runs


def test_the_page_says_what_was_recorded():
    results = json.loads(tool.RECORD.read_text())
    assert tool.TABLE.read_text() == tool.table(results)
    assert all(result["failed"] == 0 for result in results.values())


def test_a_row_says_what_was_seen():
    row = tool.table({"torch 2.14.1": RESULT}).splitlines()[-1]
    assert row == "| 2.14.1+cu130 |  | 5.24.0 |  |  |  | CPU, CUDA | 7 | 3.11.7 | 2026-01-02 |"
    assert "| 7 of 8 |" in tool.table({"torch 2.14.1": RESULT | {"failed": 1}})


def test_only_what_has_changed_is_run_again(repository, monkeypatch):
    folder, runs = repository

    def tests_run(again=False):
        runs.clear()
        tool.test("2.14.1", "5.24.0", again)
        return len(runs)

    assert tests_run()
    (result,) = json.loads(tool.RECORD.read_text()).values()
    assert (result["passed"], result["skipped"], result["failed"]) == (7, 2, 0)
    assert not tests_run()
    assert tests_run(again=True)
    (folder / "two.py").write_text("2")
    assert tests_run()
    assert not tests_run()
    monkeypatch.setattr(tool, "MODEL_PACKAGES", ("trl<1",))
    assert tests_run()
    result["failed"] = 1
    tool.RECORD.write_text(json.dumps({"torch 2.14.1, transformers 5.24.0": result}))
    assert tests_run()


def test_a_copied_source_keeps_its_time_unless_it_changes(repository):
    """What was built of it would be built again, and some of that takes minutes."""
    sources, _ = repository
    folder = sources / "environments" / "source"
    tool.copy_sources(folder)
    for path in ("one.py", "two.py"):
        os.utime(folder / path, (1, 1))
    (sources / "two.py").write_text("2")
    (folder / "removed.py").write_text("")
    (folder / "built.so").write_text("")
    tool.copy_sources(folder)
    assert (folder / "one.py").stat().st_mtime == 1
    assert (folder / "two.py").stat().st_mtime > 1
    assert (folder / "two.py").read_text() == "2"
    assert sorted(path.name for path in folder.iterdir()) == ["built.so", "one.py", "two.py"]
