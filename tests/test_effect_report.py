"""The report on NEFTune's effect says what the records say, and no more than their intervals allow."""

import json
from dataclasses import asdict, replace

import pytest

from benchmarks import records
from experiments.effect import analysis, report_pretrained, report_sign
from experiments.effect import report as effect_report
from experiments.effect import run as effect
from experiments.effect.analysis import MINUS
from experiments.effect.plan import HOOK, OURS, PACKED, PADDED, PRESETS, RMS, SIGN, SIGN_SYMMETRIC, Run, runs

SMALL = PRESETS["small"]
#: By seed, what no noise explains; the mean is 0, and alpha does not change it, so it must not widen any interval.
OF_SEED = (-2.0, -1.0, 0.0, 1.0, 2.0)
#: By seed, the spread of a difference: mean 0, standard error 0.1 / sqrt(5), 95 % interval +- 0.124.
SPREAD = (0.1, -0.1, 0.1, -0.1, 0.0)
#: The true differences to alpha 0 of the held-out loss.
DIFFERENCES = {
    (PADDED, OURS): {5: -0.5, 10: -0.5, 15: 0.5},
    (PACKED, OURS): {5: 0.0, 10: 0.0, 15: 0.0},
    (PACKED, HOOK): {5: 1.0, 10: 0.0, 15: -1.0},
    (PACKED, RMS): {0.1: 0.0},
}
START = "0123456789ab"


def outcomes_of(run):
    difference = DIFFERENCES[run.layout, run.noise_by].get(run.alpha, 0.0)
    spread = SPREAD[run.seed] if run.alpha else 0.0
    return {
        "held_out_loss": 4 + OF_SEED[run.seed] + difference + spread,
        "train_loss": 3 + 2 * (run.alpha + spread) + OF_SEED[run.seed],
        "answer_tokens": 40 + (run.alpha + 10) * spread,
        "repeated_4grams": 0.25 + 0.01 * (run.alpha + spread),
        "rouge_l": 0.25,
        "leaked_8grams": 0.125,
        "cut_off": 0.0,
    }


def record_of(run, preset=SMALL):
    noise = run.alpha * (0.02 if run.noise_by == HOOK else 0.06)
    return {
        "preset": "small",
        "stage": "fine-tuning",
        "settings": effect.settings(preset, run, START),
        "outcomes": outcomes_of(run),
        "first_update": {"noise_rms": noise, "embedding_rms": 0.5, "right_rms_per_alpha": 0.06},
    }


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A folder with a README, and records of which the outcomes are known."""
    monkeypatch.setattr(analysis, "RESULTS", tmp_path)
    monkeypatch.setattr(records, "environment", lambda: {"device": "a device", "commit": "c0ffee"})
    references = {"answer_tokens": 40.0, "repeated_4grams": 0.01, "leaked_8grams": 0.2}
    pretraining = {"preset": "small", "stage": "pretraining", "start": START, "parameters": 2_000_000}
    of_model = {"held_out_pairs": 300, "embedding_std": 0.05, "references": references}
    records.append("effect", {**pretraining, **of_model}, tmp_path)
    for run in runs(SMALL):
        records.append("effect", record_of(run), tmp_path)
    (tmp_path / "README.md").write_text("before\n<!-- effect:begin -->\nold\n<!-- effect:end -->\nafter\n")
    return tmp_path


def reported(folder):
    effect_report.main("small", folder / "README.md")
    return (folder / "README.md").read_text()


def test_each_sentence_follows_from_the_intervals(written):
    """Direction where the interval leaves out 0, "no effect shown" where it does not; the paper's claim beside it."""
    text = reported(written)
    assert (
        "**held-out loss** (in the paper it falls): padded: falls at alpha 5 and 10, rises at alpha 15; "
        "packed: no effect shown at alpha 5, 10 and 15; "
        "packed with the hook: rises at alpha 5, no effect shown at alpha 10, falls at alpha 15."
    ) in text
    rising = "rises at alpha 5, 10 and 15."
    nothing = "no effect shown at alpha 5, 10 and 15."
    assert f"**train loss** (in the paper it rises): {rising}" in text
    assert f"**answer tokens** (in the paper it rises): {nothing}" in text
    assert f"**repeated 4-grams** (in the paper it does not rise): {rising}" in text
    assert f"**ROUGE-L**: {nothing}" in text
    assert f"**8-grams from training** (in the paper it does not rise): {nothing}" in text
    assert "its noise is 3.0 times weaker" in text
    assert (
        f"{MINUS}1.000 ± 0.000 at alpha 5 (the right length is better), +0.000 ± 0.000 at alpha 10 (no difference shown) and "
        "+1.000 ± 0.000 at alpha 15 (the hook's is better)."
    ) in text
    assert "5 seeds for each condition" in text


