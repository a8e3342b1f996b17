"""Contract: the programs for machines with a GPU run from end to end, lose nothing when a part fails, and are drawn.

On a stand-in for such a machine, see gpu_doubles; with NEFT_KERNELS_TEST_GPU.
"""

import itertools
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

from benchmarks import gpu, gpu_timing, records, tune_gpu, variants
from neft_kernels import NEFTuneEmbedding
from neft_kernels.ops import triton_noise
from tools import sanitize_gpu

pytestmark = pytest.mark.cpu_extension  # the stand-in computes with it what a GPU would

ROOT = Path(__file__).parent.parent
VARIANTS = {"plain", "hook", "hook, compiled", "rand_like, compiled", "ours", "ours, cuda"}


@pytest.fixture(autouse=True)
def device(stand_in):
    return stand_in


class Kernels(TorchFunctionMode):
    """The torch functions that launch a kernel: they return memory of the device that was not there and is written."""

    def __init__(self, device):
        super().__init__()
        self.device, self.launched = device, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        before = set(self.device.storages)
        result = func(*args, **(kwargs or {}))
        is_new = isinstance(result, torch.Tensor) and result.untyped_storage()._cdata not in before
        if is_new and self.device.holds(result) and "empty" not in func.__name__:
            self.launched.append(func.__name__)
        return result


def test_a_call_is_one_launch_and_with_masks_two(device):
    module, ids = NEFTuneEmbedding(100, 64, device="cuda"), torch.randint(100, (4, 16), device="cuda")
    mask, positions = torch.ones_like(ids), torch.arange(16, device="cuda").expand(4, 16).contiguous()
    for _ in range(8):  # what `describe` reports is measured after 1, 2, 4, 8 ... batches
        module(ids)
    masked = (
        {"attention_mask": mask},
        {"position_ids": positions},
        {"attention_mask": mask, "position_ids": positions},
    )
    for sequences in ({}, *masked):
        module(ids, **sequences)
        with Kernels(device) as kernels:
            noisy = module(ids, **sequences)
        assert kernels.launched == [*(["token_magnitude.triton"] if sequences else []), "noisy_embedding.triton"]
        assert not torch.equal(noisy, torch.nn.functional.embedding(ids, module.weight))


# --- the benchmark ----------------------------------------------------------------------------------------------------


@pytest.fixture
def results(monkeypatch, tmp_path):
    """Where the benchmark writes; it has little to do."""
    for module, name, value in (
        (gpu, "TABLES", ((40, 32), (20, 8))),
        (gpu, "TOKENS", (3,)),
        (gpu_timing, "CACHE_FLUSH_BYTES", 1000),
        (gpu_timing, "COPY_BYTES", 1000),
        (gpu_timing, "WARM_UP_ROUNDS", 1),
        (gpu_timing, "HOST_QUEUES", 1),
        (gpu_timing, "HOST_CALLS", 1),
        (gpu_timing, "REPLAYS", 1),
    ):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results of the repository")
    return tmp_path / "results"


def run(results, *arguments):
    """The exit status, and the records."""
    status = gpu.main(["--rounds", "2", "--commit", "c0ffee", "--results", str(results), *arguments])
    return status, records.load("gpu", results)


def test_the_benchmark_records_everything(results, capsys):
    status, found = run(results, "--quick")
    assert status == 0
    assert [(record["shape"], record["ids"]) for record in found] == [
        ("40 x 32, 3 tokens, bfloat16", "uniform"),
        ("20 x 8, 3 tokens, bfloat16", "uniform"),
        ("40 x 32, 3 tokens, float32", "uniform"),
    ]
    for record in found:
        assert record["errors"] == {}
        for passes in ("forward", "backward", "both"):
            assert set(record[passes]) == VARIANTS | ({"ours, padded batch"} if passes == "forward" else set())
            assert all(0 < first <= middle <= last for first, middle, last in record[passes].values())
            assert set(record["host_behind"][passes]) == set(record[passes])  # the stand-in's device is never busy
        assert (
            record["host_microseconds"].keys() == record["peak_bytes_above_output"].keys() == record["forward"].keys()
        )
        peak, output = record["peak_bytes_above_output"], 3 * int(record["shape"].split()[2].rstrip(",")) * 2
        assert peak["plain"] == 0
        assert peak["ours"] == 0
        assert peak["hook"] >= output  # the noise; its uniform_ works in place
        assert record["graph_replay"]["fresh_noise"] is True
        assert record["graph_replay"]["milliseconds"] > 0
        assert record["copy_bytes_per_second"] > 0
        assert record["commit"] == "c0ffee"
        assert {"device", "driver", "torch", "triton", "python", "date", "backends"} <= record.keys()
    assert not records.RESULTS.exists()
    assert "left out" not in capsys.readouterr().err

    again, more = run(results, "--quick")
    assert again == 0
    assert more == found  # nothing was left to do
    _, elsewhere = run(results, "--quick", "--commit", "another", "--minutes", "0")
    assert elsewhere == found  # no time to do it


