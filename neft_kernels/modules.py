"""Modules: when there is noise, how much, and with which seed, around the ops of :mod:`neft_kernels.autograd`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neft_kernels import ops
from neft_kernels.autograd import add_noise, noisy_embedding
from neft_kernels.magnitude import check_alpha, check_scale_by, noise_magnitude

__all__ = ["AddNoise", "NEFTuneEmbedding", "Noise", "NoiseSettings", "Sequences"]


@dataclass(frozen=True)
class Sequences:
    """What a forward pass says of the sequences in its batch. Names and shapes are those of :func:`noise_magnitude`."""

    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    cu_seq_lens: Tensor | None = None
    #: A cache was passed, so tokens are being generated and get no noise.
    generating: bool = False

    def telling(self, tokens: Tensor) -> tuple[dict[str, Tensor], str]:
        """Those that :func:`noise_magnitude` can use for `tokens`, and a note on those that it cannot."""
        kept, unusable = {}, []
        for name, value in self._given():
            if self._tells(name, value, tokens):
                kept[name] = value
            else:
                unusable.append(
                    f"{name} of shape {list(value.shape)} does not tell the lengths of ids of shape {list(tokens.shape)}"
                )
        return kept, "; ".join(unusable)

    def _given(self) -> Iterator[tuple[str, Tensor]]:
        for name in ("attention_mask", "position_ids", "cu_seq_lens"):
            if (value := getattr(self, name)) is not None:
                yield name, value

    @staticmethod
    def _tells(name: str, value: Tensor, tokens: Tensor) -> bool:
        length = tokens.shape[-1]
        if name == "attention_mask":
            return value.shape == tokens.shape
        if name == "position_ids":
            return value.shape[-1:] == tokens.shape[-1:] and ops.broadcasts(value.shape, tokens.shape)
        return tokens.numel() == length and value.ndim == 1 and 2 <= value.shape[0] <= length + 1


NO_SEQUENCES = Sequences()


@dataclass
class NoiseSettings:
    """What the noisy embeddings of one model share."""

    alpha: float = 5.0
    scale_by: str = "sequence"
    stream: int | None = None  # None: the rank of this process
    backend: str | None = None
    enabled: bool = True
    #: Of the forward pass that is under way.
    sequences: Sequences = NO_SEQUENCES

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        check_scale_by(self.scale_by)
        if self.stream is not None and not 0 <= self.stream < 1 << 32:
            raise ValueError(f"stream must be None or in [0, 2**32), not {self.stream}")
        if self.backend is not None and self.backend not in ops.BACKENDS:
            raise ValueError(f"backend must be None or one of {', '.join(ops.BACKENDS)}, not {self.backend!r}")

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle carries no tensors of the pass under way."""
        return {**self.__dict__, "sequences": NO_SEQUENCES}

    def __deepcopy__(self, memo: dict[int, Any]) -> "NoiseSettings":
        """An embedding that is copied alone, as PEFT does with those it trains, stays one of its model's.

        A copy of the whole model gets settings of its own, from :meth:`own_copy`.
        """
        return self

    def own_copy(self, memo: dict[int, Any]) -> "NoiseSettings":
        """A copy, which takes the place of these settings in all that the deepcopy under way has yet to copy."""
        if id(self) not in memo:
            memo[id(self)] = NoiseSettings(**self.__getstate__())
        return memo[id(self)]


