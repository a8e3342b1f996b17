"""Contract: to PyTorch the ops are well-behaved: pure, with fakes that tell the truth, and one graph for all lengths."""

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.devices import CPU_BACKENDS
from neft_kernels import add_noise, noisy_embedding
from neft_kernels.ops import backends
from neft_kernels.ops.registration import OVERLOADS, kernel_of
from neft_kernels.ops.seed import draw_seed

SEED = torch.tensor([3])


def samples():
    weight = torch.randn(9, 6)
    strided = torch.randn(6, 9).t()
    ids = torch.tensor([[1, 2], [3, 8]])
    per_token = torch.rand(2, 2)
    yield "noisy_embedding", (ids, weight, SEED, None, 0.1, 0, 0)
    yield "noisy_embedding", (ids.t(), strided, SEED, per_token, 0.0, 7, 2**40)
    yield "noisy_embedding", (ids[:0], weight.bfloat16(), SEED, None, 0.1, 0, 0)
    yield "noisy_embedding", (ids, weight, SEED, None, 0.1, 0, 0, 3, False, False, 2)
    yield "add_noise", (weight, SEED, None, 0.1, 0, 0)
    yield "add_noise", (weight, SEED, None, 0.1, 0, 0, 1)
    yield "add_noise", (strided[None].half(), SEED, torch.rand(9).expand(1, 9), 0.0, 2**32 - 1, 5)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_opcheck(backend):
    for op, args in samples():
        tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        result = torch.library.opcheck(OVERLOADS[op][backend], args, test_utils=tests)
        assert set(result.values()) == {"SUCCESS"}, (op, args)


def test_opcheck_of_the_gradient():
    for grad, ids in (
        (torch.randn(2, 3, 6), torch.tensor([[1, 2, 2], [3, 8, 0]])),
        (torch.randn(4, 6).half(), torch.arange(4)),
    ):
        tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        result = torch.library.opcheck(OVERLOADS["embedding_grad"]["cpu"], (grad, ids, 9, 2, True), test_utils=tests)
        assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", [None, *CPU_BACKENDS])
def test_meta_tensors(backend):
    ids, weight = torch.empty(3, 4, dtype=torch.int64, device="meta"), torch.empty(9, 6, device="meta")
    out = noisy_embedding(ids, weight, 0.1, backend=backend)
    assert out.device.type == "meta"
    assert out.shape == (3, 4, 6)
    assert add_noise(out, 0.1, backend=backend).shape == (3, 4, 6)


@pytest.mark.parametrize("per_token", [False, True])
def test_compiled_equals_eager_at_every_length_with_one_graph(per_token):
    weight = torch.randn(50, 12, requires_grad=True)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def compiled(ids, magnitude, seed):
        return noisy_embedding(ids, weight, magnitude, seed=seed) * 2

    graphs = None
    for length in (5, 9, 17, 33):
        ids = torch.randint(50, (2, length))
        magnitude = torch.rand(2, length) if per_token else 0.25
        seed = torch.randint(1 << 60, (1,))
        out = compiled(ids, magnitude, seed)
        assert torch.equal(out, noisy_embedding(ids, weight, magnitude, seed=seed) * 2)
        (compiled_grad,) = torch.autograd.grad(out.sum(), weight)
        (grad,) = torch.autograd.grad((torch.nn.functional.embedding(ids, weight) * 2).sum(), weight)
        assert torch.equal(compiled_grad, grad)
        # A Python float takes the compiler two attempts at the first length; no further length takes any.
        graphs = graphs or counter.frame_count
        assert counter.frame_count == graphs


def test_the_first_call_of_all_may_be_a_compiled_one(monkeypatch):
    """The choice of the backend, not made yet, is traced."""
    monkeypatch.setattr(backends, "_chosen", {})
    torch._dynamo.reset()
    weight, ids = torch.randn(50, 12), torch.randint(50, (2, 5))
    compiled = torch.compile(lambda: noisy_embedding(ids, weight, 0.1, seed=torch.tensor([3])), fullgraph=True)
    assert torch.equal(compiled(), noisy_embedding(ids, weight, 0.1, seed=3))


def test_compiled_draws_fresh_noise_and_is_reproducible():
    weight = torch.randn(50, 12)
    ids = torch.randint(50, (2, 5))
    compiled = torch.compile(lambda: add_noise(weight, 0.1) + noisy_embedding(ids, weight, 0.1).sum(), fullgraph=True)
    torch.manual_seed(1)
    first, second = compiled(), compiled()
    torch.manual_seed(1)
    assert not torch.equal(first, second)
    assert torch.equal(compiled(), first)


