"""Contract: the CPU's gradient of the table is each id's sum in fp64, in order of the tokens, rounded once.

Whatever the instruction set, the number of threads, the strides and the size of the table. For ids that occur once it is
that of F.embedding bit for bit.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.bits import equal_bits, expected_embedding_grad
from helpers.devices import DTYPES, capped
from neft_kernels import noisy_embedding
from neft_kernels.ops.registration import OVERLOADS

pytestmark = pytest.mark.cpu_extension

INSTRUCTION_SETS = ("avx512", "avx2", "portable")
embedding_grad = OVERLOADS["embedding_grad"]["cpu"]


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_exact_and_rounded_once(dtype, instruction_set, poisoned_memory):
    generator = torch.Generator().manual_seed(0)
    for num_embeddings, width, shape in ((7, 1, (30,)), (50, 37, (3, 40)), (3, 300, (200,)), (2000, 2049, (2, 3, 9))):
        for id_dtype in (torch.int64, torch.int32):
            ids = torch.randint(num_embeddings, shape, generator=generator).to(id_dtype)
            grad = torch.randn(*shape, width, generator=generator).to(dtype)
            for options in ((-1, False), (2, False), (-1, True), (0, True)):
                with capped(instruction_set):
                    got = embedding_grad(grad, ids, num_embeddings, *options)
                assert equal_bits(got, expected_embedding_grad(grad, ids, num_embeddings, *options)), (width, options)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ids_that_occur_once_get_the_bits_of_the_plain_embedding(dtype, instruction_set):
    """The sign of zero, infinities, NaN and subnormal numbers included."""
    limits = torch.finfo(dtype)
    awkward = [-0.0, 0.0, float("inf"), float("-inf"), float("nan"), limits.max, limits.smallest_normal / 4]
    grad = torch.cat([torch.tensor(awkward, dtype=torch.float64), torch.randn(90, dtype=torch.float64)]).to(dtype)
    grad, ids = grad.repeat(20, 1), torch.randperm(40)[:20]
    with capped(instruction_set):
        got = embedding_grad(grad, ids, 40, -1, False)
    plain = torch.ops.aten.embedding_dense_backward(grad, ids, 40, -1, False)
    assert equal_bits(got, plain)
    assert torch.equal(got.signbit(), plain.signbit())


def test_in_fp64_it_is_the_plain_embedding_s_for_any_ids():
    """Which adds in the same order."""
    grad, ids = torch.randn(500, 33, dtype=torch.float64), torch.randint(20, (500,))
    plain = torch.ops.aten.embedding_dense_backward(grad, ids, 20, 3, False)
    assert equal_bits(embedding_grad(grad, ids, 20, 3, False), plain)


@pytest.mark.parametrize("repeats", [64, 4096, 100_000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_any_number_of_repeats(dtype, repeats):
    """Gradients of one sign, which a sum in half precision stops to grow from after some hundred."""
    grad = (torch.randn(repeats, 8) / 64 + 1 / 128).to(dtype)
    got = embedding_grad(grad, torch.zeros(repeats, dtype=torch.int64), 2, -1, False)
    exact = grad.double().sum(0)
    # One rounding is half a unit in the last place, at most eps / 2 of the sum; fp64's own roundings are far below.
    assert ((got[0].double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2 * (1 + 2**-10)).all()
    assert not got[1].any()


@pytest.mark.parametrize("frequent", [0.0, 0.9, 1.0])
def test_any_number_of_threads(frequent):
    """Also where nearly all tokens have one id, whose row the threads share."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(300, (5000,), generator=generator)
    ids[torch.rand(5000, generator=generator) < frequent] = 7
    # Numbers of so different sizes that the order of their sum shows.
    grad = torch.randn(5000, 1100, generator=generator) * torch.logspace(-20, 20, 5000)[:, None]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(embedding_grad(grad, ids, 300, -1, False))
    finally:
        torch.set_num_threads(before)
    assert all(equal_bits(each, found[0]) for each in found)


@pytest.mark.parametrize("megabytes", [16, 40])
def test_rows_without_tokens_are_zero_whatever_memory_held(megabytes, poisoned_memory):
    """Large outputs are not written but taken back by the kernel."""
    num_embeddings = (megabytes << 20) // 4 // 1023
    # Neither the first nor the last row, which do not fill whole pages.
    ids, grad = torch.tensor([2, 5, num_embeddings - 2, 5]), torch.randn(4, 1023)
    for _ in range(2):
        got = embedding_grad(grad, ids, num_embeddings, -1, False)
        assert equal_bits(got, expected_embedding_grad(grad, ids, num_embeddings))
        got.fill_(float("nan"))


