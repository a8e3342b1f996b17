"""Contract: a cache that is given to a model means generation, which has no noise; one that the model makes does not."""

import logging

import pytest
import torch
import transformers
from torch import nn
from transformers import generation

from helpers.models import build
from helpers.passes import IDS, MASK, model_of
from neft_kernels import replace_embeddings
from neft_kernels.models.batch import CACHES


class TakesABatch(nn.Module):
    """As a Lightning module does."""

    def forward(self, batch):
        return self.inner(**batch)


def test_a_cache_is_seen_below_a_module_that_is_given_a_batch():
    model = model_of(TakesABatch)
    plain = nn.functional.embedding(IDS, model.inner.embedding.weight)
    assert torch.equal(model({"input_ids": IDS, "past_key_values": object()}), plain)
    assert not torch.equal(model({"input_ids": IDS}), plain)


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_is_known_by_its_name(name):
    """Whatever its class; and a switch by that name is none."""
    model = model_of(TakesABatch)
    plain = nn.functional.embedding(IDS, model.inner.embedding.weight)
    model.inner.forward = lambda input_ids, **kwargs: model.inner.embedding(input_ids)
    assert torch.equal(model({"input_ids": IDS, name: object()}), plain)
    for none in (None, False, True):
        assert not torch.equal(model({"input_ids": IDS, name: none}), plain)


@pytest.mark.parametrize("cls", ["DynamicCache", "EncoderDecoderCache"])
def test_a_cache_of_transformers_is_known_by_its_class(cls):
    """Whatever the argument is called."""
    caches = [transformers.DynamicCache() for _ in range(2)]
    cache = caches[0] if cls == "DynamicCache" else transformers.EncoderDecoderCache(*caches)
    model = model_of(TakesABatch)
    plain = nn.functional.embedding(IDS, model.inner.embedding.weight)
    model.inner.forward = lambda input_ids, **kwargs: model.inner.embedding(input_ids)
    assert torch.equal(model({"input_ids": IDS, "memory_of_tomorrow": cache}), plain)
    for no_cache in (object(), torch.ones(2), [torch.ones(2)]):
        assert not torch.equal(model({"input_ids": IDS, "memory_of_tomorrow": no_cache}), plain)


def test_caches_have_the_names_that_transformers_gives_them():
    """So that the next one to be renamed is noticed here; test_architectures looks at what the models call theirs."""
    in_generation = {*generation.utils.ALL_CACHE_NAMES} - {"mems", "state"}  # models are given those in training too
    not_placed = {*(transformers.PreTrainedModel._skip_keys_device_placement or ())}
    assert in_generation | not_placed <= {*CACHES}


class MakesACache(nn.Module):
    def forward(self, input_ids, attention_mask=None):
        return self.inner(input_ids, past_key_values=object())


class MakesACacheAndHasOtherNames(nn.Module):
    def forward(self, tokens, attention_mask=None):
        return self.inner(tokens, past_key_values=object())


@pytest.mark.parametrize(
    ("cls", "mask"), [(MakesACache, None), (MakesACache, MASK), (MakesACacheAndHasOtherNames, MASK)]
)
def test_a_cache_that_a_model_makes_and_passes_on_within_itself_is_none(cls, mask):
    model = model_of(cls)
    assert not torch.equal(model(IDS, attention_mask=mask), model.inner.embedding.weight[IDS])


def test_a_cache_in_training_is_taken_for_generation_with_a_warning(caplog):
    """Once; not with labels, nor where gradients are disabled, as they are when a model generates."""
    model = replace_embeddings(build("llama"))

    def cache():
        return {generation.utils.ALL_CACHE_NAMES[0]: transformers.DynamicCache(config=model.config)}

    def warnings():
        return [record for record in caplog.records if record.name == "neft_kernels"]

    with caplog.at_level(logging.WARNING, logger="neft_kernels"):
        model(input_ids=IDS, **cache(), labels=IDS)
        with torch.no_grad():
            model(input_ids=IDS, **cache())
        assert not warnings()
        for _ in range(2):
            model(input_ids=IDS, **cache())
    (record,) = warnings()
    assert "a cache was passed to the model in training" in record.message
