"""Memory that watches its use: what may be touched, what was written, and which threads are in each other's way."""

from dataclasses import dataclass

import numpy as np

NOBODY = 0  # threads count from 1 here


class MemoryFault(Exception):
    """An access that a GPU, or compute-sanitizer on one, would complain about."""


@dataclass(frozen=True)
class Threads:
    """Those that make an access: their number in the launch, their block's, and how many barriers that has passed."""

    thread: np.ndarray
    block: np.ndarray
    barriers: np.ndarray


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
        self.times_written = np.zeros(size, np.uint8)
        # Who wrote and who read last, and when; several readers since the last barrier count as -1.
        self._writer, self._reader = np.zeros(size, np.int32), np.zeros(size, np.int32)
        self._write_block, self._read_block = np.zeros(size, np.int32), np.zeros(size, np.int32)
        self._write_time, self._read_time = np.zeros(size, np.int32), np.zeros(size, np.int32)
        self._by_atomic = np.zeros(size, bool)

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

    def _check_race(self, place: np.ndarray, threads: Threads, what: str, *, with_readers: bool, atomic: bool) -> None:
        thread, block, now = (each[:, None] for each in (threads.thread, threads.block, threads.barriers))
        pairs = [("a write", self._writer, self._write_block, self._write_time)]
        if with_readers:
            pairs.append(("a read", self._reader, self._read_block, self._read_time))
        for other_what, others, blocks, times in pairs:
            other = others[place]
            races = (other != NOBODY) & (other != thread) & ((blocks[place] != block) | (times[place] == now))
            if atomic and others is self._writer:
                races &= ~(self._by_atomic[place] & (blocks[place] == block))
            if races.any():
                access, _ = np.argwhere(races)[0]
                raise MemoryFault(
                    f"{what} of {self.name} by thread {threads.thread[access] - 1} races with {other_what} by another, "
                    f"at byte {place[access, 0]}"
                )

    def load(self, offset: np.ndarray, size: int, threads: Threads) -> np.ndarray:  # uint8 [accesses, size]
        place = self._bytes(offset, size, "a read")
        if self.is_written is not None and not self.is_written[place].all():
            raise MemoryFault(f"a read of {self.name} before anything was written there")
        self._check_race(place, threads, "a read", with_readers=False, atomic=False)
        thread, block, now = (each[:, None] for each in (threads.thread, threads.block, threads.barriers))
        # Whoever reads what another thread has read since the last barrier makes it several.
        last = self._reader[place]
        alone = (
            (last == NOBODY) | (last == thread) | ((self._read_block[place] == block) & (self._read_time[place] < now))
        )
        self._read_block[place], self._read_time[place] = block, now
        mine = np.where(alone, thread, -1)
        self._reader[place] = mine
        shared = self._reader[place] != mine  # by threads of this very access
        self._reader[place[shared]] = -1
        return self.data[place]

    def store(self, offset: np.ndarray, values: np.ndarray, threads: Threads) -> None:  # uint8 [accesses, size]
        place = self._bytes(offset, values.shape[1], "a write")
        self._check_race(place, threads, "a write", with_readers=True, atomic=False)
        self._note_write(place, threads, atomic=False)
        self.data[place] = values
        # Triton lets threads that hold the same value write it to the same place in shared memory.
        several = self._writer[place] != threads.thread[:, None]
        if several.any() and (self.one_writer or (self.data[place] != values).any()):
            raise MemoryFault(f"two threads write the same byte of {self.name} at once")

    def add(self, offset: np.ndarray, values: np.ndarray, threads: Threads) -> None:
        """Atomic additions of unsigned integers, within the block."""
        size = values.dtype.itemsize
        place = self._bytes(offset, size, "an addition")
        self._check_race(place, threads, "an addition", with_readers=True, atomic=True)
        self._note_write(place, threads, atomic=True)
        if (self._write_block[place] != threads.block[:, None]).any():
            raise MemoryFault(f"two blocks add to the same byte of {self.name}, but only atomically within a block")
        np.add.at(self.data.view(values.dtype), offset // size, values)

    def _note_write(self, place: np.ndarray, threads: Threads, *, atomic: bool) -> None:
        self._writer[place] = threads.thread[:, None]
        self._write_block[place] = threads.block[:, None]
        self._write_time[place] = threads.barriers[:, None]
        self._by_atomic[place] = atomic
        self.times_written[place] += 1  # a byte once, also where several threads add to it
        if self.is_written is not None:
            self.is_written[place] = True
