"""Contract: `noise=` is an option wherever noise is put into a model, reaches the op there, and is reported."""

import math

import pytest
import torch
import transformers
from torch import nn

from helpers.models import IDS, LLAMA_INPUTS, MASK, D, build
from neft_kernels import (
    NEFTuneCallback,
    NEFTuneEmbedding,
    add_noise,
    describe,
    noise_magnitude,
    noisy_embedding,
    patch_transformers,
    replace_embeddings,
    restore_embeddings,
)
from neft_kernels.models.replace import noisy_modules
from neft_kernels.ops.reference import NOISE_KINDS

KINDS = ("sign", "gaussian")


def embedding():
    torch.manual_seed(1)
    return nn.Embedding(50, D)


class Scaled(nn.Embedding):
    """Keeps its own forward, so a hook adds the noise."""

    def forward(self, input):
        return super().forward(input) * 3


@pytest.mark.parametrize("kind", NOISE_KINDS)
def test_a_noisy_embedding_adds_noise_of_its_kind(kind):
    table = NEFTuneEmbedding(50, D, alpha=5.0, noise=kind)
    magnitude = noise_magnitude(IDS, D, 5.0, attention_mask=MASK)
    torch.manual_seed(3)
    expected = noisy_embedding(IDS, table.weight, magnitude, noise=kind)
    torch.manual_seed(3)
    assert torch.equal(table(IDS, attention_mask=MASK), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_hooked_embedding_adds_noise_of_its_kind(kind):
    torch.manual_seed(1)
    table = replace_embeddings(Scaled(50, D), noise=kind)
    (report,) = describe(table)
    assert report.strategy == "add_noise"
    torch.manual_seed(3)
    noisy = table(IDS)
    restore_embeddings(table)
    torch.manual_seed(3)
    assert torch.equal(noisy, add_noise(table(IDS), noise_magnitude(IDS, D, 5.0), noise=kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_trains_with_it_and_is_plain_again_without_it(kind):
    model = build("llama").train()
    plain = model(**LLAMA_INPUTS).logits
    replace_embeddings(model, noise=kind)
    assert not torch.equal(model(**LLAMA_INPUTS).logits, plain)
    model(**LLAMA_INPUTS).loss.backward()
    restore_embeddings(model)
    assert torch.equal(model(**LLAMA_INPUTS).logits, plain)


def test_the_new_kind_replaces_the_old_one():
    model = replace_embeddings(replace_embeddings(nn.Sequential(embedding()), noise="sign"))
    (report,) = describe(model)
    assert report.noise == "uniform"


@pytest.mark.parametrize("kind", NOISE_KINDS)
def test_the_callback_and_the_patch_pass_it_on(kind):
    model = build("llama")
    callback = NEFTuneCallback(noise=kind)
    arguments = transformers.TrainingArguments(output_dir="unused", report_to=[])
    state = transformers.TrainerState()
    callback.on_train_begin(arguments, state, transformers.TrainerControl(), model=model)
    assert [each.model_noise.options.noise for _, _, each in noisy_modules(model)] == [kind]
    callback.on_train_end(arguments, state, transformers.TrainerControl(), model=model)
    assert not any(noisy_modules(model))
    with patch_transformers(noise=kind) as patch:
        assert patch.options == {"noise": kind}


@pytest.mark.parametrize(
    "make",
    [
        lambda: replace_embeddings(embedding(), noise="normal"),
        lambda: NEFTuneEmbedding(50, D, noise="normal"),
        lambda: NEFTuneCallback(noise="normal"),
        lambda: patch_transformers(noise="normal"),
    ],
)
def test_no_such_noise(make):
    with pytest.raises(ValueError, match="noise must be one of uniform, sign, gaussian, not 'normal'"):
        make()


@pytest.mark.parametrize("kind", NOISE_KINDS)
def test_scale_by_rms_makes_alpha_the_ratio_for_every_kind(kind):
    """The noise of 2 x 5 x 400 elements: its root mean square has a standard error of 1 %."""
    table = replace_embeddings(nn.Embedding(50, 400), alpha=0.1, scale_by="rms", noise=kind)
    noise = (table(IDS) - table.weight[IDS]).detach()
    assert noise.square().mean().sqrt() / table.weight.detach().square().mean().sqrt() == pytest.approx(0.1, rel=0.06)
    (report,) = describe(table)
    assert report.ratio == pytest.approx(0.1, rel=0.1)  # against the embeddings of this batch


def test_what_describe_says_of_it():
    bound = 5.0 / math.sqrt(5 * D)
    for kind, says in (("uniform", "within +-"), ("sign", "+-"), ("gaussian", "of magnitude ")):
        table = replace_embeddings(nn.Sequential(embedding()), noise=kind)
        table(IDS)
        text = str(describe(table))
        assert f"{'noise' if kind == 'uniform' else kind + ' noise'} on; alpha=5" in text
        assert f"last batch {says}{bound:.3g}" in text
