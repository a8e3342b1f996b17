"""The experiment on NEFTune's effect: its data, its conditions, and the whole chain in seconds."""

import itertools
import json
import math
import shutil
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from experiments.effect import run as effect
from experiments.effect import training as effect_training
from experiments.effect.data import InputError, QuestionAnswer, instruction_pairs, library_sources, without_docstrings
from experiments.effect.plan import HOOK, OURS, PACKED, PADDED, PRESETS, RMS, Pretrained, Run, runs
from experiments.effect.prepare import prepare
from experiments.effect.probe import document_lengths
from experiments.effect.training import fine_tune

pytestmark = pytest.mark.xdist_group("effect")  # shares `prepared` and `tuned`

TINY = PRESETS["tiny"]
MODULES = ("fractions.py", "pathlib.py", "random.py", "shutil.py", "textwrap.py")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A standard library of five modules."""
    folder = tmp_path_factory.mktemp("library")
    for name in MODULES:
        shutil.copy(Path(sysconfig.get_paths()["stdlib"]) / name, folder)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def prepared(library, cache):
    return prepare(TINY, cache, library)


def test_docstrings_are_cut_out(library):
    """Every docstring goes, in any of its forms, and nothing else."""
    module = '"""Module."""\nx = "kept"\n\n'
    class_ = 'class A:\n    "é"; y = 1\n    def f(self): """One\n        two."""\n    z = """kept"""\n'
    without = 'x = "kept"\n\nclass A:\n    ; y = 1\n    def f(self): \n    z = """kept"""\n'
    assert without_docstrings((module + class_).encode()) == without
    assert len(library_sources(library)) == len(MODULES)


def test_held_out_answers_are_in_no_training_text(prepared, library):
    """Neither the pretraining source nor the answers trained on contain a held-out answer."""
    texts = [*library_sources(library), *(example.answer for example in prepared.train)]
    assert prepared.held_out
    assert not [example for example in prepared.held_out if any(example.answer in text for text in texts)]


def test_document_lengths():
    """Of each token's own document, by mask or by position."""
    assert document_lengths(torch.tensor([[1, 1, 0], [1, 1, 1]]), None).tolist() == [[2, 2, 0], [3, 3, 3]]
    assert document_lengths(None, torch.tensor([[0, 1, 2, 0, 0, 1]])).tolist() == [[3, 3, 3, 1, 2, 2]]
    assert document_lengths(None, torch.tensor([[0, 1, 0], [0, 0, 1]])).tolist() == [[2, 2, 1], [1, 2, 2]]


def test_packed_documents_do_not_see_each_other(prepared):
    """Another first document leaves the logits of the others as they are, bit for bit: what is masked counts as 0."""
    model = LlamaForCausalLM.from_pretrained(prepared.folder)
    rows = [effect_training._labelled(example) for example in prepared.train[:3]]
    batch = effect_training.DataCollatorWithFlattening()(rows)
    length = len(rows[0]["input_ids"])
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, :length] += 1
    with torch.no_grad():
        logits, others = (model(**inputs).logits[0] for inputs in (batch, changed))
        assert not torch.equal(logits[:length], others[:length])
        assert torch.equal(logits[length:], others[length:])
        del batch["position_ids"], changed["position_ids"]
        logits, others = (model(**inputs).logits[0] for inputs in (batch, changed))
        assert not torch.equal(logits[length:], others[length:])  # so the positions are what keeps them apart


@pytest.fixture(scope="module")
def tuned(prepared, tmp_path_factory):
    """All runs of seed 0 and one of another, over two epochs: the result of each, and the batches that it was trained on."""
    found, batches = {}, []
    twice = replace(TINY, tuning=replace(TINY.tuning, epochs=2))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DataCollatorForSeq2Seq", "DataCollatorWithFlattening"):

            class Recording(getattr(effect_training, name)):
                def __call__(self, *args, **kwargs):
                    batch = super().__call__(*args, **kwargs)
                    batches.append(batch["input_ids"])
                    return batch

            patch.setattr(effect_training, name, Recording)
        for run in [*(run for run in runs(TINY) if run.seed == 0), Run(PADDED, OURS, 0, 1)]:
            batches.clear()
            result = fine_tune(twice, run, prepared, tmp_path_factory.mktemp("tuned"))
            found[run] = result, batches[: result["updates"]]
    return found