def test_the_table_shows_means_and_differences(written):
    """Paired by seed, so what the seeds differ in does not widen the intervals: 2.776 x 0.1 / sqrt(5) = 0.124."""
    lines = reported(written).splitlines()
    assert "| padded | 0 | 0 | 4.000 | 3.000 | 40.0 | 25.0 % | 25.00 | 12.5 % |" in lines
    row = next(line for line in lines if line.startswith("| padded | 5 |"))
    assert row.startswith(f"| padded | 5 | 0.60 | **{MINUS}0.500 ± 0.124** | **+10.000 ± 0.248** | +0.0 ± 1.9 |")
    assert "| packed | 5 | 0.60 | +0.000 ± 0.124 |" in "\n".join(lines)


def test_the_rest_of_the_readme_stays(written):
    """Only what is between the markers changes, and a second report changes nothing; the picture is there."""
    text = reported(written)
    assert text.startswith("before\n<!-- effect:begin -->\n")
    assert text.endswith("\n<!-- effect:end -->\nafter\n")
    assert "old" not in text.split("-->")[1].splitlines()
    assert reported(written) == text
    assert (written / "effect.png").read_bytes().startswith(b"\x89PNG")
    (written / "README.md").write_text("no markers")
    with pytest.raises(ValueError, match="has no section"):
        reported(written)


def test_it_says_how_strong_the_noise_is(written):
    text = reported(written)
    # 5 * 0.06 / 0.5; and 5 / sqrt(3 * 512 * 4096) / 0.02.
    assert "at alpha 5 its root mean square is 0.60 of the embeddings'" in text
    assert "With 512 tokens of width 4096 and embeddings of root mean square 0.02 it is 0.10." in text


def test_weaker_noise_is_reported_apart(written):
    """With the runs at alpha 0 that it shares, and with nothing else."""
    before = reported(written)
    assert "Weaker noise" not in before
    for run in runs(PRESETS["weaker"]):
        if run.alpha:
            records.append("effect", {**record_of(run), "preset": "weaker"}, written)
    text = reported(written)
    assert "alpha 0.5, 1 and 2, noise 0.06, 0.12 and 0.24 of the embeddings, the same 5 seeds" in text
    assert "held-out loss +0.000 ± 0.124, +0.000 ± 0.124, +0.000 ± 0.124;" in text
    without = [line for line in text.splitlines() if not line.startswith("Weaker noise")]
    assert [line for line in without if line] == [line for line in before.splitlines() if line]


def test_only_whole_seeds_of_the_newest_experiment_count(written):
    """A seed with a condition missing is left out, and said to be; so are runs with other settings, until they are newest."""
    path = written / "effect.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n")
    assert json.loads(lines[-1])["settings"]["seed"] == 4
    assert "4 of the 5 planned seeds for each condition" in reported(written)

    others = replace(SMALL, tuning=replace(SMALL.tuning, epochs=SMALL.tuning.epochs + 1))
    for run in runs(SMALL)[: 2 * 11]:
        records.append("effect", record_of(run, others), written)
    text = reported(written)
    assert "2 of the 5 planned seeds" in text
    assert "tuned for 4 epochs" in text

    records.append("effect", record_of(Run(PADDED, OURS, 0, 3)), written)
    assert "4 of the 5 planned seeds" in reported(written)


def test_without_enough_runs_there_is_no_report(written):
    """Intervals need two seeds, and a report needs runs."""
    path = written / "effect.jsonl"
    path.write_text("".join(f"{line}\n" for line in path.read_text().splitlines()[: 1 + 11]))
    with pytest.raises(SystemExit, match="two seeds"):
        analysis.Results("small")
    with pytest.raises(SystemExit, match="no run of preset 'gpu'"):
        analysis.Results("gpu")


def test_a_run_is_known_by_its_settings():
    """A setting that is changed makes another run; the conditions and the seeds of the experiment do not."""
    run = runs(SMALL)[0]
    same = replace(SMALL, conditions=(), seeds=(7,))
    assert effect.settings(same, run, START) == effect.settings(SMALL, run, START)
    assert effect.settings(SMALL, run, "another") != effect.settings(SMALL, run, START)
    for part in ("start", "tuning"):
        for key, value in asdict(getattr(SMALL, part)).items():
            changed = replace(getattr(SMALL, part), **{key: not value if isinstance(value, bool) else value + 1})
            assert effect.settings(replace(SMALL, **{part: changed}), run, START) != effect.settings(SMALL, run, START)


