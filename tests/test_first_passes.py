"""Contract: what a first pass had is kept for its recomputation, by the ids and the state of the generator, and no longer."""

import torch

from helpers.checkpointing import IDS, Model, Region
from neft_kernels import describe, replace_embeddings
from neft_kernels.models.checkpointing import FirstPasses, rng_state_of


def test_the_last_pass_on_the_same_ids_counts_unless_the_state_tells_another():
    passes, ids = FirstPasses(), IDS.clone()
    for rng_state, noise in ((1, "first"), (2, "second"), (1, "third")):
        passes.remember(ids[:1], rng_state, noise)
    assert passes.recall(ids[:1], 2) == "second"
    assert passes.recall(ids[:1], 3) == "third"
    assert passes.recall(ids[:1], 3, exactly=True) is None
    assert passes.recall(ids[1:], 3) is None  # other ids in the same storage


def test_the_state_tells_a_normal_number_that_the_generator_keeps():
    """It draws two at a time, so the second call moves nothing else on."""
    torch.manual_seed(1)
    torch.randn(1)
    before = rng_state_of(IDS.device)
    torch.randn(1)
    assert rng_state_of(IDS.device) != before


def test_the_note_on_a_batch_stays_when_it_is_recomputed():
    model = replace_embeddings(Model("non-reentrant", Region)).train()
    out = model(IDS)
    (report,) = describe(model)
    assert "counts in full length" in report.note
    out.sum().backward()
    assert describe(model)[0].note == report.note


def test_nothing_is_kept_of_ids_that_are_gone_but_of_the_last():
    model = replace_embeddings(Model("non-reentrant", Region)).train()
    kept = model.region.embedding.noise.first_passes
    for _ in range(3 * kept.MOST_RECENT):
        model(IDS.clone()).sum().backward()
    assert len(kept._by_storage) == kept.MOST_RECENT
    tokens = torch.zeros(1000, dtype=torch.int64)
    for begin in range(2 * kept.MOST_OF_A_STORAGE):
        model(tokens[begin : begin + 8][None])
    assert len(kept._by_storage[tokens.untyped_storage()]) == kept.MOST_OF_A_STORAGE