def test_manual_seed_reproduces_and_each_call_draws_anew():
    weight, ids = torch.randn(50, 12), torch.randint(50, (2, 5))
    torch.manual_seed(7)
    first, second = noisy_embedding(ids, weight, 0.1), noisy_embedding(ids, weight, 0.1)
    torch.manual_seed(7)
    assert torch.equal(noisy_embedding(ids, weight, 0.1), first)
    assert not torch.equal(first, second)


def test_seeds_use_all_64_bits():
    torch.manual_seed(0)
    seeds = torch.cat([draw_seed(torch.device("cpu")) for _ in range(400)])
    bits = (seeds[:, None] >> torch.arange(64)) & 1
    # Each bit is a fair coin: 400 tosses, within six standard deviations (10 each) of 200.
    assert ((bits.sum(0) - 200).abs() <= 60).all()


class _FunctionNames(TorchFunctionMode):
    """Notes the functions that it sees."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class _Names(TorchDispatchMode):
    """Notes the ops that it sees."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_whoever_watches_ops_sees_ours(backend):
    """Modes, profilers, traces and subclasses."""
    weight, ids = torch.randn(5, 4, requires_grad=True), torch.tensor([[0, 1]])
    name = f"neft_kernels.noisy_embedding.{backend}"

    def call(weight=weight):
        return noisy_embedding(ids, weight, 0.1, seed=3, backend=backend)

    expected = call()
    for mode in (_Names(), _FunctionNames()):
        with mode:
            assert torch.equal(call(), expected)
        assert name in mode.names
    with torch.profiler.profile() as profile:
        call()
    assert "neft_kernels::noisy_embedding" in {event.name for event in profile.events()}
    traced = torch.jit.trace(call, (weight.detach(),), check_trace=False)
    assert "neft_kernels::noisy_embedding" in str(traced.graph)
    with FakeTensorMode() as fakes:
        fake = noisy_embedding(fakes.from_tensor(ids), fakes.from_tensor(weight), 0.1, seed=3, backend=backend)
    assert isinstance(fake, FakeTensor)
    assert fake.shape == expected.shape


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_kernels_in_python_are_called_past_the_dispatcher(backend):
    op, plain = OVERLOADS["add_noise"][backend], (torch.zeros(1, 4), SEED, None, 0.1, 0, 0)
    compute = kernel_of(op, plain)
    assert (compute is op) == (backend == "cpu")
    assert torch.equal(compute(*plain), op(*plain))
    with FakeTensorMode() as fakes:
        fake = fakes.from_tensor(plain[0])
    for embeds in (fake, plain[0].to("meta"), torch.zeros(1, 4).mul(1j).conj().imag):
        assert kernel_of(op, (embeds, *plain[1:])) is op
    with _Names():
        assert kernel_of(op, plain) is op


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_tensors_that_are_read_another_way_than_they_lie(backend):
    """The imaginary part of a conjugate has its sign in a flag."""
    ids = torch.tensor([[0, 1]])
    flagged = torch.full((3, 4), -5.0).mul(1j).conj().imag
    assert flagged.is_neg()
    plain = flagged.clone()
    assert not plain.is_neg()
    for magnitude in (0.1, torch.tensor([[0.1, 0.2]]), torch.tensor([[-0.1j, -0.2j]]).conj().imag):
        expected = noisy_embedding(
            ids, plain, magnitude.clone() if isinstance(magnitude, torch.Tensor) else 0.1, seed=3
        )
        assert torch.equal(noisy_embedding(ids, flagged, magnitude, seed=3, backend=backend), expected)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_numbers_of_other_types(backend):
    """A bool or numpy's integer is the number that it stands for, whatever came before it."""
    ids, weight = torch.tensor([[0, 1]]), torch.randn(5, 4)
    for stream in (True, np.int64(7), 2, False, 1):
        got = noisy_embedding(ids, weight, 0.1, seed=3, stream=stream, first_token=stream, backend=backend)
        expected = noisy_embedding(
            ids, weight, 0.1, seed=3, stream=int(stream), first_token=int(stream), backend="reference"
        )
        assert torch.equal(got, expected), stream
    with pytest.raises((RuntimeError, TypeError), match="stream"):
        noisy_embedding(ids, weight, 0.1, seed=3, stream=3.0, backend=backend)