def test_sign_noise_and_symmetric_noise(written):
    """The noises against each other: their intervals are 4.303 x 0.02 / sqrt(3) = 0.050 wide to each side."""
    preset = PRESETS["smollm2-sign"]
    true = {SIGN: 0.5, SIGN_SYMMETRIC: 0.0, OURS: 0.0}
    outcomes = {"held_out_loss": 5.0, "train_loss": 4.0, "answer_tokens": 20.0, "repeated_4grams": 0.5, "rouge_l": 0.1}
    untouched = {"preset": "smollm2", "stage": "untouched", "start": START, "embedding_rms": 0.1, "held_out_pairs": 94}
    references = {"outcomes": outcomes, "references": {"answer_tokens": 36.0}, "training_pairs_to_draw_from": 398}
    records.append("effect", {**untouched, **references, "parameters": 135_000_000}, written)
    for run in runs(preset):
        record = record_of(replace(run, noise_by=OURS))
        record |= {"preset": "smollm2-sign", "settings": effect.settings(preset, run, START)}
        spread = {OURS: 0.0, SIGN: 0.02, SIGN_SYMMETRIC: 0.04}[run.noise_by] * (1, -1, 0)[run.seed]
        record["outcomes"]["held_out_loss"] = 3 + (true[run.noise_by] + spread if run.alpha else 0.0)
        record["first_update"] = {"noise_rms": 0.1 * run.alpha, "embedding_rms": 0.5}
        records.append("effect", record, written)
    page = written / "effect.md"
    page.write_text("<!-- effect-sign:begin -->\n<!-- effect-sign:end -->\n")
    report_sign.main(page)
    text = page.read_text()
    assert (
        "3 seeds for each condition: alpha 5, alpha 15, sign 5, sign 15, symmetric sign 5, symmetric sign 15." in text
    )
    differ = ("sign 5 against alpha 5", "sign 15 against alpha 15", "symmetric sign 5 against sign 5")
    assert f"it differs for {'; '.join(differ)}; symmetric sign 15 against sign 15." in text
    assert "| sign 5 against alpha 5 | **+0.500 ± 0.050** |" in text
    assert "| symmetric sign 5 against alpha 5 | +0.000 ± 0.099 |" in text
    assert f"| symmetric sign 15 against sign 15 | **{MINUS}0.500 ± 0.050** |" in text


SMOLLM2 = PRESETS["smollm2"]
#: The true differences to alpha 0 of the held-out loss.
OF_NOISES = {(OURS, 5): -0.5, (OURS, 15): 0.5, (RMS, 0.1): 0.0}


@pytest.fixture
def pretrained(written):
    """Adds the records of the experiment on a pretrained model, and a page for it."""
    outcomes = {
        "held_out_loss": 5.0,
        "train_loss": 4.0,
        "answer_tokens": 20.0,
        "repeated_4grams": 0.5,
        "rouge_l": 0.125,
    }
    record = {
        "preset": "smollm2",
        "stage": "untouched",
        "start": START,
        "parameters": 135_000_000,
        "embedding_rms": 0.125,
    }
    of_data = {"held_out_pairs": 94, "training_pairs_to_draw_from": 398, "references": {"answer_tokens": 36.0}}
    records.append("effect", {**record, **of_data, "outcomes": {**outcomes, "leaked_8grams": 0.0}}, written)
    for run in runs(SMOLLM2):
        loss = 4 + OF_SEED[run.seed] + OF_NOISES.get((run.noise_by, run.alpha), 0.0)
        loss += 0.1 * (1, -1, 0)[run.seed] if run.alpha else 0.0
        record = record_of(run)
        record |= {"preset": "smollm2", "settings": effect.settings(SMOLLM2, run, START)}
        record["outcomes"] |= {"held_out_loss": loss, "train_loss": 3 + run.alpha}
        record["first_update"] = {"noise_rms": 0.1 * run.alpha, "embedding_rms": 0.5}
        records.append("effect", record, written)
    (written / "effect.md").write_text("<!-- effect-pretrained:begin -->\n<!-- effect-pretrained:end -->\n")
    return written


def test_the_pretrained_model(pretrained):
    """Differences to no noise, paired by seed: their interval is 4.303 x 0.1 / sqrt(3) = 0.248 wide to each side."""
    report_pretrained.main("smollm2", pretrained / "effect.md")
    text = (pretrained / "effect.md").read_text()
    assert "SmolLM2-135M-Instruct, 135 million parameters" in text
    assert "with 3 seeds for each condition: no noise, alpha 5, alpha 15, rms 0.1" in text
    assert (
        "**held-out loss** (in the paper it falls): falls at alpha 5; rises at alpha 15; no effect shown at rms 0.1."
        in text
    )
    assert "**train loss** (in the paper it rises): rises at alpha 5, alpha 15, rms 0.1." in text
    assert "| reference answers |  |  |  | 36.0 |  |  |  |" in text
    assert "| untouched model |  | 5.000 | 4.000 | 20.0 | 50.0 % | 12.50 | 0.0 % |" in text
    assert "| tuned without noise | 0 | 3.000 | 3.000 | 40.0 | 25.0 % | 25.00 | 12.5 % |" in text
    assert f"| alpha 5 | 1.000 | **{MINUS}0.500 ± 0.248** |" in text
    assert "| rms 0.1 | 0.020 | +0.000 ± 0.248 |" in text


def test_an_unfinished_experiment_says_how_far_it_is(pretrained):
    """Seeds that lack a condition are left out; with fewer than two whole seeds there is no interval, and none is shown."""
    path = pretrained / "effect.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n")
    report_pretrained.main("smollm2", pretrained / "effect.md")
    assert "2 of the 3 planned seeds" in (pretrained / "effect.md").read_text()
    path.write_text("\n".join(lines[:-5]) + "\n")
    report_pretrained.main("smollm2", pretrained / "effect.md")
    assert "7 of 12 runs are recorded." in (pretrained / "effect.md").read_text()
