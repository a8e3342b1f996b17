"""Contract: replace_embeddings works on every model type of the installed transformers that looks up token ids.

A sample of them by default, all with ``--all-architectures``. Whatever is compared between a model and its noisy twin is
compared exactly: without noise, not a bit of a model may differ.
"""

import copy
import inspect
import pickle
import re
from typing import NamedTuple

import pytest
import torch
import transformers
from torch.nn import functional

from helpers import architecture_batches, architecture_limits, architectures
from helpers.noise_recorder import Outline, Recorder
from neft_kernels import describe, no_noise, replace_embeddings, restore_embeddings
from neft_kernels.models.batch import CACHES

ALPHA = 5.0

#: Every way in which models look tokens up, and the large families.
SAMPLE = (
    # a table of its own, or tied to the output
    *("llama", "qwen3", "gpt2", "gpt_neox", "opt", "bloom", "phi3", "mixtral", "deepseek_v3", "cpmant"),
    # scaled, normed, with a second table, quantised, narrower than the model, with several codebooks
    *("gemma3_text", "biogpt", "inkling_text", "muse_glimmer_text", "idefics", "ibert", "albert", "csm"),
    # encoder and decoder: one table looked up by both, scaled, or one each
    *("t5", "bart", "m2m_100", "marian", "prophetnet", "t5gemma", "t5gemma2", "encoder-decoder", "fsmt", "musicgen"),
    # encoders
    *("bert", "modernbert", "deberta-v2", "longformer", "big_bird"),
    # state-space and recurrent models
    *("mamba", "jamba", "rwkv"),
    # with images and sound; gemma4 looks up single ids as well
    *("llava", "qwen2_5_vl", "gemma4", "florence2", "blip-2", "whisper", "clip"),
    # a decoder that reads the cache of its encoder
    "diffusion_gemma",
    # ids by time, not by sequence
    "xlnet",
)


def pytest_generate_tests(metafunc):
    everything = metafunc.config.getoption("--all-architectures", default=False)
    if "model_type" in metafunc.fixturenames:
        found = architectures.model_types() if everything else SAMPLE
        metafunc.parametrize("model_type", found)
    if "refused_type" in metafunc.fixturenames:
        found = list(architecture_limits.REFUSED)
        metafunc.parametrize("refused_type", found if everything else found[::8])


def test_architecture(model_type, tmp_path):
    """One test for all that is asked of a model type, since building and running the models is what takes the time."""
    model = architectures.build(model_type)
    plain = copy.deepcopy(model)  # is never made noisy
    batch = architecture_batches.batch(model)
    evaluation, step = evaluate(model, batch), train_step(model, batch)
    was = Outline(model)  # only now, since models set up more in their first passes

    assert replace_embeddings(model, alpha=ALPHA) is model
    check_nothing_else_changed(model, plain, was)
    assert same(evaluate(model, batch), evaluation)
    calls = check_every_look_up_is_noisy(model, batch)
    check_magnitudes(calls, batch)
    check_without_noise_it_trains_as_before(model, batch, step)
    check_copies(model, batch, calls, evaluation, model_type)
    check_resized(model, plain, batch, calls, model_type)
    check_checkpointing(model, plain, batch, model_type)
    check_restored(model, batch, evaluation, step, was)
    check_reloaded(model, tmp_path, model_type)


def test_caches_have_known_names(model_type):
    """A model calls its caches what replace_embeddings knows to be a cache, so that the next renamed one is noticed here."""
    parameters = inspect.signature(architectures.model_class(model_type).forward).parameters.values()
    caches = {each.name for each in parameters if re.search(r"Cache\b", str(each.annotation))}
    assert caches <= {*CACHES, *architecture_limits.CACHES_OF_SOUND}


def test_refused(refused_type):
    """A model whose token embedding cannot be told, or is no module, raises an error that says so, and stays as it is."""
    with torch.device("meta"):
        model = architectures.build(refused_type)
    was = Outline(model)
    with pytest.raises(ValueError, match=type(model).__name__):
        replace_embeddings(model)
    assert Outline(model).differences(was) == []


def test_lists_are_disjoint():
    assert not set(architecture_limits.REFUSED) & set(architecture_limits.NOT_BUILT)
    assert not set(SAMPLE) & {
        *architecture_limits.REFUSED,
        *architecture_limits.NOT_BUILT,
    }  # that each is there, the sample's tests see


