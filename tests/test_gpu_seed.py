"""Contract, on a GPU: the seed that the host draws is the one that the device would, and each call has its own.

With NEFT_KERNELS_TEST_GPU on the stand-in for a GPU, see gpu_doubles.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import embedding

from helpers.bits import equal_bits
from neft_kernels import NEFTuneEmbedding, add_noise, noisy_embedding
from neft_kernels.ops import seed as seeds
from neft_kernels.ops.seed import draw_seed

pytestmark = [pytest.mark.gpu(stand_in=True), pytest.mark.usefixtures("stand_in")]

GPU = torch.device("cuda", 0)


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    return request.param


def table(num_embeddings, embedding_dim, dtype=torch.bfloat16):
    return torch.randn(num_embeddings, embedding_dim, device="cuda", dtype=dtype)


@pytest.mark.parametrize("offset", [0, 4, 2**34 + 8])
@pytest.mark.parametrize("seed", [0, 3, 2**40 + 7])
def test_the_host_draws_what_the_device_would(seed, offset):
    generator, drawn, offsets = torch.cuda.default_generators[0], [], []
    for by_value in (True, False):
        torch.cuda.manual_seed(seed)
        generator.set_offset(offset)
        drawn.append([draw_seed(GPU, by_value) for _ in range(3)])
        offsets.append(generator.get_offset())
    by_value, on_device = drawn
    assert [each.device.type for each in by_value + on_device] == ["cpu"] * 3 + ["cuda"] * 3
    assert [each.item() for each in by_value] == [each.item() for each in on_device]
    assert offsets[0] == offsets[1] == offset + 12


def test_the_host_leaves_the_seed_to_the_device_where_calls_are_recorded(monkeypatch):
    assert draw_seed(GPU).device.type == "cpu"
    with FakeTensorMode():
        assert not seeds._host_can_draw(GPU)
    for module, name, value in (
        (torch.compiler, "is_compiling", True),
        (torch._C, "_are_functorch_transforms_active", True),
        (torch._C, "_get_tracing_state", object()),
        (torch.cuda, "is_current_stream_capturing", True),
        (torch.cuda, "current_device", 1),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda value=value: value)
            assert not seeds._host_can_draw(GPU), name


@pytest.mark.parametrize("seed", [0, 3, -1, 2**31, -(2**31), 2**40 + 7, -(2**63), 2**63 - 1])
def test_a_seed_by_value_is_the_seed_on_the_device(backend, seed):
    weight, ids = table(50, 72), torch.randint(50, (2, 7), device="cuda")
    expected = noisy_embedding(ids, weight, 0.1, seed=torch.tensor([seed], device="cuda"), backend="reference")
    for given in (seed, torch.tensor([seed]), torch.tensor([seed], device="cuda")):
        assert equal_bits(noisy_embedding(ids, weight, 0.1, seed=given, backend=backend), expected)
        noisy = add_noise(embedding(ids, weight), 0.1, seed=given, backend=backend)
        assert equal_bits(noisy, expected)


def test_each_call_has_its_own_seed_and_a_run_goes_on_from_its_state(backend):
    module = NEFTuneEmbedding(100, 64, device="cuda", backend=backend)
    ids = torch.randint(100, (4, 16), device="cuda")
    torch.manual_seed(5)
    first, state, second = module(ids), torch.cuda.get_rng_state(), module(ids)
    assert not torch.equal(first, second)
    torch.cuda.set_rng_state(state)
    assert torch.equal(module(ids), second)
    torch.manual_seed(5)
    assert torch.equal(module(ids), first)
