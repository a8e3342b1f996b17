"""What the forward passes under way say of the sequences in their batches."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from neft_kernels import ops

__all__ = ["NO_SEQUENCES", "Passes", "Sequences", "is_recomputed"]


@dataclass(frozen=True)
class Sequences:
    """What a forward pass says of the sequences in its batch. Names and shapes are those of :func:`noise_magnitude`."""

    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    cu_seq_lens: Tensor | None = None
    labels: Tensor | None = None
    #: The token ids that the others are about, ``[..., L]``, as the model was given them.
    input_ids: Tensor | None = None
    #: A cache was passed, so tokens are being generated and get no noise.
    generating: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether nothing is told."""
        return self.input_ids is None and not self.generating and not any(self._given())

    def inside(self, known: dict[str, Tensor | None], input_ids: Tensor | None) -> "Sequences":
        """What holds inside a module that is called with `input_ids` and with what is `known`, None included.

        A module that is called with the very ids of the one around it need not be told again what is known of them.
        """
        if input_ids is not None and input_ids is self.input_ids:
            known = {name: value for name, value in known.items() if value is not None}
        return replace(self, **known)  # type: ignore[arg-type]

    def telling(self, tokens: Tensor, length: int) -> tuple[dict[str, Tensor], str]:
        """Those that :func:`noise_magnitude` can use for `tokens`, and a note on those that it cannot.

        `tokens` may be a part of rows of `length`; what is as long as the rows is about the whole of them.
        """
        kept, unusable = {}, []
        for name, value in self._given():
            if name == "attention_mask" and value.ndim == tokens.ndim and value.shape[-1] != length:
                value = value[..., -tokens.shape[-1] :]  # what comes before is about a cache, such as a prefix
            if self._tells(name, value, tokens, length):
                kept[name] = value
            else:
                unusable.append(
                    f"{name} of shape {list(value.shape)} does not tell the lengths of ids of shape {list(tokens.shape)}"
                )
        return kept, "; ".join(unusable)

    def _given(self) -> Iterator[tuple[str, Tensor]]:
        for name in ("attention_mask", "position_ids", "cu_seq_lens", "labels"):
            if (value := getattr(self, name)) is not None:
                yield name, value

    @staticmethod
    def _tells(name: str, value: Tensor, tokens: Tensor, length: int) -> bool:
        if value.device != tokens.device:
            return False
        if name == "cu_seq_lens":
            return tokens.numel() == tokens.shape[-1] and value.ndim == 1 and 2 <= value.shape[0] <= length + 1
        rows = tokens.shape[:-1]
        if value.ndim == 0 or value.shape[-1] not in (tokens.shape[-1], length):
            return False
        return value.shape[:-1] == rows or (name == "position_ids" and ops.broadcasts(value.shape[:-1], rows))


NO_SEQUENCES = Sequences()


@dataclass(frozen=True)
class _Pass:
    """A module's forward pass under way."""

    sequences: Sequences
    owner: object
    outside: "_Pass | None"
    traced: bool  # by a compiler: in the graph's own passes, of whatever thread
    reached_before: int | None  # how often embeddings had been reached when it began; None: it need not reach any


class Passes:
    """The forward passes of one model that are under way, each thread's own: several may run the model at once."""

    def __init__(self) -> None:
        self._of_thread: dict[int, _Pass] = {}
        # Of the last one that began, in whatever thread: a compiled graph cannot tell threads apart.
        self._last: _Pass | None = None
        #: How often noisy embeddings have been reached, and whether one was inside of a graph, which cannot count.
        self._reached, self._reached_in_graph = 0, False
        #: Whether the last pass that had to reach a noisy embedding reached none.
        self.missed = False

    @property
    def sequences(self) -> Sequences:
        """What the innermost pass of this thread says."""
        innermost = self._innermost()
        return NO_SEQUENCES if innermost is None else innermost.sequences

    @property
    def in_compiled_model(self) -> bool:
        """Whether the outermost pass of this thread is that of a compiled model, which counts no passes."""
        outermost = self._innermost()
        while outermost is not None and outermost.outside is not None:
            outermost = outermost.outside
        return outermost is not None and outermost.traced

    def reach(self) -> None:
        """A noisy embedding begins its pass."""
        if torch.compiler.is_compiling():
            self._reached_in_graph = True
        else:
            self._reached += 1

    def begin(self, owner: object, sequences: Sequences, must_reach: bool = False) -> None:
        """`owner` begins a pass, inside those that have begun and not ended; whether it must reach a noisy embedding."""
        reached = self._reached if must_reach else None
        self._set(_Pass(sequences, owner, self._innermost(), torch.compiler.is_compiling(), reached))

    def end(self, owner: object) -> bool:
        """The innermost pass of `owner` ends, and with it all inside of it. Whether it missed what it had to reach."""
        innermost = self._innermost()
        while innermost is not None and innermost.owner is not owner:
            innermost = innermost.outside
        if innermost is None:
            return False
        self._set(innermost.outside)
        if innermost.reached_before is None:
            return False
        self.missed = innermost.reached_before == self._reached and not self._reached_in_graph
        return self.missed

    def _innermost(self) -> _Pass | None:
        last = self._last
        if torch.compiler.is_compiling():
            return last
        own = self._of_thread.get(threading.get_ident())
        # What a compiled module calls outside of its graph is inside of the graph's pass.
        return last if own is None and last is not None and last.traced else own

    def _set(self, innermost: _Pass | None) -> None:
        self._last = innermost
        if torch.compiler.is_compiling():
            return
        if innermost is None or innermost.traced:
            self._of_thread.pop(threading.get_ident(), None)
        else:
            self._of_thread[threading.get_ident()] = innermost

    def __reduce__(self) -> tuple:
        """A copy or a pickle has nothing of the passes under way."""
        return Passes, ()


def is_recomputed() -> bool:
    """Whether this pass runs inside of backward, as activation checkpointing does it."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
