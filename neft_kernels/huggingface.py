"""Noise in the embeddings of Hugging Face models, and out again.

An embedding that is a plain ``nn.Embedding`` becomes a :class:`NEFTuneEmbedding` by a change of its class, in place: the
module, its name, its hooks, its parameters and their ties stay what they are. Any other embedding (scaled, wrapped,
quantised ...) keeps its own forward, and a forward hook adds the noise to what it returns.

The lengths of the sequences reach the embedding through hooks on the modules around it, which note the masks and positions
they are called with.
"""

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn

from neft_kernels import ops
from neft_kernels.modules import NO_SEQUENCES, AddNoise, NEFTuneEmbedding, Noise, NoiseSettings, Sequences

__all__ = ["EmbeddingReport", "Report", "describe", "no_noise", "replace_embeddings", "restore_embeddings"]

Model = TypeVar("Model", bound=nn.Module)


def replace_embeddings(
    model: Model,
    alpha: float = 5.0,
    *,
    scale_by: str = "sequence",
    stream: int | None = None,
    backend: str | None = None,
) -> Model:
    """Makes the token embeddings of `model` noisy while it trains (NEFTune, arXiv 2310.05914), in place.

    There is noise in training mode with gradients enabled, unless the model is generating; everything else is the untouched
    embedding. ``state_dict``, parameters, ties and names do not change. On a model whose embeddings are noisy already, the
    new settings replace the old ones.

    Args:
        model: a transformers model, a PEFT model, or any module with ``get_input_embeddings()`` or one ``nn.Embedding``.
        alpha: NEFTune's noise scale, >= 0; 5 to 15 in the paper.
        scale_by: "sequence" scales by each sequence's true length, from ``attention_mask``, ``position_ids`` or
            ``cu_seq_lens_q`` where the model is given them, and leaves padding alone; "batch" scales by the padded length,
            as the Hugging Face hook does.
        stream: which of the noise streams under one seed; None: the rank of this process, so that data-parallel replicas
            that are seeded alike draw different noise.
        backend: "triton", "cuda", "cpu" or "reference"; None takes the best for the embedding's device.

    Returns:
        `model` itself.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value, or `model` has no token embeddings that can be made
            noisy; the model is then unchanged.
        RuntimeError: the backend asked for cannot run here.
    """
    settings = NoiseSettings(alpha, scale_by, stream, backend)
    embeddings = _token_embeddings(model)
    if backend is not None:
        for device in {parameter.device.type for module in embeddings for parameter in module.parameters()}:
            ops.choose_backend(device, backend)

    restore_embeddings(model)
    for module in embeddings:
        noise = Noise(settings)
        if _is_plain(module):
            module.__class__ = NEFTuneEmbedding
            module.noise = noise  # type: ignore[assignment]
        elif isinstance(module, NEFTuneEmbedding):
            module.noise = noise
        else:
            module.register_forward_hook(AddNoise(noise))
    for module in _around(model, embeddings):
        watch = _WatchSequences(settings, _parameters_of_forward(module))
        module.register_forward_pre_hook(watch.enter, with_kwargs=True)
        module.register_forward_hook(watch.leave, always_call=True)
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
    settings = {id(noise.settings): noise.settings for _, _, noise in _noisy(model)}.values()
    before = [each.enabled for each in settings]
    try:
        for each in settings:
            each.enabled = False
        yield
    finally:
        for each, enabled in zip(settings, before, strict=True):
            each.enabled = enabled


# --- is it on? -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EmbeddingReport:
    """One noisy embedding, as :func:`describe` found it."""

    name: str
    module: str  # class of the module
    strategy: str  # "fused" or "add_noise"
    alpha: float
    scale_by: str
    stream: int | None
    backend: str
    state: str  # "on", or why there is no noise at this moment
    last_magnitude: tuple[float, float] | None  # smallest and largest of the last batch that had noise
    note: str

    def __str__(self) -> str:
        if self.last_magnitude is None:
            last = "no batch with noise yet"
        elif self.last_magnitude[0] == self.last_magnitude[1]:
            last = f"last batch within +-{self.last_magnitude[1]:.3g}"
        else:
            last = f"last batch within +-{self.last_magnitude[0]:.3g} to {self.last_magnitude[1]:.3g} by token"
        stream = "this rank" if self.stream is None else self.stream
        return (
            f"{self.name} ({self.module}): noise {self.state}; alpha={self.alpha:g} by {self.scale_by}, {self.strategy} on "
            f"backend {self.backend!r}, stream {stream}; {last}" + (f" [{self.note}]" if self.note else "")
        )


class Report(tuple[EmbeddingReport, ...]):
    """The noisy embeddings of a model; ``str()`` of it is for people."""

    def __str__(self) -> str:
        return (
            "\n".join(map(str, self)) or "no noisy embeddings: replace_embeddings(model) was not called, or was undone"
        )


