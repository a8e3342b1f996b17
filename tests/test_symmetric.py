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
from torch.nn.parallel import DataParallel
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface

from helpers.models import BART, NO_DROPOUT, T5, D, batch, build
from neft_kernels import (
    NEFTuneEmbedding,
    add_noise,
    describe,
    no_noise,
    noise_magnitude,
    replace_embeddings,
    restore_embeddings,
    set_alpha,
)

SEED = 7


def twice(tensor):
    return torch.cat((tensor, tensor))


def by_hand(model, inputs, magnitude, noise="uniform"):
    """Loss, logits and gradients of the plain `model` on the doubled batch. `magnitude` is that of `inputs`, ``[B, L]``."""
    torch.manual_seed(SEED)
    plain = model.get_input_embeddings()(twice(inputs["input_ids"]))
    noisy = add_noise(plain, twice(magnitude), noise=noise, symmetric=True)
    rest = {name: twice(value) for name, value in inputs.items() if name != "input_ids"}
    output = model(inputs_embeds=noisy, **rest, use_cache=False)
    return output.loss, output.logits, gradients(model, output.loss)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def trained(model, inputs):
    torch.manual_seed(SEED)
    output = model(**inputs, use_cache=False)
    return output.loss, output.logits, gradients(model, output.loss)


def magnitude_of(inputs, alpha=5.0, **options):
    per_token = noise_magnitude(inputs["input_ids"], D, alpha, **options)
    return torch.as_tensor(per_token, dtype=torch.float32).expand(inputs["input_ids"].shape)


def assert_equal(found, expected):
    for this, that in zip(found[:2], expected[:2], strict=True):
        assert torch.equal(this, that)
    assert found[2].keys() == expected[2].keys()
    for name, gradient in found[2].items():
        # The rows of a repeated id are summed in float64 by our kernel, and in float32 by PyTorch's.
        is_table = "embed_tokens" in name
        torch.testing.assert_close(
            gradient, expected[2][name], rtol=1e-5 if is_table else 0, atol=1e-7 if is_table else 0
        )


def with_first_half(expected, rows):
    loss, logits, found = expected
    return loss, logits[:rows], found


# --- what the model trains on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3, tied", "gemma3, scaled"])
@pytest.mark.parametrize("noise", ["uniform", "sign", "gaussian"])
def test_loss_and_gradients_are_those_of_the_batch_with_the_noise_and_with_its_negative(name, noise):
    model, inputs = build(name), batch()
    expected = by_hand(model, inputs, magnitude_of(inputs, attention_mask=inputs["attention_mask"]), noise)
    replace_embeddings(model, symmetric=True, noise=noise)
    assert_equal(trained(model, inputs), with_first_half(expected, 2))


def noise_seen(model, inputs):
    """The noise in what the embeddings return, ``[2 B, L, D]``, each look-up, after a pass in training."""
    seen = []

    def see(module, args, output):
        with torch.no_grad():
            seen.append((output - F.embedding(args[0], module.weight) * scale, args[0]))

    scale = getattr(model.get_input_embeddings(), "embed_scale", 1.0)
    tables = [each for each in model.modules() if isinstance(each, nn.Embedding) and each.num_embeddings == 50]
    handles = [each.register_forward_hook(see) for each in tables]
    torch.manual_seed(SEED)
    output = model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen, output


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


# --- packed rows -----------------------------------------------------------------------------------------------------


def packed():
    lengths = (4, 6, 3)
    torch.manual_seed(2)
    ids = torch.randint(3, 50, (1, sum(lengths)))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    labels = torch.where(positions == 0, -100, ids)
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def test_a_packed_row_of_ordinary_attention():
    model, inputs = build("llama"), packed()
    expected = by_hand(model, inputs, magnitude_of(inputs, position_ids=inputs["position_ids"]))
    replace_embeddings(model, symmetric=True)
    assert_equal(trained(model, inputs), with_first_half(expected, 1))