# --- what is checked -------------------------------------------------------------------------------------------------


def check_nothing_else_changed(model, plain, was):
    """Parameters, ties, names and classes are those of the plain model."""
    now = Outline(model)
    assert now.parameters == was.parameters
    assert list(model.state_dict()) == list(plain.state_dict())
    for name, original in was.classes.items():
        assert isinstance(model.get_submodule(name), original), name


def check_every_look_up_is_noisy(model, batch):
    """In training, every look-up of the input ids in the input embeddings happens in a noisy embedding."""
    assert {report.state for report in describe(model.train())} == {"on"}
    with Recorder(model) as record:
        run(model, batch, seed=1)
    assert record.plain_look_ups == []
    noisy = {side for side, _ in (wanted(call, batch) for call in record.calls)}
    expected = {name for name in ("input_ids", "decoder_input_ids") if name in batch}
    assert noisy >= expected, [call.ids.shape for call in record.calls]
    return record.calls


def check_magnitudes(calls, batch):
    """The noise is uniform within the bound of its own sequence's length, and there is none on padding."""
    for call in calls:
        side, magnitude = wanted(call, batch)
        if call.ids.ndim == 0:
            assert not call.noise.any(), call.name
        if side is None:
            continue
        assert call.noise.shape[:-1] == magnitude.shape
        assert not call.noise[magnitude == 0].any(), f"{call.name}: noise on padding"
        relative = call.noise[magnitude > 0] / magnitude[magnitude > 0][:, None]
        # The sum was rounded to float32, and so was the difference to what the embedding returns without noise.
        rounding = 2**-23 * (call.largest + 1) / magnitude[magnitude > 0].min()
        assert relative.abs().max() <= 1 + rounding, call.name
        # A uniform on (-1, 1) has variance 1/3 and kurtosis 9/5, so the relative standard error of the deviation of n draws
        # is sqrt((9/5 - 1) / 4n), and that of their mean sqrt(1/3n): six of each.
        draws = relative.numel()
        assert relative.std().item() * 3**0.5 == pytest.approx(1, abs=6 * (0.2 / draws) ** 0.5), call.name
        assert abs(relative.mean().item()) <= 6 * (1 / 3 / draws) ** 0.5, call.name


def check_without_noise_it_trains_as_before(model, batch, step):
    """Same loss and gradients as the plain model, with the same seed; with noise another loss."""
    assert train_step(model, batch).loss != step.loss
    with no_noise(model):
        assert_same_step(train_step(model, batch), step)
    replace_embeddings(model, alpha=0.0)
    assert_same_step(train_step(model, batch), step)
    replace_embeddings(model, alpha=ALPHA)


def check_copies(model, batch, calls, evaluation, model_type):
    """Copies have the same noise with the same seed, and are independent of the original."""
    copiers = {"deepcopy": copy.deepcopy, "pickle": lambda each: pickle.loads(pickle.dumps(each))}
    for how, copier in copiers.items():
        if model_type in architecture_limits.CANNOT[how]:
            continue
        twin = copier(model)
        with Recorder(model) as original, Recorder(twin) as copied:
            run(twin.train(), batch, seed=1)
        assert original.calls == []
        assert [call.name for call in copied.calls] == [call.name for call in calls]
        assert all(torch.equal(mine.noise, theirs.noise) for mine, theirs in zip(copied.calls, calls, strict=True))
        restore_embeddings(twin)
        assert describe(model)
        assert not describe(twin)
        assert same(evaluate(twin, batch), evaluation)


def check_resized(model, plain, batch, calls, model_type):
    """A noisy model's embeddings can be resized: they stay noisy, and are otherwise those of a resized plain model."""
    if model_type in architecture_limits.CANNOT["deepcopy"] or model_type in architecture_limits.CANNOT["resize"]:
        return
    batch = {name: value for name, value in batch.items() if name != "labels"}
    noisy, resized = copy.deepcopy(model), copy.deepcopy(plain)
    for each in (noisy, resized):
        torch.manual_seed(0)
        each.resize_token_embeddings(architectures.VOCABULARY + 8)
    assert same(evaluate(noisy, batch), evaluate(resized, batch))
    again = check_every_look_up_is_noisy(noisy, batch)
    check_magnitudes(again, batch)
    assert len(again) == len(calls)


