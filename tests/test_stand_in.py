"""Contract: the stand-in for a GPU behaves as a GPU does where programs could go wrong. With NEFT_KERNELS_TEST_GPU."""

import pytest
import torch

pytestmark = pytest.mark.cpu_extension  # the stand-in computes with it what a GPU would


@pytest.fixture(autouse=True)
def device(stand_in):
    return stand_in


def test_the_stand_in_tells_the_device_from_the_cpu(device):
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    assert there.is_cuda
    assert (there + 1).device.type == "cuda"
    assert not here.is_cuda
    assert not there.cpu().is_cuda
    for mistake in (
        lambda: here + there,
        lambda: torch.nn.functional.embedding(torch.tensor([0]), torch.ones(2, 2, device="cuda")),
        lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
    ):
        with pytest.raises(RuntimeError, match=r"same device|'cuda' device type for generator"):
            mistake()
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    with pytest.raises(NotImplementedError, match="'CUDA' backend"):
        torch.ops.neft_kernels.add_noise.cpu(
            there[None], torch.zeros(1, dtype=torch.int64, device="cuda"), None, 0.1, 0, 0
        )
    with pytest.raises(NotImplementedError, match="allocator"):
        torch.cuda.memory_allocated()


@pytest.mark.parametrize("waits", [lambda x: x.item(), lambda x: x.cpu(), lambda x: bool(x), torch.nonzero])
def test_the_stand_in_sees_who_waits_for_the_device(waits):
    x = torch.ones(1, device="cuda")
    waits(x)
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchronizing"):
        waits(x)


def test_a_graph_of_the_stand_in_replays_into_the_same_tensors():
    x, graph = torch.zeros(2, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = torch.rand(2, device="cuda") + x.add_(1)
        with pytest.raises(RuntimeError, match="capturing"):
            y.tolist()
    torch.manual_seed(3)
    graph.replay()
    torch.manual_seed(3)
    assert torch.equal(y, torch.rand(2, device="cuda") + 2)
    assert x.tolist() == [2, 2]


def test_the_stand_in_counts_the_bytes_that_tensors_need():
    x = torch.ones(1000, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    y = (x + 1) + x
    assert torch.cuda.memory_stats()["requested_bytes.all.peak"] - before == 2 * 4000
    assert torch.cuda.memory_stats()["requested_bytes.all.current"] - before == y.nbytes