def flash_like(module, query, key, value, attention_mask, *, position_ids=None, cu_seq_lens_q=None, **kwargs):
    """Attention that keeps the sequences of one row apart, as FlashAttention does it, and ignores positions of several."""
    length = query.shape[2]
    sequence = torch.zeros(length, dtype=torch.int64)
    if query.shape[0] == 1:
        if cu_seq_lens_q is not None:
            sequence = torch.bucketize(torch.arange(length), cu_seq_lens_q[1:].long(), right=True)
        elif position_ids is not None:
            sequence = (position_ids[0] == 0).cumsum(0)
    mask = (sequence[:, None] == sequence[None, :]) & torch.ones(length, length).tril().bool()
    repeats = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(repeats, 1) for each in (key, value))
    return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2), None


@pytest.fixture
def flash(monkeypatch):
    AttentionInterface.register("flash_for_tests", flash_like)
    AttentionMaskInterface.register("flash_for_tests", lambda *args, **kwargs: None)
    yield "flash_for_tests"
    AttentionInterface._global_mapping.pop("flash_for_tests")
    AttentionMaskInterface._global_mapping.pop("flash_for_tests")


def ends(lengths, extra=()):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist(), *extra], dtype=torch.int32)


@pytest.mark.parametrize("boundaries", ["position_ids", "cu_seq_lens"])
@pytest.mark.parametrize("options", [{}, {"scale_by": "batch"}], ids=str)
def test_a_packed_row_of_flash_attention_is_lengthened(flash, boundaries, options):
    model, inputs = build("llama"), packed()
    magnitude = magnitude_of(inputs, position_ids=inputs["position_ids"], **options)
    expected = by_hand(model, inputs, magnitude)
    model.config._attn_implementation = flash
    replace_embeddings(model, symmetric=True, **options)
    if boundaries == "cu_seq_lens":
        cu_seq_lens = ends((4, 6, 3))
        inputs |= {"cu_seq_lens_q": cu_seq_lens, "cu_seq_lens_k": cu_seq_lens, "max_length_q": 6, "max_length_k": 6}
    loss, logits, found = trained(model, inputs)
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(logits, expected[1][:1], atol=1e-5, rtol=1e-4)  # of another order of sums
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[2][name], atol=1e-6, rtol=1e-3)


def test_a_label_of_the_first_token_of_a_lengthened_row_is_no_target(flash):
    model = replace_embeddings(build("llama"), symmetric=True)
    model.config._attn_implementation = flash
    inputs = packed()
    expected = trained(model, inputs)[0]
    inputs["labels"][0, 0] = 17
    given = inputs["labels"].clone()
    assert torch.equal(trained(model, inputs)[0], expected)
    assert torch.equal(inputs["labels"], given)


def test_padding_after_the_last_sequence_of_a_lengthened_row(flash):
    model, inputs = build("llama"), packed()
    inputs["labels"][:, 10:] = -100
    replace_embeddings(model, symmetric=True)
    model.config._attn_implementation = flash
    cu_seq_lens = ends((4, 6))  # the last three tokens are padding
    seen, _ = noise_seen(model, inputs | {"cu_seq_lens_q": cu_seq_lens, "cu_seq_lens_k": cu_seq_lens})
    noise = seen[0][0][0]
    assert noise.shape[0] == 26
    first, second = noise.chunk(2)
    assert torch.allclose(first, -second, atol=1e-6)
    assert not first[10:].any()
    assert (first[:10].abs().amax(1) > 0).all()


# --- when the batch is not doubled -----------------------------------------------------------------------------------


def rows_seen(model, **inputs):
    rows = []
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    try:
        output = model(**inputs)
    finally:
        handle.remove()
    return rows, output


def test_without_noise_the_batch_stays_as_it_is():
    model, inputs = replace_embeddings(build("llama"), symmetric=True), batch()
    assert rows_seen(model, **inputs)[0] == [4]
    with torch.no_grad():
        assert rows_seen(model, **inputs)[0] == [2]
    with no_noise(model):
        assert rows_seen(model, **inputs)[0] == [2]
    assert rows_seen(model.eval(), **inputs)[0] == [2]
    model.train()
    assert rows_seen(replace_embeddings(model, 0.0, symmetric=True), **inputs)[0] == [2]
    set_alpha(model, 5.0)
    assert rows_seen(model, **inputs)[0] == [4]
    restore_embeddings(model)
    assert rows_seen(model, **inputs)[0] == [2]