def test_all_comparisons_are_made_the_quick_ones_first():
    quick, everything = gpu.comparisons(quick=True), gpu.comparisons(quick=False)
    assert everything[: len(quick)] == quick
    assert len(everything) == len(set(everything)) == len(gpu.TABLES) * len(gpu.TOKENS) * len(gpu.KINDS)


def failing(*_):
    raise torch.OutOfMemoryError("CUDA out of memory, on purpose")


def test_what_fails_does_not_cost_the_rest(results, monkeypatch, capsys):
    """A variant that fails, here in its backward or as it is built, a step that fails, a comparison that fails."""
    builders = variants.builders

    class FailsInBackward(torch.nn.Embedding):
        def forward(self, ids):
            rows = super().forward(ids)
            rows.register_hook(failing)
            return rows

    def some_fail(weight):
        if weight.shape[0] == 20:
            raise torch.OutOfMemoryError("no room for the table")
        plain = dict.fromkeys(("plain, in its backward",), lambda: FailsInBackward(*weight.shape, _weight=weight))
        mine = {name: build for name, build in builders(weight, compiled=False).items() if name in ("plain", "ours")}
        return {"hook, compiled": failing, **plain, **mine}

    monkeypatch.setattr(gpu, "builders", some_fail)
    monkeypatch.setattr(gpu, "replay", failing)
    status, (first, failed, second) = run(results, "--quick")
    assert status == 1
    for record in (first, second):
        assert set(record["errors"]) == {"hook, compiled", "plain, in its backward", "graph_replay"}
        assert "out of memory, on purpose" in record["errors"]["hook, compiled"]
        assert set(record["forward"]) == {"plain", "plain, in its backward", "ours", "ours, padded batch"}
        assert set(record["both"]) == {"plain", "ours"}
        assert "peak_bytes_above_output" in record
    assert "no room for the table" in failed["errors"]["comparison"]
    assert "left out: hook, compiled" in capsys.readouterr().err
    monkeypatch.setattr(gpu, "builders", lambda weight: {**builders(weight, False), "plain": failing})
    _, found = run(results, "--quick")
    assert [record["shape"] for record in found[3:]] == [failed["shape"]]  # it alone is tried again


def test_nothing_is_timed_that_computes_something_else(monkeypatch, results):
    class Stronger(variants.NEFTuneEmbedding):
        def forward(self, ids):
            return super().forward(ids) * 1.5

    monkeypatch.setattr(gpu, "builders", lambda weight: {"ours": lambda: Stronger(*weight.shape, _weight=weight)})
    _, found = run(results, "--quick")
    assert all("ours differs from the reference" in record["errors"]["comparison"] for record in found)


def test_each_comparison_is_compiled_for_its_own_shape(monkeypatch):
    """Also the tenth, where torch.compile would have given up on the function, and with static shapes."""
    graphs = []

    def backend(graph, examples):
        assert all(isinstance(size, int) for each in examples if isinstance(each, torch.Tensor) for size in each.shape)
        assert not any(isinstance(each, torch.SymInt) for each in examples)
        graphs.append(graph)
        return graph

    def compiled(module):
        return torch._dynamo.optimize(backend)(module)

    monkeypatch.setattr(torch, "compile", compiled)
    with torch._C.DisableTorchFunction():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        for number in range(10):
            modules = variants.training_modules(torch.randn(30 + number, 8))
            modules["rand_like, compiled"](torch.tensor([[1] * (number + 2)]))
            assert len(graphs) == number + 1


