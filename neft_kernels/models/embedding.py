"""Noisy embeddings: a module for plain tables, and a hook for embeddings that keep their own forward."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neft_kernels.models import sharding
from neft_kernels.models.noise import EmbeddingNoise
from neft_kernels.models.options import AlphaSchedule, NoiseOptions
from neft_kernels.models.state import ModelNoise
from neft_kernels.ops.autograd import add_noise, noisy_embedding

__all__ = ["NEFTuneEmbedding", "NoiseHook"]


class NEFTuneEmbedding(nn.Embedding):
    """``nn.Embedding`` whose forward in training adds NEFTune's noise, in the same kernel as the look-up.

    In evaluation mode, under ``torch.no_grad()``, and with ``alpha=0`` it is the plain embedding. The seed is drawn from
    PyTorch's default generator of the weight's device, so ``torch.manual_seed`` reproduces a run.

    Args:
        num_embeddings, embedding_dim, padding_idx, args, kwargs: as in ``nn.Embedding``. ``max_norm`` is not supported.
        alpha, and the options in kwargs: as in :func:`neft_kernels.replace_embeddings`. If a ``sequence_group`` is set, the
            masks given to forward may be those of the rank's part or those of the whole sequences.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value. The message names it.
    """

    #: None after :func:`neft_kernels.restore_embeddings`.
    noise: EmbeddingNoise | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: None = None,
        *args: Any,
        alpha: float | Callable[[int], float] = 5.0,
        **kwargs: Any,
    ) -> None:
        if max_norm is not None:
            raise ValueError("max_norm is not supported: it rewrites the weight in forward")
        options = {name: kwargs.pop(name) for name in NoiseOptions.__dataclass_fields__ if name in kwargs}
        model = ModelNoise(NoiseOptions(**options), AlphaSchedule(alpha))
        super().__init__(num_embeddings, embedding_dim, padding_idx, None, *args, **kwargs)
        self.noise = self.built_in_noise = EmbeddingNoise(model)

    def forward(self, input: Tensor, **sequences: Tensor | None) -> Tensor:
        """``[..., L]`` ids to ``[..., L, embedding_dim]``.

        Args:
            input: token ids, any integer dtype.
            sequences: ``attention_mask``, ``position_ids``, ``cu_seq_lens`` or ``labels``, as in
                :func:`neft_kernels.noise_magnitude`. Without any, those that the model around this module was called with, if
                :func:`neft_kernels.replace_embeddings` made it noisy.
        """
        noise = self.noise
        if noise is None or input.ndim == 0 or not noise.is_on(self, input):
            return super().forward(input)
        weight = self.weight
        is_sharded = sharding.is_dtensor(weight)
        if not torch.compiler.is_compiling():
            noise.table_was_sharded = is_sharded
        if is_sharded:
            ids = input.full_tensor() if sharding.is_dtensor(input) else input  # type: ignore[attr-defined]
            groups = sharding.tensor_parallel_groups(self)
            return sharding.add_to_whole(
                super().forward(input), lambda embeds: _add_to(embeds, noise, ids, groups, sequences)
            )
        part = sharding.part_of_rank(input, noise.model.options)
        if part is not None and not part.is_one_run(input):
            # Fused, each run of tokens would have a gradient of the size of the table.
            return _add_to(super().forward(input), noise, input, (), sequences)
        op = functools.partial(
            noisy_embedding,
            input,
            weight,
            first_token=0 if part is None else part.pieces[0][0],
            padding_idx=self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
        )
        return noise.add(op, input, self.embedding_dim, part, (), sequences)


class NoiseHook:
    """Forward hooks that add noise to the output of an embedding that keeps its own forward."""

    def __init__(self, noise: EmbeddingNoise) -> None:
        self.noise = noise
        self._groups: Sequence[Any] = ()

    def attach(self, module: nn.Module) -> None:
        """Registers both hooks."""
        module.register_forward_pre_hook(self.before)
        module.register_forward_hook(self.after, with_kwargs=True)

    def before(self, module: nn.Module, args: tuple) -> None:
        """Notes over which ranks the table is sharded. After the forward FSDP may have sharded it over its own ranks again."""
        self._groups = sharding.tensor_parallel_groups(module) if sharding.distributed_is_on() else ()

    def after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """The output with its noise."""
        noise, groups = self.noise, self._groups
        embeds = output[0] if isinstance(output, tuple) else output  # [..., L, D]
        ids = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), embeds)
        if embeds.ndim < 2 or not noise.is_on(module, ids):
            return output
        if sharding.is_dtensor(embeds):
            noisy = sharding.add_to_whole(embeds, lambda whole: _add_to(whole, noise, whole[..., 0], groups))
        else:
            width = getattr(module, "embedding_dim", embeds.shape[-1])
            if len(groups) == 1 and embeds.shape[-1] != width:  # the output of a table that is sharded by columns
                noisy = sharding.add_to_columns(
                    embeds, width, groups[0], lambda wide: _add_to(wide, noise, ids, groups)
                )
            else:
                noisy = _add_to(embeds, noise, ids, groups)
        return (noisy, *output[1:]) if isinstance(output, tuple) else noisy


def _add_to(
    embeds: Tensor,
    noise: EmbeddingNoise,
    ids: Tensor,
    groups: Sequence[Any],
    sequences: dict[str, Tensor | None] | None = None,
) -> Tensor:
    """The noise of `ids` on `embeds` ``[..., l, D]``, of which a rank may hold a part.

    If `ids` have another shape than the tokens in `embeds`, as with several codebooks, they say nothing about the batch.
    """
    shape = embeds.shape[:-1]
    is_part = len(groups) == 1 and ids.shape == (*shape[:-1], shape[-1] * sharding.group_size(groups[0]))
    tokens = ids if is_part or ids.shape == shape else embeds[..., 0]
    part = sharding.part_of_rank(tokens, noise.model.options)
    if is_part and ids.shape != shape:  # the output of tensor parallelism with sequence parallelism
        part = sharding.part_of_output(part, tokens.shape[-1], shape[-1], groups[0])
    op = functools.partial(add_noise if part is None else functools.partial(sharding.in_parts, add_noise, part), embeds)
    return noise.add(op, tokens, embeds.shape[-1], part, groups, sequences)
