"""Contract: a model inside of another one, or one that shares a table, is noisy once, and plain again when it is restored."""

import logging

import pytest
import torch
import transformers
from torch import nn

from helpers.models import llama
from helpers.situations import ALPHA, IDS, MASK, Looks, bound, bounds
from neft_kernels import describe, no_noise, replace_embeddings, restore_embeddings


class BiEncoder(nn.Module):
    def __init__(self, query, passage):
        super().__init__()
        self.query, self.passage = query, passage

    def forward(self, query, passage):
        return self.query(**query).logits, self.passage(**passage).logits


def test_all_models_inside_of_a_plain_module_are_noisy():
    model = replace_embeddings(BiEncoder(llama(), llama()), ALPHA)
    assert [report.name for report in describe(model)] == ["query.model.embed_tokens", "passage.model.embed_tokens"]
    model({"input_ids": IDS, "attention_mask": MASK}, {"input_ids": IDS[:, :4], "attention_mask": MASK[:, :4]})
    first, second = describe(model)
    assert first.last_magnitude == pytest.approx((bound(6), bound(3)))
    assert second.last_magnitude == pytest.approx((bound(4), bound(3)))
    restore_embeddings(model)
    assert not describe(model)


class PastHooks(nn.Module):
    """Is given batches as mappings, and calls the forward of its model, as SentenceTransformer does it."""

    def __init__(self):
        super().__init__()
        self.model = llama().model  # no module inside it is given the mask before the look-up

    def forward(self, *batches):
        return [self.model.forward(**batch).last_hidden_state for batch in batches]


def test_a_batch_that_is_given_as_one_mapping_is_read():
    model = replace_embeddings(PastHooks(), ALPHA)
    batch = {"input_ids": IDS, "attention_mask": MASK}
    model(batch)
    assert bounds(model) == pytest.approx((bound(6), bound(3)))
    model(transformers.BatchEncoding(batch))
    assert bounds(model) == pytest.approx((bound(6), bound(3)))
    # Of several it is not known which one the look-up is for.
    model(batch, {"input_ids": IDS.clone(), "attention_mask": torch.ones_like(MASK)})
    assert bounds(model) == pytest.approx((bound(6),) * 2)


def test_one_model_in_two_places_is_noisy_once():
    shared = llama()
    assert len(describe(replace_embeddings(BiEncoder(shared, shared), ALPHA))) == 1


class NamesNone(nn.Module):
    """As a model with a value head."""

    def __init__(self):
        super().__init__()
        self.pretrained_model = llama()

    def get_input_embeddings(self):
        return None

    def forward(self, input_ids, attention_mask=None):
        return self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask)


def test_a_model_that_names_no_embeddings_is_looked_into():
    model = replace_embeddings(NamesNone(), ALPHA)
    model(IDS, MASK)
    assert bounds(model) == pytest.approx((bound(6), bound(3)))


class Pictures(nn.Module):
    """Names a convolution its input embeddings, as vision models do."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 4, 2)

    def get_input_embeddings(self):
        return self.patches


def test_parts_that_look_up_no_tokens_are_left_alone():
    module = nn.Module()
    module.vision, module.text = Pictures(), llama()
    assert [report.name for report in describe(replace_embeddings(module))] == ["text.model.embed_tokens"]
    module = nn.Module()
    module.vision = Pictures()
    with pytest.raises(ValueError, match="found no token embedding"):
        replace_embeddings(module)


def test_an_embedding_in_two_models_belongs_to_one():
    first, second = Looks(), Looks()
    second.embedding = first.embedding
    replace_embeddings(first, ALPHA)
    with pytest.raises(ValueError, match="shares an embedding with a Looks that is noisy already"):
        replace_embeddings(second, 1.0)
    first.train()(IDS, attention_mask=MASK)
    assert bounds(first) == pytest.approx((bound(6), bound(3)))  # and nothing of it has changed
    restore_embeddings(first)
    second.train()
    replace_embeddings(second, 1.0)(IDS, attention_mask=MASK)
    assert describe(second)[0].alpha == 1.0


def test_a_part_and_the_whole_of_a_model_may_both_be_replaced():
    model = llama()
    replace_embeddings(model.model, 1.0)
    replace_embeddings(model, ALPHA)
    model(input_ids=IDS, attention_mask=MASK)
    assert bounds(model) == pytest.approx((bound(6), bound(3)))
    replace_embeddings(model.model, 1.0)
    assert [report.alpha for report in describe(model)] == [1.0]
    del model


def test_restoring_a_part_leaves_no_hook_on_the_whole(caplog):
    model = llama()
    with caplog.at_level(logging.WARNING, logger="neft_kernels"):
        replace_embeddings(model, ALPHA)
        replace_embeddings(model.model, ALPHA)
        model(input_ids=IDS, attention_mask=MASK)
        restore_embeddings(model.model)
        model(input_ids=IDS, attention_mask=MASK)
    assert not [record for record in caplog.records if record.name == "neft_kernels"]
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_restoring_a_model_leaves_the_noise_of_another_one_alone():
    first, second = Looks(), Looks()
    second.embedding = first.embedding
    replace_embeddings(first, ALPHA).train()
    restore_embeddings(second)
    first(IDS, attention_mask=MASK)
    assert bounds(first) == pytest.approx((bound(6), bound(3)))


def test_no_noise_around_a_wrapper_holds_for_what_is_replaced_inside():
    model = Looks().train()
    wrapper = nn.Sequential(model)
    with no_noise(wrapper):
        with no_noise(model):
            replace_embeddings(model)
        assert torch.equal(model(IDS), model.embedding.weight[IDS])
    assert not torch.equal(model(IDS), model.embedding.weight[IDS])
