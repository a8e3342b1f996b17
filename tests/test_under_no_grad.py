"""Contract: under_no_grad=True gives both passes of a method that runs twice under one generator state the same noise."""

import logging

import pytest
import torch

from helpers.situations import IDS, Looks
from neft_kernels import describe, replace_embeddings, set_alpha


def twice(model, ids):
    """As GradCache does it: a pass without gradients, the state restored, a pass with gradients."""
    state = torch.get_rng_state()
    with torch.no_grad():
        first = model(ids)
    between = torch.get_rng_state()
    torch.set_rng_state(state)
    second = model(ids)
    return first, second, torch.equal(between, torch.get_rng_state())


def test_under_no_grad_both_passes_have_the_same_noise_and_draw_the_same_numbers():
    model = replace_embeddings(Looks(), under_no_grad=True).train()
    first, second, drew_the_same = twice(model, IDS)
    assert torch.equal(first, second)
    assert drew_the_same
    assert not torch.equal(first, model.embedding.weight[IDS])
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(IDS), model.embedding.weight[IDS])


def test_by_default_a_pass_without_gradients_is_a_reference_pass():
    model = replace_embeddings(Looks()).train()
    first, second, _ = twice(model, IDS)
    assert torch.equal(first, model.embedding.weight[IDS])
    assert not torch.equal(first, second)


def test_under_no_grad_a_schedule_must_be_told_its_steps():
    model = replace_embeddings(Looks(), alpha=lambda step: 5.0 + step, under_no_grad=True).train()
    with pytest.raises(RuntimeError, match="under_no_grad=True a pass may run twice"):
        model(IDS)
    set_alpha(model, lambda step: 5.0 + step, step=3)
    model(IDS)
    assert describe(model)[0].alpha == 8.0


def test_under_no_grad_must_be_a_bool():
    with pytest.raises(TypeError, match="under_no_grad must be a bool"):
        replace_embeddings(Looks(), under_no_grad=1)


def test_a_pass_run_again_in_a_hook_of_backward_has_what_it_had_the_first_time(caplog):
    """As in sentence-transformers' cached losses, with slices of the batch."""
    for options, is_noisy in (({}, False), ({"under_no_grad": True}, True)):
        model = replace_embeddings(Looks(), **options).train()
        seen = []

        parts, first = [], []

        def again(gradient, model=model, seen=seen, parts=parts):
            with torch.enable_grad():
                for ids, state in parts:
                    torch.set_rng_state(state)
                    seen.append(model(ids).detach())

        for ids in IDS.split(1):
            parts.append((ids, torch.get_rng_state()))
            with torch.no_grad():
                first.append(model(ids))
        x = torch.ones(1, requires_grad=True)
        x.register_hook(again)
        with caplog.at_level(logging.WARNING, logger="neft_kernels"):
            x.sum().backward()
        assert all(torch.equal(a, b) for a, b in zip(first, seen, strict=True))
        assert torch.equal(seen[0], model.embedding.weight[IDS[:1]]) != is_noisy
        assert ("set under_no_grad=True" in caplog.text) != is_noisy
        caplog.clear()