def test_generation_in_training_mode_is_not_doubled():
    model = replace_embeddings(build("llama"), symmetric=True)
    assert model.generate(batch()["input_ids"], max_new_tokens=3, do_sample=False).shape == (2, 10)


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
    call = model.model.__call__

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
    assert call is not None
    assert torch.equal(found[0], expected[0])
    for name, gradient in found[2].items():
        assert torch.equal(gradient, expected[2][name.replace("model.inner", "model")])


def test_a_compiled_model_trains_on_the_same_batch():
    model, inputs = replace_embeddings(build("llama"), symmetric=True), batch()
    sizes = []
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    output = compiled(**inputs, use_cache=False)
    sizes.append(output.logits.shape[0])
    output.loss.backward()
    assert sizes == [2]
    mean = torch.stack([model(**inputs, use_cache=False).loss.detach() for _ in range(50)])
    assert abs(output.loss.detach() - mean.mean()) < 8 * mean.std()
    with torch.no_grad():
        plain = model(**inputs, use_cache=False).loss
    assert output.loss != plain


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "pass labels to it"),
        ({"input_ids": torch.arange(3, 10)}, r"input_ids of shape \[B, L\], not \[7\]"),
        ({"attention_mask": torch.ones(3, 7)}, r"cannot double the argument 'attention_mask' of shape \[3, 7\]"),
        ({"banana": [torch.ones(2)]}, "cannot double the argument 'banana' of type list"),
        ({"past_key_values": transformers.DynamicCache()}, "cannot double the argument 'past_key_values'"),
        ({"cu_seq_lens_q": torch.tensor([0, 7])}, "needs position_ids beside cu_seq_lens"),
    ],
    ids=str,
)
def test_what_cannot_be_doubled_is_an_error_and_the_next_batch_is_right(change, message):
    model, inputs = replace_embeddings(build("llama"), symmetric=True), batch()
    expected = trained(model, inputs)
    with pytest.raises(ValueError, match=message):
        model(**inputs | change)
    assert_equal(trained(model, inputs), expected)


def test_a_loss_of_the_logits_is_an_error():
    model, inputs = replace_embeddings(build("llama"), symmetric=True), batch()
    output = model(**inputs)
    own = F.cross_entropy(output.logits.flatten(0, 1), inputs["labels"].flatten())
    with pytest.raises(RuntimeError, match="use the loss that the model returns"):
        own.backward()
    with torch.no_grad():
        assert output.logits.argmax(-1).shape == inputs["labels"].shape  # a metric


def test_an_embedding_that_is_called_without_the_model_is_an_error():
    model, inputs = replace_embeddings(build("llama"), symmetric=True), batch()
    with pytest.raises(RuntimeError, match="embedding was called without that"):
        model.get_input_embeddings()(inputs["input_ids"])
    with torch.no_grad():
        model.get_input_embeddings()(inputs["input_ids"])


@pytest.mark.parametrize("length", [7, 4])  # 4: the transposed batch has the shape of the doubled one
def test_a_model_that_rearranges_its_ids_is_an_error(length):
    torch.manual_seed(0)
    config = transformers.XLNetConfig(vocab_size=50, d_model=16, n_layer=1, n_head=2, d_inner=16)
    model = replace_embeddings(transformers.XLNetLMHeadModel(config).train(), symmetric=True)
    ids = batch()["input_ids"][:, :length]
    with pytest.raises(RuntimeError, match="looks up input_ids as they are"):
        model(input_ids=ids, labels=ids)


def test_options_that_exclude_each_other():
    with pytest.raises(TypeError, match="symmetric must be a bool, not int"):
        replace_embeddings(build("llama"), symmetric=1)
    with pytest.raises(ValueError, match="does not work on a DataParallel"):
        replace_embeddings(DataParallel(build("llama")), symmetric=True)
    with pytest.raises(TypeError, match="symmetric"):
        NEFTuneEmbedding(50, D, symmetric=True)


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
