"""Contract: noise is in the modules by which a model looks tokens up; where it comes to look them up past them, it says so."""

import logging

import pytest
import torch
from peft import LoraConfig, TrainableTokensConfig, get_peft_model

from helpers.models import batch, build, names
from neft_kernels import NEFTuneEmbedding, describe, no_noise, replace_embeddings, restore_embeddings

ADAPTERS = {
    "trainable tokens": lambda: TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[1, 2]),
    "LoRA, trainable tokens": lambda: LoraConfig(
        target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 2]}
    ),
}
NOT_REACHED = "reached no noisy embedding"


def into_first_layer(model, **inputs):
    """What the decoder's first layer is given in one forward pass."""
    given = []
    layer = next(module for name, module in model.named_modules() if name.endswith("layers.0"))
    handle = layer.register_forward_pre_hook(lambda module, args: given.append(args[0].detach()))
    model(**(inputs or batch()))
    handle.remove()
    return given[0]


def is_noisy(model):
    noisy = into_first_layer(model)
    with no_noise(model):
        return not torch.equal(noisy, into_first_layer(model))


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_that_looks_tokens_up_past_the_noise_is_noticed(name, caplog):
    """Once in the log, and in describe as long as it is so."""
    model = get_peft_model(replace_embeddings(build("llama")), ADAPTERS[name]()).train()
    with caplog.at_level(logging.WARNING, logger="neft_kernels"):
        assert not is_noisy(model)
        assert not is_noisy(model)
    assert caplog.text.count(NOT_REACHED) == 1
    assert all(NOT_REACHED in str(report) for report in describe(model))
    replace_embeddings(model)
    assert is_noisy(model)
    assert NOT_REACHED not in str(describe(model))


def test_another_table_is_noticed(caplog):
    model = replace_embeddings(build("llama"))
    model.set_input_embeddings(torch.nn.Embedding(50, 16))
    with caplog.at_level(logging.WARNING, logger="neft_kernels"):
        into_first_layer(model)
    assert NOT_REACHED in caplog.text
    assert is_noisy(replace_embeddings(model))


def test_an_adapter_merged_away_with_the_noise_on_it_is_noticed(caplog):
    config = LoraConfig(target_modules=["q_proj", "embed_tokens"])
    model = replace_embeddings(get_peft_model(build("llama"), config).train())
    assert is_noisy(model)
    merged = model.merge_and_unload().train()
    with caplog.at_level(logging.WARNING, logger="neft_kernels"):
        into_first_layer(merged)
    assert NOT_REACHED in caplog.text


@pytest.mark.parametrize("name", ["llama", "t5, shared table", "gemma3, scaled"])
def test_passes_that_need_not_reach_an_embedding_raise_no_alarm(name, caplog):
    model = replace_embeddings(build(name))
    inputs = batch()
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    with caplog.at_level(logging.WARNING, logger="neft_kernels"):
        model(**inputs)
        with no_noise(model):
            model(**inputs)
        model(inputs_embeds=embeds, labels=inputs["labels"])
        with torch.no_grad():
            model(**inputs)
        model.eval()(**inputs)
        with pytest.raises((IndexError, TypeError)):
            model.train()(input_ids=torch.full((1, 3), 1000), labels=torch.zeros(1, 3, dtype=torch.int64))
        around = next(module for name, module in model.named_modules() if name in ("model", "encoder"))
        handle = around.register_forward_pre_hook(lambda module, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):  # before it gets to the embedding
            model(**inputs)
        handle.remove()
    assert NOT_REACHED not in caplog.text


class Either(torch.nn.Module):
    """Takes embeddings beside the ids, as models of pictures do, and then looks nothing up."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(8, 4)

    def forward(self, input_ids, inputs_embeds=None):
        return self.embedding(input_ids) if inputs_embeds is None else inputs_embeds


def test_embeddings_given_beside_the_ids_raise_no_alarm(caplog):
    model, ids = replace_embeddings(Either()), torch.arange(6)[None]
    with caplog.at_level(logging.WARNING, logger="neft_kernels"):
        model(ids, inputs_embeds=model(ids))
    assert NOT_REACHED not in caplog.text


def test_a_single_id_raises_no_alarm(caplog):
    """transformers looks special tokens up so; the plain embedding returns its row."""
    model = replace_embeddings(Either())
    with caplog.at_level(logging.WARNING, logger="neft_kernels"):
        model(torch.tensor(3))
    assert not caplog.records


@pytest.mark.parametrize("part", ["model", "model.embed_tokens", ""])
def test_what_is_compiled_raises_no_alarm(part, caplog):
    torch._dynamo.reset()
    model = replace_embeddings(build("llama"))
    model.get_submodule(part).compile(backend="eager")
    with caplog.at_level(logging.WARNING, logger="neft_kernels"):
        for _ in range(2):
            model(**batch())
    assert NOT_REACHED not in caplog.text


def test_built_in_noise_inside_of_an_adapter_is_silent_while_the_adapter_adds_it():
    model = build("llama")
    model.set_input_embeddings(NEFTuneEmbedding(50, 16, alpha=5.0))
    config = LoraConfig(target_modules=["q_proj", "embed_tokens"])
    model = replace_embeddings(get_peft_model(model, config).train())
    assert len(names(model)) == 1
    noisy = into_first_layer(model)
    with no_noise(model):
        noise = noisy - into_first_layer(model)
    bound = 5.0 / (7 * 16) ** 0.5
    assert 0.9 * bound < noise[1].abs().max() <= bound + 1e-5
    restore_embeddings(model)
    (name,) = names(model)
    assert name.endswith("base_layer")  # its own noise is back


def test_what_has_a_forward_around_ours_works_on_when_restored():
    """As accelerate puts it there, which calls the forward that it found."""
    model = replace_embeddings(build("llama"))
    embedding = model.get_input_embeddings()
    forward = embedding.forward
    embedding.forward = lambda *args: forward(*args)
    plain = build("llama")
    restore_embeddings(model)
    assert names(model) == []
    assert torch.equal(into_first_layer(model), into_first_layer(plain))
    replace_embeddings(model, alpha=2.0)
    assert not torch.equal(into_first_layer(model), into_first_layer(plain))
    assert [report.alpha for report in describe(model)] == [2.0]
