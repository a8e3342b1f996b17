"""What the first pass of a checkpointed region had, so that the pass that backward recomputes has the same."""

import weakref
from typing import Any

import torch
from torch import Tensor

__all__ = ["OFF", "FirstPasses"]

#: The first pass had no noise.
OFF = object()


class FirstPasses:
    """The magnitude and the seed of forward passes, by the storage of their token ids.

    Activation checkpointing runs a region again inside backward. In that run the hooks of the modules around the region may
    not run, so the masks are unknown. Gradients may be enabled although they were disabled at first, and ``no_noise`` may have
    ended. The storage of the ids is the key, because a region may look up a view of the ids that it is given. An entry lives
    as long as its ids; the last one lives until the next pass.
    """

    def __init__(self) -> None:
        self._by_storage: weakref.WeakKeyDictionary[Any, dict] = weakref.WeakKeyDictionary()
        self._last: tuple[Tensor, Any] | None = None  # ids and noise of the last pass

    def remember(self, ids: Tensor, noise: Any) -> None:
        """A first pass on `ids` has `noise`: magnitude and seed, or OFF."""
        if type(ids) is Tensor:  # not one that stands for others inside a transform or a trace
            self._by_storage.setdefault(ids.untyped_storage(), {})[ids.storage_offset(), ids.numel()] = noise
            self._last = ids, noise

    def recall(self, ids: Tensor) -> Any:
        """What the first pass on `ids` had. None if there was none.

        Ids that were copied in between, as ``save_on_cpu`` does it, are compared with those of the last pass by value. Only
        then the host waits for the device.
        """
        if type(ids) is not Tensor:
            return None
        noise = self._by_storage.get(ids.untyped_storage(), {}).get((ids.storage_offset(), ids.numel()))
        if noise is None and self._last is not None:
            last, noise_of_last = self._last
            if last.numel() == ids.numel() and last.device == ids.device and torch.equal(last.flatten(), ids.flatten()):
                return noise_of_last
        return noise

    def __reduce__(self) -> tuple:
        return FirstPasses, ()  # copies and pickles have nothing of the passes under way
