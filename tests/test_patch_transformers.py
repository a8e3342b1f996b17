"""Contract: patch_transformers() runs the Trainer's own option neftune_noise_alpha on our kernels, and undoes only that."""

import logging
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from transformers import Trainer

from helpers.models import D, llama
from helpers.trainer import Look, activate, deactivate, is_plain, own_hook, trainer
from neft_kernels import describe, noise_magnitude, patch_transformers, replace_embeddings
from neft_kernels.integrations.trainer import _own_hook


def test_patched_the_trainers_own_option_runs_on_our_kernels(tmp_path):
    before = own_hook()
    network, look = llama(), Look()
    with patch_transformers(scale_by="batch"):
        runner = trainer(tmp_path, network, [look], neftune_noise_alpha=5.0)
        for _ in range(2):
            runner.train()
            assert is_plain(network)
    assert [(report.alpha, report.strategy, report.scale_by) for (report,) in look.reports] == [
        (5.0, "fused", "batch")
    ] * 6
    assert own_hook() == before

    look = Look()  # outside of it the Trainer's own hook is back
    trainer(tmp_path, llama(), [look], neftune_noise_alpha=5.0).train()
    assert look.reports == [()] * 3
    assert look.hooks == [1] * 3


def test_patch_as_a_plain_call_and_twice_in_a_row(tmp_path):
    before = own_hook()
    first = patch_transformers()
    second = patch_transformers(scale_by="batch")
    look = Look()
    trainer(tmp_path, llama(), [look], neftune_noise_alpha=5.0).train()
    assert [len(report) for report in look.reports] == [1] * 3
    assert {report[0].scale_by for report in look.reports} == {"batch"}
    first.undo()  # in any order, and as often as one likes
    trainer(tmp_path, llama(), [look], neftune_noise_alpha=5.0).train()
    assert [len(report) for report in look.reports] == [1] * 6
    second.undo(), second.undo()
    assert own_hook() == before
    with patch_transformers():
        second.undo()
        assert own_hook() != before


def test_a_handle_undoes_only_what_it_did():
    """Taken back a second time, as the Trainer does where a run fails after its end, it leaves alone what came since."""
    network = llama()
    with patch_transformers():
        handle = activate(network, 5.0)
        assert len(describe(network)) == 1
        handle.remove()
        assert is_plain(network)
        replace_embeddings(network, alpha=50.0)
        deactivate(network, handle)
    assert describe(network)[0].alpha == 50.0


def test_patching_leaves_a_model_alone_that_is_noisy_already(caplog):
    """As the callback does; and undoing what the Trainer did undoes nothing of the user's."""
    network = replace_embeddings(llama(), alpha=50.0)
    with patch_transformers(), caplog.at_level(logging.WARNING, logger="neft_kernels"):
        handle = activate(network, 5.0)
        assert "noisy already" in caplog.text
        assert describe(network)[0].alpha == 50.0
        deactivate(network, handle)
    assert describe(network)[0].alpha == 50.0


def test_patching_needs_a_transformers_that_can_be_patched(monkeypatch):
    owner, names = _own_hook()
    monkeypatch.delattr(owner, names[0])
    with pytest.raises(RuntimeError, match=r"needs transformers 4\.40"):
        patch_transformers()


def test_before_5_2_it_is_methods_of_the_trainer(monkeypatch, tmp_path):
    """What test_versions does with such versions, here without one."""
    for name in ("activate_neftune", "deactivate_neftune"):
        monkeypatch.delattr(transformers.trainer, name, raising=False)
        monkeypatch.setattr(Trainer, f"_{name}", lambda self, model: model, raising=False)
    before = own_hook()
    network = llama()
    runner = trainer(tmp_path, network, neftune_noise_alpha=5.0)
    with patch_transformers(scale_by="batch"):
        assert own_hook() != before
        assert runner._activate_neftune(network) is network
        assert [(report.alpha, report.scale_by) for report in describe(network)] == [(5.0, "batch")]
        runner._deactivate_neftune(network)
        assert is_plain(network)
    assert own_hook() == before


def test_patching_draws_nothing():
    state = torch.get_rng_state()
    patch_transformers().undo()
    assert torch.equal(torch.get_rng_state(), state)


def test_scale_by_batch_is_the_rule_of_the_hugging_face_hook():
    """The hook computes it in float32, so half a unit in the last place apart."""
    network, ids = llama(), torch.zeros(2, 9, dtype=torch.int64)
    embedding = network.get_input_embeddings()
    nn.init.zeros_(embedding.weight)
    activate(network, 5.0)
    largest = max(embedding(ids).abs().max().item() for _ in range(200))
    magnitude = noise_magnitude(ids, D, 5.0, scale_by="batch")
    # The largest of n uniform draws on [0, m] is below m (1 - t) with probability (1 - t)**n; n = 57600, t = 0.001: 1e-25.
    assert 0.999 * magnitude < largest <= magnitude * (1 + 2**-23)


def test_what_accelerate_wraps_is_unwrapped_first():
    network = llama()
    wrapped = nn.Sequential(network)
    accelerator = SimpleNamespace(unwrap_model=lambda given: given[0])
    with patch_transformers():
        handle = activate(wrapped, 5.0, accelerator)
        assert [report.name for report in describe(network)] == ["model.embed_tokens"]
        assert not wrapped._forward_hooks
        assert not wrapped._forward_pre_hooks
        deactivate(wrapped, handle, accelerator)
    assert is_plain(network)


def test_patched_the_attribute_of_the_hook_goes_when_training_ends(tmp_path):
    """Unsloth's generated trainers set it on the embedding before they train."""
    network, look = llama(), Look()
    network.get_input_embeddings().neftune_noise_alpha = 5.0
    with patch_transformers():
        trainer(tmp_path, network, [look], neftune_noise_alpha=5.0).train()
    assert all(report.state == "on" for (report,) in look.reports)
    assert "neftune_noise_alpha" not in vars(network.get_input_embeddings())
