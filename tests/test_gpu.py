"""Contract, on a GPU: no waiting for the device, CUDA graphs, memory, many rows, ids out of range, a training step.

With NEFT_KERNELS_TEST_GPU all but the largest run on the stand-in for a GPU, see gpu_doubles.
"""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import embedding
from torch.utils.checkpoint import checkpoint

from benchmarks.gpu_timing import capture
from helpers.bits import equal_bits
from helpers.devices import HAS_GPU
from neft_kernels import NEFTuneEmbedding, add_noise, available_backends, noise_magnitude, noisy_embedding, set_alpha
from neft_kernels.ops.seed import draw_seed

pytestmark = [pytest.mark.gpu(stand_in=True), pytest.mark.usefixtures("stand_in")]


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    return request.param


def table(num_embeddings, embedding_dim, dtype=torch.bfloat16):
    return torch.randn(num_embeddings, embedding_dim, device="cuda", dtype=dtype)


def test_both_backends_are_built():
    assert {each.name for each in available_backends() if "cuda" in each.devices} >= {"triton", "cuda", "reference"}


def test_nothing_waits_for_the_device(backend):
    weight = table(100, 64).requires_grad_()
    ids = torch.randint(100, (4, 16), device="cuda")
    magnitude = torch.rand(4, 16, device="cuda")
    noisy_embedding(ids, weight, magnitude, backend=backend).sum().backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for each in (0.1, magnitude):
            noisy_embedding(ids, weight, each, backend=backend).sum().backward()
            add_noise(embedding(ids, weight), each, backend=backend).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def padded_and_packed(length=3000):
    mask = (torch.arange(length) < torch.tensor([[length], [length // 3], [1], [0]])).long()
    positions = (torch.arange(length) % 700).expand(4, length).contiguous()
    return {"attention_mask": mask}, {"position_ids": positions}, {"attention_mask": mask, "position_ids": positions}


def test_magnitudes_are_those_of_the_cpu_and_nothing_waits():
    tokens = torch.zeros(4, 3000, dtype=torch.int64)
    for case in padded_and_packed():
        on_gpu, ids = {name: value.cuda() for name, value in case.items()}, tokens.cuda()
        noise_magnitude(ids, 64, 5.0, **on_gpu)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = noise_magnitude(ids, 64, 5.0, **on_gpu)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(got.cpu(), noise_magnitude(tokens, 64, 5.0, **case))


def test_a_replayed_graph_draws_fresh_noise_that_the_generator_decides(backend):
    module = NEFTuneEmbedding(100, 64, device="cuda", backend=backend)
    ids = torch.randint(100, (4, 16), device="cuda")
    graph, out = capture(module, ids)

    def replays():
        torch.cuda.manual_seed(7)
        found = []
        for _ in range(3):
            graph.replay()
            found.append(out.detach().clone())
        return found

    torch.cuda.manual_seed(7)
    eager = module(ids)
    first, again = replays(), replays()
    assert torch.equal(first[0], eager)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[1], first[2])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert ((first[0] - embedding(ids, module.weight)).abs() > 0).any()


# --- the seed, which goes to the kernel by value ---------------------------------------------------------------------


GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_recomputes_the_noise_and_leaves_the_generator_alone(backend, use_reentrant):
    module = NEFTuneEmbedding(100, 64, device="cuda", backend=backend, under_no_grad=use_reentrant)
    ids, scale = torch.randint(100, (4, 16), device="cuda"), torch.ones(64, device="cuda", requires_grad=True)
    outputs = []
    module.register_forward_hook(lambda module, args, output: outputs.append(output.detach().clone()))
    torch.manual_seed(5)

    def region(scale):
        return (module(ids) * scale).square().sum()

    # The check compares devices, which the stand-in does not tell where tensors are saved.
    loss = checkpoint(region, scale, use_reentrant=use_reentrant, determinism_check="none")
    module(ids)
    loss.backward()
    after = draw_seed(GPU)
    first, other, recomputed = outputs
    assert torch.equal(recomputed, first)
    assert not torch.equal(other, first)
    torch.manual_seed(5)
    assert [draw_seed(GPU) for _ in range(3)][2] == after


def test_alpha_of_compiled_graphs_lives_where_the_table_is(monkeypatch):
    """It would cut a CUDA graph in two if it were copied to the GPU inside of it."""
    module = NEFTuneEmbedding(100, 64)
    alpha = module.noise.model_noise.alpha
    set_alpha(module, 3.0)
    assert alpha.tensor.device.type == "cpu"
    module.weight.data = module.weight.data.cuda()
    for value in (4.0, 5.0):
        set_alpha(module, value)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert module.noise.model_noise.alpha_on(GPU) is alpha.tensor
        monkeypatch.undo()
        assert alpha.tensor.device == GPU
        assert alpha.tensor.item() == value


def test_no_memory_beyond_the_output(backend):
    """What the allocator was asked for, not what it gave, which depends on the blocks that it had."""
    weight = table(100, 512)
    ids = torch.randint(100, (1, 40), device="cuda")
    seed = torch.tensor([3], device="cuda")
    noisy_embedding(ids, weight, 0.1, seed=seed, backend=backend)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    out = noisy_embedding(ids, weight, 0.1, seed=seed, backend=backend)
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["requested_bytes.all.peak"] - before == out.numel() * out.element_size()


def test_an_id_out_of_range_makes_its_row_nan_and_reads_nothing(backend):
    weight = table(10, 100, torch.float32)
    ids = torch.tensor([[1, 10, -1, 2**40]], device="cuda")
    for magnitude in (0.1, 0.0):
        out = noisy_embedding(ids, weight, magnitude, backend=backend)
        assert out.isnan().all(-1).tolist() == [[False, True, True, True]]


@pytest.mark.gpu  # starts a process of its own
def test_check_ids_makes_it_an_error(backend):
    code = (
        "import torch, neft_kernels as n; "
        f"n.noisy_embedding(torch.tensor([[0, 7]]).cuda(), torch.ones(5, 4).cuda(), 0.1, backend={backend!r})"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "NEFT_KERNELS_CHECK_IDS": "1"},
        capture_output=True,
        text=True,
    )
    assert "IndexError: input_ids[0, 1] is 7" in run.stderr


@pytest.mark.gpu  # too large to be emulated, as is the next one
@pytest.mark.parametrize("rows", [70_000, 1 << 20])
def test_more_rows_than_a_grid_dimension(backend, rows):
    weight = table(50, 16)
    ids = torch.randint(50, (rows,), device="cuda")
    got = noisy_embedding(ids, weight, 0.1, seed=3, backend=backend)
    for part in (slice(0, 100), slice(rows - 100, rows)):
        expected = noisy_embedding(ids[part], weight, 0.1, seed=3, first_token=part.start, backend="reference")
        assert equal_bits(got[part], expected)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements_on_the_gpu(backend):
    width, rows = 1 << 14, (1 << 17) + 3
    weight = table(1, width).expand(rows, width)
    ids = torch.arange(rows, device="cuda")
    out = noisy_embedding(ids, weight, 0.1, seed=4, backend=backend)
    assert out.numel() > 1 << 31
    tail = noisy_embedding(ids[-2:], weight, 0.1, seed=4, first_token=rows - 2, backend="reference")
    assert equal_bits(out[-2:], tail)


def test_the_cpu_draws_the_same_noise(backend):
    weight = table(50, 129, torch.float16)
    ids = torch.randint(50, (3, 7), device="cuda")
    on_gpu = noisy_embedding(ids, weight, 0.1, seed=11, stream=3, backend=backend)
    assert equal_bits(on_gpu, noisy_embedding(ids.cpu(), weight.cpu(), 0.1, seed=11, stream=3, backend="cpu"))


def test_a_training_step_lowers_the_loss(backend):
    torch.manual_seed(0)
    module = NEFTuneEmbedding(50, 64, alpha=1.0, device="cuda", backend=backend)
    head = torch.nn.Linear(64, 50, device="cuda")
    optimizer = torch.optim.AdamW([*module.parameters(), *head.parameters()], lr=1e-2)
    ids = torch.randint(50, (8, 32), device="cuda")
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(head(module(ids)).flatten(0, 1), ids.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4


@pytest.mark.parametrize("noise", ["uniform", "sign", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_symmetric_noise_is_that_of_the_reference(backend, dtype, noise):
    """Pairs of equal ids, of other ids, and of one that is out of range; magnitudes of 0 and, on a GPU, unchecked NaN."""
    weight = table(50, 1032, dtype)
    ids = torch.cat((torch.arange(40), torch.arange(40))).cuda()
    ids[45:50] = torch.tensor([3, 50, -1, 7, 7], device="cuda")
    per_token = torch.rand(80, device="cuda")
    per_token[::7] = 0.0
    if HAS_GPU:  # the stand-in computes with the CPU's kernels, which check magnitudes
        per_token[11] = torch.nan
    given = {"noise": noise, "seed": 5, "first_token": 2**32 - 20, "symmetric": True}
    for magnitude in (0.1, per_token):
        got = noisy_embedding(ids, weight, magnitude, backend=backend, **given)
        in_range = (ids >= 0) & (ids < 50)
        expected = noisy_embedding(ids.where(in_range, 0), weight, magnitude, backend="reference", **given)
        expected[~in_range] = torch.nan
        assert equal_bits(got, expected)
        embeds = weight[ids.where(in_range, 0)]
        expected = add_noise(embeds, magnitude, backend="reference", **given)
        assert equal_bits(add_noise(embeds, magnitude, backend=backend, **given), expected)


def test_symmetric_noise_waits_for_nothing_and_needs_no_memory(backend):
    weight, ids = table(100, 512), torch.randint(100, (2, 40), device="cuda")
    seed = torch.tensor([3], device="cuda")
    noisy_embedding(ids, weight, 0.1, seed=seed, symmetric=True, backend=backend)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = noisy_embedding(ids, weight, 0.1, seed=seed, symmetric=True, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["requested_bytes.all.peak"] - before == out.numel() * out.element_size()
