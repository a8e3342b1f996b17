"""Contract: replace_embeddings makes the token look-ups of a real model noisy in training, and changes nothing else."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import generation

from helpers.models import MODELS, batch, build, names, noise_in
from neft_kernels import describe, no_noise, noise_magnitude, replace_embeddings, restore_embeddings
from neft_kernels.models.batch import NO_BATCH


def expected_in(model, name):
    """Name and strategy of the embeddings that become noisy: before transformers 5, T5 has one module under three names."""
    modules = dict(model.named_modules())
    return {key: strategy for key, strategy in MODELS[name][2].items() if key in modules}


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def test_the_right_embeddings_become_noisy(name):
    model = build(name)
    assert replace_embeddings(model, alpha=5.0) is model
    reports = describe(model)
    expected = expected_in(model, name)
    if name.startswith("bart"):  # the table itself may be held in a plain module that forward does not call
        expected = {key: report.strategy for key, report in zip(expected, reports, strict=True)}
        assert set(expected.values()) >= {"add_noise"}
    assert {report.name: report.strategy for report in reports} == expected
    assert {report.state for report in reports} == {"on"}


def test_nothing_else_changes(name):
    model, plain = build(name), build(name)
    inputs = batch()
    parameters = dict(model.named_parameters())
    replace_embeddings(model)
    assert {key: id(value) for key, value in model.named_parameters()} == {k: id(v) for k, v in parameters.items()}
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(isinstance(model.get_submodule(key), type(plain.get_submodule(key))) for key in names(model))
    with no_noise(model):
        assert torch.equal(model(**inputs).loss, plain(**inputs).loss)
    assert not torch.equal(model(**inputs).loss, plain(**inputs).loss)
    model.eval(), plain.eval()
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)


def test_noise_has_the_right_bound_by_sequence_and_none_on_padding(name):
    model = replace_embeddings(build(name), alpha=5.0)
    inputs = batch()
    noise = noise_in(model, inputs)
    # The encoder has the mask; a decoder that was given none takes its tokens as one full sequence each.
    first = "encoder" if "decoder_start_token_id" in model.config.to_dict() and len(noise) > 1 else ""
    masked = next((key for key in noise if first in key), next(iter(noise)))
    want = noise_magnitude(inputs["input_ids"], 16, 5.0, attention_mask=inputs["attention_mask"])
    largest = noise[masked].abs().amax(-1)
    # 1e-5 is what rounding to float32 at the values' size, below 32, can add to a difference of two.
    assert (largest <= want + 1e-5).all()
    # The largest of 16 draws falls below a tenth of the bound with probability 1e-16.
    assert (largest >= 0.1 * want).all()
    assert (largest[0, 4:] == 0).all()
    for key, decoder_noise in noise.items():
        if "decoder" in key:
            assert 0.1 < decoder_noise.abs().max() / noise_magnitude(inputs["input_ids"], 16, 5.0) <= 1 + 1e-5


def test_standard_deviation_is_that_of_a_uniform(name):
    model = replace_embeddings(build(name), alpha=5.0)
    inputs = {"input_ids": torch.randint(3, 50, (8, 64))}
    inputs["labels"] = inputs["input_ids"]
    for noise in noise_in(model, inputs).values():
        bound = 5.0 / (64 * 16) ** 0.5
        # 8192 draws: the standard error of the deviation is 0.5 %; six of them.
        assert noise.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
        assert abs(noise.mean().item()) < 6 * bound / 3**0.5 / 8192**0.5


def test_gradients_without_noise_are_those_of_the_plain_model(name):
    model, plain = replace_embeddings(build(name), alpha=0.0), build(name)
    for each in (model, plain):
        each(**batch()).loss.backward()
    for (key, noisy), (_, untouched) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(noisy.grad, untouched.grad), key


def test_generation_in_training_mode_has_no_noise(name):
    model, plain = replace_embeddings(build(name), alpha=50.0), build(name)
    inputs = {key: value for key, value in batch().items() if key != "labels"}
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**inputs, **settings), plain.generate(**inputs, **settings))


def test_a_cache_means_generation():
    model = replace_embeddings(build("llama"), alpha=50.0)
    plain = build("llama")
    ids = batch()["input_ids"]
    for each in (model, plain):
        each.config.use_cache = True
    name = generation.utils.ALL_CACHE_NAMES[0]
    with torch.no_grad():
        prompt = plain(ids, use_cache=True)[name]
    noisy = model(ids[:, :1], **{name: copy.deepcopy(prompt)}).logits
    assert torch.equal(noisy, plain(ids[:, :1], **{name: prompt}).logits)


def test_restore_brings_back_the_original(name):
    model, plain = build(name), build(name)
    replace_embeddings(model)
    model(**batch())
    assert restore_embeddings(model) is model
    for (key, module), (_, untouched) in zip(model.named_modules(), plain.named_modules(), strict=True):
        assert type(module) is type(untouched), key
        assert set(module.__dict__) == set(untouched.__dict__), key
        for hooks in (name for name in module.__dict__ if "hooks" in name):
            assert len(getattr(module, hooks)) == len(getattr(untouched, hooks)), (key, hooks)
    assert "no noisy embeddings" in str(describe(model))
    assert torch.equal(model(**batch()).loss, plain(**batch()).loss)


def test_a_second_call_replaces_the_first():
    model = replace_embeddings(replace_embeddings(build("llama"), alpha=5.0), alpha=1.0, scale_by="batch")
    (report,) = describe(model)
    assert (report.alpha, report.scale_by) == (1.0, "batch")
    (noise,) = noise_in(model, batch()).values()
    bound = 1.0 / (7 * 16) ** 0.5
    assert 0.5 * bound < noise[0, 4:].abs().max() <= bound + 1e-5


def test_a_bad_call_changes_nothing():
    model = replace_embeddings(build("llama"), alpha=5.0)
    for bad in ({"alpha": -1.0}, {"scale_by": "x"}, {"backend": "x"}, {"stream": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            replace_embeddings(model, **bad)
    with pytest.raises(RuntimeError, match="cuda"):
        replace_embeddings(model, backend="cuda")
    assert describe(model)[0].alpha == 5.0


def test_what_cannot_tell_lengths_is_noted():
    model = replace_embeddings(build("llama"))
    ids = batch()["input_ids"]
    model(input_ids=ids, attention_mask=torch.ones(2, 1, 7, 7, dtype=torch.bool))
    (report,) = describe(model)
    assert "attention_mask of shape [2, 1, 7, 7]" in report.note
    assert "attention_mask" in str(report)
    assert report.last_magnitude == pytest.approx((5.0 / (7 * 16) ** 0.5,) * 2)


def test_packed_sequences_are_told_apart_by_position_ids():
    model = replace_embeddings(build("llama"))
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1]])
    model(input_ids=batch()["input_ids"][:1], position_ids=positions)
    assert describe(model)[0].last_magnitude == pytest.approx((5 / (5 * 16) ** 0.5, 5 / (2 * 16) ** 0.5))


def test_an_error_in_forward_leaves_no_masks_behind():
    model = replace_embeddings(build("llama"))
    bad = batch()
    bad["input_ids"] = bad["input_ids"] + 100
    with pytest.raises(IndexError, match="input_ids"):
        model(**bad)
    assert model.model.embed_tokens.noise.model_noise.passes.batch is NO_BATCH
    (noise,) = noise_in(model, batch()).values()
    assert (noise[0, 4:] == 0).all()


class Nested(nn.Module):
    """Looks tokens up again after a module inside it, which takes a mask of its own, has returned."""

    class Inner(nn.Module):
        def __init__(self, embedding):
            super().__init__()
            self.embedding = embedding

        def forward(self, ids, attention_mask=None):
            return self.embedding(ids)

    def __init__(self):
        super().__init__()
        self.inner = self.Inner(nn.Embedding(50, 16))
        self.copied = None

    def get_input_embeddings(self):
        return self.inner.embedding

    def forward(self, ids, attention_mask):
        inside = self.inner(ids, attention_mask=attention_mask.roll(1, -1))
        self.copied = pickle.loads(pickle.dumps(self.inner))
        return inside, self.inner.embedding(ids)


def test_the_outer_masks_are_back_when_an_inner_module_returns():
    model = replace_embeddings(Nested(), alpha=5.0)
    ids, mask = torch.arange(6)[None], torch.tensor([[1, 1, 1, 0, 0, 0]])
    plain = nn.functional.embedding(ids, model.inner.embedding.weight)
    inside, outside = model(ids, mask)
    assert torch.equal((inside != plain).any(-1), mask.roll(1, -1).bool())
    assert torch.equal((outside != plain).any(-1), mask.bool())
    # A copy made in the middle of a pass has nothing of that pass.
    assert model.copied.embedding.noise.model_noise.passes.batch is NO_BATCH


def test_inside_of_data_parallel_it_is_the_model_that_counts():
    name = "t5, shared table"
    model = replace_embeddings(nn.DataParallel(build(name)))
    assert names(model) == [f"module.{each}" for each in expected_in(model.module, name)]


def test_no_noise_nests_and_survives_errors():
    model = replace_embeddings(build("llama"))
    with no_noise(model):
        with no_noise(model):
            assert describe(model)[0].state == "off: inside no_noise"
        assert describe(model)[0].state == "off: inside no_noise"
    with pytest.raises(KeyError), no_noise(model):
        raise KeyError
    assert describe(model)[0].state == "on"


@pytest.mark.parametrize("name", ["llama", "t5, shared table"])
def test_compiling_a_noisy_model_breaks_no_graph_more(name):
    inputs = batch()
    breaks = []
    for noisy in (False, True):
        model = build(name)
        if noisy:
            replace_embeddings(model)
        torch._dynamo.reset()
        breaks.append(torch._dynamo.explain(model)(**inputs).graph_break_count)
    assert breaks[1] <= breaks[0]


def test_noise_on_the_prompt_or_the_completion_only():
    ids = torch.arange(3, 12)[None]
    labels = torch.where(torch.arange(9) < 4, -100, ids)
    for noise_on, noisy in (("prompt", torch.arange(9) < 4), ("completion", torch.arange(9) >= 4)):
        network = replace_embeddings(build("llama"), alpha=50.0, noise_on=noise_on)
        output = network(ids, labels=labels, output_hidden_states=True).hidden_states[0]
        changed = (output != network.get_input_embeddings().weight[ids]).any(-1)[0]
        assert torch.equal(changed, noisy)
        assert f"on the {noise_on}" in str(describe(network))
        with pytest.raises(ValueError, match=f"noise_on='{noise_on}' needs labels"):
            network(ids)
    with pytest.raises(ValueError, match="noise_on"):
        replace_embeddings(build("llama"), noise_on="answers")
    with pytest.raises(ValueError, match=r"noise_on.*decoder-only"):
        replace_embeddings(build("t5, shared table"), noise_on="prompt")
