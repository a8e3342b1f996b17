"""CPU: what else a training step does with its embedding, again plain, with the Hugging Face hook, and ours side by side.

backward and both passes, with the error of the gradient where one id occurs often; the forward on padded batches, whose masks
ours turns into a magnitude for each token; and the noise on embeddings that are no plain look-up (the hook's function, and
add_noise, on the same tensor).
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.neftune import neftune_post_forward_hook

from benchmarks import records
from benchmarks.test_cpu_forward import BF16, FP32, replay, table
from benchmarks.timing import Samples, interleaved
from benchmarks.variants import ALPHA, Shape, training_modules, verify
from neft_kernels import add_noise, noise_magnitude, noisy_embedding

VARIANTS = ("plain", "hook", "ours")
BATCH = 8  # sequences in a padded batch
PADDED_BACKWARD = "backward, half of the ids the same"  # as where padding has gradients too
#: Without the compiled variants, the gradient of a table of 32000 x 1024 takes as long as that of its copy.
CASES = [
    *(
        (Shape(num_embeddings, 1024, 2048, dtype), passes)
        for num_embeddings in (32000, 128256)
        for dtype in (FP32, BF16)
        for passes in ("backward", "both")
    ),
    *((Shape(32000, 1024, 4096, dtype), PADDED_BACKWARD) for dtype in (FP32, BF16)),
    *(
        (Shape(32000, width, 2048, dtype), passes)
        for width in (1024, 4096)
        for dtype in (FP32, BF16)
        for passes in ("forward, padded batch", "add_noise")
    ),
]


def calls(shape: Shape, passes: str) -> dict[str, Callable[[], object]]:
    """The variants by name; verified."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape.num_embeddings, shape.embedding_dim, generator=generator).to(shape.dtype)
    ids = torch.randint(shape.num_embeddings, (BATCH, shape.tokens // BATCH), generator=generator)
    modules = training_modules(weight, compiled=False)
    verify(modules, ids, weight)
    if passes == PADDED_BACKWARD:
        ids[:, ids.shape[1] // 2 :] = 0
    if passes == "forward, padded batch":
        mask = padded(ids, generator)
        ours = modules["ours"]
        verify_padded(ours, ids, mask, weight)
        return {
            "plain": lambda: modules["plain"](ids),
            "hook": lambda: modules["hook"](ids),
            "ours": lambda: ours(ids, attention_mask=mask),
        }
    if passes == "add_noise":
        embeds = modules["plain"](ids).detach()
        magnitude = noise_magnitude(ids, shape.embedding_dim, ALPHA)
        seed = torch.tensor([1])
        assert torch.equal(
            add_noise(embeds, magnitude, seed=seed), add_noise(embeds, magnitude, seed=seed, backend="reference")
        )
        return {
            "plain": embeds.clone,
            "hook": lambda: neftune_post_forward_hook(modules["hook"], (), embeds),
            "ours": lambda: add_noise(embeds, magnitude),
        }
    found: dict[str, Callable[[], object]] = {}
    for name in VARIANTS:
        module = modules[name]
        weights, out = list(module.parameters()), module(ids)
        upstream = torch.randn(out.shape, generator=generator).to(shape.dtype)
        if passes != "both":  # the graph is kept, so that nothing else runs
            found[name] = functools.partial(torch.autograd.grad, out, weights, upstream, retain_graph=True)
        else:
            found[name] = functools.partial(forward_and_backward, module, ids, weights, upstream)
    return found


def gradient_error(shape: Shape, passes: str) -> dict[str, float]:
    """By variant, the largest error of a row of the gradient, in parts of the row's largest element.

    The upstream gradient is positive on average, as that of a frequent token often is; the exact one is computed in fp64.
    """
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape.num_embeddings, shape.embedding_dim, generator=generator).to(shape.dtype)
    ids = torch.randint(shape.num_embeddings, (BATCH, shape.tokens // BATCH), generator=generator)
    if passes == PADDED_BACKWARD:
        ids[:, ids.shape[1] // 2 :] = 0
    upstream = (torch.randn(*ids.shape, shape.embedding_dim, generator=generator) + 0.5).to(shape.dtype)
    rows = ids.unique()
    exact = torch.zeros(shape.num_embeddings, shape.embedding_dim, dtype=torch.float64)
    exact = exact.index_add_(0, ids.flatten(), upstream.flatten(0, 1).double())[rows]
    found = {}
    for name, module in training_modules(weight, compiled=False).items():
        (grad,) = torch.autograd.grad(module(ids), list(module.parameters()), upstream)
        error = (grad[rows].double() - exact).abs().amax(1) / exact.abs().amax(1)
        found[name] = error.max().item()
    return found


def forward_and_backward(module: torch.nn.Module, ids: Tensor, weights: list, upstream: Tensor) -> object:
    return torch.autograd.grad(module(ids), weights, upstream)


def padded(ids: Tensor, generator: torch.Generator) -> Tensor:
    """A mask whose rows end with padding of random length."""
    lengths = torch.randint(ids.shape[1] // 4, ids.shape[1] + 1, (ids.shape[0], 1), generator=generator)
    return (torch.arange(ids.shape[1]) < lengths).long()


def verify_padded(module: torch.nn.Module, ids: Tensor, mask: Tensor, weight: Tensor) -> None:
    """Ours equals the reference bit for bit, by sequence."""
    torch.manual_seed(0)
    got = module(ids, attention_mask=mask)
    torch.manual_seed(0)
    magnitude = noise_magnitude(ids, weight.shape[1], ALPHA, attention_mask=mask)
    assert torch.equal(got, noisy_embedding(ids, weight, magnitude, backend="reference"))


@functools.cache
def measured(shape: Shape, passes: str) -> dict[str, Samples]:
    torch.manual_seed(0)
    return interleaved(calls(shape, passes))


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("shape", "passes"), CASES, ids=str)
def test_pass(
    benchmark: Any,
    summary: Callable[[str], None],
    request: pytest.FixtureRequest,
    shape: Shape,
    passes: str,
    variant: str,
) -> None:
    samples = measured(shape, passes)
    replay.load(samples[variant])
    benchmark.group = f"{shape}, {passes}"
    benchmark.pedantic(lambda: None, rounds=len(samples[variant].seconds))
    if variant == VARIANTS[-1]:
        median = {name: each.median for name, each in samples.items()}
        low, high = samples["ours"].spread
        summary(
            f"{f'{shape}, {passes}':66} ours {median['ours'] * 1e3:8.3f} ms ({low * 1e3:.3f}-{high * 1e3:.3f}), "
            f"{median['ours'] / median['plain']:5.2f} x plain, hook {median['hook'] / median['ours']:5.1f} x ours"
        )
        record: dict[str, Any] = {"shape": str(shape), "passes": passes, "milliseconds": table(samples)}
        if passes in ("backward", "both", PADDED_BACKWARD):
            record["gradient_error"] = gradient_error(shape, passes)
            errors = ", ".join(f"{name} {record['gradient_error'][name]:.2g}" for name in VARIANTS)
            summary(f"{f'{shape}, {passes}':66} error of the gradient: {errors}")
        if request.config.getoption("--record"):
            records.append("cpu_passes", record)