def test_rows_without_tokens_are_zero_in_memory_that_has_its_pages():
    """glibc takes even a large tensor from freed memory, where blocks that it does not map one by one lay side by side."""
    torch.empty(31 << 20, dtype=torch.uint8)  # after this was freed, glibc maps no block of up to its size by itself
    blocks = [torch.full((24 << 18,), float("nan")) for _ in range(12)]
    above = torch.full((24 << 18,), float("nan"))  # keeps glibc from returning the memory below to the OS
    del blocks
    num_embeddings = (40 << 20) // 4 // 1023
    ids, grad = torch.tensor([2, 5, num_embeddings - 2, 5]), torch.randn(4, 1023)
    got = embedding_grad(grad, ids, num_embeddings, -1, False)
    assert equal_bits(got, expected_embedding_grad(grad, ids, num_embeddings))
    assert above.isnan().all()


def test_strides():
    ids, grad = torch.randint(9, (6, 8)), torch.randn(6, 8, 20)
    want = expected_embedding_grad(grad, ids, 9)
    apart = torch.stack([grad, grad], -1).flatten(-2)[..., ::2]
    for same in (grad.mT.contiguous().mT, grad.transpose(0, 1).contiguous().transpose(0, 1), apart):
        assert not same.is_contiguous()
        assert equal_bits(embedding_grad(same, ids, 9, -1, False), want)
    assert equal_bits(embedding_grad(grad, ids.t().contiguous().t(), 9, -1, False), want)
    one = torch.ones(()).expand(6, 8, 20)  # the gradient of a sum
    assert equal_bits(embedding_grad(one, ids, 9, -1, False), expected_embedding_grad(one.contiguous(), ids, 9))


@pytest.mark.parametrize(("num_embeddings", "width", "shape"), [(4, 0, (3,)), (4, 5, (0,)), (0, 5, (2, 0)), (4, 5, ())])
def test_sizes_of_zero_and_a_single_id(num_embeddings, width, shape):
    ids, grad = torch.zeros(shape, dtype=torch.int64), torch.ones(*shape, width)
    got = embedding_grad(grad, ids, num_embeddings, -1, False)
    assert got.shape == (num_embeddings, width)
    assert got.sum() == grad.sum()


def test_what_would_read_or_write_elsewhere_is_refused():
    grad = torch.ones(2, 5)
    for ids in (torch.tensor([0, 4]), torch.tensor([-1, 0])):
        with pytest.raises(RuntimeError, match=r"input_ids must be in \[0, 4\)"):
            embedding_grad(grad, ids, 4, -1, False)
    with pytest.raises(RuntimeError, match="shape of input_ids"):
        embedding_grad(grad, torch.tensor([0, 1, 2]), 4, -1, False)
    with pytest.raises(RuntimeError, match="one dimension more"):
        embedding_grad(grad, torch.tensor([[0, 1]]), 4, -1, False)


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


def ops_of_backward(backend="cpu", create_graph=False, **options):
    weight = torch.randn(9, 6, requires_grad=True)
    out = noisy_embedding(torch.tensor([[1, 2], [2, 8]]), weight, 0.1, backend=backend, **options)
    with Names() as seen:
        torch.autograd.grad(out.square().sum(), weight, create_graph=create_graph)
    return {name for name in seen.names if name.startswith("embedding")}


def test_where_the_kernel_is_used_and_where_pytorch_s_rules_are_needed():
    assert ops_of_backward() == ops_of_backward(padding_idx=1, scale_grad_by_freq=True) == {"embedding_grad"}
    assert ops_of_backward(create_graph=True) == {"embedding_dense_backward"}
    assert ops_of_backward(backend="reference") == {"embedding_dense_backward"}
    assert ops_of_backward(sparse=True) <= {"embedding_backward", "embedding_sparse_backward"}


def test_autograd_keeps_the_tensor_without_a_copy():
    weight = torch.randn(9, 6, requires_grad=True)
    where = []
    weight.register_hook(lambda grad: where.append(grad.data_ptr()))
    noisy_embedding(torch.tensor([1, 2]), weight, 0.1).sum().backward()
    assert weight.grad.data_ptr() == where[0]
    noisy_embedding(torch.tensor([1, 2]), weight, 0.1).sum().backward()
    assert torch.equal(weight.grad[1], torch.full((6,), 2.0))


def test_vectorized_gradients():
    """is_grads_batched calls backward under vmap."""
    weight, ids = torch.randn(9, 6, requires_grad=True), torch.tensor([1, 2, 2])
    upstream = torch.randn(4, 3, 6)
    (batched,) = torch.autograd.grad(noisy_embedding(ids, weight, 0.1), weight, upstream, is_grads_batched=True)
    for one, grad in zip(batched, upstream, strict=True):
        (plain,) = torch.autograd.grad(F.embedding(ids, weight), weight, grad)
        torch.testing.assert_close(one, plain)
