"""Contract: in a training run of the real Trainer the noise is there while it trains, once, and gone afterwards."""

import contextlib
import copy
import inspect
import logging
import threading
from types import SimpleNamespace

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainerCallback, TrainingArguments

import neft_kernels
from helpers.models import D, llama, rows
from neft_kernels import (
    NEFTuneCallback,
    describe,
    noise_magnitude,
    patch_transformers,
    replace_embeddings,
    restore_embeddings,
    set_alpha,
)
from neft_kernels.integrations.trainer import _own_hook
from neft_kernels.models.noise import EmbeddingNoise


def trainer(tmp_path, network, callbacks=(), cls=Trainer, **options):
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        **options,
    )
    return cls(network, arguments, train_dataset=rows(), eval_dataset=rows(4), callbacks=list(callbacks))


class Look(TrainerCallback):
    """Notes what describe() says, and how the embedding is hooked, in the middle of training."""

    def __init__(self, fail_at=None, error=KeyboardInterrupt):
        self.reports, self.hooks, self.fail_at, self.error = [], [], fail_at, error

    def on_step_end(self, args, state, control, **kwargs):
        network = kwargs["model"]
        self.reports.append(describe(network))
        self.hooks.append(len(network.get_input_embeddings()._forward_hooks))
        if state.global_step == self.fail_at:
            raise self.error


def own_hook():
    """What puts transformers' own hook on and takes it off, at this moment."""
    owner, names = _own_hook()
    return tuple(getattr(owner, name) for name in names)


def activate(network, alpha, accelerator=None):
    """Does what the Trainer does before it trains; returns the handle."""
    put_on, _ = own_hook()
    if _own_hook()[0] is transformers.trainer:
        return put_on(network, alpha, accelerator)
    accelerator = accelerator or SimpleNamespace(unwrap_model=lambda given: given)
    holder = SimpleNamespace(neftune_noise_alpha=alpha, accelerator=accelerator)
    assert put_on(holder, network) is network
    return holder.neftune_hook_handle


def deactivate(network, handle, accelerator=None):
    """Does what the Trainer does after it has trained."""
    _, take_off = own_hook()
    if _own_hook()[0] is transformers.trainer:
        take_off(network, handle, accelerator)
    else:
        accelerator = accelerator or SimpleNamespace(unwrap_model=lambda given: given)
        take_off(SimpleNamespace(neftune_hook_handle=handle, accelerator=accelerator), network)


def is_plain(network):
    embedding = network.get_input_embeddings()
    return type(embedding) is nn.Embedding and not embedding._forward_hooks and not network._forward_pre_hooks


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


def test_an_alpha_of_0_is_off_however_it_came():
    """To a compiled graph it is a number like others, once it has been set at run time; to people it is not."""
    for network in (replace_embeddings(llama(), alpha=0), replace_embeddings(llama(), alpha=5.0)):
        set_alpha(network, 0)
        assert describe(network)[0].state == "off: alpha is 0"
        set_alpha(network, 1.0)
        assert describe(network)[0].state == "on"


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


def test_schedule_follows_the_trainers_step(tmp_path):
    look = Look()
    network = llama()
    callback = NEFTuneCallback(alpha=lambda step: 10.0 * step)
    trainer(tmp_path, network, [callback, look], gradient_accumulation_steps=2).train()
    assert [report[0].alpha for report in look.reports] == [0.0, 10.0, 20.0]
    largest = [report[0].last_magnitude[1] for report in look.reports]
    assert largest == pytest.approx([alpha / (9 * D) ** 0.5 for alpha in (0.0, 10.0, 20.0)])


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


def test_an_alpha_that_is_set_during_training_stays(tmp_path):
    """The callback tells a schedule its step, and sets nothing where there is none."""

    class Sets(Look):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            set_alpha(kwargs["model"], 8.0)

    look = Sets()
    trainer(tmp_path, llama(), [NEFTuneCallback(5.0), look]).train()
    assert [report[0].alpha for report in look.reports] == [5.0, 8.0, 8.0]


