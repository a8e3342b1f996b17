"""Contract: a checkpointed region that holds the embedding itself has the same noise when it is recomputed, or none twice."""

import contextlib
import functools
import operator

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from helpers.checkpointing import (
    IDS,
    MASK,
    Model,
    Region,
    RegionOfASlice,
    RegionOfAView,
    RegionWithMask,
    RegionWithPositions,
    assert_equal,
    step,
)
from neft_kernels import NEFTuneEmbedding, no_noise, replace_embeddings


@pytest.mark.parametrize("inputs", [{}, {"attention_mask": MASK}], ids=["no mask", "mask"])
def test_the_usual_kind_recomputes_the_same_noise(inputs):
    assert_equal(step("non-reentrant", **inputs), step(None, **inputs))
    with save_on_cpu():
        assert_equal(step("non-reentrant", **inputs), step(None, **inputs))
    assert not torch.equal(step(None, **inputs)[0], step(None, alpha=0.0, **inputs)[0])


def test_the_reentrant_kind_has_no_noise_in_either_pass():
    """Its first pass has gradients disabled. Noise in the second alone would give gradients of another loss."""
    assert_equal(step("reentrant"), step(None, alpha=0.0))


@pytest.mark.parametrize("around_backward", [contextlib.nullcontext, save_on_cpu])
@pytest.mark.parametrize("around_forward", [contextlib.nullcontext, save_on_cpu])
@pytest.mark.parametrize("how", ["reentrant", "non-reentrant"])
def test_hooks_on_saved_tensors_change_nothing(how, around_forward, around_backward):
    """They move what is saved, ids included, to other storages, and they may be active in either pass or in both."""

    def run(how, alpha):
        model = replace_embeddings(Model(how, Region), alpha=alpha).train()
        torch.manual_seed(1)
        with around_forward():
            out = model(IDS, attention_mask=MASK)
        with around_backward():
            out.square().sum().backward()
        return out.detach(), [parameter.grad for parameter in model.parameters()]

    assert_equal(run(how, 5.0), run(None, 0.0 if how == "reentrant" else 5.0))


@pytest.mark.parametrize("region", [Region, RegionWithPositions, RegionOfAView, RegionOfASlice])
@pytest.mark.parametrize("options", [{}, {"scale_by": "batch"}], ids=str)
def test_masks_that_are_gone_when_the_region_is_recomputed_need_not_be_given_again(region, options):
    """The modules around the region, which were given them, do not run again; the magnitude of the first pass holds."""
    for inputs in ({"attention_mask": MASK}, {}):
        assert_equal(step("non-reentrant", region=region, **inputs), step(None, region=region, **inputs))


def test_the_noise_is_the_same_although_the_generator_is_not_restored():
    region = replace_embeddings(RegionWithMask()).train()

    def run(recompute):
        torch.manual_seed(1)
        region.zero_grad()
        like = torch.zeros(4, requires_grad=True)
        if recompute:
            out = checkpoint(region, IDS, like, MASK, use_reentrant=False, preserve_rng_state=False)
        else:
            out = region(IDS, like, MASK)
        out.square().sum().backward()
        return out.detach(), [parameter.grad.clone() for parameter in region.parameters()]

    assert_equal(run(True), run(False))


def test_what_follows_the_embedding_draws_the_same_numbers_when_it_is_recomputed():
    """Dropout after the embedding: the recomputed pass moves the generator on as the first one did."""
    region, dropout = replace_embeddings(Region()).train(), nn.Dropout(0.5)

    def run(recompute):
        torch.manual_seed(1)
        region.zero_grad()
        like = torch.zeros(4, requires_grad=True)

        def block(ids, like):
            return dropout(region(ids, like))

        out = checkpoint(block, IDS, like, use_reentrant=False) if recompute else block(IDS, like)
        out.square().sum().backward()
        return out.detach(), [parameter.grad.clone() for parameter in region.parameters()]

    assert_equal(run(True), run(False))


class TakesLabels(Model):
    def forward(self, input_ids, labels=None):
        return super().forward(input_ids)


@pytest.mark.parametrize("noise_on", ["prompt", "completion"])
def test_labels_that_are_gone_need_not_be_given_again(noise_on):
    gradients = []
    for how in (None, "non-reentrant"):
        model = replace_embeddings(TakesLabels(how, Region), noise_on=noise_on).train()
        torch.manual_seed(1)
        model(IDS, labels=IDS.masked_fill(IDS < 4, -100)).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("how", ["reentrant", "non-reentrant"])
def test_backward_outside_of_no_noise_recomputes_no_noise(how):
    def run(how, alpha):
        model = replace_embeddings(Model(how, Region), alpha=alpha).train()
        with no_noise(model):
            out = model(IDS)
        out.square().sum().backward()
        return out.detach(), [parameter.grad for parameter in model.parameters()]

    assert_equal(run(how, 5.0), run(None, 0.0))


