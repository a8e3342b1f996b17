"""Memory that watches its use: what may be touched, what was written, and which threads are in each other's way."""

from dataclasses import dataclass

import numpy as np

NOBODY, SEVERAL = 0, -1  # threads and blocks count from 1


class MemoryFault(Exception):
    """An access that a GPU, or compute-sanitizer on one, would complain about."""


@dataclass(frozen=True)
class Threads:
    """Those that make an access: their number in the launch, their block's, and how many barriers that has passed."""

    thread: np.ndarray
    block: np.ndarray
    barriers: np.ndarray


class _LastAccess:
    """For each byte, which thread made the last access of a kind, of which block, and after how many of its barriers.

    Several threads since the block's last barrier are SEVERAL, and so are several blocks, of which no barrier orders any two.
    """

    def __init__(self, size: int) -> None:
        self.thread, self.block, self.time = (np.zeros(size, np.int32) for _ in range(3))

    def note(self, place: np.ndarray, threads: Threads) -> None:
        thread, block, now = (each[:, None] for each in (threads.thread, threads.block, threads.barriers))
        is_same_block = (self.block[place] == block) | (self.block[place] == NOBODY)
        is_ordered = is_same_block & ((self.time[place] < now) | (self.thread[place] == NOBODY))
        mine = np.where(is_ordered | (is_same_block & (self.thread[place] == thread)), thread, SEVERAL)
        my_block = np.where(is_same_block, block, SEVERAL)
        self.thread[place], self.block[place], self.time[place] = mine, my_block, now
        # Several threads of this very access: whoever came last has overwritten the others.
        self.block[place[self.block[place] != my_block]] = SEVERAL
        self.thread[place[self.thread[place] != mine]] = SEVERAL

    def is_in_the_way_of(self, place: np.ndarray, threads: Threads) -> np.ndarray:
        """Where no barrier of their block orders it and an access by `threads`."""
        thread, block, now = (each[:, None] for each in (threads.thread, threads.block, threads.barriers))
        is_unordered = (self.block[place] != block) | (self.time[place] == now)
        return (self.thread[place] != NOBODY) & (self.thread[place] != thread) & is_unordered


class Memory:
    """A run of bytes, in blocks' shared memory one after the other, each watched by itself.

    Two accesses of a byte by different threads, at least one of them a write, are a race unless a barrier of their block
    lies between them. Atomic additions race with plain accesses, and with those of other blocks, because the kernels say
    that they are atomic within the block only.
    """

    def __init__(
        self, name: str, data: np.ndarray, accessible: np.ndarray | None = None, *, shared: bool = False
    ) -> None:
        self.name, self.data, self.accessible, self.one_writer = name, data, accessible, not shared
        size = len(data)
        self.is_written = np.zeros(size, bool) if shared else None
        #: By stores and additions, a byte once where several threads write it at once, and 255 for more.
        self.times_written = np.zeros(size, np.uint8)
        self._reads, self._stores, self._additions = (_LastAccess(size) for _ in range(3))

    def _bytes(self, offset: np.ndarray, size: int, what: str) -> np.ndarray:  # [accesses, size]
        found = offset[:, None] + np.arange(size)
        outside = (offset < 0) | (offset > len(self.data) - size)
        if not outside.any() and self.accessible is not None:
            outside = ~self.accessible[found].all(1)
        if outside.any():
            raise MemoryFault(
                f"{what} of {size} bytes outside the elements of {self.name}, at byte {offset[outside][0]}"
            )
        return found

    def _check_race(self, place: np.ndarray, threads: Threads, what: str, others: dict[str, np.ndarray]) -> None:
        for other, races in others.items():
            if races.any():
                access, _ = np.argwhere(races)[0]
                raise MemoryFault(
                    f"{what} of {self.name} by thread {threads.thread[access] - 1} races with {other} by another, "
                    f"at byte {place[access, 0]}"
                )

    def load(self, offset: np.ndarray, size: int, threads: Threads) -> np.ndarray:  # uint8 [accesses, size]
        place = self._bytes(offset, size, "a read")
        if self.is_written is not None and not self.is_written[place].all():
            raise MemoryFault(f"a read of {self.name} before anything was written there")
        others = {
            "a write": self._stores.is_in_the_way_of(place, threads),
            "an addition": self._additions.is_in_the_way_of(place, threads),
        }
        self._check_race(place, threads, "a read", others)
        self._reads.note(place, threads)
        return self.data[place]

    def store(self, offset: np.ndarray, values: np.ndarray, threads: Threads) -> None:  # uint8 [accesses, size]
        place = self._bytes(offset, values.shape[1], "a write")
        others = {
            "a write": self._stores.is_in_the_way_of(place, threads),
            "an addition": self._additions.is_in_the_way_of(place, threads),
            "a read": self._reads.is_in_the_way_of(place, threads),
        }
        self._check_race(place, threads, "a write", others)
        self._note_write(self._stores, place, threads)
        self.data[place] = values
        # Triton lets threads that hold the same value write it to the same place in shared memory.
        several = self._stores.thread[place] == SEVERAL
        if several.any() and (self.one_writer or (self.data[place] != values).any()):
            raise MemoryFault(f"two threads write the same byte of {self.name} at once")

    def add(self, offset: np.ndarray, values: np.ndarray, threads: Threads) -> None:
        """Atomic additions of unsigned integers, within the block."""
        size = values.dtype.itemsize
        place = self._bytes(offset, size, "an addition")
        others = {
            "a write": self._stores.is_in_the_way_of(place, threads),
            "a read": self._reads.is_in_the_way_of(place, threads),
        }
        self._check_race(place, threads, "an addition", others)
        self._note_write(self._additions, place, threads)
        if (self._additions.block[place] == SEVERAL).any():
            raise MemoryFault(f"two blocks add to the same byte of {self.name}, but only atomically within a block")
        np.add.at(self.data.view(values.dtype), offset // size, values)

    def _note_write(self, kind: _LastAccess, place: np.ndarray, threads: Threads) -> None:
        kind.note(place, threads)
        self.times_written[place] = np.minimum(self.times_written[place], 254) + 1
        if self.is_written is not None:
            self.is_written[place] = True
