"""Modules: an embedding whose training forward is noisy, and the hook that makes another embedding's output noisy."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from neft_kernels.autograd import add_noise, noisy_embedding
from neft_kernels.distributed import (
    Part,
    add_to_columns,
    add_to_whole,
    distributed_is_on,
    group_size,
    in_parts,
    is_dtensor,
    part_of_rank,
    tensor_parallel_groups,
)
from neft_kernels.noise import Noise, NoiseSettings

if TYPE_CHECKING:
    from neft_kernels.distributed import Group

__all__ = ["AddNoise", "NEFTuneEmbedding"]


class NEFTuneEmbedding(nn.Embedding):
    """``nn.Embedding`` whose forward in training adds NEFTune's noise, in the same kernel as the look-up.

    In evaluation, under ``torch.no_grad()``, and with ``alpha=0`` it is the plain embedding. The seed is drawn from PyTorch's
    default generator of the weight's device, so ``torch.manual_seed`` reproduces a run.

    Args:
        num_embeddings, embedding_dim, padding_idx, scale_grad_by_freq, sparse, device, dtype: as in ``nn.Embedding``.
        alpha: NEFTune's noise scale, >= 0; 5 to 15 in the paper. A callable is a schedule, see
            :func:`neft_kernels.replace_embeddings`.
        scale_by: "sequence" or "batch", see :func:`neft_kernels.noise_magnitude`.
        noise_on: "all", "prompt" or "completion", see :func:`neft_kernels.noise_magnitude`.
        stream: which of the streams under one seed; None: that of this process's replica, 0 without torch.distributed.
        backend: see :func:`neft_kernels.noisy_embedding`.
        sequence_group, sequence_layout: where several ranks hold parts of the same sequences, see
            :func:`neft_kernels.replace_embeddings`; the masks may be those of the part or those of the whole sequences.

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
        alpha: float | Callable[[int], float] = 5.0,
        scale_by: str = "sequence",
        noise_on: str = "all",
        stream: int | None = None,
        backend: str | None = None,
        sequence_group: "Group | None" = None,
        sequence_layout: str = "contiguous",
    ) -> None:
        if max_norm is not None:
            raise ValueError("max_norm is not supported: it rewrites the weight in forward")
        settings = NoiseSettings(alpha, scale_by, noise_on, stream, backend, sequence_group, sequence_layout)
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
            sequences: ``attention_mask``, ``position_ids``, ``cu_seq_lens`` or ``labels``, as in
                :func:`neft_kernels.noise_magnitude`.
                Without them, those that the model around this module was called with, if
                :func:`neft_kernels.replace_embeddings` made it noisy.
        """
        noise = self.noise
        if noise is None or input.ndim == 0 or not noise.is_on(self):
            return super().forward(input)
        weight = self.weight
        if not torch.compiler.is_compiling():
            noise.table_was_spread = is_dtensor(weight)
        if is_dtensor(weight):
            tokens = input.full_tensor() if is_dtensor(input) else input  # type: ignore[attr-defined]
            groups = tensor_parallel_groups(self)
            return add_to_whole(
                super().forward(input), lambda embeds: _add_noise(noise, embeds, tokens, groups=groups, **sequences)
            )
        part = noise.part_of(input)
        options = noise.arguments(input, self.embedding_dim, part, (), **sequences)
        if part is not None and (len(part.pieces) > 1 or input.numel() > input.shape[-1]):
            # Fused, each run of tokens would have a gradient of the whole table.
            return in_parts(add_noise, super().forward(input), part, options)
        return noisy_embedding(
            input,
            weight,
            first_token=0 if part is None else part.pieces[0][0],
            padding_idx=self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
            **options,
        )


class AddNoise:
    """Forward hooks: noise on the output of an embedding that keeps its own forward."""

    def __init__(self, noise: Noise) -> None:
        self.noise = noise
        self._groups: Sequence[Any] = ()

    def attach(self, module: nn.Module) -> None:
        """Registers both hooks."""
        module.register_forward_pre_hook(self.before)
        module.register_forward_hook(self.after, with_kwargs=True)

    def before(self, module: nn.Module, args: tuple) -> None:
        """Notes over which ranks the table is spread; afterwards FSDP may have spread it over its own again."""
        self._groups = tensor_parallel_groups(module) if distributed_is_on() else ()

    def after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """The output with its noise."""
        noise = self.noise
        embeds = output[0] if isinstance(output, tuple) else output  # [..., L, D]
        if embeds.ndim < 2 or not noise.is_on(module):
            return output
        if is_dtensor(embeds):
            noisy = add_to_whole(embeds, lambda whole: _add_noise(noise, whole, whole[..., 0], groups=self._groups))
        else:
            ids = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), embeds[..., 0])
            width = getattr(module, "embedding_dim", embeds.shape[-1])
            if len(self._groups) == 1 and embeds.shape[-1] != width:  # the output of a table that is spread by columns
                noisy = add_to_columns(
                    embeds, width, self._groups[0], lambda wide: _add_noise(noise, wide, ids, groups=self._groups)
                )
            else:
                noisy = _add_noise(noise, embeds, ids, groups=self._groups)
        return (noisy, *output[1:]) if isinstance(output, tuple) else noisy


def _add_noise(
    noise: Noise, embeds: Tensor, input_ids: Tensor, groups: Sequence[Any], **sequences: Tensor | None
) -> Tensor:
    """The noise of one process alone on `embeds` ``[..., L, D]``, of which a rank may hold a part.

    `input_ids` are what the embedding was called with; where their shape is another one than that of the tokens in `embeds`,
    as with several codebooks, they tell nothing.
    """
    tokens_shape = embeds.shape[:-1]
    sharded = len(groups) == 1 and input_ids.shape == (*tokens_shape[:-1], tokens_shape[-1] * group_size(groups[0]))
    tokens = input_ids if sharded or input_ids.shape == tokens_shape else embeds[..., 0]
    part = noise.part_of(tokens)
    if sharded and input_ids.shape != tokens_shape:  # the output of tensor parallelism with sequence parallelism
        whole = Part(tokens.shape[-1], ((0, tokens.shape[-1]),)) if part is None else part
        part = whole.slice(*part_of_rank(tokens_shape[-1], groups[0], "contiguous").pieces[0])
    options = noise.arguments(tokens, embeds.shape[-1], part, groups, **sequences)
    if part is None:
        return add_noise(embeds, **options)
    return in_parts(add_noise, embeds, part, options)