def test_a_schedule_that_has_moved_on_recomputes_the_noise_of_its_step():
    gradients = []
    for how in (None, "non-reentrant"):
        model = replace_embeddings(Model(how, Region), alpha=lambda step: 5.0 / (1 + step)).train()
        torch.manual_seed(1)
        outputs = [model(IDS.clone()) for _ in range(3)]
        torch.stack(outputs).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    # The engine adds the gradients of the three passes up in the same order.
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("cut", [lambda ids: list(ids.split(1)), lambda ids: [row.clone() for row in ids.split(1)]])
def test_several_batches_before_backward_are_told_apart(cut):
    """Copies, and slices of one tensor, as pipelines cut it; each with lengths of its own."""
    gradients = []
    for how in (None, "non-reentrant"):
        model = replace_embeddings(Model(how, Region)).train()
        torch.manual_seed(1)
        parts = cut(IDS.clone())
        out = [model(ids, attention_mask=mask) for ids, mask in zip(parts, MASK.split(1), strict=True)]
        torch.stack(out).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_pass_that_begins_inside_backward_has_noise_of_its_own():
    """As in losses that run the model in a hook on their gradient."""
    model = replace_embeddings(Model(None, Region)).train()
    seen = []

    def run(gradient):
        with torch.enable_grad():
            seen.append(model.region.embedding(IDS).detach())

    x = torch.ones(1, requires_grad=True)
    x.register_hook(run)
    x.sum().backward()
    assert not torch.equal(seen[0], model.region.embedding.weight[IDS])


def test_a_pass_inside_backward_on_other_ids_does_not_repeat_the_last_one():
    model = replace_embeddings(Model(None, Region)).train()
    seen = []

    def run(gradient):
        with torch.enable_grad():
            seen.append(model.region.embedding(IDS.flip(1), attention_mask=MASK).detach())

    with no_noise(model):
        out = model(IDS)
    out.register_hook(run)
    out.sum().backward()
    assert torch.equal((seen[0] != model.region.embedding.weight[IDS.flip(1)]).any(-1), MASK.bool())


def gradients_of(how, passes):
    """The gradients of one backward after `passes`, a function of the model that returns a loss."""
    model = replace_embeddings(Model(how, Region)).train()
    torch.manual_seed(1)
    passes(model).backward()
    return [parameter.grad for parameter in model.parameters()]


def reference_pass_after(model):
    loss = model(IDS, attention_mask=MASK).square().sum()
    with torch.no_grad():
        model(IDS, attention_mask=MASK)
    return loss


def reference_pass_in_the_same_state(model):
    state = torch.get_rng_state()
    loss = model(IDS, attention_mask=MASK).square().sum()
    torch.set_rng_state(state)
    with torch.no_grad():
        model(IDS, attention_mask=MASK)
    return loss


def reference_pass_before(model):
    with torch.no_grad():
        model(IDS, attention_mask=MASK)
    return model(IDS, attention_mask=MASK).square().sum()


def two_masks(model):
    return model(IDS, attention_mask=MASK).square().sum() + model(IDS, attention_mask=MASK.flip(0)).square().sum()


def without_noise_after(model):
    loss = model(IDS, attention_mask=MASK).square().sum()
    with no_noise(model):
        return loss + model(IDS).square().sum()


def slices_at_one_place(model):
    return model(IDS[:, :3]).square().sum() + model(IDS[:1]).square().sum()


def copies_of_several(model):
    """As save_on_cpu makes them on a GPU."""
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.clone(), lambda saved: saved.clone()):
        loss = model(IDS.clone(), attention_mask=MASK).square().sum()
        return loss + model(IDS.flip(1).clone(), attention_mask=MASK.flip(0)).square().sum()


PASSES = [
    reference_pass_after,
    reference_pass_in_the_same_state,
    reference_pass_before,
    two_masks,
    without_noise_after,
    slices_at_one_place,
    copies_of_several,
]


@pytest.mark.parametrize("passes", PASSES)
def test_each_recomputation_has_the_noise_of_its_own_first_pass(passes):
    expected = gradients_of(None, passes)
    got = gradients_of("non-reentrant", passes)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)  # added up in another order; without the right noise they are far apart


def test_a_recomputed_pass_in_evaluation_mode_has_no_noise():
    gradients = []
    for how in (None, "non-reentrant"):
        model = replace_embeddings(Model(how, Region)).train()
        model(IDS).sum().backward()
        model.zero_grad()
        model.eval()(IDS).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("saved", ["mul.Tensor", "embedding", "index_select"])
@pytest.mark.parametrize("options", [{}, {"scale_by": "rms", "alpha": 0.1}])
def test_selective_checkpointing_hands_out_what_the_region_itself_computed(saved, options):
    """What is computed for the magnitude, and for describe, is computed in the first pass only."""
    op = operator.attrgetter(saved)(torch.ops.aten)
    op = op if "." in saved else op.default
    ids, gradients = torch.tensor([3, 4, 5, 0, 0]), []
    for is_checkpointed in (False, True):
        torch.manual_seed(0)
        factor = torch.randn(8, requires_grad=True)
        module = NEFTuneEmbedding(10, 8, backend="reference", **options)

        def region(ids, module=module, factor=factor):
            return (module(ids, attention_mask=(ids > 0).long()) * factor).sin()

        torch.manual_seed(1)
        if is_checkpointed:
            contexts = functools.partial(create_selective_checkpoint_contexts, [op])
            out = checkpoint(region, ids, use_reentrant=False, context_fn=contexts)
        else:
            out = region(ids)
        out.sum().backward()
        gradients.append((factor.grad, module.weight.grad))
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)
