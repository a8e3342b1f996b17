"""Contract: in a training run of the real Trainer the noise is there while it trains, once, and gone afterwards."""

import contextlib
import inspect
import logging
import threading

import pytest
import torch
from transformers import Trainer, TrainerCallback

from helpers.models import D, llama
from helpers.trainer import Look, activate, deactivate, is_plain, own_hook, trainer
from neft_kernels import NEFTuneCallback, describe, patch_transformers, replace_embeddings


def test_callback_is_there_while_it_trains_and_gone_afterwards(tmp_path):
    network, look = llama(), Look()
    runner = trainer(tmp_path, network, [NEFTuneCallback(alpha=7.0, scale_by="batch"), look])
    assert is_plain(network)
    for _ in range(2):
        runner.train()
        assert is_plain(network)
    assert len(look.reports) == 6
    for (report,) in look.reports:
        assert (report.alpha, report.scale_by, report.strategy) == (7.0, "batch", "fused")
        assert report.last_magnitude == pytest.approx((7.0 / (9 * D) ** 0.5,) * 2)


@pytest.mark.parametrize("by", ["callback", "patch"])
def test_alpha_may_be_the_ratio_of_the_noise_to_the_embeddings(tmp_path, by):
    """Measured when training begins, and changed by a schedule."""
    network, look = llama(), Look()
    rms = network.get_input_embeddings().weight.square().mean().sqrt().item()
    if by == "callback":
        callback = NEFTuneCallback(alpha=lambda step: 0.1 * (step + 1), scale_by="rms")
        trainer(tmp_path, network, [callback, look]).train()
    else:
        with patch_transformers(scale_by="rms"):
            trainer(tmp_path, network, [look], neftune_noise_alpha=0.1).train()
    expected = [0.1, 0.2, 0.3] if by == "callback" else [0.1] * 3
    for (report,), ratio in zip(look.reports, expected, strict=True):
        assert report.last_magnitude == pytest.approx((ratio * 3**0.5 * rms,) * 2)
        assert report.ratio == pytest.approx(ratio, rel=0.2)  # of a few tokens


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_training_that_fails_leaves_a_plain_model(tmp_path, error):
    network, look = llama(), Look(fail_at=2, error=error)
    runner = trainer(tmp_path, network, [NEFTuneCallback(), look])
    with pytest.raises(error):
        runner.train()
    assert len(look.reports[0]) == 1
    assert is_plain(network)

    network, look = llama(), Look(fail_at=2, error=error)
    with patch_transformers():
        runner = trainer(tmp_path, network, [look], neftune_noise_alpha=5.0)
        with pytest.raises(error):
            runner.train()
    assert len(look.reports[0]) == 1
    assert is_plain(network)


def test_bad_options_are_refused_at_once():
    before = own_hook()
    with pytest.raises(ValueError, match="scale_by"):
        patch_transformers(scale_by="x")
    with pytest.raises(TypeError, match="alfa"):
        patch_transformers(alfa=3)
    assert own_hook() == before
    with pytest.raises(ValueError, match="alpha"):
        NEFTuneCallback(-3.0)
    with pytest.raises(TypeError, match="alfa"):
        NEFTuneCallback(alfa=3)
    with pytest.raises(TypeError, match="enabled"):
        NEFTuneCallback(enabled=False)
    NEFTuneCallback(backend="cuda")  # where the model will be is not known yet
    patch_transformers(backend="cuda").undo()


def test_never_two_noises(tmp_path, caplog):
    """Whatever of ours meets the Hugging Face hook steps aside and says so."""
    own_bound = 5.0 / (9 * D) ** 0.5

    network, look = llama(), Look()
    with caplog.at_level(logging.WARNING, logger="neft_kernels"):
        trainer(tmp_path, network, [NEFTuneCallback(50.0), look], neftune_noise_alpha=5.0).train()
    assert "neftune_noise_alpha is set as well" in caplog.text
    assert look.reports == [()] * 3

    network, look = replace_embeddings(llama(), alpha=50.0), Look()
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="neft_kernels"):
        trainer(tmp_path, network, [NEFTuneCallback(1.0), look]).train()
    assert "noisy already" in caplog.text
    assert {report[0].alpha for report in look.reports} == {50.0}
    assert describe(network)[0].alpha == 50.0  # the callback does not undo what it did not do

    for order in ("hook first", "hook second"):
        network = llama()
        if order == "hook second":
            replace_embeddings(network, alpha=50.0)
        handle = activate(network, 5.0)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="neft_kernels"):
            if order == "hook first":
                replace_embeddings(network, alpha=50.0)
            for _ in range(2):
                network(torch.arange(9)[None])
        assert caplog.text.count("neftune_noise_alpha") == 1, order
        embedding, ids = network.get_input_embeddings(), torch.arange(9)[None]
        noise = embedding(ids) - embedding.weight[ids]
        assert 0 < noise.abs().max() <= own_bound + 1e-5, order
        assert "neftune_noise_alpha" in describe(network)[0].state
        deactivate(network, handle)
        assert describe(network)[0].state == "on"
        assert (embedding(ids) - embedding.weight[ids]).abs().max() > own_bound


