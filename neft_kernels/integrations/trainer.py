"""Noise for the time of a training run: a callback for the Trainer, and the Trainer's own option on our kernels.

Importing this module imports transformers. It works with transformers 4.40 and newer.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import transformers
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from neft_kernels.models.lookups import input_embeddings
from neft_kernels.models.model_noise import ModelNoise
from neft_kernels.models.options import AlphaSchedule, NoiseOptions
from neft_kernels.models.replace import check_unshared, noisy_modules, replace_embeddings, restore_embeddings, set_alpha
from neft_kernels.models.switch import HOOK_ATTRIBUTE
from neft_kernels.ops.backends import logger

__all__ = ["NEFTuneCallback", "patch_transformers"]


#: Callbacks to run when the current ``Trainer.train`` ends.
_training: ContextVar[contextlib.ExitStack | None] = ContextVar("_training", default=None)


class _TrainingNoise:
    """The noise of one training run at a time. The Trainer takes it for the handle of a hook, and calls :meth:`remove`."""

    def __init__(self, asked_by: str) -> None:
        self.asked_by = asked_by
        self.model: nn.Module | None = None

    def begin(self, model: nn.Module, alpha: float | Callable[[int], float], options: dict[str, Any]) -> None:
        """Makes `model` noisy until :meth:`remove`, or until the Trainer's ``train`` ends."""
        self.remove()  # auto_find_batch_size begins anew, with no end in between
        check_unshared(model)
        if any(noisy_modules(model)):
            logger.warning("%s does nothing, because replace_embeddings() made the model noisy already", self.asked_by)
            return
        replace_embeddings(model, alpha, **options)
        self.model = model
        training = _training.get()
        if training is not None:
            training.callback(self.remove)

    def remove(self) -> None:
        """Makes the model plain again; a second time, nothing."""
        if self.model is not None:
            restore_embeddings(self.model)
            self.model = None


