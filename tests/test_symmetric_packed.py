"""Contract: with `symmetric=True` a packed row is doubled as its attention tells sequences apart: as a row, or lengthened."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForTokenClassification
from transformers.masking_utils import flash_attention_mask

from helpers.models import SMALL, build
from helpers.symmetric import assert_equal, by_hand, magnitude_of, noise_seen, trained, with_first_half
from neft_kernels import replace_embeddings


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
    assert attention_mask is None  # of ones, which FlashAttention drops
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
    AttentionMaskInterface.register("flash_for_tests", flash_attention_mask)
    yield "flash_for_tests"
    AttentionInterface._global_mapping.pop("flash_for_tests")
    AttentionMaskInterface._global_mapping.pop("flash_for_tests")


def ends(lengths, extra=()):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist(), *extra], dtype=torch.int32)


@pytest.mark.parametrize("boundaries", ["position_ids", "position_ids and a mask of ones", "cu_seq_lens"])
@pytest.mark.parametrize("options", [{}, {"scale_by": "batch"}], ids=str)
def test_a_packed_row_of_flash_attention_is_lengthened(flash, boundaries, options):
    model, inputs = build("llama"), packed()
    magnitude = magnitude_of(inputs, position_ids=inputs["position_ids"], **options)
    expected = by_hand(model, inputs, magnitude)
    model.config._attn_implementation = flash
    replace_embeddings(model, symmetric=True, **options)
    if "mask" in boundaries:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
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


def test_labels_that_are_not_shifted_all_count_in_a_lengthened_row(flash):
    torch.manual_seed(0)
    model = LlamaForTokenClassification(LlamaConfig(**SMALL, num_labels=2, classifier_dropout=0.0)).train()
    model.config._attn_implementation = flash
    inputs = packed()
    inputs["labels"] = torch.where(inputs["position_ids"] == 0, torch.arange(13)[None] % 2, -100)
    expected = model(**inputs, use_cache=False).loss
    symmetric = replace_embeddings(model, 1e-30, symmetric=True)(**inputs, use_cache=False).loss
    torch.testing.assert_close(symmetric, expected)


def test_one_sequence_is_a_row_for_flash_attention_too(flash):
    """A row that was lengthened would carry the state of recurrent layers into the second half."""
    model = replace_embeddings(build("llama"), symmetric=True)
    model.config._attn_implementation = flash
    ids = packed()["input_ids"]
    seen, _ = noise_seen(model, {"input_ids": ids, "labels": ids, "position_ids": torch.arange(13)[None]})
    assert seen[0][0].shape[0] == 2
