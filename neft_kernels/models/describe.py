"""Is it on? Which embeddings of a model are noisy, how, and why not."""

from dataclasses import dataclass

import torch
from torch import nn

from neft_kernels.models.embedding import NEFTuneEmbedding, is_unreadable
from neft_kernels.models.noise import EmbeddingNoise
from neft_kernels.models.replace import noisy_modules
from neft_kernels.models.strength import BOUND, described_kind, described_ratio
from neft_kernels.models.switch import why_off
from neft_kernels.ops.backends import choose_backend

__all__ = ["EmbeddingReport", "Report", "describe"]


NOT_REACHED = "the last pass in training reached no noisy embedding"


@dataclass(frozen=True)
class EmbeddingReport:
    """One noisy embedding, as :func:`describe` found it."""

    name: str
    module: str  # class of the module
    strategy: str  # "fused": one kernel; "add_noise": the module's own forward, then the noise
    alpha: float
    scale_by: str
    noise_on: str
    noise: str  # "uniform", "sign" or "gaussian"
    symmetric: bool  # whether the batch is doubled, and the second half gets the negative noise
    stream: int | None  # None: that of the process's replica
    backend: str
    state: str  # "on", or why there is no noise at this moment
    last_magnitude: tuple[float, float] | None  # of the last noisy batch: smallest and largest, over tokens with noise
    ratio: float | None  # of its noise to the embeddings: root mean squares, over tokens with noise
    note: str  # why the noise, of the last batch or at all, is not what was asked for

    def __str__(self) -> str:
        if self.last_magnitude is None:
            last = "no noisy batch recorded yet (compiled models record none)"
        elif self.last_magnitude[1] == 0:
            last = "no token of the last batch had noise"
        elif self.last_magnitude[0] == self.last_magnitude[1]:
            last = f"last batch {BOUND[self.noise]}{self.last_magnitude[1]:.3g}"
        else:
            last = f"last batch {BOUND[self.noise]}{self.last_magnitude[0]:.3g} to {self.last_magnitude[1]:.3g} by sequence"
        if self.ratio:
            last += f", {described_ratio(self.ratio)}"
        tokens = "" if self.noise_on == "all" else f" on the {self.noise_on}"
        stream = "of this replica" if self.stream is None else self.stream
        return (
            f"{self.name} ({self.module}): {described_kind(self.noise, self.symmetric)} {self.state}; alpha={self.alpha:g} by "
            f"{self.scale_by}{tokens}, {self.strategy} on backend {self.backend!r}, stream {stream}; {last}"
            + (f" [{self.note}]" if self.note else "")
        )


class Report(tuple[EmbeddingReport, ...]):
    """The noisy embeddings of a model; ``str()`` of it is for people."""

    def __str__(self) -> str:
        return (
            "\n".join(map(str, self)) or "no noisy embeddings: replace_embeddings(model) was not called, or was undone"
        )


def describe(model: nn.Module) -> Report:
    """Which embeddings of `model` are noisy, how, and whether the noise is on at this moment. Waits for the device.

    Of several embeddings that share a table, those that were never called are left out once another one was called. T5 names
    its `shared` table, but calls those of its encoder and its decoder.
    """
    noisy = list(noisy_modules(model))
    called = {table for _, module, noise in noisy if noise.last_magnitude is not None for table in module.parameters()}
    return Report(
        _report(name, module, noise)
        for name, module, noise in noisy
        if noise.last_magnitude is not None or called.isdisjoint(module.parameters())
    )


def _report(name: str, module: nn.Module, noise: EmbeddingNoise) -> EmbeddingReport:
    model_noise, options = noise.model_noise, noise.model_noise.options
    noise.measures_next = True  # so that the next report has the embeddings as they are then
    notes = noise.standing_note, noise.note, model_noise.warning, NOT_REACHED if model_noise.reached.missed else ""
    off = why_off(noise, module) or ("alpha is 0" if model_noise.alpha.now() == 0 else "")
    return EmbeddingReport(
        name=name or "(the model itself)",
        module=type(module).__name__,
        strategy="fused" if _is_fused(module, noise) else "add_noise",
        alpha=model_noise.alpha.now(),
        scale_by=options.scale_by,
        noise_on=options.noise_on,
        noise=options.noise,
        symmetric=options.symmetric,
        stream=options.stream,
        backend=choose_backend(noise.last_device or _device_type(module), options.backend),
        state=f"off: {off}" if off else "on",
        last_magnitude=noise.bounds(),
        ratio=noise.ratio(),
        note="; ".join(filter(None, notes)),
    )


def _is_fused(module: nn.Module, noise: EmbeddingNoise) -> bool:
    if not isinstance(module, NEFTuneEmbedding):
        return False
    return not is_unreadable(module.weight) if noise.was_fused is None else noise.was_fused


def _device_type(module: nn.Module) -> str:
    """Where `module` runs: accelerate moves a table that it keeps elsewhere there for its forward."""
    where = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if where is None:
        where = next((parameter.device for parameter in module.parameters()), "cpu")
    return torch.device(where).type
