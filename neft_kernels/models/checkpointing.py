"""What the first pass of a checkpointed region had, so that the pass that backward recomputes has the same."""

import contextlib
import ctypes
import weakref
from collections import deque
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode
from torch.utils.checkpoint import _CachingTorchDispatchMode

__all__ = ["OFF", "FirstPasses", "in_backward", "outside_of_selective_checkpointing", "rng_state_of"]

#: Bytes of the state of PyTorch's CPU generator: its seed, its position and the first 128 of 624 words; and at the end, the
#: normally distributed numbers that it keeps for later.
_HEAD_OF_STATE, _TAIL_OF_STATE = 24 + 8 * 128, 40

#: The first pass had no noise.
OFF = object()


class FirstPasses:
    """The magnitude and the seed of forward passes, by their token ids and by the state of the generator.

    Activation checkpointing runs a region again inside backward. In that run the hooks of the modules around the region may
    not run, so the masks are unknown. Gradients may be enabled although they were disabled at first, and ``no_noise`` may have
    ended. Ids are known by their storage, because a region may look up a view of the ids that it is given. Several passes may
    look up the same ids; checkpointing restores the state of the generator, which tells them apart. Entries live as long as
    the ids, the last ones longer.
    """

    MOST_OF_A_STORAGE = 256
    MOST_RECENT = 8

    def __init__(self) -> None:
        self._by_storage: weakref.WeakKeyDictionary[Any, dict] = weakref.WeakKeyDictionary()
        self._recent: deque[Any] = deque(maxlen=self.MOST_RECENT)  # keeps the storages of the last passes alive

    def remember(self, ids: Tensor, rng_state: Hashable, noise: Any) -> None:
        """A first pass on `ids`, which began in `rng_state`, has `noise`: magnitude and seed, or OFF."""
        if type(ids) is not Tensor:  # it stands for others inside a transform or a trace
            return
        storage, place = ids.untyped_storage(), _place(ids)
        entries = self._by_storage.setdefault(storage, {})
        if noise is OFF and entries.get((place, rng_state), OFF) is not OFF:
            return  # a pass without noise leaves the state as it is, so the noisy one beside it counts
        entries.pop((place, rng_state), None)
        entries[place, rng_state] = noise
        if len(entries) > self.MOST_OF_A_STORAGE:
            del entries[next(iter(entries))]
        self._recent.append(storage)

    def recall(self, ids: Tensor, rng_state: Hashable, exactly: bool = False) -> Any:
        """What the first pass on `ids` had. None if there was none.

        `exactly`: only a pass that began in this `rng_state`. Otherwise the last pass on these ids counts if the generator was
        not restored.
        """
        if type(ids) is not Tensor:
            return None
        entries, place = self._by_storage.get(ids.untyped_storage(), {}), _place(ids)
        if (place, rng_state) in entries:
            return entries[place, rng_state]
        if not exactly:
            for (other, _), noise in reversed(entries.items()):
                if other == place:
                    return noise
        if rng_state is None:
            return None
        # The ids may have been copied in between, as save_on_cpu does it. Only here the host waits for the device.
        for storage, others in list(self._by_storage.items()):
            for (other, its_state), noise in reversed(others.items()):
                if its_state == rng_state and storage.device == ids.device:
                    original = torch.empty(0, dtype=ids.dtype, device=ids.device).set_(storage, *other)
                    if torch.equal(original, ids):
                        return noise
        return None

    def __reduce__(self) -> tuple:
        return FirstPasses, ()  # copies and pickles have nothing of the passes under way


def in_backward() -> bool:
    """Whether this runs inside backward, as the passes do that activation checkpointing recomputes."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def rng_state_of(device: torch.device) -> Hashable:
    """A value that differs between states of the default generator of `device`. None if it cannot be read without waiting."""
    if torch.compiler.is_compiling():
        return None
    if device.type == "cpu":
        state = torch.default_generator.get_state()
        begin, end = state.data_ptr(), state.data_ptr() + state.numel()
        return hash((ctypes.string_at(begin, _HEAD_OF_STATE), ctypes.string_at(end - _TAIL_OF_STATE, _TAIL_OF_STATE)))
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        generator = torch.cuda.default_generators[device.index or 0]
        return generator.initial_seed(), generator.get_offset()
    return None


def outside_of_selective_checkpointing() -> contextlib.AbstractContextManager:
    """Hides what runs inside from selective activation checkpointing, because a recomputed pass does not run it again.

    It stores the results of operations in the order in which they ran, and hands them out in that order.
    """
    if torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack():
        return contextlib.nullcontext()
    is_selective = isinstance(_get_current_dispatch_mode(), _CachingTorchDispatchMode)
    return _disable_current_modes() if is_selective else contextlib.nullcontext()


def _place(ids: Tensor) -> tuple[Any, torch.Size, tuple[int, ...]]:
    """Where in their storage `ids` lie."""
    return ids.storage_offset(), ids.shape, ids.stride()