class NEFTuneCallback(TrainerCallback):
    """Makes the model's token embeddings noisy when training begins, and plain again when it ends, fails or is interrupted.

    ::

        trainer = Trainer(model, args, ..., callbacks=[NEFTuneCallback(alpha=5.0)])

    It leaves alone, with a warning, a model that is noisy already and a Trainer whose ``neftune_noise_alpha`` is set: no
    token ever gets noise twice. So that an exception in ``Trainer.train`` restores the model too, the first callback made
    wraps that method. A callback that is removed during training leaves the noise on until training ends;
    ``set_alpha(model, 0)`` turns it off at once.

    Args:
        alpha: NEFTune's noise scale, >= 0, or a schedule: a callable that is given the Trainer's global step.
        options: the other arguments of :func:`neft_kernels.replace_embeddings`, such as ``scale_by`` or ``sequence_group``.

    Raises:
        TypeError, ValueError: as :func:`neft_kernels.replace_embeddings`; what is wrong with the model, when training begins.
    """

    def __init__(self, alpha: float | Callable[[int], float] = 5.0, **options: Any) -> None:
        _check_options(alpha, options)
        self.alpha = alpha
        self.options = options
        self.noise = _TrainingNoise("NEFTuneCallback")
        _wrap_train()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if getattr(args, "neftune_noise_alpha", None) is not None:
            logger.warning(
                "NEFTuneCallback does nothing, because neftune_noise_alpha is set as well; unset one of them"
            )
        else:
            self.noise.begin(kwargs["model"], self.alpha, self.options)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.noise.model is not None and callable(self.alpha):
            set_alpha(self.noise.model, self.alpha, step=state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.noise.remove()


class patch_transformers:
    """Makes the Trainer's own ``neftune_noise_alpha`` run on our kernels: TRL, axolotl, LLaMA-Factory.

    ::

        patch_transformers()                      # from here on
        with patch_transformers(): ...            # or only in here

    Call it in the process that trains. Commands such as ``axolotl train`` and ``swift sft`` train in a child process:
    ``neft-kernels run axolotl train config.yaml`` patches that as well.

    Unlike the Trainer's own hook the noise also ends when training fails. Options are those of
    :func:`neft_kernels.replace_embeddings`; calling it again replaces them. :meth:`undo` brings back what was there before.
    """

    _active: "list[patch_transformers]" = []  # noqa: RUF012
    _originals: tuple[Callable, Callable]

    def __init__(self, **options: Any) -> None:
        owner, _ = _own_hook()
        _check_options(0.0, options)
        self.options = options
        if not patch_transformers._active:
            functions = (
                (_activate, _deactivate) if owner is transformers.trainer else (_activate_method, _deactivate_method)
            )
            patch_transformers._originals = _replace_own_hook(functions)
        patch_transformers._active.append(self)
        _wrap_train()

    def undo(self) -> None:
        """Takes this patch back, in any order with others; a second time, nothing."""
        if self in patch_transformers._active:
            patch_transformers._active.remove(self)
            if not patch_transformers._active:
                _replace_own_hook(patch_transformers._originals)

    def __enter__(self) -> "patch_transformers":
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def _activate(model: nn.Module, neftune_noise_alpha: float, accelerator: Any = None) -> _TrainingNoise:
    """Replaces ``activate_neftune`` of transformers 5.2 and newer. Its options are those of the newest patch."""
    noise = _TrainingNoise("neftune_noise_alpha")
    noise.begin(_unwrapped(model, accelerator), neftune_noise_alpha, patch_transformers._active[-1].options)
    return noise


def _deactivate(model: nn.Module, hook_handle: _TrainingNoise, accelerator: Any = None) -> None:
    hook_handle.remove()
    embedding, _ = input_embeddings(_unwrapped(model, accelerator))
    if embedding is not None:
        embedding.__dict__.pop(HOOK_ATTRIBUTE, None)  # some trainers set it without registering the hook


def _unwrapped(model: nn.Module, accelerator: Any) -> nn.Module:
    return model if accelerator is None else accelerator.unwrap_model(model)


def _activate_method(trainer: Any, model: nn.Module) -> nn.Module:
    """Replaces the Trainer's ``_activate_neftune`` of older transformers."""
    trainer.neftune_hook_handle = _activate(model, trainer.neftune_noise_alpha, trainer.accelerator)
    return model


def _deactivate_method(trainer: Any, model: nn.Module) -> None:
    _deactivate(model, trainer.neftune_hook_handle, trainer.accelerator)


def _own_hook() -> tuple[Any, tuple[str, str]]:
    """Where transformers puts its own hook on and takes it off: the module and the names of two functions.

    Before 5.2 it is the Trainer and two of its methods.
    """
    for owner, prefix in ((transformers.trainer, ""), (transformers.Trainer, "_")):
        names = f"{prefix}activate_neftune", f"{prefix}deactivate_neftune"
        if all(hasattr(owner, name) for name in names):
            return owner, names
    raise RuntimeError(f"patch_transformers needs transformers 4.40 or newer, not {transformers.__version__}")


def _replace_own_hook(functions: tuple[Callable, Callable]) -> tuple[Callable, Callable]:
    """Puts `functions` in the place of the hook's, which are returned."""
    owner, names = _own_hook()
    before = getattr(owner, names[0]), getattr(owner, names[1])
    for name, function in zip(names, functions, strict=True):
        setattr(owner, name, function)
    return before


def _check_options(alpha: float | Callable[[int], float], options: dict[str, Any]) -> None:
    """Raises what replace_embeddings() would raise later, whatever the model."""
    inspect.signature(replace_embeddings).bind(None, alpha, **options)
    ModelNoise(NoiseOptions(**options), AlphaSchedule(alpha))


def _wrap_train() -> None:
    """Wraps ``Trainer.train``, once, so that its model is plain again however it ends, also if the callback was removed."""
    train = transformers.Trainer.train
    if hasattr(train, "_neft_kernels"):
        return

    @functools.wraps(train)
    def wrapped(self: transformers.Trainer, *args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as training:
            token = _training.set(training)
            training.callback(_training.reset, token)
            return train(self, *args, **kwargs)

    wrapped._neft_kernels = True  # type: ignore[attr-defined]
    transformers.Trainer.train = wrapped  # type: ignore[method-assign]
