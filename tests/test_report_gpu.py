"""Contract: the GPU table says what the newest records say, and without records that nothing was measured."""

import json

import pytest

from benchmarks import gpu, records, report_gpu


def record(shape, milliseconds, ids="uniform"):
    """Made up, for the arithmetic alone."""
    forward = {name: [time * 0.9, time, time * 1.2] for name, time in zip(report_gpu.LABELS, milliseconds, strict=True)}
    return {
        "shape": shape,
        "ids": ids,
        "device": "no device",
        "torch": "0",
        "commit": "0",
        "forward": forward,
        "copy_bytes_per_second": 4e12,
    }


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """The README, and the page with the table."""
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(report_gpu, "RESULTS", tmp_path)
    paths = [tmp_path / "README.md", tmp_path / "performance.md"]
    for name, path in zip(("README", "PERFORMANCE"), paths, strict=True):
        path.write_text("before\n<!-- gpu:begin -->\nold\n<!-- gpu:end -->\nafter\n")
        monkeypatch.setattr(report_gpu, name, path)
    return paths


def test_without_records_nothing_was_measured(pages):
    report_gpu.main()
    for page in pages:
        text = page.read_text()
        assert "Nothing was measured on a GPU yet" in text
        assert "old" not in text
        assert text.startswith("before\n")
        assert text.endswith("after\n")


def test_the_table_is_that_of_the_newest_record(pages, tmp_path):
    shapes = [shape for shape in report_gpu.IN_TABLE if shape.startswith(report_gpu.PLOTTED)]
    assert list(report_gpu.LABELS) == ["plain", "ours", "hook", "hook, compiled"]
    lines = [record(shape, (9, 9, 9, 9)) for shape in shapes]
    lines += [record(shape, (0.1, 0.08, 0.4, 0.2)) for shape in shapes]
    lines += [record(shape, (7, 7, 7, 7), ids="zipf") for shape in shapes]
    (tmp_path / "gpu.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report_gpu.main()
    readme, performance = (page.read_text() for page in pages)
    # 16384 x 4096 elements of 2 bytes, read and written: 268 MB in 80 us are 3.36e12 bytes a second, 84 % of 4e12.
    row = "| 32000 x 4096, 16384 tokens, bfloat16 | 100 | **80** | 400 | 200 | 0.80 | 5.0 | 2.5 | 84% |"
    assert row in performance
    assert "| 32000 x 4096, 16384 tokens, float32 | 100 | **80** | 400 | 200 | 0.80 | 5.0 | 2.5 | 168% |" in performance
    assert (tmp_path / "gpu.png").stat().st_size > 10_000
    assert (
        "32000 x 4096, 16384 tokens, bfloat16: ours / plain 0.80, hook / ours 5.0, compiled hook / ours 2.5, 84% of a copy's"
    ) in readme
    assert "\nold\n" not in readme + performance


def test_all_that_is_drawn_is_among_the_quick_comparisons():
    quick = {str(shape) for shape, ids in gpu.comparisons(quick=True) if ids == "uniform"}
    assert quick >= set(report_gpu.IN_TABLE)
    assert {f"{report_gpu.PLOTTED}, {tokens} tokens, bfloat16" for tokens in gpu.TOKENS} <= quick
