"""The noise of one embedding: its magnitude, its seed and stream, and the record for ``describe``.

Every batch with noise takes the same way, :meth:`EmbeddingNoise.add`, in four steps: the magnitude of the noise, its seed and
stream, the op, and the record that ``describe`` reads.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neft_kernels.models.batch import NO_BATCH
from neft_kernels.models.checkpointing import (
    OFF,
    FirstPasses,
    in_backward,
    outside_of_selective_checkpointing,
    rng_state_of,
)
from neft_kernels.models.model_noise import ModelNoise
from neft_kernels.models.rearrangement import rearrange
from neft_kernels.models.sharding import groups_of, seed_and_stream
from neft_kernels.models.strength import (
    BOUND,
    RELATIVE_STRENGTH,
    CleanEmbeddings,
    described_kind,
    described_ratio,
    measured_rms,
    rms_of_noise,
    root_mean_square,
)
from neft_kernels.models.symmetric import Doubling
from neft_kernels.ops.backends import choose_backend, logger
from neft_kernels.ops.magnitude import noise_magnitude

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["EmbeddingNoise"]


class EmbeddingNoise:
    """The noise of one embedding."""

    def __init__(self, model_noise: ModelNoise, name: str = "embedding", standing_note: str = "") -> None:
        #: What the noisy embeddings of a model share.
        self.model_noise, self.name = model_noise, name
        #: A note that holds for every batch, such as "the decoder's tokens get no noise".
        self.standing_note = standing_note
        #: The magnitude of the last noisy batch, and a note if it deviates from the options.
        self.last_magnitude: float | Tensor | None = None
        self.note = ""
        self.last_device: str | None = None  # its device type, such as "cuda"
        #: The root mean square of the embeddings: for scale_by="rms", measured in the first pass with noise.
        self.rms: float | None = None
        #: What :meth:`CleanEmbeddings.squares` measured in a batch, and whether it measures the next one: the first batch, and
        #: the one after each ``describe``.
        self._squares: Tensor | None = None
        self.measures_next = True
        #: Whether the last eager pass used the fused op. None before the first. FSDP shards the table between passes only.
        self.was_fused: bool | None = None
        self.first_passes = FirstPasses()
        self._warned: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "last_magnitude": None,
            "note": "",
            "last_device": None,
            "was_fused": None,
            "_squares": None,
            "measures_next": True,
        }

    def warn(self, message: str) -> None:
        """Logs a warning, once."""
        if not torch.compiler.is_compiling() and message not in self._warned:
            self._warned.add(message)
            logger.warning("%s: %s", self.name, message)

    def add(
        self,
        op: Callable[..., Tensor],
        clean: CleanEmbeddings,
        arguments: dict[str, Tensor | None],
    ) -> Tensor:
        """The result of `op` with the noise of one batch. Call it only if :func:`~neft_kernels.models.switch.begin_pass`.

        Args:
            op: is called with the keyword arguments ``magnitude``, ``noise``, ``seed``, ``stream`` and ``backend``.
            clean: the embeddings that `op` adds the noise to. The values of its ids count only where a model rearranges
                them.
            arguments: those of :func:`neft_kernels.noise_magnitude` about the sequences. Without any, those of the model's
                forward pass are used.
        """
        ids = clean.ids
        if ids.is_nested:
            raise TypeError(
                "input_ids is a nested tensor, which has no noise yet; pad it, or pack it and pass cu_seq_lens"
            )
        options, groups = self.model_noise.options, list(clean.groups)
        if options.sequence_group is not None:
            groups += groups_of(options.sequence_group)
        is_compiling = torch.compiler.is_compiling()
        rng_state = rng_state_of(ids.device)
        first = self.first_passes.recall(ids, rng_state) if in_backward() else None
        first = None if first is OFF else first
        # 1. How strong the noise of each token is. noise_magnitude() makes it 0 for padding.
        if first is None:
            with outside_of_selective_checkpointing():
                magnitude, note = self._magnitude(clean, groups, arguments)
        else:
            magnitude, note = first[0], self.note
        # 2. Which noise: the ranks of a replica share it. A recomputed pass draws too, so that what follows draws the same.
        seed, stream = seed_and_stream(options.stream, groups, ids.device)
        seed = seed if first is None else first[1]
        # 3. The look-up and the noise.
        kind = {"noise": options.noise, "symmetric": options.symmetric}
        out = op(magnitude=magnitude, **kind, seed=seed, stream=stream, backend=options.backend)
        # 4. What describe() reports.
        if not is_compiling and _is_real(magnitude):
            with outside_of_selective_checkpointing():
                self._record(clean, magnitude, note)
            if first is None:
                self.first_passes.remember(ids, rng_state, (magnitude, seed))
        return out

    def _magnitude(
        self, clean: CleanEmbeddings, groups: "Sequence[ProcessGroup]", arguments: dict[str, Any]
    ) -> tuple[float | Tensor, str]:
        """The magnitude of each token of a look-up, and a note if it deviates from the options."""
        options, ids, part = self.model_noise.options, clean.ids, clean.part
        given, note = ids, ""
        if not arguments:
            batch = self.model_noise.passes.batch
            given, arguments, note = batch.about(ids, None if part is None else part.length, options)
            if batch is NO_BATCH and self.model_noise.for_whole_model and options.scale_by != "batch":
                note = (
                    "the embedding was called outside of the model's forward, so the padded length is used; pass the mask, as "
                    "in model.get_input_embeddings()(input_ids, attention_mask=attention_mask)"
                )
        doubling = None
        if options.symmetric:
            doubling = self._doubling(clean, given)
            given, arguments = doubling.first_half(given), doubling.of_sequences(arguments)
        if part is not None:
            given, arguments = part.whole_rows(given, arguments, options)

        def of_tokens(alpha: float | Tensor, rms: float | None) -> float | Tensor:
            compute = functools.partial(
                noise_magnitude,
                embedding_dim=clean.embedding_dim,
                alpha=alpha,
                scale_by=options.scale_by,
                rms=None if rms is None else rms / RELATIVE_STRENGTH[options.noise],
                noise_on=options.noise_on,
                backend=options.backend,
            )
            magnitude = compute(given, **arguments)
            if doubling is not None:
                return doubling.of_both(magnitude, ids)
            if part is not None:
                return part.of(magnitude)
            if given is ids:
                return magnitude
            return rearrange(magnitude, given, ids, compute(ids) if options.noise_on == "all" else 0.0)

        rms = self.rms
        if options.scale_by == "rms" and rms is None:
            names = tuple(group.group_name for group in groups)
            rms = measured_rms(ids, clean.table, clean.output, of_tokens(1.0, 1.0), names)
            if rms == 0 and torch.compiler.is_compiling():  # it would be a constant of the graph
                raise RuntimeError(
                    'scale_by="rms" measures the embeddings in the first pass, and no token of this one has noise; run the '
                    "model once uncompiled on a batch that has"
                )
            self.rms = rms or None  # 0.0 if no token of this batch has noise
        return of_tokens(self.model_noise.alpha_on(ids.device), rms), note

    def _doubling(self, clean: CleanEmbeddings, given: Tensor) -> Doubling:
        """How the model's batch was doubled for symmetric noise.

        Raises:
            RuntimeError: it was not, or the look-up is not of both halves, one after the other.
        """
        ids, doubling = clean.ids, self.model_noise.passes.batch.doubling
        if doubling is None:
            raise RuntimeError(
                f"{self.name}: symmetric=True doubles the batch where the model's forward begins, in training mode, but the "
                "embedding was called without that; call the model, put it into training mode, and if a wrapper such as a "
                "PEFT model was added since, call replace_embeddings() on that"
            )
        is_whole = given is ids and clean.part is None and doubling.fits(ids)
        if is_whole and _can_be_compared(ids) and (ids.device.type == "cpu" or self.last_magnitude is None):
            is_whole = bool(doubling.halves_are_equal(ids))
        if not is_whole:
            raise RuntimeError(
                f"{self.name}: symmetric=True needs a model that looks up input_ids as they are, but it looked up ids of "
                f"shape {list(ids.shape)} that are not those of the doubled batch; use symmetric=False"
            )
        return doubling

    def _record(self, clean: CleanEmbeddings, magnitude: float | Tensor, note: str) -> None:
        """Keeps what ``describe`` reports. Logs the first batch."""
        ids, is_first, options = clean.ids, self.last_magnitude is None, self.model_noise.options
        self.last_magnitude, self.note, self.last_device = magnitude, note, ids.device.type
        if _is_capturing(ids):
            return
        if self.measures_next and _is_real(ids) and (isinstance(magnitude, Tensor) or magnitude > 0):
            self._squares, self.measures_next = clean.squares(magnitude), False
        if is_first and logger.isEnabledFor(logging.INFO):
            low, high = self.bounds() or (0.0, 0.0)
            ratio = self.ratio()
            logger.info(
                "%s: %s is on, alpha=%g scaled by %s, backend %s, first batch %s%.3g to %.3g%s%s",
                self.name,
                described_kind(options.noise, options.symmetric),
                self.model_noise.alpha.now(),
                options.scale_by,
                choose_backend(ids.device.type, options.backend),
                BOUND[options.noise],
                low,
                high,
                "" if ratio is None else f", {described_ratio(ratio)}",
                f" ({note})" if note else "",
            )

    def bounds(self) -> tuple[float, float] | None:
        """Smallest and largest magnitude of the last batch with noise, over the tokens with noise. Waits for the device."""
        last = self.last_magnitude
        if not isinstance(last, Tensor):
            return None if last is None else (last, last)
        noisy = last[last > 0]
        return (noisy.min().item(), noisy.max().item()) if noisy.numel() else (0.0, 0.0)

    def ratio(self) -> float | None:
        """The root mean square of the noise of the last batch over that of the embeddings. Waits for the device."""
        if self.last_magnitude is None or self._squares is None:
            return None
        of_noise, of_embeddings = (
            rms_of_noise(self.last_magnitude, self.model_noise.options.noise),
            root_mean_square(self._squares),
        )
        if not of_noise:
            return 0.0
        return of_noise / of_embeddings if of_embeddings else None


def _is_real(magnitude: float | Tensor) -> bool:
    """Whether `magnitude` can be read later: it does not stand for values inside a transform or a trace."""
    if not isinstance(magnitude, Tensor):
        return True
    return type(magnitude) is Tensor and not magnitude.is_meta and not torch._C._are_functorch_transforms_active()


def _can_be_compared(ids: Tensor) -> bool:
    """Whether the host can read `ids`. What a module returned in place of ids may differ by its dropout."""
    return (
        _is_real(ids) and not torch.compiler.is_compiling() and not ids.is_floating_point() and not _is_capturing(ids)
    )


def _is_capturing(ids: Tensor) -> bool:
    return ids.is_cuda and torch.cuda.is_current_stream_capturing()