def test_schedule_counts_forward_passes_and_set_alpha_changes_it():
    network = replace_embeddings(llama(), alpha=lambda step: 1.0 + step)
    ids = torch.arange(3, 12)[None]
    seen = []
    for _ in range(3):
        network(ids)
        seen.append(describe(network)[0].last_magnitude[1] * (9 * D) ** 0.5)
    network.eval()(ids)
    assert seen == pytest.approx([1.0, 2.0, 3.0])
    set_alpha(network.train(), 8.0)
    network(ids)
    assert describe(network)[0].last_magnitude[1] == pytest.approx(8.0 / (9 * D) ** 0.5)
    with pytest.raises(ValueError, match="alpha"):
        set_alpha(network, -1.0)
    assert describe(network)[0].alpha == 8.0
    with pytest.raises(ValueError, match="alpha"):
        replace_embeddings(network, alpha=lambda step: -1.0)
    restore_embeddings(network)
    with pytest.raises(ValueError, match="no noisy embeddings"):
        set_alpha(network, 1.0)


def test_a_compiled_model_follows_set_alpha_without_compiling_again():
    torch._dynamo.reset()
    embedding = neft_kernels.NEFTuneEmbedding(50, D, alpha=lambda step: 1.0)
    counter = CompileCounter()
    compiled = torch.compile(embedding, fullgraph=True, backend=counter)
    ids = torch.arange(9)[None]
    for alpha in (2.0, 4.0, 8.0, 0.0):
        set_alpha(embedding, alpha)
        noise = (compiled(ids) - embedding.weight[ids]).abs().max()
        bound = alpha / (9 * D) ** 0.5
        assert 0.5 * bound <= noise <= bound + 1e-5
    assert counter.frame_count == 1


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_compiled_model_does_not_freeze_a_schedule(fullgraph):
    """It cannot count, and says so; also where the embedding runs uncompiled, because the compiler gave up on it."""
    torch._dynamo.reset()
    network = replace_embeddings(llama(), alpha=lambda step: 5.0 if step < 2 else 0.0)
    ids = torch.arange(3, 12)[None]
    with pytest.raises(Exception, match=r"set_alpha\(\.\.\., step="):
        torch.compile(network, fullgraph=fullgraph, backend="eager")(ids)


def test_a_schedule_counts_on_in_a_model_that_is_compiled_in_part():
    """The outermost module is not compiled, and so it counts; the embedding inside of the compiled part follows."""
    torch._dynamo.reset()
    network = replace_embeddings(llama(), alpha=lambda step: 1.0 + step)
    network.model.compile(backend="eager")
    ids = torch.arange(3, 12)[None]
    for step in range(3):
        network(ids)
        assert describe(network)[0].last_magnitude == pytest.approx(((1.0 + step) / (9 * D) ** 0.5,) * 2)


def test_a_compiled_model_follows_a_schedule_whose_step_is_told():
    """In one graph; a copy has an alpha of its own."""
    torch._dynamo.reset()
    embedding = neft_kernels.NEFTuneEmbedding(50, D, alpha=lambda step: 1.0 + step)
    set_alpha(embedding, lambda step: 1.0 + step, step=0)
    twin, ids = copy.deepcopy(embedding), torch.arange(9)[None]
    counter = CompileCounter()
    compiled = torch.compile(embedding, fullgraph=True, backend=counter)
    for step in (0, 3, 15):
        set_alpha(embedding, lambda step: 1.0 + step, step=step)
        set_alpha(twin, 0.0)
        noise = (compiled(ids) - embedding.weight[ids]).abs().max()
        bound = (1.0 + step) / (9 * D) ** 0.5
        assert 0.5 * bound <= noise <= bound + 1e-5
    assert counter.frame_count == 1


def test_a_recomputed_pass_is_not_counted():
    network = replace_embeddings(llama(), alpha=lambda step: 5.0 * (step + 1))
    ids = torch.arange(3, 12)[None]
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(3)
        network.zero_grad()
        set_alpha(network, lambda step: 5.0 * (step + 1), step=0)
        set_alpha(network, lambda step: 5.0 * (step + 1))
        if recompute:
            logits = checkpoint(lambda tokens: network(tokens, use_cache=False).logits, ids, use_reentrant=False)
        else:
            logits = network(ids, use_cache=False).logits
        logits.square().sum().backward()
        gradients.append(network.get_input_embeddings().weight.grad.clone())
    assert torch.equal(*gradients)


