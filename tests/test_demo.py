"""The demo, in its smallest form: three runs from the same start, and a report that shows what they measured.

The runs are made in this process instead of one process each, which would import transformers and TRL three more times.
"""

import importlib
import json
import shutil
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("trl")

pytestmark = pytest.mark.xdist_group("demo")  # shares `shown`

DEMO = Path(__file__).parent.parent / "examples" / "instruction_tuning"
MODULES = ("fractions.py", "pathlib.py", "random.py", "shutil.py", "textwrap.py")


@pytest.fixture(scope="module")
def demo():
    """The demo's modules, which a program finds beside itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DEMO))
        yield {
            name: importlib.import_module(name)
            for name in ("train", "run", "inputs", "causal_lm", "records", "smollm2")
        }


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A standard library of five modules, where the demo looks for it."""
    folder = tmp_path_factory.mktemp("library")
    for name in MODULES:
        shutil.copy(Path(sysconfig.get_paths()["stdlib"]) / name, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(folder)})
        yield folder


@pytest.fixture(scope="module")
def shown(demo, library, tmp_path_factory):
    """What the demo prints and where it writes, after three steps in each run."""
    output = tmp_path_factory.mktemp("output")
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        options = ["--model", "tiny", "--steps", "3", "--batch-size", "4", "--output", str(output)]
        patch.setattr(sys, "argv", ["train.py", *options])

        def run(settings):
            result = demo["run"].run(settings)
            path = output / "result.json"
            result.save(path)
            return demo["records"].RunResult.load(path)

        patch.setattr(demo["train"], "run", run)
        patch.setattr(demo["train"], "OF_TINY", replace(demo["train"].OF_TINY, evaluated=4))
        patch.setattr(demo["run"], "MAX_ANSWER_TOKENS", 8)
        patch.setattr("builtins.print", lambda *values, **_: lines.append(" ".join(map(str, values))))
        demo["train"].main()
    return "\n".join(lines), output


def test_the_runs_differ_in_nothing_but_the_noise(shown):
    """Before the first step all losses are the same, to the bit; after it, the noise has made them different."""
    runs = json.loads((shown[1] / "results.json").read_text())["runs"]
    assert [run["noise"] for run in runs] == ["no noise", "Trainer neftune_noise_alpha", "neft_kernels"]
    assert [[point["step"] for point in run["curve"]] for run in runs] == [[0, 1, 2, 3]] * 3
    starts, ends = (
        {(run["curve"][i]["train_loss"], run["curve"][i]["held_out_loss"]) for run in runs} for i in (0, -1)
    )
    assert len(starts) == 1
    assert len(ends) == 3


def test_the_report_shows_what_was_measured(shown):
    """describe, the table, and the answers to two held-out questions, those of the untrained model among them."""
    text, output = shown
    assert "noise on; alpha=5 by sequence, fused on backend" in text
    runs = json.loads((output / "results.json").read_text())["runs"]
    for run in runs:
        last = run["curve"][-1]
        row = next(line for line in text.splitlines() if line.startswith(run["noise"]) and "MiB" in line)
        assert f"{last['train_loss']:.3f}" in row
        assert f"{last['held_out_loss']:.3f}" in row
    questions = [answer["question"] for answer in runs[0]["answers"]]
    assert len(set(questions)) == 2
    assert [answer["question"] for answer in runs[0]["untrained_answers"]] == questions
    assert all(question in text for question in questions)
    titles = next(line for line in text.splitlines() if line.startswith("untrained"))
    assert titles.split() == ["untrained", "no", "noise", "Trainer", "neftune_noise_alpha", "neft_kernels"]
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_with_a_chat_template_sees_turns(demo):
    """The question is the user's turn and the answer the assistant's; other models see the question marked by ###."""
    inputs = demo["inputs"]
    tokenizer = demo["causal_lm"].train_tokenizer(["What? That."], 300)
    examples = inputs.Examples([{"prompt": "What?", "completion": "That."}], [{"prompt": "Who?", "completion": "She."}])
    plain = inputs.in_model_format(examples, tokenizer, inputs.PROMPT)
    assert plain.train == [{"prompt": "### What?\n", "completion": "That."}]

    tokenizer.chat_template = (
        "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chat = inputs.in_model_format(examples, tokenizer, inputs.PROMPT)
    prompt, answer = inputs.question_and_answer(chat.held_out[0])
    assert inputs.prompt_text(prompt, tokenizer) == "<user>Who?<assistant>"
    assert answer == "She."


def test_pairs_that_are_too_long_are_left_out(demo):
    """With the end of the answer, which takes a token; texts stay, as SFTTrainer cuts them."""
    inputs = demo["inputs"]
    tokenizer = demo["causal_lm"].train_tokenizer(["aaaa"], 259)  # no merges: one token a byte, and <s>
    pairs = [{"prompt": "a" * 4, "completion": "a" * length} for length in (4, 5)]
    kept = inputs.fitting(inputs.Examples(pairs, [*pairs, {"text": "a" * 99}]), tokenizer, 10)
    assert kept.train == pairs[:1]
    assert kept.held_out == [pairs[0], {"text": "a" * 99}]
    with pytest.raises(inputs.InputError, match="--max-length 9: 0 pairs to train on"):
        inputs.fitting(inputs.Examples(pairs, pairs), tokenizer, 9)


def test_without_the_weights_it_says_what_else_there_is(demo, monkeypatch):
    """Neither a traceback nor a download."""
    monkeypatch.setattr(demo["smollm2"], "PACKAGE", "no-such-package")
    with pytest.raises(demo["inputs"].InputError, match=r"no-such-package is not installed.*hub.*tiny"):
        demo["causal_lm"].default_model()
    assert demo["smollm2"].local_or_hub("HuggingFaceTB/SmolLM2-135M-Instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct"