def test_a_callback_that_steps_aside_lets_the_training_run(tmp_path):
    """It tells its schedule to nobody; and what Trainer.train returns is what it returns without us."""
    network, look = replace_embeddings(llama(), alpha=50.0), Look()
    output = trainer(tmp_path, network, [NEFTuneCallback(lambda step: 1.0), look]).train()
    assert output.global_step == 3
    assert [report[0].alpha for report in look.reports] == [50.0] * 3


@pytest.mark.parametrize("way", ["callback", "patch"])
def test_a_smaller_batch_is_tried_with_noise(way, tmp_path, caplog):
    """With auto_find_batch_size training begins as often as it is tried, and ends once."""

    class OutOfMemoryOnce(Look):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            if len(self.reports) == 1:
                raise RuntimeError("CUDA out of memory.")

    network, look = llama(), OutOfMemoryOnce()
    callbacks, options = [NEFTuneCallback(7.0), look], {}
    if way == "patch":
        callbacks, options = [look], {"neftune_noise_alpha": 7.0}
    with patch_transformers(), caplog.at_level(logging.WARNING, logger="neft_kernels"):
        trainer(tmp_path, network, callbacks, auto_find_batch_size=True, **options).train()
    assert len(look.reports) == 1 + 3
    assert all(report[0].alpha == 7.0 and report[0].last_magnitude is not None for report in look.reports)
    assert [record for record in caplog.records if record.name == "neft_kernels"] == []
    assert is_plain(network)


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_a_callback_that_was_removed_leaves_no_noise(error, tmp_path):
    """Nothing calls it when training ends, or fails."""

    class Removes(Look):
        def on_step_end(self, args, state, control, **kwargs):
            runner.remove_callback(NEFTuneCallback)
            super().on_step_end(args, state, control, **kwargs)

    network, look = llama(), Removes(error and 2, error)
    runner = trainer(tmp_path, network, [NEFTuneCallback(), look])
    with pytest.raises(error) if error else contextlib.nullcontext():
        runner.train()
    assert len(look.reports[0]) == 1
    assert is_plain(network)


def test_trainings_in_two_threads_end_each_its_own_noise(tmp_path):
    """Each in a context of its own: the one that ends first leaves the other one's model noisy."""
    first_has_ended, second_has_begun, reports = threading.Event(), threading.Event(), []

    class WaitsForTheFirst(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            second_has_begun.set()
            first_has_ended.wait(60)
            reports.append(describe(kwargs["model"]))

    class WaitsForTheSecond(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            second_has_begun.wait(60)

    networks = llama(), llama()
    runners = [
        trainer(tmp_path / str(each), network, [NEFTuneCallback(), waits()])
        for each, (network, waits) in enumerate(zip(networks, (WaitsForTheSecond, WaitsForTheFirst), strict=True))
    ]
    second = threading.Thread(target=runners[1].train)
    second.start()
    runners[0].train()
    assert is_plain(networks[0])
    first_has_ended.set()
    second.join()
    assert [len(report) for report in reports] == [1] * 3
    assert is_plain(networks[1])


@pytest.mark.parametrize("first", [NEFTuneCallback, lambda: patch_transformers().undo()], ids=["callback", "patch"])
def test_train_is_wrapped_once_by_whichever_comes_first(first, monkeypatch):
    """An earlier test may have wrapped it."""
    plain = Trainer.train
    if hasattr(plain, "_neft_kernels"):
        plain = plain.__wrapped__
    monkeypatch.setattr(Trainer, "train", plain)
    first()
    wrapped = Trainer.train
    assert wrapped is not plain
    assert inspect.signature(wrapped) == inspect.signature(plain)
    NEFTuneCallback()
    patch_transformers().undo()
    assert Trainer.train is wrapped


def test_evaluation_has_no_noise_and_manual_seed_reproduces_the_weights(tmp_path):
    def train(alpha):
        network = llama() if alpha is None else replace_embeddings(llama(), alpha=alpha)
        runner = trainer(tmp_path, network, seed=3)
        first, second = (runner.evaluate()["eval_loss"] for _ in range(2))
        assert first == second
        runner.train()
        return network.state_dict()

    first, second, plain = train(5.0), train(5.0), train(None)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], plain[key]) for key in first)
