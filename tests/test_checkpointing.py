"""Contract: a checkpointed region that holds the embedding itself has the same noise when it is recomputed, or none twice, or
says why it cannot.
"""

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from neft_kernels import replace_embeddings

IDS = torch.tensor([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]])
MASK = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])


class Region(nn.Module):
    """An embedding and a layer whose gradient depends on what the embedding returned."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layer = nn.Embedding(8, 4), nn.Linear(4, 3)

    def forward(self, ids, like):
        return torch.tanh(self.layer(self.embedding(ids) + like))


class RegionWithMask(Region):
    def forward(self, ids, like, attention_mask=None):
        return super().forward(ids, like)


class RegionWithPositions(Region):
    def forward(self, ids, like, position_ids=None):
        return super().forward(ids, like)


class Model(nn.Module):
    """Checkpoints its region, which is given the mask if it takes it."""

    def __init__(self, how, region):
        super().__init__()
        self.region, self.how = region(), how

    def get_input_embeddings(self):
        return self.region.embedding

    def forward(self, input_ids, attention_mask=None):
        like = torch.zeros(4, requires_grad=True)  # a reentrant region has gradients only if one of its inputs has
        args = (input_ids, like, *([attention_mask] if type(self.region) is RegionWithMask else []))
        if self.how is None:
            return self.region(*args)
        return checkpoint(self.region, *args, use_reentrant=self.how == "reentrant")


def step(how, alpha=5.0, region=RegionWithMask, **inputs):
    """The output, and the gradients of all parameters."""
    model = replace_embeddings(Model(how, region), alpha=alpha).train()
    torch.manual_seed(1)
    out = model(IDS, **inputs)
    out.square().sum().backward()
    return out.detach(), [parameter.grad for parameter in model.parameters()]


def assert_equal(one, other):
    assert torch.equal(one[0], other[0])
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


@pytest.mark.parametrize("inputs", [{}, {"attention_mask": MASK}], ids=["no mask", "mask"])
def test_the_usual_kind_recomputes_the_same_noise(inputs):
    assert_equal(step("non-reentrant", **inputs), step(None, **inputs))
    with save_on_cpu():
        assert_equal(step("non-reentrant", **inputs), step(None, **inputs))
    assert not torch.equal(step(None, **inputs)[0], step(None, alpha=0.0, **inputs)[0])


def test_the_reentrant_kind_has_no_noise_in_either_pass():
    """Its first pass has gradients disabled. Noise in the second alone would give gradients of another loss."""
    assert_equal(step("reentrant"), step(None, alpha=0.0))


@pytest.mark.parametrize("region", [Region, RegionWithPositions])
def test_masks_that_are_gone_when_the_region_is_recomputed_are_an_error(region):
    with pytest.raises(RuntimeError, match="attention_mask; give them to a module inside the region"):
        step("non-reentrant", region=region, attention_mask=MASK)
    assert_equal(step("non-reentrant", region=region), step(None, region=region))  # there were none


def test_only_what_the_noise_depends_on_must_be_told_again():
    ids = IDS.clone()
    for options, inputs in (({"scale_by": "batch"}, {"attention_mask": MASK}), ({}, {"labels": ids})):

        class Takes(Model):
            def forward(self, input_ids, attention_mask=None, labels=None):
                return super().forward(input_ids, attention_mask)

        model = replace_embeddings(Takes("non-reentrant", Region), **options).train()
        model(ids, **inputs).sum().backward()


def test_labels_that_are_gone_are_an_error_where_they_choose_the_tokens():
    class Takes(Model):
        def forward(self, input_ids, labels=None):
            return super().forward(input_ids)

    for noise_on in ("prompt", "completion"):
        model = replace_embeddings(Takes("non-reentrant", Region), noise_on=noise_on).train()
        out = model(IDS, labels=IDS)
        with pytest.raises(RuntimeError, match="labels; give them to a module inside the region"):
            out.sum().backward()


def test_what_was_told_last_of_the_same_ids_counts():
    model = replace_embeddings(Model("non-reentrant", Region)).train()
    model(IDS, attention_mask=MASK)
    model(IDS).sum().backward()


def test_what_was_told_of_other_ids_does_not_matter():
    model = replace_embeddings(Model("non-reentrant", RegionWithMask)).train()
    first, second = IDS.clone(), IDS.clone()
    with_mask, without = model(first, attention_mask=MASK), model(second)
    (with_mask.sum() + without.sum()).backward()
    model(first, attention_mask=MASK)
    checkpoint(lambda ids: model.region.embedding(ids), second, use_reentrant=False).sum().backward()

    lost = replace_embeddings(Model("non-reentrant", Region)).train()
    with_mask, without = lost(first, attention_mask=MASK), lost(second)
    without.sum().backward()
    with pytest.raises(RuntimeError, match="attention_mask; give them"):
        with_mask.sum().backward()
