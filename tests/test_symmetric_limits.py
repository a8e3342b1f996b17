"""Contract: where `symmetric=True` cannot double the batch, or does not, it is an error that says so, or the plain batch."""

import pytest
import torch
import transformers
from torch.nn import functional as F
from torch.nn.parallel import DataParallel

from helpers.models import D, batch, build
from helpers.symmetric import assert_equal, rows_seen, trained
from neft_kernels import NEFTuneEmbedding, no_noise, replace_embeddings, restore_embeddings, set_alpha


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "pass labels to it"),
        ({"input_ids": torch.arange(3, 10)}, r"input_ids of shape \[B, L\], not \[7\]"),
        ({"attention_mask": torch.ones(3, 7)}, r"cannot double the argument 'attention_mask' of shape \[3, 7\]"),
        ({"banana": [torch.ones(2)]}, "cannot double the argument 'banana' of type list"),
        ({"past_key_values": transformers.DynamicCache()}, "cannot double the cache 'past_key_values'"),
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
    with pytest.raises(ValueError, match="does not work on a DataParallel"):
        replace_embeddings(torch.nn.Sequential(DataParallel(build("llama"))), symmetric=True)
    with pytest.raises(TypeError, match="symmetric"):
        NEFTuneEmbedding(50, D, symmetric=True)
