"""Contract: with `symmetric=True` the model trains on its batch twice, with the noise and with its negative.

The reference doubles the batch by hand and gives the plain model the noisy embeddings.
"""

import copy
import logging

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from helpers.models import BART, NO_DROPOUT, T5, D, batch, build
from helpers.symmetric import (
    SEED,
    assert_equal,
    by_hand,
    gradients,
    magnitude_of,
    noise_seen,
    rows_seen,
    trained,
    twice,
    with_first_half,
)
from neft_kernels import add_noise, describe, no_noise, replace_embeddings, set_alpha

# --- what the model trains on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3, tied", "gemma3, scaled"])
@pytest.mark.parametrize("noise", ["uniform", "sign", "gaussian"])
def test_loss_and_gradients_are_those_of_the_batch_with_the_noise_and_with_its_negative(name, noise):
    model, inputs = build(name), batch()
    expected = by_hand(model, inputs, magnitude_of(inputs, attention_mask=inputs["attention_mask"]), noise)
    replace_embeddings(model, symmetric=True, noise=noise)
    assert_equal(trained(model, inputs), with_first_half(expected, 2))


@pytest.mark.parametrize("name", ["t5, shared table", "bart, shared and scaled"])
def test_encoder_and_decoder_both_see_the_negative(name):
    model, inputs = replace_embeddings(build(name), symmetric=True), batch()
    seen, output = noise_seen(model, inputs)
    assert len(seen) == 2
    for noise, ids in seen:
        first, second = noise.chunk(2)
        assert ids.shape[0] == 4
        assert first.abs().max() > 0.1
        assert torch.allclose(first, -second, atol=1e-6)  # of the sum with the embedding, which is rounded
    assert output.logits.shape[0] == output.encoder_last_hidden_state.shape[0] == 2


def test_the_number_of_items_is_that_of_both_halves():
    model, inputs = build("llama"), batch()
    items = torch.tensor(14)
    magnitude = magnitude_of(inputs, attention_mask=inputs["attention_mask"])
    torch.manual_seed(SEED)
    noisy = add_noise(model.get_input_embeddings()(twice(inputs["input_ids"])), twice(magnitude), symmetric=True)
    rest = {name: twice(value) for name, value in inputs.items() if name != "input_ids"}
    expected = model(inputs_embeds=noisy, **rest, num_items_in_batch=2 * items).loss
    replace_embeddings(model, symmetric=True)
    for given in (items, 14):
        torch.manual_seed(SEED)
        assert torch.equal(model(**inputs, num_items_in_batch=given).loss, expected)
    torch.manual_seed(SEED)
    mean = model(**inputs).loss
    torch.testing.assert_close(expected, mean * (2 * (inputs["labels"][:, 1:] != -100).sum() / 28))


@pytest.mark.parametrize(
    "options",
    [{"scale_by": "batch"}, {"scale_by": "rms", "alpha": 0.1}, {"noise_on": "prompt"}, {"noise_on": "completion"}],
    ids=str,
)
def test_every_option_means_for_both_halves_what_it_means_for_one(options):
    model, inputs = build("llama"), batch()
    inputs["labels"] = inputs["labels"].clone()
    inputs["labels"][:, :3] = -100
    more = {"labels": inputs["labels"], "attention_mask": inputs["attention_mask"]}
    table = model.get_input_embeddings().weight
    rms = {"rms": table.double().square().mean().sqrt().item()} if "rms" in options.values() else {}
    magnitude = magnitude_of(inputs, **{"alpha": 5.0, **options}, **more, **rms)
    expected = by_hand(model, inputs, magnitude)
    replace_embeddings(model, symmetric=True, **options)
    assert_equal(trained(model, inputs), with_first_half(expected, 2))


def test_arguments_by_position_and_for_all_rows():
    model, inputs = build("llama"), batch()
    expected = by_hand(model, inputs, magnitude_of(inputs, attention_mask=inputs["attention_mask"]))
    replace_embeddings(model, symmetric=True)
    torch.manual_seed(SEED)
    positions = torch.arange(7)[None]
    output = model(inputs["input_ids"], inputs["attention_mask"], positions, labels=inputs["labels"])
    assert torch.equal(output.loss, expected[0])
    as_tuple = model(**inputs, return_dict=False)
    assert as_tuple[1].shape[0] == 2