@dataclass
class Noise:
    """The noise of one embedding."""

    settings: NoiseSettings
    #: The magnitude of the last forward pass that had noise, and why it was not scaled as asked for.
    last_magnitude: float | Tensor | None = None
    note: str = ""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last_magnitude": None}

    def state(self, training: bool) -> str:
        """ "on", or why there is no noise at this moment."""
        if not training:
            return "off: evaluation mode"
        if not torch.is_grad_enabled():
            return "off: gradients are disabled"
        if not self.settings.enabled:
            return "off: inside no_noise"
        if self.settings.sequences.generating:
            return "off: a cache is passed, so the model is generating"
        return "on" if self.settings.alpha > 0 else "off: alpha is 0"

    def arguments(self, tokens: Tensor, embedding_dim: int, **sequences: Tensor | None) -> dict[str, Any]:
        """The arguments of the op that say which noise `tokens` ``[..., L]`` get; only shape and device of them count.

        `sequences` are those of :func:`noise_magnitude`; without any, those of the model's forward pass are used as far as
        they tell lengths.
        """
        settings, note = self.settings, ""
        if not sequences and settings.sequences is not NO_SEQUENCES and settings.scale_by == "sequence":
            sequences, note = settings.sequences.telling(tokens)  # type: ignore[assignment]
        magnitude = noise_magnitude(tokens, embedding_dim, settings.alpha, scale_by=settings.scale_by, **sequences)
        if not torch.compiler.is_compiling():
            self.last_magnitude, self.note = magnitude, note
        stream = _rank() if settings.stream is None else settings.stream
        return {"magnitude": magnitude, "stream": stream, "backend": settings.backend}


class NEFTuneEmbedding(nn.Embedding):
    """``nn.Embedding`` whose forward in training adds NEFTune's noise, in the same kernel as the look-up.

    In evaluation, under ``torch.no_grad()``, and with ``alpha=0`` it is the plain embedding. The seed is drawn from PyTorch's
    default generator of the weight's device, so ``torch.manual_seed`` reproduces a run.

    Args:
        num_embeddings, embedding_dim, padding_idx, scale_grad_by_freq, sparse, device, dtype: as in ``nn.Embedding``.
        alpha: NEFTune's noise scale, >= 0; 5 to 15 in the paper.
        scale_by: "sequence" or "batch", see :func:`neft_kernels.noise_magnitude`.
        stream: which of the streams under one seed; None: the rank of this process, 0 without torch.distributed.
        backend: see :func:`neft_kernels.noisy_embedding`.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value; the message names it.
    """

    #: None once :func:`neft_kernels.restore_embeddings` has been here.
    noise: Noise | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        alpha: float = 5.0,
        scale_by: str = "sequence",
        stream: int | None = None,
        backend: str | None = None,
    ) -> None:
        if max_norm is not None:
            raise ValueError("max_norm is not supported: it rewrites the weight in forward")
        settings = NoiseSettings(alpha, scale_by, stream, backend)
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            None,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            _freeze,
            device,
            dtype,
        )
        self.noise = self.built_in_noise = Noise(settings)

    def forward(self, input: Tensor, **sequences: Tensor | None) -> Tensor:
        """``[..., L]`` ids to ``[..., L, embedding_dim]``.

        Args:
            input: token ids, any integer dtype.
            sequences: ``attention_mask``, ``position_ids`` or ``cu_seq_lens``, as in :func:`neft_kernels.noise_magnitude`.
                Without them, those that the model around this module was called with, if
                :func:`neft_kernels.replace_embeddings` made it noisy.
        """
        noise = self.noise
        if noise is None or noise.state(self.training) != "on" or input.ndim == 0:
            return super().forward(input)
        return noisy_embedding(
            input,
            self.weight,
            padding_idx=self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
            **noise.arguments(input, self.embedding_dim, **sequences),
        )


class AddNoise:
    """A forward hook: noise on the output of an embedding that keeps its own forward."""

    def __init__(self, noise: Noise) -> None:
        self.noise = noise

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        embeds = output[0] if isinstance(output, tuple) else output  # [..., L, D]
        if self.noise.state(module.training) != "on" or embeds.ndim < 2:
            return output
        embeds = add_noise(embeds, **self.noise.arguments(embeds[..., 0], embeds.shape[-1]))
        return (embeds, *output[1:]) if isinstance(output, tuple) else embeds


def _rank() -> int:
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
