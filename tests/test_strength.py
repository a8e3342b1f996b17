"""Contract: the noise is known against the embeddings that it is added to, and scale_by="rms" sets it by them."""

import copy
import logging

import pytest
import torch
from torch import nn

from helpers.models import build
from helpers.tables import TABLES, Model, padded_batch, ratio_by_hand
from neft_kernels import describe, no_noise, replace_embeddings, set_alpha
from neft_kernels.models.strength import CleanEmbeddings, described_ratio


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(
    "options", [{"alpha": 5.0}, {"alpha": 5.0, "scale_by": "batch"}, {"alpha": 0.1, "scale_by": "rms"}]
)
def test_describe_tells_the_ratio_of_noise_to_embeddings(table, options):
    model = replace_embeddings(Model(table), **options)
    by_hand = ratio_by_hand(model, padded_batch())
    assert describe(model)[0].ratio == pytest.approx(by_hand, rel=0.05)


@pytest.mark.parametrize("name", ["llama", "gemma3, scaled", "bart, shared and scaled"])
def test_describe_tells_the_ratio_in_models_of_transformers(name):
    model = replace_embeddings(build(name), alpha=5.0)
    looked_up = {}
    for part_name, part in model.named_modules():
        if isinstance(part, nn.Embedding):
            part.register_forward_hook(lambda module, args, output, name=part_name: looked_up.update({name: output}))
    ids = torch.randint(3, 50, (6, 40), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(40) < torch.arange(6)[:, None] * 6 + 5).long()
    with no_noise(model):
        model(input_ids=ids, attention_mask=mask)
    clean = dict(looked_up)
    model(input_ids=ids, attention_mask=mask)
    for report in describe(model):
        noise = (looked_up[report.name] - clean[report.name]).detach()
        noisy = noise.abs().amax(-1) > 0
        by_hand = (noise[noisy].square().mean() / clean[report.name][noisy].square().mean()).sqrt().item()
        assert report.ratio == pytest.approx(by_hand, rel=0.05)


def test_the_ratio_is_of_the_last_batch():
    model = replace_embeddings(Model("plain"), alpha=1.0)
    assert describe(model)[0].ratio is None
    for _ in range(3):
        model(**padded_batch())
    before = describe(model)[0].ratio
    set_alpha(model, 3.0)
    model(**padded_batch())
    assert describe(model)[0].ratio == pytest.approx(3 * before)


def test_embeddings_are_measured_in_the_first_batch_and_after_a_report(monkeypatch, caplog):
    measured, squares = [], CleanEmbeddings.squares
    monkeypatch.setattr(CleanEmbeddings, "squares", lambda *args: measured.append(0) or squares(*args))
    model = replace_embeddings(Model("plain"), alpha=5.0)
    with caplog.at_level(logging.INFO, "neft_kernels"):  # whose line about the first batch is no report
        for _ in range(3):
            model(**padded_batch())
    assert len(measured) == 1
    describe(model)
    for _ in range(3):
        model(**padded_batch())
    assert len(measured) == 2


def test_a_copy_measures_its_own_first_batch():
    model = replace_embeddings(Model("plain"), alpha=5.0)
    model(**padded_batch())
    twin = copy.deepcopy(model)
    assert describe(twin)[0].ratio is None
    twin = copy.deepcopy(model)
    twin(**padded_batch())
    assert describe(twin)[0].ratio == pytest.approx(describe(model)[0].ratio)


def test_only_tokens_with_noise_count():
    """Padding may be most of a batch, and its row of another size."""
    model = Model("scaled")
    model.table.weight.data[0] = 100.0
    replace_embeddings(model, alpha=5.0)
    batch = padded_batch()
    assert describe(model)[0].ratio is None
    assert ratio_by_hand(model, batch) == pytest.approx(describe(model)[0].ratio, rel=0.05)


@pytest.mark.parametrize(("alpha", "hint"), [(100.0, "strong: above 0.5"), (5.0, None), (0.001, "weak: below 0.01")])
def test_an_unusual_ratio_has_a_hint(caplog, alpha, hint):
    model = replace_embeddings(Model("plain"), alpha=alpha)
    with caplog.at_level(logging.INFO, "neft_kernels"):
        model(**padded_batch())
    (first_batch,) = [each.getMessage() for each in caplog.records if "noise is on" in each.getMessage()]
    for text in (first_batch, str(describe(model))):
        assert f"{describe(model)[0].ratio:.3g} of the embeddings" in text
        assert ("strong" in text or "weak" in text) == (hint is not None)
        assert hint is None or hint in text


def test_a_batch_without_noise_has_no_hint():
    model = replace_embeddings(Model("plain"), alpha=lambda step: 0.0)
    model(**padded_batch())
    assert str(describe(model)).endswith("; no token of the last batch had noise")
    assert described_ratio(0.0) == "0 of the embeddings"


def test_an_id_out_of_range_is_measured_as_another():
    """A GPU makes its row NaN and raises no error; nor may the measurement."""
    ids, table = torch.tensor([[5, -1, 400]]), torch.randn(400, 32)
    total, count = CleanEmbeddings(ids, table).squares(1.0).tolist()
    assert count == 3 * 32
    assert total == pytest.approx(table[[5, 0, 399]].square().sum().item())