def test_own_names_of_arguments():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(50, D)
            self.rows = 0

        def forward(self, tokens, mask, targets):
            self.rows = tokens.shape[0]
            assert tokens.shape == mask.shape == targets.shape
            return {"loss": F.cross_entropy(self.table(tokens).flatten(0, 1), targets.flatten())}

    inputs = batch()
    names = {"input_ids": "tokens", "attention_mask": "mask", "labels": "targets"}
    model = replace_embeddings(Own(), symmetric=True, argument_names=names).train()
    output = model(inputs["input_ids"], mask=inputs["attention_mask"], targets=inputs["labels"] % D)
    assert model.rows == 4
    output["loss"].backward()


def test_a_copy_doubles_by_its_own_options():
    model = replace_embeddings(build("llama"), symmetric=True)
    twin = copy.deepcopy(model)
    set_alpha(model, 3.0)
    with no_noise(model):
        assert rows_seen(twin, **batch())[0] == [4]
    assert describe(twin)[0].alpha == 5.0


# --- recomputed passes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    model, inputs = replace_embeddings(build("llama"), symmetric=True), batch()
    expected = trained(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_equal(trained(model, inputs), expected)


@pytest.mark.parametrize("part", ["model", "decoder"])
def test_a_region_that_holds_the_embedding_is_recomputed_alike(part):
    model, inputs = replace_embeddings(build("llama"), symmetric=True), batch()
    expected = trained(model, inputs)
    region = model if part == "model" else model.model
    forward = region.forward

    if part == "decoder":
        region.forward = lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
        assert_equal(trained(model, inputs), expected)
        return
    torch.manual_seed(SEED)
    loss = checkpoint(lambda **given: model(**given, use_cache=False).loss, use_reentrant=False, **inputs)
    found = gradients(model, loss)
    assert torch.equal(loss, expected[0])
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[2][name])


def test_a_part_called_by_a_checkpointed_region_is_not_doubled_again():
    model, inputs = replace_embeddings(build("llama"), symmetric=True), batch()
    expected = trained(model, inputs)

    class Decoder(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, **kwargs):
            return checkpoint(self.inner, use_reentrant=False, **kwargs)

    inner = model.model
    model.model = Decoder(inner)
    found = trained(model, inputs)
    model.model = inner
    assert torch.equal(found[0], expected[0])
    for name, gradient in found[2].items():
        assert torch.equal(gradient, expected[2][name.replace("model.inner", "model")])


def test_a_compiled_model_trains_on_the_same_batch():
    model, inputs = build("llama"), batch()
    expected = trained(model, inputs)
    replace_embeddings(model, 1e-30, symmetric=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss, logits, found = trained(compiled, inputs)
    torch.testing.assert_close(loss, expected[0])
    assert logits.shape == expected[1].shape
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[2][name.removeprefix("_orig_mod.")], atol=1e-6, rtol=1e-3)
    replace_embeddings(model, 5.0, symmetric=True)
    assert (trained(compiled, inputs)[0] - expected[0]).abs() > 1e-4


# --- where the option is given ---------------------------------------------------------------------------------------


def test_describe_and_the_log_say_it(caplog):
    model = replace_embeddings(build("llama"), symmetric=True, noise="sign")
    with caplog.at_level(logging.INFO, "neft_kernels"):
        model(**batch())
    assert "symmetric sign noise is on" in caplog.text
    (report,) = describe(model)
    assert report.symmetric
    assert "symmetric sign noise on" in str(report)
    (report,) = describe(replace_embeddings(model))
    assert not report.symmetric


@pytest.mark.parametrize("class_name", ["T5ForConditionalGeneration", "BartForConditionalGeneration"])
def test_decoder_ids_and_masks_of_their_own(class_name):
    config = getattr(transformers, class_name).config_class
    options = {**(T5 if class_name.startswith("T5") else BART), "decoder_start_token_id": 0}
    model = getattr(transformers, class_name)(config(**options, **NO_DROPOUT)).train()
    replace_embeddings(model, symmetric=True)
    inputs = batch()
    own = {"decoder_input_ids": inputs["input_ids"][:, :5], "decoder_attention_mask": inputs["attention_mask"][:, :5]}
    seen, output = noise_seen(model, inputs | own | {"labels": inputs["labels"][:, :5]})
    decoder = next(noise for noise, ids in seen if ids.shape[1] == 5)
    assert not decoder[[0, 2], 4:].any()  # padding
    assert decoder[[1, 3], 4:].any()
    assert output.logits.shape[:2] == (2, 5)