def test_conditions_differ_in_nothing_but_the_noise(tuned):
    """For one seed, all conditions see the same documents in the same updates; another seed, others.

    Without noise, packed and padded training are the same but for rounding, here by less than 1e-6 of the loss: float32
    rounds by 6e-8, and the 6 updates together move the loss by no more than 1e-2 of itself.
    """
    seen = {
        run: [[token for token in batch.flatten().tolist() if token] for batch in updates]
        for run, (_, updates) in tuned.items()
    }
    order = seen[Run(PADDED, OURS, 0, 0)]
    assert len(order) == 6
    assert order[:3] != order[3:]
    pairs = sorted(itertools.chain.from_iterable(order))
    for run, updates in seen.items():
        assert (updates == order) == (run.seed == 0)
        assert (sorted(itertools.chain.from_iterable(updates)) == pairs) == (run.seed == 0)
    losses = {run: result["outcomes"]["held_out_loss"] for run, (result, _) in tuned.items()}
    assert losses[Run(PACKED, OURS, 0, 0)] == pytest.approx(losses[Run(PADDED, OURS, 0, 0)], rel=1e-6)
    assert len(set(losses.values())) >= 5  # noise and seed do change it


def test_noise_has_the_size_it_should_have(tuned):
    """Ours is scaled by each document's length in both layouts, and spares padding; the hook's by the row's length.

    The mean square of n uniform variables is within 5 standard errors, 5 sqrt(4/5 / n), of theirs; n is above 100 x 32.
    """
    tolerance = 5 * math.sqrt(0.8 / 3200) / 2
    for run, (result, _) in tuned.items():
        first = result["first_update"]
        assert first["documents"] == TINY.tuning.update_pairs
        assert first["padding_noise_rms"] == 0
        if run.noise_by == HOOK:
            right = run.alpha / math.sqrt(3 * first["row_tokens"] * TINY.start.hidden_size)
        else:
            right = run.alpha * first["right_rms_per_alpha"]
            wanted = "last batch within" if run.alpha else "noise off: alpha is 0"
            assert wanted in result["describe"]
            assert (" by sequence, " in result["describe"].partition("last batch within")[2]) == (run.alpha > 0)
        assert first["noise_rms"] == pytest.approx(right, rel=tolerance)


@pytest.fixture(scope="module")
def instructions(tmp_path_factory):
    """A file in Alpaca's columns: 40 questions, one of them twice, and one pair without an answer."""
    rows = [
        {"instruction": f"Count to {n}.", "input": "", "output": " ".join(map(str, range(n)))} for n in range(1, 40)
    ]
    rows += [rows[0], {"instruction": "Repeat:", "input": "a b", "output": "a b"}]
    rows += [{"instruction": "Say nothing.", "input": "", "output": ""}]
    path = tmp_path_factory.mktemp("data") / "instructions.json"
    path.write_text(json.dumps(rows))
    return path


def test_instructions(instructions, tmp_path):
    """Instruction and input make the question; what is there twice is taken once, and what has no answer is left out."""
    pairs = instruction_pairs(str(instructions))
    assert len(pairs) == 40
    assert pairs[2] == QuestionAnswer("Count to 3.", "Count to 3.", "0 1 2")
    assert pairs[-1].question == "Repeat:\n\na b"
    other = tmp_path / "other.csv"
    other.write_text("question,answer\n1,2\n")
    with pytest.raises(InputError, match="expected the columns instruction, input and output, got question, answer"):
        instruction_pairs(str(other))


