"""Contract: with symmetric=True gradients, transformations and compiled graphs are those of the plain ops."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

from helpers.devices import CPU_BACKENDS
from helpers.symmetric_ops import IDS, OTHER_IDS, OTHER_PER_TOKEN, PER_TOKEN, table
from neft_kernels import add_noise, noisy_embedding
from neft_kernels.ops.registration import OVERLOADS

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(
    "options", [{}, {"padding_idx": 2}, {"scale_grad_by_freq": True}, {"sparse": True, "padding_idx": 3}], ids=str
)
def test_the_gradient_is_that_of_the_plain_embedding(backend, options):
    ids = torch.cat((IDS, IDS))  # of which each occurs twice or four times, so that all numbers are exact
    upstream = torch.randint(-8, 9, (4, 3, 5)).float()
    found = []
    for look_up in (
        F.embedding,
        lambda ids, weight, **options: noisy_embedding(ids, weight, 0.1, symmetric=True, backend=backend, **options),
    ):
        weight = table(5, torch.float32).requires_grad_()
        look_up(ids, weight, **options).backward(upstream)
        found.append(weight.grad)
    assert found[0].layout == found[1].layout
    assert torch.equal(found[0].to_dense(), found[1].to_dense())
    embeds = torch.randn(4, 3, 5, requires_grad=True)
    add_noise(embeds, 0.1, symmetric=True, backend=backend).backward(upstream)
    assert torch.equal(embeds.grad, upstream)


def test_forward_mode_and_gradcheck():
    weight, tangent = torch.randn(7, 5), torch.randn(7, 5)
    with forward_ad.dual_level():
        out = noisy_embedding(IDS, forward_ad.make_dual(weight, tangent), 0.1, seed=2, symmetric=True)
        primal, found = forward_ad.unpack_dual(out)
        assert torch.equal(found, tangent[IDS])
        assert torch.equal(primal, noisy_embedding(IDS, weight, 0.1, seed=2, symmetric=True))
    double = weight.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: noisy_embedding(IDS, w, 0.1, seed=3, symmetric=True), double)
    embeds = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda e: add_noise(e, 0.1, seed=3, symmetric=True), embeds, check_forward_ad=True)


def test_torch_func():
    """Under vmap the halves are those of one example."""
    seed, tables, batches = torch.tensor([5]), torch.randn(3, 7, 5), torch.stack((IDS, OTHER_IDS, IDS))

    def look_up(ids, weight):
        return noisy_embedding(ids, weight, 0.1, seed=seed, symmetric=True)

    one_by_one = torch.stack([look_up(*pair) for pair in zip(batches, tables, strict=True)])
    assert torch.equal(torch.func.vmap(look_up)(batches, tables), one_by_one)
    gradient = torch.func.grad(lambda weight: look_up(IDS, weight).sum())(tables[0])
    assert torch.equal(gradient, torch.func.grad(lambda weight: F.embedding(IDS, weight).sum())(tables[0]))
    embeds = torch.randn(3, 4, 5)
    added = torch.func.vmap(lambda rows: add_noise(rows, 0.1, seed=seed, symmetric=True))(embeds)
    assert torch.equal(added, torch.stack([add_noise(rows, 0.1, seed=seed, symmetric=True) for rows in embeds]))
    with pytest.raises(ValueError, match="embeds has 3 tokens"):
        torch.func.vmap(lambda rows: add_noise(rows, 0.1, symmetric=True))(torch.randn(2, 3, 5))


def test_compiled_equals_eager_at_every_length_with_one_graph():
    weight = torch.randn(50, 12, requires_grad=True)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def compiled(ids, magnitude, seed):
        ids, magnitude = torch.cat((ids, ids)), torch.cat((magnitude, magnitude))
        return noisy_embedding(ids, weight, magnitude, seed=seed, symmetric=True) * 2

    for length in (5, 9, 17):
        ids, magnitude, seed = torch.randint(50, (2, length)), torch.rand(2, length), torch.randint(1 << 60, (1,))
        out = compiled(ids, magnitude, seed)
        doubled = (torch.cat((ids, ids)), weight, torch.cat((magnitude, magnitude)))
        assert torch.equal(out, noisy_embedding(*doubled, seed=seed, symmetric=True) * 2)
        (grad,) = torch.autograd.grad(out.sum(), weight)
        assert torch.equal(grad, torch.autograd.grad((F.embedding(doubled[0], weight) * 2).sum(), weight)[0])
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_opcheck(backend):
    seed, weight, per_token = torch.tensor([3]), torch.randn(7, 6), torch.cat((PER_TOKEN, OTHER_PER_TOKEN))
    calls = {
        "noisy_embedding": (torch.cat((IDS, IDS)), weight, seed, per_token, 0.0, 7, 2**40, 3, False, False, 1, True),
        "add_noise": (torch.randn(2, 3, 6), seed, None, 0.1, 0, 0, 0, True),
    }
    for op, args in calls.items():
        tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        result = torch.library.opcheck(OVERLOADS[op][backend], args, test_utils=tests)
        assert set(result.values()) == {"SUCCESS"}, op


@pytest.mark.parametrize("backend", [None, *CPU_BACKENDS])
def test_meta_tensors(backend):
    ids, weight = torch.empty(4, 3, dtype=torch.int64, device="meta"), torch.empty(9, 6, device="meta")
    out = noisy_embedding(ids, weight, 0.1, symmetric=True, backend=backend)
    assert out.device.type == "meta"
    assert out.shape == (4, 3, 6)
    assert add_noise(out, 0.1, symmetric=True, backend=backend).shape == out.shape