def describe(model: nn.Module) -> Report:
    """Which embeddings of `model` are noisy, how, and whether the noise is on at this moment. Reads magnitudes back."""
    return Report(_report(name, module, noise) for name, module, noise in _noisy(model))


def _report(name: str, module: nn.Module, noise: Noise) -> EmbeddingReport:
    settings, last = noise.settings, noise.last_magnitude
    if isinstance(last, torch.Tensor):
        smallest, largest = (value.item() for value in last.aminmax())
        last_magnitude: tuple[float, float] | None = (smallest, largest)
    else:
        last_magnitude = None if last is None else (last, last)
    device = next((parameter.device.type for parameter in module.parameters()), "cpu")
    return EmbeddingReport(
        name=name or "(the model itself)",
        module=type(module).__name__,
        strategy="fused" if isinstance(module, NEFTuneEmbedding) else "add_noise",
        alpha=settings.alpha,
        scale_by=settings.scale_by,
        stream=settings.stream,
        backend=ops.choose_backend(device, settings.backend),
        state=noise.state(module.training),
        last_magnitude=last_magnitude,
        note=noise.note,
    )


def _noisy(model: nn.Module) -> Iterator[tuple[str, nn.Module, Noise]]:
    for name, module in model.named_modules():
        if isinstance(module, NEFTuneEmbedding) and module.noise is not None:
            yield name, module, module.noise
        for hook in module._forward_hooks.values():
            if isinstance(hook, AddNoise):
                yield name, module, hook.noise


# --- which embeddings ------------------------------------------------------------------------------------------------


def _token_embeddings(model: nn.Module) -> list[nn.Module]:
    """All token look-ups of `model`: its input embeddings, and whatever else looks up the same table.

    Encoder-decoder models keep the table in one module and look it up through others that are tied to it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    lookups = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    get_input_embeddings = getattr(model, "get_input_embeddings", None)
    if get_input_embeddings is None:
        if len(lookups) != 1:
            raise ValueError(
                f"model has no get_input_embeddings() and {len(lookups)} nn.Embedding modules, so its token embedding "
                "is not known; pass the module that holds just that one"
            )
        return list(lookups)
    main = get_input_embeddings()
    if not isinstance(main, nn.Module):
        raise ValueError(
            f"model.get_input_embeddings() of {type(model).__name__} returns {type(main).__name__}, not a module"
        )
    table = getattr(main, "weight", None)
    return [module for module in lookups if module.weight is table] or [main]


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


# --- what the forward pass knows of its sequences --------------------------------------------------------------------

_CACHES = ("past_key_values", "past_key_value", "cache_params")
_FROM_ARGUMENT = {
    "attention_mask": "attention_mask",
    "position_ids": "position_ids",
    "cu_seq_lens_q": "cu_seq_lens",
    "cu_seq_lens": "cu_seq_lens",
}


class _WatchSequences:
    """Hooks on a module around an embedding: what it is called with holds while its forward runs.

    The innermost module that takes an argument decides on it: a decoder's ``attention_mask`` is its own, not the encoder's.
    """

    def __init__(self, settings: NoiseSettings, parameters: tuple[str, ...]) -> None:
        self.settings = settings
        self.parameters = parameters
        self.outside: Sequences | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "outside": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> "_WatchSequences":
        # A module's hooks are copied before its submodules, so the embeddings below follow.
        return _WatchSequences(self.settings.own_copy(memo), self.parameters)

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = dict.fromkeys(self.parameters) | dict(zip(self.parameters, args, strict=False)) | kwargs
        known = {
            attribute: given[argument] if isinstance(given[argument], torch.Tensor) else None
            for argument, attribute in _FROM_ARGUMENT.items()
            if argument in given
        }
        generating = any(given.get(name) is not None for name in _CACHES)
        outside = self.outside = self.settings.sequences
        self.settings.sequences = replace(outside, **known, generating=outside.generating or generating)

    def leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.settings.sequences, self.outside = self.outside or NO_SEQUENCES, None


def _around(model: nn.Module, embeddings: list[nn.Module]) -> list[nn.Module]:
    """`model`, and the modules between it and its embeddings that are called with what tells lengths."""
    names = [name for name, module in model.named_modules(remove_duplicate=False) if module in embeddings]
    paths = {name.rsplit(".", depth)[0] for name in names for depth in range(1, name.count(".") + 1)}
    found = [model]
    for path in sorted(paths):
        module = model.get_submodule(path)
        if module not in found and set(_parameters_of_forward(module)) & {*_FROM_ARGUMENT, *_CACHES}:
            found.append(module)
    return found


def _parameters_of_forward(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(module.forward).parameters)


def _remove_hooks(module: nn.Module) -> None:
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(hook, AddNoise) or isinstance(getattr(hook, "__self__", None), _WatchSequences):
                for registry in (
                    hooks,
                    module._forward_hooks_always_called,
                    module._forward_hooks_with_kwargs,
                    module._forward_pre_hooks_with_kwargs,
                ):
                    registry.pop(key, None)
