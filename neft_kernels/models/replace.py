"""Puts noise into the embeddings of a model, and takes it out again.

A plain ``nn.Embedding`` becomes a :class:`NEFTuneEmbedding` by a change of its class, in place. The module, its name, hooks,
parameters and ties stay what they are. Any other embedding (scaled, wrapped, quantised ...) keeps its own forward, and a
forward hook adds the noise to its output. Hooks on the modules around the embeddings read the batch, see
:mod:`neft_kernels.models.passes`.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar

from torch import nn
from torch.nn.parallel import DataParallel

from neft_kernels.models.embedding import NEFTuneEmbedding, NoiseHook
from neft_kernels.models.lookups import check_model, is_encoder_decoder, is_plain, token_embeddings
from neft_kernels.models.model_noise import ModelNoise
from neft_kernels.models.noise import EmbeddingNoise
from neft_kernels.models.options import AlphaSchedule, NoiseOptions
from neft_kernels.models.passes import BatchHook, modules_around
from neft_kernels.models.switch import warn_of_other_noise
from neft_kernels.ops.backends import choose_backend, logger

if TYPE_CHECKING:
    from neft_kernels.models.sharding import Group

__all__ = ["no_noise", "noisy_modules", "replace_embeddings", "restore_embeddings", "set_alpha"]

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
    under_no_grad: bool = False,
    argument_names: Mapping[str, str] | None = None,
    noise: str = "uniform",
    symmetric: bool = False,
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
            as the Hugging Face hook does; with "rms" `alpha` is itself the ratio of the noise to the embeddings, such as 0.05,
            as root mean squares, whatever the length. The embeddings are measured in the first pass in training.
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
        under_no_grad: True adds noise in training mode also where gradients are disabled. For methods that run a pass
            twice under one state of the random number generator, first without gradients: GradCache, the cached losses of
            sentence-transformers, reentrant activation checkpointing around the embedding. Both passes then have the same
            noise. The default leaves the reference and rollout passes of DPO, KTO and GRPO without noise.
        argument_names: for a model whose forward has its own names for ``input_ids``, ``attention_mask``, ``position_ids``,
            ``cu_seq_lens`` or ``labels``: its name of each, as ``{"attention_mask": "mask", "position_ids": "input_pos"}``.
        noise: "uniform", "sign" or "gaussian", as in :func:`neft_kernels.noisy_embedding`. Sign noise is that of SymNoise,
            and sqrt(3) times as strong as the others at the same alpha.
        symmetric: True doubles each batch in training where the model begins, as in SymNoise (arXiv 2312.01523). The second
            half gets the noise of the first with the other sign, and the loss is the mean over both. The other outputs are
            those of the first half. The model has to be given labels. A step takes twice the computation and memory.

    Returns:
        `model` itself.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value, or `model` has no token embeddings that can be made
            noisy; the model is then unchanged.
        RuntimeError: the backend asked for cannot run here.
    """
    options = NoiseOptions(
        scale_by=scale_by,
        noise_on=noise_on,
        stream=stream,
        backend=backend,
        sequence_group=sequence_group,
        sequence_layout=sequence_layout,
        under_no_grad=under_no_grad,
        argument_names=argument_names,
        noise=noise,
        symmetric=symmetric,
    )
    model_noise = ModelNoise(options, AlphaSchedule(alpha), for_whole_model=True)
    embeddings, note = token_embeddings(model)
    if noise_on != "all" and is_encoder_decoder(model):
        raise ValueError(f"noise_on={noise_on!r} is for decoder-only models: here labels are not about input_ids")
    if symmetric and any(isinstance(module, DataParallel) for module in model.modules()):
        raise ValueError(
            "symmetric=True does not work on a DataParallel, which would split the doubled batch; call replace_embeddings() "
            "on the model inside"
        )
    if backend is not None:
        for device in {parameter.device.type for module in embeddings for parameter in module.parameters()}:
            choose_backend(device, backend)

    around = modules_around(model, embeddings, options)
    names = {module: name for name, module in model.named_modules()}
    before = _noise_of(model)
    check_unshared(model)
    contexts = (count for paused, count in _paused.items() if paused in names or model in paused.modules())
    model_noise.pause(max([sum(contexts), *(each.paused for each in before)]))

    restore_embeddings(model)
    for module in embeddings:
        _put_in(module, EmbeddingNoise(model_noise, names[module], note))
    logger.info("%s: noise goes into %s", type(model).__name__, ", ".join(names[module] for module in embeddings))
    if note:
        logger.warning("%s: %s", type(model).__name__, note)
    for module in around:
        BatchHook(model_noise, module).attach(module)
    return model


def check_unshared(model: nn.Module) -> None:
    """Raises ValueError if an embedding of `model` already belongs to another noisy model."""
    for noise in _noise_of(model):
        if (owner := _other_owner(model, noise)) is not None:
            raise ValueError(
                f"model shares an embedding with a {type(owner).__name__} that is noisy already; call restore_embeddings() "
                "on that one first, or replace_embeddings() on a module that holds both"
            )


