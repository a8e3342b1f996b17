"""Contract: Triton's kernels are compiled once for launches of one kind, and kept for no others.

On the emulated GPU, with NEFT_KERNELS_TEST_GPU.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from helpers.bits import equal_bits
from neft_kernels import add_noise
from neft_kernels.ops import reference, triton_launch, triton_noise

SEED = torch.tensor([2**40 + 7])


def table(num_embeddings, embedding_dim, dtype):
    generator = torch.Generator().manual_seed(embedding_dim)
    return torch.randn(num_embeddings, embedding_dim, generator=generator).to(dtype)


def test_a_compiled_kernel_is_kept_for_launches_like_its_own(monkeypatch):
    """Bits and alignment are right whatever was launched before, and Triton is asked once for each kind of launch."""
    monkeypatch.setattr(triton_launch, "_compiled", {})
    aligned = table(20, 64, torch.float32)
    shifted = torch.cat([torch.zeros(1), aligned.flatten()])[1:].view(20, 64)
    narrow, wide_apart = aligned[:, :60], aligned[:, :63]
    ids = torch.arange(7)
    launches = [
        (ids, aligned, None, 3),
        (ids, shifted, None, 3),  # not on 16 bytes
        (ids, narrow, None, 3),  # the same code as the first
        (ids, wide_apart, None, 3),  # not whole vectors
        (ids.int(), aligned, None, 3),
        (ids, aligned.t().contiguous().t(), None, 3),
        (ids, aligned, torch.rand(7), 3),
        (ids, aligned.bfloat16(), None, 3),
        (ids, aligned, None, 2**31),  # of 64 bits, so other code
    ]
    asked = []
    run = triton_noise.noisy_rows_kernel.run
    monkeypatch.setattr(triton_noise.noisy_rows_kernel, "run", lambda *a, **k: asked.append(0) or run(*a, **k))
    for _ in range(3):
        for these_ids, rows, per_token, stream in launches:
            out = triton_noise.noisy_embedding(these_ids, rows, SEED, per_token, 0.1, stream, 0)
            assert equal_bits(out, reference.noisy_embedding(these_ids, rows, SEED, per_token, 0.1, stream, 0))
    assert len(triton_launch._compiled) == len(asked) == len(launches) - 1


def test_a_seed_by_value_needs_no_other_kernel(monkeypatch, stand_in):
    """The first launch in a captured graph has its seed on the device. Then nothing may be compiled."""
    monkeypatch.setattr(triton_launch, "_compiled", {})
    rows = table(4, 64, torch.bfloat16).cuda()
    for seed in (5, -1, 2**40, SEED, SEED.cuda()):
        add_noise(rows, 0.1, seed=seed, backend="triton")
    assert len(triton_launch._compiled) == 1


class StubDriver:
    """Of a GPU that is not there."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return repr(self.target)


class StubKernel:
    def __getitem__(self, grid):
        return lambda *arguments: None


@pytest.mark.parametrize(
    ("target", "kernels"), [(GPUTarget("hip", "gfx942", 64), 2), (GPUTarget("cuda", 90, 32), 1)], ids=str
)
def test_a_kernel_is_not_kept_for_tensors_that_triton_tells_apart(monkeypatch, target, kernels):
    """On AMD, those of less than 2 GiB, which 32 bits address, from larger ones."""
    monkeypatch.setattr(triton_launch, "_compiled", {})
    asked = []
    kernel = triton_noise.noisy_rows_kernel
    monkeypatch.setattr(kernel, "run", lambda *a, **k: asked.append(0) or StubKernel())
    before = driver.active
    driver.set_active(StubDriver(target))
    try:
        small = torch.empty(4, 64, dtype=torch.bfloat16)
        large = torch.empty(1 << 30, dtype=torch.bfloat16)[:256].view(4, 64)  # of 2 GiB that are never touched
        for rows in (small, large, small, large):
            triton_noise.add_noise(rows, SEED, None, 0.1, 0, 0)
    finally:
        driver.set_active(before)
    assert len(asked) == len(triton_launch._compiled) == kernels


def test_asynchronous_compilation(monkeypatch):
    """The first launch then gives a promise of the kernel, which later ones cannot be made of."""
    monkeypatch.setattr(triton_launch, "_compiled", {})
    rows = table(4, 72, torch.float16)  # of which no other test has a kernel
    expected = reference.add_noise(rows, SEED, None, 0.1, 0, 0)
    triton_noise.noisy_rows_kernel.device_caches.clear()
    with ThreadPoolExecutor(1) as executor, triton.AsyncCompileMode(executor):
        first = triton_noise.add_noise(rows, SEED, None, 0.1, 0, 0)
    for out in (first, triton_noise.add_noise(rows, SEED, None, 0.1, 0, 0)):
        assert equal_bits(out, expected)
