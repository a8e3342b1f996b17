"""Contract: exported, saved and traced programs have the noise and the gradients of the eager ops, for other batches too."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from helpers.bits import equal_bits
from helpers.models import (
    IDS,
    LLAMA_INPUTS,
    MASK,
    WEIGHT,
    llama_batches,
    noisy_gemma,
    noisy_llama,
    noisy_module,
    seeded,
)
from neft_kernels import add_noise, noisy_embedding


class Ops(nn.Module):
    """Both ops with the seed as an input."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(WEIGHT.clone())

    def forward(self, ids, magnitude, seed):
        looked_up = noisy_embedding(ids, self.weight, magnitude, seed=seed, stream=3, first_token=2**40)
        return looked_up, add_noise(looked_up, 0.3, seed=seed)


@pytest.mark.parametrize("strict", [True, False])
class TestExport:
    def test_ops_with_a_seed_tensor(self, strict):
        """The program gives eager's bits for every seed and length."""
        batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
        inputs = (IDS, torch.rand(IDS.shape), torch.tensor([5]))
        dynamic = ({0: batch, 1: length}, {0: batch, 1: length}, None)
        exported = torch.export.export(Ops(), inputs, dynamic_shapes=dynamic, strict=strict).module()
        for seed, shape in ((5, (2, 5)), (-(2**63), (2, 5)), (7, (3, 11))):
            inputs = (torch.randint(50, shape), torch.rand(shape), torch.tensor([seed]))
            ours = Ops()
            results = exported(*inputs), ours(*inputs)
            for got, want in zip(*results, strict=True):
                assert equal_bits(got, want)
            for pair, weight in zip(results, (*exported.parameters(), ours.weight), strict=True):
                weight.grad = None
                sum(each.tanh().square().sum() for each in pair).backward()
            (traced,) = exported.parameters()
            assert ours.weight.grad.any()
            assert equal_bits(traced.grad, ours.weight.grad)

    @pytest.mark.parametrize("make", [noisy_module, noisy_llama])
    def test_a_model_in_training(self, strict, make):
        """It draws a seed at each call from the default generator, as the eager model does."""
        network = make()
        args, kwargs = ((IDS,), {"attention_mask": MASK}) if make is noisy_module else ((), LLAMA_INPUTS)
        exported = torch.export.export(network, args, kwargs, strict=strict).module()
        torch.manual_seed(5)
        first, second = exported(*args, **kwargs), exported(*args, **kwargs)
        eager = seeded(network, *args, **kwargs)
        if make is not noisy_module:
            first, second, eager = first.logits, second.logits, eager.logits
        assert equal_bits(first, eager)
        assert not torch.equal(first, second)
        grads = []
        for out, module in ((first, exported), (eager, network)):
            module.zero_grad()
            out.square().sum().backward()
            grads.append({name: parameter.grad for name, parameter in module.named_parameters()})
        # The program's own kernels may add up in another order; a table without a gradient would be off by all of it.
        for name, parameter in grads[1].items():
            torch.testing.assert_close(grads[0][name], parameter)


OPTIONS = [{}, {"padding_idx": 3}, {"scale_grad_by_freq": True}, {"sparse": True, "padding_idx": 3}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_traced_graph_has_the_gradient_of_the_eager_op(options):
    """Exported, and by make_fx: the ops that the graphs hold know their gradients, options and all."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(WEIGHT.clone())

        def forward(self, ids, seed):
            return noisy_embedding(ids, self.weight, 0.1, seed=seed, **options).tanh()

    inputs = (IDS, torch.tensor([5]))
    graphs = [torch.export.export(Model(), inputs, strict=strict).module() for strict in (True, False)]
    weight = WEIGHT.clone().requires_grad_()
    traced = make_fx(lambda weight: noisy_embedding(IDS, weight, 0.1, seed=5, **options).tanh())(WEIGHT)
    eager = Model()
    eager(*inputs).square().sum().backward()
    want = eager.weight.grad.to_dense()
    assert want.any()
    traced(weight).square().sum().backward()
    assert equal_bits(weight.grad.to_dense(), want)
    for graph in graphs:
        graph(*inputs).square().sum().backward()
        (parameter,) = graph.parameters()
        assert equal_bits(parameter.grad.to_dense(), want)


def test_an_exported_model_serves_other_batches():
    """The lengths come from the mask that the program is given, not from the one that it was traced with."""
    network, auto = noisy_gemma(), torch.export.Dim.AUTO
    shapes = {"input_ids": {0: auto, 1: auto}, "attention_mask": {0: auto, 1: auto}, "use_cache": None}
    inputs = {"input_ids": IDS, "attention_mask": MASK, "use_cache": False}
    exported = torch.export.export(network, (), inputs, dynamic_shapes=shapes, strict=False).module()
    for inputs in llama_batches():
        assert equal_bits(seeded(exported, **inputs).logits, seeded(network, **inputs).logits)


def test_a_saved_program_gives_the_same_bits(tmp_path):
    inputs = (IDS, torch.rand(IDS.shape), torch.tensor([5]))
    torch.export.save(torch.export.export(Ops(), inputs), tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").run_decompositions().module()
    for got, want in zip(loaded(*inputs), Ops()(*inputs), strict=True):
        assert equal_bits(got, want)
