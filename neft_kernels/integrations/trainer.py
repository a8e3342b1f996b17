"""Noise for the time of a training run: a callback for the Trainer, and the Trainer's own option on our kernels.

Importing this module imports transformers.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import transformers
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from neft_kernels.models.options import AlphaSchedule, NoiseOptions
from neft_kernels.models.replace import noisy_modules, replace_embeddings, restore_embeddings, set_alpha
from neft_kernels.ops.backends import logger

__all__ = ["NEFTuneCallback", "patch_transformers"]


class _Replacement:
    """The embeddings of one model, noisy until :meth:`remove`; like the handle of a hook."""

    def __init__(self, model: nn.Module, alpha: float | Callable[[int], float], options: dict[str, Any]) -> None:
        self.model: nn.Module | None = model
        replace_embeddings(model, alpha, **options)

    @classmethod
    def of_nothing(cls) -> "_Replacement":
        """A handle that has nothing to undo."""
        handle = cls.__new__(cls)
        handle.model = None
        return handle

    def remove(self) -> None:
        """Undoes it; a second time, nothing."""
        if self.model is not None:
            restore_embeddings(self.model)
            self.model = None


class NEFTuneCallback(TrainerCallback):
    """Makes the model's token embeddings noisy when training begins, and plain again when it ends, fails or is interrupted.

    ::

        trainer = Trainer(model, args, ..., callbacks=[NEFTuneCallback(alpha=5.0)])

    It leaves alone, with a warning, a model that is noisy already and a Trainer whose ``neftune_noise_alpha`` is set: no
    token ever gets noise twice. So that an exception in ``Trainer.train`` restores the model too, the first callback made
    wraps that method.

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
        self.replacement: _Replacement | None = None
        _restore_when_training_fails()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        if getattr(args, "neftune_noise_alpha", None) is not None:
            logger.warning(
                "NEFTuneCallback does nothing, because neftune_noise_alpha is set as well; unset one of them"
            )
        elif any(noisy_modules(model)):
            logger.warning("NEFTuneCallback does nothing, because replace_embeddings() made the model noisy already")
        else:
            self.replacement = _Replacement(model, self.alpha, self.options)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.replacement is not None and self.replacement.model is not None and callable(self.alpha):
            set_alpha(self.replacement.model, self.alpha, step=state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.replacement is not None:
            self.replacement.remove()
            self.replacement = None


class patch_transformers:
    """Makes the Trainer's own ``neftune_noise_alpha`` run on our kernels, with no other change: TRL, axolotl, LLaMA-Factory.

    ::

        patch_transformers()                      # from here on
        with patch_transformers(): ...            # or only in here

    Unlike the Trainer's own hook it also goes away when training fails. Options are those of
    :func:`neft_kernels.replace_embeddings`; calling it again replaces them. :meth:`undo` brings back what was there before.
    """

    _active: "list[patch_transformers]" = []  # noqa: RUF012
    _originals: tuple[Callable, Callable]

    def __init__(self, **options: Any) -> None:
        if not hasattr(transformers.trainer, "activate_neftune"):
            raise RuntimeError(
                f"patch_transformers needs transformers 5 or newer, not {transformers.__version__}; use NEFTuneCallback"
            )
        _check_options(0.0, options)
        self.options = options
        if not patch_transformers._active:
            patch_transformers._originals = (
                transformers.trainer.activate_neftune,
                transformers.trainer.deactivate_neftune,
            )
        patch_transformers._active.append(self)
        self._install()
        _restore_when_training_fails()

    def undo(self) -> None:
        """Takes this patch back, in any order with others; a second time, nothing."""
        if self in patch_transformers._active:
            patch_transformers._active.remove(self)
            self._install()

    @staticmethod
    def _install() -> None:
        if patch_transformers._active:
            newest = patch_transformers._active[-1]
            functions: tuple[Callable, Callable] = (newest._activate, newest._deactivate)
        else:
            functions = patch_transformers._originals
        transformers.trainer.activate_neftune, transformers.trainer.deactivate_neftune = functions

    def __enter__(self) -> "patch_transformers":
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def _activate(self, model: nn.Module, neftune_noise_alpha: float, accelerator: Any = None) -> _Replacement:
        model = _unwrapped(model, accelerator)
        if any(noisy_modules(model)):
            logger.warning(
                "neftune_noise_alpha does nothing, because replace_embeddings() made the model noisy already"
            )
            return _Replacement.of_nothing()
        return _Replacement(model, neftune_noise_alpha, self.options)

    def _deactivate(self, model: nn.Module, hook_handle: Any, accelerator: Any = None) -> None:
        hook_handle.remove()


def _check_options(alpha: float | Callable[[int], float], options: dict[str, Any]) -> None:
    """Raises what replace_embeddings() would raise later, whatever the model."""
    inspect.signature(replace_embeddings).bind(None, alpha, **options)
    AlphaSchedule(alpha)
    NoiseOptions(**options)


def _unwrapped(model: nn.Module, accelerator: Any) -> nn.Module:
    return model if accelerator is None else accelerator.unwrap_model(model)


def _restore_when_training_fails() -> None:
    """Wraps ``Trainer.train``, once, so that what it made noisy is plain again however it ends."""
    train = transformers.Trainer.train
    if hasattr(train, "_neft_kernels"):
        return

    @functools.wraps(train)
    def wrapped(self: transformers.Trainer, *args: Any, **kwargs: Any) -> Any:
        try:
            return train(self, *args, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, NEFTuneCallback):
                    callback.on_train_end(self.args, self.state, self.control)
            if isinstance(getattr(self, "neftune_hook_handle", None), _Replacement):
                self.neftune_hook_handle.remove()

    wrapped._neft_kernels = True  # type: ignore[attr-defined]
    transformers.Trainer.train = wrapped  # type: ignore[method-assign]
