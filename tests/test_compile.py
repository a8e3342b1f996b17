"""Contract: a noisy embedding compiles to one graph for all masks, lengths and switches, with the noise of the eager one."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from helpers.bits import equal_bits
from helpers.models import IDS, D, llama, llama_batches, noisy_gemma, noisy_llama, noisy_module, padded_batches, seeded
from neft_kernels import describe, no_noise, set_alpha


def test_a_compiled_module_is_one_graph_for_all_masks_and_lengths():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    module = noisy_module()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for ids, mask in padded_batches():
        torch.manual_seed(5)
        first, second = compiled(ids, attention_mask=mask), compiled(ids, attention_mask=mask)
        assert equal_bits(first, seeded(module, ids, attention_mask=mask))
        assert not torch.equal(first, second)
        assert torch.equal((first != F.embedding(ids, module.weight)).any(-1), mask.bool())
        assert counter.frame_count == 1


@pytest.mark.parametrize("make", [llama, noisy_llama, noisy_gemma])
def test_a_compiled_llama_is_one_graph_for_all_masks_and_lengths(make):
    """As the plain one is."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(make(), fullgraph=True, dynamic=True, backend=counter)
    for inputs in llama_batches():
        compiled(**inputs)
        assert counter.frame_count == 1


def test_a_compiled_llama_has_the_noise_of_the_eager_one():
    """Fresh at each call, eager's for eager's seed, with alpha as it is set at the time, in one graph."""
    torch._dynamo.reset()
    network, eager = noisy_llama(), noisy_llama()
    set_alpha(network, 5.0)  # once it has been set at run time, alpha is an input of the graph
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(network, fullgraph=True, dynamic=True, backend=counter)
    for alpha, inputs in zip((5.0, 1.0, 20.0, 0.0), llama_batches(), strict=True):
        for each in (network, eager):
            set_alpha(each, alpha)
        torch.manual_seed(5)
        first, second = compiled(**inputs).logits, compiled(**inputs).logits
        assert equal_bits(first, seeded(eager, **inputs).logits)
        assert torch.equal(first, second) == (alpha == 0)
    assert counter.frame_count == 1


def test_a_compiled_module_follows_every_switch():
    """It is plain wherever the eager one is, and noisy again afterwards."""
    torch._dynamo.reset()
    module = noisy_module()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")

    def is_plain():
        return torch.equal(compiled(IDS), module.weight[IDS])

    for context in (torch.no_grad, torch.inference_mode, lambda: no_noise(module)):
        assert not is_plain()
        with context():
            assert is_plain()
    module.eval()
    assert is_plain()
    module.train()
    assert not is_plain()


def test_reduce_overhead_on_the_cpu():
    torch._dynamo.reset()
    module = noisy_module()
    compiled = torch.compile(module, mode="reduce-overhead", fullgraph=True)
    first, second = compiled(IDS), compiled(IDS)
    bound = describe(module)[0].alpha / (5 * D) ** 0.5
    for out in (first, second):
        assert 0 < (out - F.embedding(IDS, module.weight)).abs().max() <= bound + 1e-6
    assert not torch.equal(first, second)
    first.sum().backward()
    assert module.weight.grad[3].tolist() == [1.0] * D
