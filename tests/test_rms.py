"""Contract: with scale_by="rms" alpha is the ratio of the noise to the embeddings, measured once when training begins."""

import math

import pytest
import torch
from torch import nn

from helpers.models import LLAMA_INPUTS, llama
from helpers.tables import VOCABULARY, WIDTH, Model, Unreadable, padded_batch, ratio_by_hand
from neft_kernels import NEFTuneEmbedding, describe, no_noise, noise_magnitude, replace_embeddings, set_alpha


@pytest.mark.parametrize("table", ["plain", "scaled"])
def test_the_magnitude_is_by_the_table_and_its_scale_not_by_the_batch(table):
    model = Model(table)
    model.table.weight.data[7] *= 30  # in the table, and not in the batch
    rms = model(torch.arange(VOCABULARY)).square().mean().sqrt().item()
    replace_embeddings(model, 0.1, scale_by="rms")
    model(torch.arange(20, 40)[None])
    (low, high) = describe(model)[0].last_magnitude
    assert low == high == pytest.approx(0.1 * math.sqrt(3) * rms, rel=1e-5)


def test_sequences_of_all_lengths_have_one_magnitude_and_padding_none():
    module = NEFTuneEmbedding(VOCABULARY, WIDTH, alpha=0.1, scale_by="rms")
    batch = padded_batch()
    out = module(batch["input_ids"], attention_mask=batch["attention_mask"])
    noise = out - nn.functional.embedding(batch["input_ids"], module.weight)
    assert torch.equal(noise.abs().amax(-1) > 0, batch["attention_mask"] > 0)
    m = 0.1 * math.sqrt(3) * module.weight.square().mean().sqrt()
    assert (noise.abs().amax(-1)[batch["attention_mask"] > 0] > 0.7 * m).all()


def test_packed_rows_have_noise_but_for_their_padding():
    model = replace_embeddings(Model("plain"), 0.1, scale_by="rms")
    ids = torch.randint(1, VOCABULARY, (1, 12))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 0, 0]])
    with no_noise(model):
        clean = model(ids, position_ids=positions)
    noisy = (model(ids, position_ids=positions) - clean).abs().amax(-1) > 0
    assert noisy.tolist() == [[True] * 9 + [False] * 3]


def test_it_is_measured_once_when_training_begins():
    model = replace_embeddings(Model("plain"), 0.1, scale_by="rms")
    model.table.weight.data.mul_(10)  # as a checkpoint that is loaded now
    rms = model.table.weight.square().mean().sqrt().item()
    model(**padded_batch())
    model.table.weight.data.mul_(10)
    model(**padded_batch())
    assert describe(model)[0].last_magnitude[1] == pytest.approx(0.1 * math.sqrt(3) * rms, rel=1e-5)
    assert describe(replace_embeddings(model, 0.1, scale_by="rms"))[0].last_magnitude is None
    model(**padded_batch())
    assert describe(model)[0].last_magnitude[1] == pytest.approx(math.sqrt(3) * rms, rel=1e-5)


def test_a_first_batch_of_padding_measures_nothing():
    model = replace_embeddings(Model("quantized"), 0.1, scale_by="rms")
    batch = padded_batch()
    nothing = {**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])}
    model(**nothing)
    assert ratio_by_hand(model, batch) == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize("table", ["scaled", "quantized", "wrapped"])
def test_a_first_batch_without_noise_turns_nothing_off(table):
    """Also where a compiler would make what was measured a constant."""
    batch = padded_batch()
    nothing = {**batch, "labels": torch.full_like(batch["input_ids"], -100)}
    options = {"scale_by": "rms", "noise_on": "completion"}
    model = replace_embeddings(Model(table), 0.1, **options)
    model(**nothing)
    assert ratio_by_hand(model, {**batch, "labels": batch["input_ids"]}) == pytest.approx(0.1, rel=0.1)

    torch.compiler.reset()
    compiled = torch.compile(replace_embeddings(Model(table), 0.1, **options), fullgraph=True)
    with pytest.raises(Exception, match="no token of this one has noise"):
        compiled(**nothing)


@pytest.mark.parametrize("shape", [(256, 128), (1024, 64), (64, 96)])
@pytest.mark.parametrize("table", ["plain", "unreadable"])
def test_the_sample_is_not_of_a_few_columns(table, shape):
    """Of a batch in which the first token of each row is small, and most of a row is padding."""
    model = Model("plain")
    model.table.weight.data[1] /= 20
    if table == "unreadable":
        model.table = Unreadable(model.table.weight)
    replace_embeddings(model, 0.1, scale_by="rms")
    ids = torch.randint(2, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))
    ids[:, 0] = 1
    mask = (torch.arange(shape[1]) < 20).long().expand(shape).contiguous()
    assert ratio_by_hand(model, {"input_ids": ids, "attention_mask": mask}) == pytest.approx(0.1, rel=0.1)
    assert describe(model)[0].ratio == pytest.approx(0.1, rel=0.1)


def test_the_table_inside_of_a_wrapper_is_measured():
    model = Model("wrapped")
    table, ids = model.table.base.weight, torch.arange(20, 40)[None]
    table.data[7] *= 30  # in the table, and not in the batch
    factor = (model(ids).square().mean() / table[ids].square().mean()).sqrt().item()
    expected = 0.1 * math.sqrt(3) * table.square().mean().sqrt().item() * factor
    replace_embeddings(model, 0.1, scale_by="rms")
    model(ids)
    assert describe(model)[0].last_magnitude[0] == pytest.approx(expected, rel=0.05)