def test_the_records_are_drawn(results, monkeypatch):
    from benchmarks import report_gpu  # which needs matplotlib, as machines with a GPU need not

    results.parent.mkdir(exist_ok=True)
    readme, performance = results.parent / "README.md", results.parent / "performance.md"
    for page in (readme, performance):
        page.write_text("<!-- gpu:begin -->\n<!-- gpu:end -->\n")
    monkeypatch.setattr(gpu, "TABLES", ((40, 32),))
    status, found = run(results, "--quick")
    assert status == 0
    del found[0]["forward"]["hook, compiled"]  # as if it had failed
    (results / "gpu.jsonl").write_text("".join(json.dumps(record) + "\n" for record in found))
    for module, name, value in (
        (records, "RESULTS", results),
        (report_gpu, "RESULTS", results),
        (report_gpu, "README", readme),
        (report_gpu, "PERFORMANCE", performance),
        (report_gpu, "IN_TABLE", [record["shape"] for record in found]),
        (report_gpu, "PLOTTED", "40 x 32"),
    ):
        monkeypatch.setattr(module, name, value)
    report_gpu.main()
    lines = performance.read_text().splitlines()
    number = r"[\d.e+-]+"
    times, ratios = rf"{number} \| \*\*{number}\*\* \| {number} \| —", rf"{number} \| {number} \| —"
    assert re.fullmatch(rf"\| 40 x 32, 3 tokens, bfloat16 \| {times} \| {ratios} \| \d+% \|", lines[3])
    assert lines[4].startswith("| 40 x 32, 3 tokens, float32 |")
    assert (results / "gpu.png").stat().st_size > 10_000


# --- the tuner --------------------------------------------------------------------------------------------------------


def test_the_tuner_tries_each_tile_and_leaves_none_behind(results, monkeypatch, capsys):
    shape = variants.Shape(40, 1024, 5, torch.bfloat16)  # 128 vectors
    monkeypatch.setattr(tune_gpu, "SHAPES", ((shape, "uniform"),))
    monkeypatch.setattr(tune_gpu, "TILES", (128, 512))
    monkeypatch.setattr(tune_gpu, "REGISTERS", (None, 64))
    monkeypatch.setattr(tune_gpu, "_compiled_for", {})

    def constants():
        return [getattr(triton_noise, name) for name in tune_gpu._CONSTANTS], triton_noise._tile(1024, 2)

    before = constants()
    assert tune_gpu.main(["--rounds", "2", "--results", str(results)]) == 0
    (record,) = records.load("gpu_tuning", results)
    sizes = ((1, 1), (1, 2), (1, 4), (4, 1), (4, 2), (4, 4), (4, 8))  # rows and warps
    tiles = {(rows, 128, warps, registers) for rows, warps in sizes for registers in (None, 64)}
    names = {"{} x {} vectors, {} warps, registers {}".format(*tile) for tile in tiles}
    assert record["forward"].keys() == {"F.embedding", *names}
    kept = [each for tile in tune_gpu._compiled_for.values() for each in tile.items()]
    assert len(kept) == len(tiles)
    assert tiles == {
        (*(value for _, value in key[-4:-2]), compiled.metadata.num_warps, compiled.metadata.maxnreg)
        for key, compiled in kept
    }
    assert before == constants()
    assert capsys.readouterr().out.count("of the copy") == len(tiles) + 1


# --- the other programs -----------------------------------------------------------------------------------------------


def test_the_program_for_the_sanitizer(monkeypatch, capsys):
    monkeypatch.setattr(sanitize_gpu, "DTYPES", (torch.bfloat16,))
    monkeypatch.setattr(sanitize_gpu, "WIDTHS", (7,))
    assert sanitize_gpu.main() == 0
    out = capsys.readouterr().out
    assert "triton: 12 launches" in out
    assert "cuda: 12 launches" in out


def test_the_makefile_names_files_that_there_are():
    of_no_make = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "-n", "gpu", "GPU_PYTHON=python3", "GPU_BENCH=--quick"]
    shown = subprocess.run(command, cwd=ROOT, env=of_no_make, capture_output=True, text=True, check=True).stdout
    shown = shown.replace("\\\n", " ")
    commands = [shlex.split(line) for line in shown.splitlines()]
    files = [word for command in commands for word in command if word.endswith((".py", ".jsonl"))]
    modules = [
        word.replace(".", "/") + ".py"
        for command in commands
        for before, word in itertools.pairwise(command)
        if before == "-m" and word != "pytest"
    ]
    assert {"setup.py", "tests/test_gpu.py"} <= set(files)
    assert {"tools/sanitize_gpu.py", "benchmarks/gpu.py"} == set(modules)
    assert [each for each in files + modules if not (ROOT / each).exists()] == []
    assert commands[-1][-3:] == ["-m", "benchmarks.gpu", "--quick"]