def check_checkpointing(model, plain, batch, model_type):
    """Gradient checkpointing recomputes the same noise: same loss, same gradients."""
    unable = {**architecture_limits.CANNOT["deepcopy"], **architecture_limits.CANNOT["checkpoint"]}
    if not model.supports_gradient_checkpointing or model_type in unable:
        return
    steps = []
    for each in (plain, model):
        twin = copy.deepcopy(each)
        twin.gradient_checkpointing_enable()
        steps.append((train_step(twin, batch), train_step(each, batch)))
    (plain_checkpointed, plain_step), (checkpointed, step) = steps
    assert torch.equal(checkpointed.loss, step.loss)
    if all(map(torch.equal, plain_checkpointed.gradients.values(), plain_step.gradients.values())):
        assert_same_step(checkpointed, step)
        return
    # Recurrent layers add the same gradients up in another order when they are checkpointed, without noise as well. That
    # rounds differently, by 2**-24 of the largest gradient for each of some thousand terms at the very most.
    assert checkpointed.gradients.keys() == step.gradients.keys()
    for name, gradient in checkpointed.gradients.items():
        error = (gradient - step.gradients[name]).abs().max()
        assert error <= 1000 * 2**-24 * step.gradients[name].abs().max(), name


def check_reloaded(model, folder, model_type):
    """What a noisy model saves is what it would have saved before, and loads as a plain model."""
    replace_embeddings(model).save_pretrained(folder)
    again = type(model).from_pretrained(folder)
    assert not describe(again)
    if model_type in architecture_limits.CANNOT["reload"]:
        return
    saved, loaded = model.state_dict(), again.state_dict()
    assert saved.keys() == loaded.keys()
    for name, value in saved.items():
        assert torch.equal(value, loaded[name]), name


def check_restored(model, batch, evaluation, step, was):
    """Classes, attributes, hooks, outputs and gradients are those of a model that was never noisy."""
    assert restore_embeddings(model) is model
    assert not describe(model)
    assert Outline(model).differences(was) == []
    assert same(evaluate(model, batch), evaluation)
    assert_same_step(train_step(model, batch), step)


# --- how -------------------------------------------------------------------------------------------------------------


def run(model, batch, seed=0):
    """One forward pass; every random number in it follows from `seed`."""
    transformers.set_seed(seed)
    return model(**batch)


def evaluate(model, batch):
    """The outputs in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return [tensor.clone() for tensor in architecture_batches.floats(run(model, batch))]


def same(ours, theirs):
    return len(ours) == len(theirs) and all(
        torch.equal(a.nan_to_num(nan=1.5), b.nan_to_num(nan=1.5)) for a, b in zip(ours, theirs, strict=True)
    )


class Step(NamedTuple):
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]


def train_step(model, batch):
    """Loss and gradients of one training step."""
    model.train().zero_grad()
    loss = architecture_batches.loss(run(model, batch))
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return Step(loss.detach(), gradients)


def assert_same_step(ours, theirs):
    assert torch.equal(ours.loss, theirs.loss)
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, gradient in ours.gradients.items():
        assert torch.equal(gradient, theirs.gradients[name]), name


def wanted(call, batch):
    """Which of the batch's ids a call looked up, and the magnitude that each of them ought to have; None for other ids."""
    for side in ("input_ids", "decoder_input_ids"):
        ids = batch.get(side)
        if ids is None:
            continue
        if side == "decoder_input_ids":
            ids = ids.view(architectures.BATCH, -1, architectures.LENGTH)[:, 0]  # of MusicGen's codebooks the first
        mask = batch.get("attention_mask") if side == "input_ids" else None
        mask = torch.ones(ids.shape[:2]) if mask is None else mask.float()
        magnitude = mask * ALPHA / (mask.sum(1, keepdim=True) * call.noise.shape[-1]) ** 0.5
        further = call.ids.shape[-1] - ids.shape[-1]
        if torch.equal(call.ids, ids):
            return side, magnitude
        if torch.equal(call.ids, ids.mT):  # by time, as in XLNet
            return side, magnitude.mT
        if further > 0 and torch.equal(call.ids[..., :-further], ids):  # padded on, as in Longformer
            return side, functional.pad(magnitude, (0, further))
        if further > 0 and torch.equal(call.ids[..., further:], ids):  # behind a prompt of its own, as in CPMAnt
            return side, functional.pad(magnitude, (further, 0))
    return None, None
