"""Is it on? Which embeddings of a model are noisy, how, and why not."""

from dataclasses import dataclass

from torch import nn

from neft_kernels import ops
from neft_kernels.distributed import is_dtensor
from neft_kernels.modules import NEFTuneEmbedding
from neft_kernels.noise import Noise
from neft_kernels.placing import noisy_modules

__all__ = ["EmbeddingReport", "Report", "describe"]


MISSED = "the last pass in training reached no noisy embedding"


@dataclass(frozen=True)
class EmbeddingReport:
    """One noisy embedding, as :func:`describe` found it."""

    name: str
    module: str  # class of the module
    strategy: str  # "fused": one kernel; "add_noise": the module's own forward, then the noise
    alpha: float
    scale_by: str
    noise_on: str
    stream: int | None  # None: that of the process's replica
    backend: str
    state: str  # "on", or why there is no noise at this moment
    last_magnitude: tuple[float, float] | None  # of the last noisy batch: smallest and largest, over tokens with noise
    note: str  # why the noise, of the last batch or at all, is not what was asked for

    def __str__(self) -> str:
        if self.last_magnitude is None:
            last = "no batch with noise yet (those of compiled models are not noted)"
        elif self.last_magnitude[0] == self.last_magnitude[1]:
            last = f"last batch within +-{self.last_magnitude[1]:.3g}"
        else:
            last = f"last batch within +-{self.last_magnitude[0]:.3g} to {self.last_magnitude[1]:.3g} by sequence"
        tokens = "" if self.noise_on == "all" else f" on the {self.noise_on}"
        stream = "of this replica" if self.stream is None else self.stream
        return (
            f"{self.name} ({self.module}): noise {self.state}; alpha={self.alpha:g} by {self.scale_by}{tokens}, "
            f"{self.strategy} on backend {self.backend!r}, stream {stream}; {last}"
            + (f" [{self.note}]" if self.note else "")
        )


class Report(tuple[EmbeddingReport, ...]):
    """The noisy embeddings of a model; ``str()`` of it is for people."""

    def __str__(self) -> str:
        return (
            "\n".join(map(str, self)) or "no noisy embeddings: replace_embeddings(model) was not called, or was undone"
        )


def describe(model: nn.Module) -> Report:
    """Which embeddings of `model` are noisy, how, and whether the noise is on at this moment. Waits for the device."""
    return Report(_report(name, module, noise) for name, module, noise in noisy_modules(model))


def _report(name: str, module: nn.Module, noise: Noise) -> EmbeddingReport:
    settings = noise.settings
    device = next((parameter.device.type for parameter in module.parameters()), "cpu")
    return EmbeddingReport(
        name=name or "(the model itself)",
        module=type(module).__name__,
        strategy="fused" if _is_fused(module, noise) else "add_noise",
        alpha=settings.current_alpha(),
        scale_by=settings.scale_by,
        noise_on=settings.noise_on,
        stream=settings.stream,
        backend=ops.choose_backend(device, settings.backend),
        state=_state(module, noise),
        last_magnitude=noise.bounds(),
        note="; ".join(filter(None, (noise.standing_note, noise.note, MISSED if settings.passes.missed else ""))),
    )


def _state(module: nn.Module, noise: Noise) -> str:
    state = noise.state(module)
    return "off: alpha is 0" if state == "on" and noise.settings.current_alpha() == 0 else state


def _is_fused(module: nn.Module, noise: Noise) -> bool:
    if not isinstance(module, NEFTuneEmbedding):
        return False
    return not (is_dtensor(module.weight) if noise.table_was_spread is None else noise.table_was_spread)
