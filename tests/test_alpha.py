"""Contract: alpha may be a schedule or be set at run time, and each pass has the alpha of its step."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import neft_kernels
from helpers.models import D, llama
from helpers.trainer import Look, trainer
from neft_kernels import NEFTuneCallback, describe, replace_embeddings, restore_embeddings, set_alpha


def test_an_alpha_of_0_is_off_however_it_came():
    """To a compiled graph it is a number like others, once it has been set at run time; to people it is not."""
    for network in (replace_embeddings(llama(), alpha=0), replace_embeddings(llama(), alpha=5.0)):
        set_alpha(network, 0)
        assert describe(network)[0].state == "off: alpha is 0"
        set_alpha(network, 1.0)
        assert describe(network)[0].state == "on"


def test_schedule_follows_the_trainers_step(tmp_path):
    look = Look()
    network = llama()
    callback = NEFTuneCallback(alpha=lambda step: 10.0 * step)
    trainer(tmp_path, network, [callback, look], gradient_accumulation_steps=2).train()
    assert [report[0].alpha for report in look.reports] == [0.0, 10.0, 20.0]
    largest = [report[0].last_magnitude[1] for report in look.reports]
    assert largest == pytest.approx([alpha / (9 * D) ** 0.5 for alpha in (0.0, 10.0, 20.0)])


def test_an_alpha_that_is_set_during_training_stays(tmp_path):
    """The callback tells a schedule its step, and sets nothing where there is none."""

    class Sets(Look):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            set_alpha(kwargs["model"], 8.0)

    look = Sets()
    trainer(tmp_path, llama(), [NEFTuneCallback(5.0), look]).train()
    assert [report[0].alpha for report in look.reports] == [5.0, 8.0, 8.0]


def test_schedule_counts_forward_passes_and_set_alpha_changes_it():
    network = replace_embeddings(llama(), alpha=lambda step: 1.0 + step)
    ids = torch.arange(3, 12)[None]
    seen = []
    for _ in range(3):
        network(ids)
        seen.append(describe(network)[0].last_magnitude[1] * (9 * D) ** 0.5)
    network.eval()(ids)
    assert seen == pytest.approx([1.0, 2.0, 3.0])
    set_alpha(network.train(), 8.0)
    network(ids)
    assert describe(network)[0].last_magnitude[1] == pytest.approx(8.0 / (9 * D) ** 0.5)
    with pytest.raises(ValueError, match="alpha"):
        set_alpha(network, -1.0)
    assert describe(network)[0].alpha == 8.0
    with pytest.raises(ValueError, match="alpha"):
        replace_embeddings(network, alpha=lambda step: -1.0)
    restore_embeddings(network)
    with pytest.raises(ValueError, match="no noisy embeddings"):
        set_alpha(network, 1.0)


def test_a_compiled_model_follows_set_alpha_without_compiling_again():
    torch._dynamo.reset()
    embedding = neft_kernels.NEFTuneEmbedding(50, D, alpha=lambda step: 1.0)
    counter = CompileCounter()
    compiled = torch.compile(embedding, fullgraph=True, backend=counter)
    ids = torch.arange(9)[None]
    for alpha in (2.0, 4.0, 8.0, 0.0):
        set_alpha(embedding, alpha)
        noise = (compiled(ids) - embedding.weight[ids]).abs().max()
        bound = alpha / (9 * D) ** 0.5
        assert 0.5 * bound <= noise <= bound + 1e-5
    assert counter.frame_count == 1


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_compiled_model_does_not_freeze_a_schedule(fullgraph):
    """It cannot count, and says so; also where the embedding runs uncompiled, because the compiler gave up on it."""
    torch._dynamo.reset()
    network = replace_embeddings(llama(), alpha=lambda step: 5.0 if step < 2 else 0.0)
    ids = torch.arange(3, 12)[None]
    with pytest.raises(Exception, match=r"set_alpha\(\.\.\., step="):
        torch.compile(network, fullgraph=fullgraph, backend="eager")(ids)


def test_a_schedule_counts_on_in_a_model_that_is_compiled_in_part():
    """The outermost module is not compiled, and so it counts; the embedding inside of the compiled part follows."""
    torch._dynamo.reset()
    network = replace_embeddings(llama(), alpha=lambda step: 1.0 + step)
    network.model.compile(backend="eager")
    ids = torch.arange(3, 12)[None]
    for step in range(3):
        network(ids)
        assert describe(network)[0].last_magnitude == pytest.approx(((1.0 + step) / (9 * D) ** 0.5,) * 2)


def test_a_compiled_model_follows_a_schedule_whose_step_is_told():
    """In one graph; a copy has an alpha of its own."""
    torch._dynamo.reset()
    embedding = neft_kernels.NEFTuneEmbedding(50, D, alpha=lambda step: 1.0 + step)
    set_alpha(embedding, lambda step: 1.0 + step, step=0)
    twin, ids = copy.deepcopy(embedding), torch.arange(9)[None]
    counter = CompileCounter()
    compiled = torch.compile(embedding, fullgraph=True, backend=counter)
    for step in (0, 3, 15):
        set_alpha(embedding, lambda step: 1.0 + step, step=step)
        set_alpha(twin, 0.0)
        noise = (compiled(ids) - embedding.weight[ids]).abs().max()
        bound = (1.0 + step) / (9 * D) ** 0.5
        assert 0.5 * bound <= noise <= bound + 1e-5
    assert counter.frame_count == 1


def test_a_recomputed_pass_is_not_counted():
    network = replace_embeddings(llama(), alpha=lambda step: 5.0 * (step + 1))
    ids = torch.arange(3, 12)[None]
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(3)
        network.zero_grad()
        set_alpha(network, lambda step: 5.0 * (step + 1), step=0)
        set_alpha(network, lambda step: 5.0 * (step + 1))
        if recompute:
            logits = checkpoint(lambda tokens: network(tokens, use_cache=False).logits, ids, use_reentrant=False)
        else:
            logits = network(ids, use_cache=False).logits
        logits.square().sum().backward()
        assert describe(network)[0].alpha == 5.0  # of step 0 still
        gradients.append(network.get_input_embeddings().weight.grad.clone())
    assert torch.equal(*gradients)
