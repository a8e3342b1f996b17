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

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from neft_kernels import ops
from neft_kernels.modules import AddNoise, NEFTuneEmbedding
from neft_kernels.noise import HOOK_ATTRIBUTE, Noise, NoiseSettings
from neft_kernels.reporting import noisy_modules
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
    embeddings, note = _token_embeddings(model)
    if noise_on != "all" and _is_encoder_decoder(model):
        raise ValueError(f"noise_on={noise_on!r} is for decoder-only models: here labels are not about input_ids")
    if backend is not None:
        for device in {parameter.device.type for module in embeddings for parameter in module.parameters()}:
            ops.choose_backend(device, backend)

    restore_embeddings(model)
    names = {module: name for name, module in model.named_modules()}
    for module in embeddings:
        noise = Noise(settings, names[module], standing_note=note)
        if _is_plain(module):
            module.__class__ = NEFTuneEmbedding
            module.noise = noise  # type: ignore[assignment]
        elif isinstance(module, NEFTuneEmbedding):
            module.noise = noise
        else:
            AddNoise(noise).attach(module)
        if HOOK_ATTRIBUTE in module.__dict__:
            ops.logger.warning("%s: noise %s; to use neft_kernels instead, unset it", noise.name, noise.state(module))
    if note:
        ops.logger.warning("%s: %s", type(model).__name__, note)
    for module in modules_to_watch(model, embeddings):
        WatchSequences(settings, module).attach(module)
    return model


def restore_embeddings(model: Model) -> Model:
    """Undoes :func:`replace_embeddings`; a model that it did not touch stays as it is. Returns `model` itself."""
    for module in model.modules():
        if isinstance(module, NEFTuneEmbedding):
            if type(module) is NEFTuneEmbedding and "built_in_noise" not in module.__dict__:
                module.__class__ = nn.Embedding  # type: ignore[assignment]
                del module.noise
            else:  # built by the user, or in the meantime given a class derived from ours, as fully_shard() does
                module.noise = module.__dict__.get("built_in_noise")
        _remove_hooks(module)
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


# --- which embeddings ------------------------------------------------------------------------------------------------


def _token_embeddings(model: nn.Module) -> tuple[list[nn.Module], str]:
    """All token look-ups of `model`, and a note on those that are not known.

    They are the input embeddings that it names, those of its decoder where it has an encoder as well, and whatever else looks
    up the same tables: most encoder-decoder models keep one table and look it up through modules that are tied to it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        return _token_embeddings(model.module)
    lookups = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if not hasattr(model, "get_input_embeddings"):
        if len(lookups) != 1:
            raise ValueError(
                f"model has no get_input_embeddings() and {len(lookups)} nn.Embedding modules, so its token embedding "
                "is not known; pass the module that holds just that one"
            )
        return list(lookups), ""
    main, why_not = _input_embeddings(model)
    if main is None:  # for transformers the text part beside a part for pictures is a decoder too
        main, _ = _input_embeddings(_part(model, "decoder"))
    if main is None:
        raise ValueError(f"model of class {type(model).__name__} names no input embeddings: {why_not}")
    named, note = [main], ""
    if _is_encoder_decoder(model):
        encoder, _ = _input_embeddings(_part(model, "encoder"))  # of a picture or a sound, where it reads those
        decoder, why_not = _input_embeddings(_part(model, "decoder"))
        if encoder is not None and any(_is_tied(table, main) for table in _tables(encoder)):
            named.append(encoder)
        if decoder is not None:
            named.append(decoder)
        else:
            note = f"the decoder's tokens get no noise, because its embedding is not known: {why_not}"
    tied = [module for module in lookups if any(module.weight is getattr(each, "weight", None) for each in named)]
    # What wraps a table, as PEFT's layers do, may look it up by itself; then noise goes on what the wrapper returns.
    inside = {part for module in named for part in module.modules() if part is not module}
    return [module for module in dict.fromkeys([*named, *tied]) if module not in inside], note


def _input_embeddings(part: nn.Module) -> tuple[nn.Module | None, str]:
    """The module by which `part` of a model looks tokens up, as it names it itself; or None, and why."""
    getter = getattr(part, "get_input_embeddings", None)
    try:
        # The default name is that of transformers, for parts that do not derive from its models.
        found = part.embed_tokens if getter is None else getter()
    except (NotImplementedError, AttributeError) as error:
        return None, str(error)
    if isinstance(found, nn.ModuleList) and found and all(isinstance(table, nn.Embedding) for table in found):
        # One table for each codebook. The model adds their rows up, and so the noise of one is the noise of the sum; noise
        # in each would be sqrt(codebooks) times too much, and no longer uniform.
        return found[0], ""
    if not isinstance(found, nn.Module) or isinstance(found, (nn.ModuleList, nn.ModuleDict)):
        return (
            None,
            f"get_input_embeddings() of {type(part).__name__} returns a {type(found).__name__}, which is not called",
        )
    return found, ""


def _part(model: nn.Module, kind: str) -> nn.Module:
    """The "encoder" or the "decoder" of `model`."""
    getter: Callable[[], nn.Module] | None = getattr(model, f"get_{kind}", None)
    return getattr(model, kind, model) if getter is None else getter()


def _tables(module: nn.Module) -> list[Tensor]:
    return [each.weight for each in module.modules() if isinstance(each, nn.Embedding)]


def _is_tied(table: Tensor, module: nn.Module) -> bool:
    return any(table is other for other in _tables(module))


def _is_encoder_decoder(model: nn.Module) -> bool:
    return getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def _is_plain(module: nn.Module) -> bool:
    """Whether `module` does exactly what nn.Embedding does on an ordinary table, so that the fused op can stand in."""
    return (
        type(module) is nn.Embedding
        and "forward" not in module.__dict__  # accelerate's offloading replaces it on the instance
        and module.max_norm is None
        and type(module.weight) is nn.Parameter
        and module.weight.layout == torch.strided
        and module.weight.dtype in ops.FLOAT_DTYPES
    )


def _remove_hooks(module: nn.Module) -> None:
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), (AddNoise, WatchSequences)):
                for registry in (
                    hooks,
                    module._forward_hooks_always_called,
                    module._forward_hooks_with_kwargs,
                    module._forward_pre_hooks_with_kwargs,
                ):
                    registry.pop(key, None)