def test_noise_on_the_prompt_or_the_completion_only():
    ids = torch.arange(3, 12)[None]
    labels = torch.where(torch.arange(9) < 4, -100, ids)
    for noise_on, noisy in (("prompt", torch.arange(9) < 4), ("completion", torch.arange(9) >= 4)):
        network = replace_embeddings(llama(), alpha=50.0, noise_on=noise_on)
        output = network(ids, labels=labels, output_hidden_states=True).hidden_states[0]
        changed = (output != network.get_input_embeddings().weight[ids]).any(-1)[0]
        assert torch.equal(changed, noisy)
        assert f"on the {noise_on}" in str(describe(network))
        with pytest.raises(ValueError, match=f"noise_on='{noise_on}' needs labels"):
            network(ids)
    with pytest.raises(ValueError, match="noise_on"):
        replace_embeddings(llama(), noise_on="answers")
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(ValueError, match=r"noise_on.*decoder-only"):
        replace_embeddings(t5, noise_on="prompt")


@pytest.mark.cpu_extension
def test_the_first_noisy_batch_is_logged_once(caplog):
    network = replace_embeddings(llama(), alpha=5.0)
    with caplog.at_level(logging.INFO, logger="neft_kernels"):
        for _ in range(2):
            network(torch.arange(3, 12)[None], attention_mask=torch.ones(1, 9))
    (record,) = [record.message for record in caplog.records if "noise is on" in record.message]
    assert record.startswith("model.embed_tokens: noise is on, alpha=5 scaled by sequence, backend cpu")
    assert f"{5.0 / (9 * D) ** 0.5:.3g}" in record


def test_the_log_of_a_schedule_and_of_what_could_not_be_used(caplog):
    network = replace_embeddings(llama(), alpha=lambda step: 3.0 + step)
    with caplog.at_level(logging.INFO, logger="neft_kernels"):
        network(torch.arange(3, 12)[None], attention_mask=torch.ones(1, 1, 9, 9, dtype=torch.bool))
    (message,) = [record.getMessage() for record in caplog.records if "noise is on" in record.getMessage()]
    assert "alpha=3 scaled" in message
    assert message.endswith("(attention_mask of shape [1, 1, 9, 9] does not tell the lengths of ids of shape [1, 9])")


def test_magnitudes_are_read_only_for_a_log_that_is_kept(caplog, monkeypatch):
    """On a GPU reading them waits for the device."""
    read = []
    monkeypatch.setattr(EmbeddingNoise, "bounds", lambda noise: read.append(noise))
    for level, reads in ((logging.WARNING, 0), (logging.INFO, 1)):
        with caplog.at_level(level, logger="neft_kernels"):
            replace_embeddings(llama(), alpha=5.0)(torch.arange(3, 12)[None])
        assert len(read) == reads


def tokenizer():
    words = [f"w{number}" for number in range(46)]
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
    built = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=built, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


SFT = {
    "padded": {},
    "packed": {"packing": True, "max_length": 16},
    "padding-free": {"padding_free": True, "max_length": None},
    "completion only": {"completion_only_loss": True},
}


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("case", SFT)
def test_sft_trainer(tmp_path, case, peft):
    """TRL's collators: each sequence is scaled by its own length, however the batch is laid out."""
    texts = [(f"w{n} w{n + 1}", "".join(f" w{n + k}" for k in range(2 + n % 4))) for n in range(24)]
    data = Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in texts])
    config = trl.SFTConfig(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=3,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        bf16=False,
        **SFT[case],
    )
    network, look = llama(), Look()
    runner = trl.SFTTrainer(
        network,
        config,
        train_dataset=data,
        processing_class=tokenizer(),
        callbacks=[NEFTuneCallback(5.0), look],
        peft_config=LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM") if peft else None,
    )
    runner.train()
    bounds = [bound for report in look.reports for bound in report[0].last_magnitude]
    # Prompt and completion of 2 + (2 to 5) words, and the end token: sequences of 5 to 8 tokens.
    possible = torch.tensor([5.0 / (length * D) ** 0.5 for length in (5, 6, 7, 8)])
    assert all((possible - bound).abs().min() < 1e-6 for bound in bounds), bounds
    assert max(bounds) > min(bounds)
    assert all(report[0].note == "" for report in look.reports)
    assert describe(runner.model) == ()


def test_patched_the_attribute_of_the_hook_goes_when_training_ends(tmp_path):
    """Unsloth's generated trainers set it on the embedding before they train."""
    network, look = llama(), Look()
    network.get_input_embeddings().neftune_noise_alpha = 5.0
    with patch_transformers():
        trainer(tmp_path, network, [look], neftune_noise_alpha=5.0).train()
    assert all(report.state == "on" for (report,) in look.reports)
    assert "neftune_noise_alpha" not in vars(network.get_input_embeddings())
