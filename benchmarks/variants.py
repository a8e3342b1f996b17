"""What is compared: the plain embedding, NEFTune as transformers does it (eager and compiled), and ours."""

import functools
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers.integrations.neftune import neftune_post_forward_hook

from neft_kernels import NEFTuneEmbedding, available_backends, noise_magnitude, noisy_embedding

ALPHA = 5.0
#: Bytes that the forward moves per element, in elements: rows read and output written; the hook in four kernels.
PASSES = {"plain": 2, "hook": 7, "hook, compiled": 7, "ours": 2, "memcpy": 2}


@dataclass(frozen=True)
class Shape:
    """One comparison: a table of ``[num_embeddings, embedding_dim]`` and ``[1, tokens]`` ids."""

    num_embeddings: int
    embedding_dim: int
    tokens: int
    dtype: torch.dtype

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.num_embeddings} x {self.embedding_dim}, {self.tokens} tokens, {dtype}"

    @property
    def elements(self) -> int:
        return self.tokens * self.embedding_dim


def builders(weight: Tensor, compiled: bool = True) -> dict[str, Callable[[], nn.Module]]:
    """How to build each variant, by name: a module in training mode on the table `weight`, which all of them share.

    What was compiled before is forgotten: torch.compile makes the shapes of a function's later compilations dynamic and,
    after eight of them, runs it as it is; so each comparison gets the graphs of its own shape.
    """
    size = (weight.shape[0], weight.shape[1])
    found: dict[str, Callable[[], nn.Module]] = {
        "plain": lambda: nn.Embedding(*size, _weight=weight),
        "hook": lambda: _hooked(weight),
        "ours": lambda: NEFTuneEmbedding(*size, _weight=weight, alpha=ALPHA),
    }
    if compiled:
        torch._dynamo.reset()
        found["hook, compiled"] = lambda: cast(nn.Module, torch.compile(_hooked(weight)))
        found["rand_like, compiled"] = lambda: cast(nn.Module, torch.compile(_RandLike(weight)))
    if weight.is_cuda and importlib.util.find_spec("liger_kernel") is not None:
        found["plain, Liger"] = lambda: _liger(weight)
    for backend in available_backends():
        if backend.name != "reference" and weight.device.type in set(backend.devices) - set(backend.chosen_for):
            found[f"ours, {backend.name}"] = functools.partial(
                NEFTuneEmbedding, *size, _weight=weight, alpha=ALPHA, backend=backend.name
            )
    return found


def training_modules(weight: Tensor, compiled: bool = True) -> dict[str, nn.Module]:
    """The variants by name, see :func:`builders`."""
    return {name: build() for name, build in builders(weight, compiled).items()}


def _hooked(weight: Tensor) -> nn.Module:
    """NEFTune as transformers does it."""
    hook = nn.Embedding(weight.shape[0], weight.shape[1], _weight=weight)
    hook.neftune_noise_alpha = ALPHA  # type: ignore[assignment]
    hook.register_forward_hook(neftune_post_forward_hook)
    return hook


def _liger(weight: Tensor) -> nn.Module:
    from liger_kernel.transformers.experimental.embedding import LigerEmbedding

    module: nn.Module = LigerEmbedding(weight.shape[0], weight.shape[1])
    module.weight = nn.Parameter(weight)
    return module


class _RandLike(nn.Module):
    """NEFTune in the one form whose random numbers torch.compile fuses with the rest."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, ids: Tensor) -> Tensor:
        rows = nn.functional.embedding(ids, self.weight)
        magnitude = ALPHA / (rows.shape[-2] * rows.shape[-1]) ** 0.5
        return rows + (torch.rand_like(rows) * 2 - 1) * magnitude


def forwards(shape: Shape, compiled: bool = True) -> dict[str, Callable[[], Tensor]]:
    """The variants on the CPU by name, each a call that looks up a fresh batch of ids in training mode.

    A fresh batch for each call, because a user's batches are; all variants see the same batches in the same order.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape.num_embeddings, shape.embedding_dim, generator=generator).to(shape.dtype)
    batches = [torch.randint(shape.num_embeddings, (1, shape.tokens), generator=generator) for _ in range(8)]
    modules: dict[str, Callable[[Tensor], Tensor]] = {**training_modules(weight, compiled)}
    verify(modules, batches[0], weight)

    source = torch.randn(shape.tokens, shape.embedding_dim, generator=generator).to(shape.dtype)
    modules["memcpy"] = lambda ids: source.clone()

    def call(module: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        turn = iter(range(1 << 60))
        return lambda: module(batches[next(turn) % len(batches)])

    return {name: call(module) for name, module in modules.items()}


def verify(modules: Mapping[str, Callable[[Tensor], Tensor]], ids: Tensor, weight: Tensor) -> None:
    """Nothing is timed whose result is wrong: ours equals the reference bit for bit, others' noise is within its bound."""
    magnitude = noise_magnitude(ids, weight.shape[1], ALPHA)
    assert isinstance(magnitude, float)
    rows = nn.functional.embedding(ids, weight)
    # One unit in the last place of the largest row element, for the rounding of the sum.
    bound = magnitude + rows.abs().max().item() * torch.finfo(weight.dtype).eps
    for name, module in modules.items():
        torch.manual_seed(0)
        got = module(ids)
        if name.startswith("ours"):
            torch.manual_seed(0)
            expected = noisy_embedding(ids, weight, magnitude, backend="reference")
            assert torch.equal(got, expected), f"{name} differs from the reference"
        difference = (got - rows).abs().max().item()
        assert difference == 0 if name.startswith("plain") else 0 < difference <= bound, (
            f"{name} is off by {difference}"
        )
