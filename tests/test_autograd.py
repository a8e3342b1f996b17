"""Contract: the gradient is that of the plain embedding, by every route that PyTorch has; to the bit where sums are exact."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from neft_kernels import NoisyEmbedding, add_noise, noisy_embedding

OPTIONS = [
    {},
    {"padding_idx": 2},
    {"padding_idx": -1},
    {"padding_idx": -7},  # the first of as many rows
    {"scale_grad_by_freq": True},
    {"padding_idx": 0, "scale_grad_by_freq": True},
    {"sparse": True},
    {"sparse": True, "padding_idx": 3},
]


def ids():
    return torch.tensor([[0, 1, 2, 2], [6, 3, 0, 2]])


def gradients(dtype, options, id_dtype):
    torch.manual_seed(0)
    weight = torch.randn(7, 5, dtype=torch.float64).to(dtype)
    upstream = torch.randint(-8, 9, (2, 4, 5)).to(dtype)  # so that all sums are exact, in whatever precision and order
    if options.get("scale_grad_by_freq"):
        upstream *= 3  # id 2 occurs three times
    found = []
    for noisy in (False, True):
        leaf = weight.clone().requires_grad_()
        tokens = ids().to(id_dtype)
        out = noisy_embedding(tokens, leaf, 0.1, **options) if noisy else F.embedding(tokens, leaf, **options)
        out.backward(upstream)
        found.append(leaf.grad)
    return found


@pytest.mark.parametrize("id_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradient_is_that_of_the_plain_embedding(dtype, options, id_dtype):
    plain, noisy = gradients(dtype, options, id_dtype)
    assert noisy.layout == plain.layout
    assert torch.equal(noisy.to_dense(), plain.to_dense())


def test_small_integer_ids_have_a_gradient():
    weight = torch.randn(7, 5, requires_grad=True)
    noisy_embedding(ids().to(torch.uint8), weight, 0.1).sum().backward()
    assert weight.grad[2].tolist() == [3.0] * 5


def test_frozen_weight_costs_nothing():
    out = noisy_embedding(ids(), torch.randn(7, 5), 0.1)
    assert out.grad_fn is None
    assert not out.requires_grad
    weight = torch.randn(7, 5, requires_grad=True)
    with torch.no_grad():
        assert noisy_embedding(ids(), weight, 0.1).grad_fn is None


def test_add_noise_passes_the_gradient_through():
    embeds = torch.randn(2, 4, 5, requires_grad=True)
    upstream = torch.randn(2, 4, 5)
    add_noise(embeds, torch.rand(2, 4)).backward(upstream)
    assert torch.equal(embeds.grad, upstream)


def test_gradcheck_first_second_and_forward_mode():
    weight = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)

    def look_up(w):
        return noisy_embedding(ids(), w, 0.1, seed=3, padding_idx=1)

    def add(w):
        return add_noise(w, 0.1, seed=3)

    # Forward mode knows no padding_idx, so the look-up is checked without it.
    assert torch.autograd.gradcheck(lambda w: noisy_embedding(ids(), w, 0.1, seed=3), weight, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda w: look_up(w) ** 2, weight.clone().detach().requires_grad_()) is True
    assert torch.autograd.gradcheck(add, weight, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda w: add(w) ** 2, weight)


def test_forward_mode_gives_the_tangent_of_the_plain_embedding():
    weight, tangent = torch.randn(7, 5), torch.randn(7, 5)
    with forward_ad.dual_level():
        out = noisy_embedding(ids(), forward_ad.make_dual(weight, tangent), 0.1)
        assert torch.equal(forward_ad.unpack_dual(out).tangent, tangent[ids()])


def test_changing_the_output_in_place_leaves_the_tangent_that_was_given():
    embeds, tangent = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    given = tangent.clone()
    with forward_ad.dual_level():
        out = add_noise(forward_ad.make_dual(embeds, given), 0.1).mul_(2)
        assert torch.equal(forward_ad.unpack_dual(out).tangent, 2 * tangent)
    assert torch.equal(given, tangent)


def test_torch_func():
    weight = torch.randn(7, 5)
    upstream = torch.randn(2, 4, 5)

    def loss(w, tokens, seed):
        return (noisy_embedding(tokens, w, 0.1, seed=seed) * upstream).sum()

    seed = torch.tensor([5])
    plain = torch.func.grad(lambda w: (F.embedding(ids(), w) * upstream).sum())(weight)
    assert torch.equal(torch.func.grad(loss)(weight, ids(), seed), plain)
    tables = torch.randn(3, 7, 5)
    batched = torch.func.vmap(lambda w: noisy_embedding(ids(), w, 0.1, seed=seed))(tables)
    one_by_one = torch.stack([noisy_embedding(ids(), table, 0.1, seed=seed) for table in tables])
    assert torch.equal(batched, one_by_one)
    assert torch.equal(torch.func.vmap(torch.func.grad(loss), (0, None, None))(tables, ids(), seed)[1], plain)
    batched = torch.func.vmap(lambda embeds: add_noise(embeds, 0.1, seed=seed))(tables)
    assert torch.equal(batched, torch.stack([add_noise(table, 0.1, seed=seed) for table in tables]))
    squares = torch.func.grad(lambda embeds: add_noise(embeds, 0.1, seed=seed).square().sum())(weight)
    assert torch.equal(squares, 2 * add_noise(weight, 0.1, seed=seed))


def test_a_compiled_transform_is_refused_rather_than_wrong():
    """The compiler would trace forward alone, and its gradient would be zero."""
    weight = torch.randn(7, 5)
    gradient = torch.func.grad(lambda w: noisy_embedding(ids(), w, 0.1, seed=1).square().sum())
    with pytest.raises(Exception, match=r"torch\.func transform|maybe_current_level"):
        torch.compile(gradient, fullgraph=True, backend="eager")(weight)


def test_the_function_is_an_autograd_function():
    assert issubclass(NoisyEmbedding, torch.autograd.Function)
    weight = torch.randn(7, 5, requires_grad=True)
    seed = torch.tensor([5])
    op = torch.ops.neft_kernels.noisy_embedding.reference
    out = NoisyEmbedding.apply(op, ids(), weight, seed, None, 0.1, 0, 0, -1, False, False)
    assert torch.equal(out, noisy_embedding(ids(), weight, 0.1, seed=5))
    assert "NoisyEmbedding" in type(out.grad_fn).__name__