class OfCodebooks(nn.Embedding):
    """Adds up the rows of several ids, so the ids have another shape than the tokens."""

    def forward(self, input):
        return super().forward(input).sum(-2)


def test_embeddings_of_several_codebooks_are_measured_themselves():
    table = replace_embeddings(OfCodebooks(VOCABULARY, WIDTH), 0.1, scale_by="rms")
    batch = {"input": torch.randint(VOCABULARY, (8, 50, 3))}
    assert ratio_by_hand(table, batch) == pytest.approx(0.1, rel=0.02)


def test_on_the_meta_device_nothing_is_measured():
    with torch.device("meta"):
        table = NEFTuneEmbedding(VOCABULARY, WIDTH, alpha=0.1, scale_by="rms")
        assert table(torch.zeros(2, 3, dtype=torch.int64)).shape == (2, 3, WIDTH)


def test_a_schedule_that_begins_at_zero_measures_all_the_same():
    model = replace_embeddings(Model("quantized"), lambda step: 0.1 * min(step, 1), scale_by="rms")
    batch = padded_batch()
    model(**batch)
    assert describe(model)[0].ratio == 0.0
    model(**batch)
    assert describe(model)[0].ratio == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize("table", ["plain", "scaled"])
def test_compiled_whole_it_is_measured_too(table):
    torch.compiler.reset()
    model = replace_embeddings(Model(table), 0.1, scale_by="rms")
    compiled = torch.compile(model, fullgraph=True)
    batch = padded_batch()
    noisy = [compiled(**batch).detach() for _ in range(2)]
    with no_noise(model):
        clean = model(**batch).detach()
    counts = batch["attention_mask"] > 0
    for each in noisy:
        noise = (each - clean)[counts]
        assert (noise.square().mean() / clean[counts].square().mean()).sqrt().item() == pytest.approx(0.1, rel=0.05)
        assert torch.equal(each[~counts], clean[~counts])


def test_alpha_that_is_set_at_run_time_reaches_the_graph():
    torch.compiler.reset()
    model = replace_embeddings(Model("plain"), 0.1, scale_by="rms")
    compiled = torch.compile(model, fullgraph=True)
    batch = padded_batch()
    with no_noise(model):
        clean = model(**batch)
    set_alpha(model, 0.3)
    compiled(**batch)
    set_alpha(model, 0.2)
    counts = batch["attention_mask"] > 0
    noise = (compiled(**batch) - clean)[counts]
    assert (noise.square().mean() / clean[counts].square().mean()).sqrt().item() == pytest.approx(0.2, rel=0.05)


def test_exporting_before_anything_was_measured_is_an_error():
    model = replace_embeddings(Model("plain"), 0.1, scale_by="rms")
    batch = padded_batch()
    with pytest.raises(Exception, match="run the model once in training mode before"):
        torch.export.export(model, (), batch, strict=False)
    model(**batch)
    torch.export.export(model, (), batch, strict=False)


def test_a_training_step_of_a_model_of_transformers():
    model = replace_embeddings(llama(), 0.1, scale_by="rms")
    model(**LLAMA_INPUTS).loss.backward()
    assert describe(model)[0].ratio == pytest.approx(0.1, rel=0.3)  # of eight tokens in a table of 50 rows
    assert describe(model)[0].note == ""


def test_alpha_above_one_is_an_error_where_it_is_a_ratio():
    pytest.importorskip("transformers")
    from neft_kernels import NEFTuneCallback

    model = Model("plain")
    for make in (
        lambda: replace_embeddings(model, scale_by="rms"),
        lambda: NEFTuneEmbedding(4, 4, scale_by="rms"),
        lambda: NEFTuneCallback(scale_by="rms"),
    ):
        with pytest.raises(ValueError, match="alpha is the ratio of the noise to the embeddings"):
            make()
    assert type(model.table) is nn.Embedding


def test_alpha_above_one_is_an_error_later_too():
    model = replace_embeddings(Model("plain"), 0.1, scale_by="rms")
    with pytest.raises(ValueError, match="alpha is the ratio"):
        set_alpha(model, 5.0)
    replace_embeddings(model, lambda step: 5.0 * min(step, 1), scale_by="rms")
    model(**padded_batch())
    with pytest.raises(ValueError, match="alpha is the ratio"):
        model(**padded_batch())


def test_the_function_wants_rms_for_that_rule_alone():
    ids = torch.zeros(2, 3, dtype=torch.int64)
    assert noise_magnitude(ids, 8, 0.5, scale_by="rms", rms=2.0) == 0.5 * (math.sqrt(3) * 2.0)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    magnitude = noise_magnitude(ids, 8, 0.5, attention_mask=mask, scale_by="rms", rms=2.0)
    assert torch.equal(magnitude, mask * torch.tensor(math.sqrt(3), dtype=torch.float64).float())
    for options in ({"scale_by": "rms"}, {"rms": 2.0}):
        with pytest.raises(ValueError, match="rms"):
            noise_magnitude(ids, 8, 0.5, **options)
    for wrong, error in ((-1.0, ValueError), (math.nan, ValueError), ("2", TypeError)):
        with pytest.raises(error, match="rms"):
            noise_magnitude(ids, 8, 0.5, scale_by="rms", rms=wrong)
