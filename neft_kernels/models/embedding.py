"""Noisy embeddings: a module for plain tables, and a hook for embeddings that keep their own forward.

Every batch takes the same way, :meth:`EmbeddingNoise.add`, in four steps: the magnitude of the noise, its seed and stream, the op,
and the record that ``describe`` reads.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from neft_kernels.models import sharding
from neft_kernels.models.batch import EMPTY_BATCH, in_backward
from neft_kernels.models.checkpointing import OFF, FirstPasses
from neft_kernels.models.layout import is_rearranged, rearranged
from neft_kernels.models.options import AlphaSchedule, NoiseOptions
from neft_kernels.models.state import ModelNoise
from neft_kernels.ops.autograd import add_noise, noisy_embedding
from neft_kernels.ops.backends import choose_backend, logger
from neft_kernels.ops.magnitude import magnitude_of_length, noise_magnitude

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from neft_kernels.models.sharding import Part

__all__ = ["HOOK_ATTRIBUTE", "EmbeddingNoise", "NEFTuneEmbedding", "NoiseHook"]

#: What transformers sets on an embedding that its own NEFTune hook is on.
HOOK_ATTRIBUTE = "neftune_noise_alpha"


class EmbeddingNoise:
    """The noise of one embedding."""

    def __init__(self, model: ModelNoise, name: str = "embedding", standing_note: str = "") -> None:
        self.model, self.name = model, name
        #: What the noise of the model leaves out, whatever the batch.
        self.standing_note = standing_note
        #: Of the last batch with noise: its magnitude, and why it is not what was asked for.
        self.last_magnitude: float | Tensor | None = None
        self.note = ""
        #: Whether the table was a DTensor in the last forward pass. FSDP has it so only between passes.
        self.table_was_sharded: bool | None = None
        self.first_passes = FirstPasses()
        self._warned: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last_magnitude": None}

    # --- on or off ---

    def state(self, module: nn.Module) -> str:
        """ "on", or why `module` has no noise at this moment."""
        model = self.model
        if not module.training:
            return "off: evaluation mode"
        if not torch.is_grad_enabled() and not model.options.under_no_grad:
            return "off: gradients are disabled"
        if not model.enabled:
            return "off: inside no_noise"
        if model.passes.batch.generating:
            return "off: a cache is passed, so the model is generating"
        if HOOK_ATTRIBUTE in module.__dict__:
            return "off: the Hugging Face hook (neftune_noise_alpha) is on this embedding and adds its own noise"
        return "off: alpha is 0" if model.alpha.is_always_zero() else "on"

    def is_on(self, module: nn.Module, ids: Tensor) -> bool:
        """Whether this forward pass of `module` on `ids` has noise. A pass that is recomputed has it if the first one had."""
        self.model.coverage.reach()
        self.warn_of_other_noise(module)
        if torch.compiler.is_compiling():
            return self.state(module) == "on"
        is_on = self.state(module) == "on"
        if in_backward() and (first := self.first_passes.recall(ids)) is not None:
            if first is OFF and is_on:
                self._warn(
                    "a pass that backward runs again has no noise, because it had none the first time, when gradients were "
                    "disabled; under_no_grad=True gives noise to both"
                )
            return first is not OFF
        if module.training and not is_on:
            self.first_passes.remember(ids, OFF)
        return is_on

    def warn_of_other_noise(self, module: nn.Module) -> None:
        """Says once that this noise is off because the Hugging Face hook is on."""
        if HOOK_ATTRIBUTE in module.__dict__:
            self._warn(
                "the Hugging Face hook (neftune_noise_alpha) is on this embedding and adds its own noise, so ours is off; to use "
                "neft_kernels instead, unset it"
            )

    def _warn(self, message: str) -> None:
        if not torch.compiler.is_compiling() and message not in self._warned:
            self._warned.add(message)
            logger.warning("%s: %s", self.name, message)

    # --- one batch ---

    def add(
        self,
        op: Callable[..., Tensor],
        ids: Tensor,
        embedding_dim: int,
        part: "Part | None" = None,
        groups: "Sequence[ProcessGroup]" = (),
        sequences: dict[str, Tensor | None] | None = None,
    ) -> Tensor:
        """The result of `op` with the noise of one batch.

        Args:
            op: is called with the keyword arguments ``magnitude``, ``seed``, ``stream`` and ``backend``.
            ids: ``[..., l]``, the token ids. Their values count only where a model rearranges them.
            embedding_dim: the width of the embedding.
            part: the part that `ids` are of their sequences. None: they are the whole.
            groups: the process groups over which the table is sharded.
            sequences: arguments of :func:`neft_kernels.noise_magnitude`. Without any, those of the model's forward pass.
        """
        options = self.model.options
        if options.sequence_group is not None:
            groups = [*groups, *sharding.groups_of(options.sequence_group)]
        magnitude, note = self._magnitude(ids, embedding_dim, part, sequences)
        seed, stream = sharding.seed_and_stream(options.stream, groups, ids.device)
        out = op(magnitude=magnitude, seed=seed, stream=stream, backend=options.backend)
        self._record(ids, magnitude, note)
        return out

    def _magnitude(
        self, ids: Tensor, embedding_dim: int, part: "Part | None", sequences: dict[str, Tensor | None] | None
    ) -> tuple[float | Tensor, str]:
        """The magnitude of each token of `ids`, and a note if it is not what was asked for."""
        options, is_compiling = self.model.options, torch.compiler.is_compiling()
        if not is_compiling and in_backward() and (first := self.first_passes.recall(ids)) is not None:
            return first, self.note
        batch = EMPTY_BATCH if sequences else self.model.passes.batch
        # Where the model rearranges its ids, the batch is about those that it was given.
        given = batch.input_ids if part is None and is_rearranged(batch.input_ids, ids) else ids
        note = ""
        if batch is not EMPTY_BATCH:
            row_length = given.shape[-1] if part is None else part.length
            sequences, note = batch.about(given, row_length, with_labels=options.noise_on != "all")
        sequences = sequences or {}
        if options.noise_on != "all" and sequences.get("labels") is None:
            raise ValueError(
                f"noise_on={options.noise_on!r} needs labels of the ids' shape, but the model was called without; a Trainer "
                "that computes the loss itself takes them out of the batch"
            )
        if part is not None:
            given, sequences = part.whole_rows(given, sequences, options)

        alpha = self.model.alpha_on(ids.device)

        def compute(tokens: Tensor, told: dict[str, Any]) -> float | Tensor:
            if not told and tokens.numel():
                return magnitude_of_length(alpha, tokens.shape[-1], embedding_dim, tokens.device)
            scale_by, noise_on, backend = options.scale_by, options.noise_on, options.backend
            return noise_magnitude(
                tokens, embedding_dim, alpha, scale_by=scale_by, noise_on=noise_on, backend=backend, **told
            )

        magnitude = compute(given, sequences)
        if part is not None:
            magnitude = part.of(magnitude)
        elif given is not ids:
            magnitude = rearranged(magnitude, given, ids, compute(ids, {}) if options.noise_on == "all" else 0.0)
            if given.shape != ids.shape and not is_compiling:
                looked_up = f"ids of shape {list(given.shape)} were looked up as {list(ids.shape)}"
                note = "; ".join(filter(None, (note, looked_up)))
        return magnitude, note

    def _record(self, ids: Tensor, magnitude: float | Tensor, note: str) -> None:
        """Keeps what ``describe`` reports, and what a recomputation of this pass needs. Logs the first batch."""
        if torch.compiler.is_compiling() or not _is_real(magnitude):
            return
        if not in_backward():
            self.first_passes.remember(ids, magnitude)
        is_first, self.last_magnitude, self.note = self.last_magnitude is None, magnitude, note
        if is_first and logger.isEnabledFor(logging.INFO) and not _is_capturing(ids):
            low, high = self.bounds() or (0.0, 0.0)
            logger.info(
                "%s: noise is on, alpha=%g scaled by %s, backend %s, first batch within +-%.3g to %.3g%s",
                self.name,
                self.model.alpha.now(),
                self.model.options.scale_by,
                choose_backend(ids.device.type, self.model.options.backend),
                low,
                high,
                f" ({note})" if note else "",
            )

    def bounds(self) -> tuple[float, float] | None:
        """Smallest and largest magnitude of the last batch with noise, over the tokens with noise. Waits for the device."""
        last = self.last_magnitude
        if not isinstance(last, Tensor):
            return None if last is None else (last, last)
        noisy = last[last > 0]
        return (noisy.min().item(), noisy.max().item()) if noisy.numel() else (0.0, 0.0)


def _is_real(magnitude: float | Tensor) -> bool:
    """Whether `magnitude` can be read later: it does not stand for values inside a transform or a trace."""
    if not isinstance(magnitude, Tensor):
        return True
    return type(magnitude) is Tensor and not magnitude.is_meta and not torch._C._are_functorch_transforms_active()


def _is_capturing(ids: Tensor) -> bool:
    return ids.is_cuda and torch.cuda.is_current_stream_capturing()


class NEFTuneEmbedding(nn.Embedding):
    """``nn.Embedding`` whose forward in training adds NEFTune's noise, in the same kernel as the look-up.

    In evaluation mode, under ``torch.no_grad()``, and with ``alpha=0`` it is the plain embedding. The seed is drawn from PyTorch's
    default generator of the weight's device, so ``torch.manual_seed`` reproduces a run.

    Args:
        num_embeddings, embedding_dim, padding_idx, scale_grad_by_freq, sparse, device, dtype: as in ``nn.Embedding``.
        alpha, options: as in :func:`neft_kernels.replace_embeddings`. If the module is given masks and a ``sequence_group`` is set,
            the masks may be those of the rank's part or those of the whole sequences.

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
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        alpha: float | Callable[[int], float] = 5.0,
        **options: Any,
    ) -> None:
        if max_norm is not None:
            raise ValueError("max_norm is not supported: it rewrites the weight in forward")
        model = ModelNoise(NoiseOptions(**options), AlphaSchedule(alpha))
        plain = (num_embeddings, embedding_dim, padding_idx, None, norm_type, scale_grad_by_freq, sparse)
        super().__init__(*plain, _weight, _freeze, device, dtype)
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
