"""Contract: the noise is known against the embeddings that it is added to, and scale_by="rms" sets it by them."""

import logging
import math

import pytest
import torch
from torch import nn

from helpers.models import LLAMA_INPUTS, build, llama
from neft_kernels import NEFTuneEmbedding, describe, no_noise, noise_magnitude, replace_embeddings, set_alpha
from neft_kernels.models.strength import LookUp

VOCABULARY, WIDTH = 400, 32
#: By name: a model whose table is of `embedding`, and what it multiplies the rows by.
TABLES = ("plain", "scaled", "quantized", "wrapped")


class Scaled(nn.Embedding):
    def forward(self, input):
        return super().forward(input) * 7.0


class Wrapped(nn.Module):
    """Like an adapter's layer around a table."""

    def __init__(self):
        super().__init__()
        self.base = nn.Embedding(VOCABULARY, WIDTH)

    def forward(self, input):
        return self.base(input) + 1.0


class Unreadable(nn.Module):
    """An embedding whose table is no embedding module's."""

    def __init__(self, table):
        super().__init__()
        self.rows = table

    def forward(self, input):
        return self.rows[input]


class Model(nn.Module):
    def __init__(self, table):
        super().__init__()
        torch.manual_seed(0)
        self.table = {"scaled": Scaled, "wrapped": lambda *_: Wrapped()}.get(table, nn.Embedding)(VOCABULARY, WIDTH)
        if table == "quantized":
            pytest.importorskip("torchao")
            from torchao.quantization import IntxWeightOnlyConfig, quantize_
            from torchao.quantization.granularity import PerAxis

            config = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
            quantize_(self.table, config, filter_fn=lambda module, name: isinstance(module, nn.Embedding))

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids, attention_mask=None, position_ids=None, labels=None):
        return self.table(input_ids)


def padded_batch(rows=8, length=50):
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(length) < torch.arange(rows)[:, None] * 6 + 5).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def ratio_by_hand(model, batch):
    """Of the noise that `model` adds to the embeddings without it, over the tokens that have noise."""
    with no_noise(model):
        clean = model(**batch).detach().double()
    noise = model(**batch).detach().double() - clean
    noisy = noise.abs().amax(-1) > 0
    return (noise[noisy].square().mean() / clean[noisy].square().mean()).sqrt().item()


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
    measured, squares = [], LookUp.squares
    monkeypatch.setattr(LookUp, "squares", lambda *args: measured.append(0) or squares(*args))
    model = replace_embeddings(Model("plain"), alpha=5.0)
    with caplog.at_level(logging.INFO, "neft_kernels"):  # whose line about the first batch is no report
        for _ in range(3):
            model(**padded_batch())
    assert len(measured) == 1
    describe(model)
    for _ in range(3):
        model(**padded_batch())
    assert len(measured) == 2


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


# --- scale_by="rms" --------------------------------------------------------------------------------------------------


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
