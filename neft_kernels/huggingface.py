"""Noise in the embeddings of Hugging Face models, and out again.

An embedding that is a plain ``nn.Embedding`` becomes a :class:`NEFTuneEmbedding` by a change of its class, in place: the
module, its name, its hooks, its parameters and their ties stay what they are. Any other embedding (scaled, wrapped,
quantised ...) keeps its own forward, and a forward hook adds the noise to what it returns.

The lengths of the sequences reach the embedding through hooks on the modules around it, which note the masks and positions
they are called with.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from neft_kernels import ops
from neft_kernels.lookups import check_model, is_encoder_decoder, token_embeddings
from neft_kernels.noise import NoiseSettings
from neft_kernels.placing import noisy_modules, place_noise, remove_noise
from neft_kernels.watching import WatchSequences, modules_to_watch

if TYPE_CHECKING:
    from neft_kernels.distributed import Group

__all__ = ["no_noise", "replace_embeddings", "restore_embeddings", "set_alpha"]

Model = TypeVar("Model", bound=nn.Module)


def replace_embeddings(
    model: Model,
    alpha: float | Callable[[int], float] = 5.0,
    *,
    scale_by: str = "sequence",
    noise_on: str = "all",
    stream: int | None = None,
    backend: str | None = None,
    sequence_group: "Group | None" = None,
    sequence_layout: str = "contiguous",
) -> Model:
    """Makes the token embeddings of `model` noisy while it trains (NEFTune, arXiv 2310.05914), in place.

    There is noise in training mode with gradients enabled, unless the model is generating; everything else is the untouched
    embedding. ``state_dict``, parameters, ties and names do not change. On a model whose embeddings are noisy already, the
    new settings replace the old ones.

    Args:
        model: a transformers model, a PEFT model, or any module with ``get_input_embeddings()`` or one ``nn.Embedding``.
        alpha: NEFTune's noise scale, >= 0; 5 to 15 in the paper. A callable is a schedule: it is given the number of forward
            passes in training so far, or the Trainer's global step under :class:`neft_kernels.NEFTuneCallback`, and returns
            alpha. :func:`set_alpha` changes it at any time.
        scale_by: "sequence" scales by each sequence's true length, from ``attention_mask``, ``position_ids`` or
            ``cu_seq_lens_q`` where the model is given them, and leaves padding alone; "batch" scales by the padded length,
            as the Hugging Face hook does.
        noise_on: "all" tokens, or those of the "prompt" or of the "completion" only, as the ``labels`` that the model is
            given tell them apart (-100 is prompt); decoder-only models.
        stream: which of the noise streams under one seed; None: one for each data-parallel replica, so that replicas that are
            seeded alike draw different noise: the rank of this process, or the smallest one of its tensor- and
            sequence-parallel ranks.
        backend: "triton", "cuda", "cpu" or "reference"; None takes the best for the embedding's device.
        sequence_group: for sequence and context parallelism, the process group, or mesh of one dimension, whose ranks hold the
            parts of the same sequences. Their tokens are numbered in the whole sequences and scaled by the whole lengths.
        sequence_layout: which part: "contiguous", rank r of n holds the r-th of n equal parts; "head_tail", the r-th of 2n
            from the front and the r-th from the back, as torch's and accelerate's context parallelism have it.

    Returns:
        `model` itself.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value, or `model` has no token embeddings that can be made
            noisy; the model is then unchanged.
        RuntimeError: the backend asked for cannot run here.
    """
    settings = NoiseSettings(alpha, scale_by, noise_on, stream, backend, sequence_group, sequence_layout, of_model=True)
    embeddings, note = token_embeddings(model)
    if noise_on != "all" and is_encoder_decoder(model):
        raise ValueError(f"noise_on={noise_on!r} is for decoder-only models: here labels are not about input_ids")
    if backend is not None:
        for device in {parameter.device.type for module in embeddings for parameter in module.parameters()}:
            ops.choose_backend(device, backend)

    restore_embeddings(model)
    place_noise(model, embeddings, settings, note)
    if note:
        ops.logger.warning("%s: %s", type(model).__name__, note)
    for module in modules_to_watch(model, embeddings):
        WatchSequences(settings, module).attach(module)
    return model


def restore_embeddings(model: Model) -> Model:
    """Undoes :func:`replace_embeddings`; a model that it did not touch stays as it is. Returns `model` itself."""
    check_model(model)
    for module in model.modules():
        remove_noise(module)
    return model


@contextlib.contextmanager
def no_noise(model: nn.Module) -> Iterator[None]:
    """Within this context the embeddings of `model` are the plain ones, in training mode too."""
    settings = {id(noise.settings): noise.settings for _, _, noise in noisy_modules(model)}.values()
    before = [each.enabled for each in settings]
    try:
        for each in settings:
            each.enabled = False
        yield
    finally:
        for each, enabled in zip(settings, before, strict=True):
            each.enabled = enabled


def set_alpha(model: nn.Module, alpha: float | Callable[[int], float], *, step: int | None = None) -> None:
    """Changes alpha of the noisy embeddings of `model`; a compiled model is compiled again at most once for it.

    Args:
        model: a model that :func:`replace_embeddings` made noisy.
        alpha: the new noise scale, >= 0, or a schedule of the step.
        step: the step that a schedule is at, until it is told again; None: forward passes are counted.

    Raises:
        TypeError, ValueError: `alpha` is no number >= 0, or `model` has no noisy embeddings.
    """
    settings = {id(noise.settings): noise.settings for _, _, noise in noisy_modules(model)}.values()
    if not settings:
        raise ValueError("model has no noisy embeddings; call replace_embeddings(model) first")
    for each in settings:
        each.set_alpha(alpha, step)