def _other_owner(model: nn.Module, noise: ModelNoise) -> nn.Module | None:
    """A module beside `model` whose batches scale `noise`; neither is a part of the other."""
    inside = set(model.modules())
    beside = (around for around in noise.around if around not in inside and model not in around.modules())
    return next(beside, None)


def _put_in(module: nn.Module, noise: EmbeddingNoise) -> None:
    noise.model_noise.embeddings.add(module)
    if is_plain(module):
        module.__class__ = NEFTuneEmbedding
        module.noise = noise  # type: ignore[assignment]
    elif isinstance(module, NEFTuneEmbedding):
        module.noise = noise
    else:
        NoiseHook(noise).attach(module)
        for submodule in module.modules():
            if isinstance(submodule, NEFTuneEmbedding):  # built by the user; the hook around it adds the noise now
                submodule.noise = None
    warn_of_other_noise(noise, module)


def restore_embeddings(model: Model) -> Model:
    """Undoes :func:`replace_embeddings`; a model that it did not touch stays as it is. Returns `model` itself."""
    check_model(model)
    noise = _noise_of(model)
    others = {id(each) for each in noise if _other_owner(model, each) is not None}
    for module in model.modules():
        _take_out(module, others)
    for each in noise:
        if not each.embeddings:  # its hooks on modules around `model` have nothing left to tell
            for around in list(each.around):
                _take_out(around, others)
    return model


def _take_out(module: nn.Module, others: set[int]) -> None:
    """Undoes :func:`_put_in` and the hooks around, except for the noise of `others`."""
    if isinstance(module, NEFTuneEmbedding) and (module.noise is None or id(module.noise.model_noise) not in others):
        if module.noise is not None:
            module.noise.model_noise.embeddings.discard(module)
        if type(module) is NEFTuneEmbedding and not {"built_in_noise", "forward"} & module.__dict__.keys():
            module.__class__ = nn.Embedding  # type: ignore[assignment]
            del module.noise
        else:
            # Keep the class if the user built the module noisy, fully_shard() derived a class from ours, or accelerate
            # replaced its forward.
            module.noise = module.__dict__.get("built_in_noise")
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key, hook in list(hooks.items()):
            owner = getattr(hook, "__self__", None)
            if not isinstance(owner, (NoiseHook, BatchHook)):
                continue
            model_noise = owner.model_noise if isinstance(owner, BatchHook) else owner.noise.model_noise
            if id(model_noise) in others:
                continue
            members = model_noise.around if isinstance(owner, BatchHook) else model_noise.embeddings
            members.discard(module)
            for registry in (
                hooks,
                module._forward_hooks_always_called,
                module._forward_hooks_with_kwargs,
                module._forward_pre_hooks_with_kwargs,
            ):
                registry.pop(key, None)


def noisy_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, EmbeddingNoise]]:
    """Name, module and noise of each noisy embedding."""
    check_model(model)
    for name, module in model.named_modules():
        if isinstance(module, NEFTuneEmbedding) and module.noise is not None:
            yield name, module, module.noise
        for hook in module._forward_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, NoiseHook):
                yield name, module, owner.noise


def _noise_of(model: nn.Module) -> list[ModelNoise]:
    """The noise of all noisy embeddings of `model`, each once."""
    return list({id(noise.model_noise): noise.model_noise for _, _, noise in noisy_modules(model)}.values())


@contextlib.contextmanager
def no_noise(model: nn.Module) -> Iterator[None]:
    """Within this context the embeddings of `model` are the plain ones, in training mode too."""
    _paused[model] = _paused.get(model, 0) + 1
    before = _noise_of(model)
    try:
        for each in before:
            each.pause(1)
        yield
    finally:
        _paused[model] -= 1
        for each in {*before, *_noise_of(model)}:
            each.pause(-1)


#: The number of active no_noise() contexts of each model. replace_embeddings() reads it, because it may be called inside one.
_paused: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


def set_alpha(model: nn.Module, alpha: float | Callable[[int], float], *, step: int | None = None) -> None:
    """Changes alpha of the noisy embeddings of `model`; a compiled model is compiled again at most once for it.

    Args:
        model: a model that :func:`replace_embeddings` made noisy.
        alpha: the new noise scale, >= 0, or a schedule of the step.
        step: the step that a schedule is at, until it is told again; None: forward passes are counted.

    Raises:
        TypeError, ValueError: `alpha` is no number >= 0, or `model` has no noisy embeddings.
    """
    found = {noise.model_noise: module for _, module, noise in noisy_modules(model)}
    if not found:
        raise ValueError("model has no noisy embeddings; call replace_embeddings(model) first")
    for each, module in found.items():
        each.alpha.set(alpha, step, device=next((table.device for table in module.parameters()), None))