def test_a_pretrained_model(prepared, instructions, tmp_path):
    """It is tuned in its own format; its record has outcomes before and after, and no texts. Noise by rms is a share of the
    table, within 5 standard errors of the mean square of n uniform variables, 5 sqrt(4/5 / n); n is above 500 x 32.
    """
    start = Pretrained(str(prepared.folder), None, pair_tokens=256, held_out_fraction=0.3, bf16=False)
    preset = replace(TINY, name="pretrained", start=start)
    with pytest.raises(InputError, match="--data: preset 'pretrained' needs a file"):
        prepare(preset, tmp_path)
    made = prepare(preset, tmp_path, data=str(instructions))
    assert made.record["stage"] == "untouched"
    assert made.record["held_out_pairs"] + made.record["training_pairs_to_draw_from"] == 40
    assert str(instructions) not in json.dumps(made.record)

    run = Run(PACKED, RMS, 0.1, 0)
    result = fine_tune(preset, run, made, tmp_path)
    assert "answers" not in result
    assert result["outcomes"].keys() == made.record["outcomes"].keys()
    assert result["outcomes"]["held_out_loss"] != made.record["outcomes"]["held_out_loss"]
    first = result["first_update"]
    ratio = first["noise_rms"] / made.record["embedding_rms"]
    assert ratio == pytest.approx(0.1, rel=5 * math.sqrt(0.8 / 500 / 32) / 2)

    with pytest.raises(InputError, match=r"pairs to train on and \d+ to hold out have at most 256 tokens"):
        prepare(replace(preset, tuning=replace(preset.tuning, training_pairs=41)), tmp_path, data=str(instructions))


@pytest.mark.usefixtures("prepared")  # so that `cache` has the pretrained model
def test_an_experiment_goes_on_where_it_was(library, cache, tmp_path, monkeypatch):
    """All runs are recorded once; a second call repeats none; one whose record was cut off midway is done again."""
    monkeypatch.setattr(effect, "RESULTS", tmp_path / "results")
    path = tmp_path / "results" / "effect.jsonl"
    effect.experiment(TINY, 1, cache, library)
    lines = path.read_text().splitlines()
    start = json.loads(lines[0])["start"]
    assert len(lines) == 1 + len(runs(TINY))
    assert effect.pending(TINY, start) == []

    before = path.read_bytes()
    monkeypatch.setattr(effect, "work", None)  # whatever would run now, fails
    effect.experiment(TINY, 1, cache, library)
    assert path.read_bytes() == before
    monkeypatch.undo()

    monkeypatch.setattr(effect, "RESULTS", tmp_path / "results")
    path.write_bytes(before[:-100])
    assert len(effect.pending(TINY, start)) == 1
    # That workers are processes was seen above; starting one takes longer than the run.
    monkeypatch.setattr(effect, "ProcessPoolExecutor", lambda workers, *_: ThreadPoolExecutor(workers))
    effect.experiment(TINY, 1, cache, library)
    assert effect.pending(TINY, start) == []
    again, first = json.loads(path.read_text().splitlines()[-1]), json.loads(lines[-1])
    assert again["outcomes"] == first["outcomes"]  # the same run, so the same result
    assert path.read_bytes().startswith(before[:-100] + b"\n")


@pytest.mark.usefixtures("prepared")
def test_a_run_that_fails_does_not_stop_the_others(library, cache, tmp_path, monkeypatch):
    """Its error is shown, it has no record, and the next call repeats it alone."""
    broken = runs(TINY)[1]

    def work(preset, run, folder):
        if run == broken:
            raise RuntimeError("no such noise")
        return {"outcomes": {}}

    monkeypatch.setattr(effect, "RESULTS", tmp_path)
    monkeypatch.setattr(effect, "work", work)
    monkeypatch.setattr(effect, "ProcessPoolExecutor", lambda workers, *_: ThreadPoolExecutor(workers))
    shown = []
    monkeypatch.setattr(effect.tqdm, "write", lambda self, text: shown.append(text))
    with pytest.raises(SystemExit, match=f"1 of {len(runs(TINY))} runs failed"):
        effect.experiment(TINY, 1, cache, library)
    assert "RuntimeError: no such noise" in "".join(shown)
    start = json.loads((tmp_path / "effect.jsonl").read_text().splitlines()[0])["start"]
    assert effect.pending(TINY, start) == [broken]
