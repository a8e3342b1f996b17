"""Contract: a noisy model is copied, saved, loaded and resized as a plain one; copies have noise of their own."""

import copy
import pickle

import pytest
import torch
from torch import nn

from helpers.models import MODELS, batch, build, names, noise_in
from neft_kernels import NEFTuneEmbedding, describe, replace_embeddings, restore_embeddings, set_alpha


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_their_noise_and_are_independent(name, copier):
    model = replace_embeddings(build(name), alpha=5.0)
    model(**batch())
    twin = copier(model)
    restore_embeddings(model)
    assert names(model) == []
    assert {report.state for report in describe(twin)} == {"on"}
    noise = noise_in(twin, batch())
    assert any((each != 0).any() for each in noise.values())
    assert any((each == 0).any() for each in noise.values())  # padding: the copy's hooks feed the copy's embeddings


def test_an_embedding_copied_alone_stays_one_of_its_models():
    model = replace_embeddings(build("llama"), alpha=5.0)
    model.model.embed_tokens = copy.deepcopy(model.model.embed_tokens)
    model(**batch())
    assert describe(model)[0].last_magnitude == pytest.approx(
        (5.0 / (7 * 16) ** 0.5, 5.0 / (4 * 16) ** 0.5)
    )  # it sees the padding


@pytest.mark.parametrize("name", MODELS)
def test_save_and_reload(name, tmp_path):
    model = replace_embeddings(build(name))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).train()
    assert names(again) == []
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_resized_embeddings_stay_noisy():
    model = replace_embeddings(build("llama"))
    model.resize_token_embeddings(64)
    inputs = {"input_ids": torch.full((1, 5), 63)}
    (noise,) = noise_in(model, inputs).values()
    assert (noise != 0).any()


def test_modules_built_noisy_are_copied_with_settings_of_their_own():
    model = nn.Sequential(NEFTuneEmbedding(10, 4, alpha=2.0))
    twin = copy.deepcopy(model)
    set_alpha(twin, 0.0)
    assert (describe(model)[0].alpha, describe(twin)[0].alpha) == (2.0, 0.0)
