"""What the stand-in for a GPU has for torch.cuda's generator, events, streams and graphs."""

import struct
import time
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from helpers import independent


class Generator:
    """The device's default generator, which draws one integer of 64 bits as PyTorch's kernel does. All other random numbers
    of the device are drawn from the CPU's generator."""

    def __init__(self, device: Any) -> None:
        self.device, self.seed, self.offset = device, torch.initial_seed(), 0

    def initial_seed(self) -> int:
        self._check()
        return self.seed

    def get_offset(self) -> int:
        self._check()
        return self.offset

    def set_offset(self, offset: int) -> None:
        self._check()
        assert offset % 4 == 0, "offset must be a multiple of 4"
        self.offset = offset

    def manual_seed(self, seed: int) -> None:
        self.seed, self.offset = seed % (1 << 64), 0

    def get_state(self) -> Tensor:
        self._check()
        numbers = torch.frombuffer(bytearray(struct.pack("<QQ", self.seed, self.offset)), dtype=torch.uint8)
        return torch.cat([numbers, torch.get_rng_state()])

    def set_state(self, state: Tensor) -> None:
        self.seed, self.offset = struct.unpack("<QQ", bytes(state[:16].tolist()))
        torch.set_rng_state(state[16:].clone())

    def draw(self, low: int, high: int) -> int:
        """The number of thread 0 of a kernel that draws with Philox, and moves the offset on for it by 4."""
        block, key = self.offset // 4, (self.seed & 0xFFFFFFFF, self.seed >> 32)
        first, second, *_ = independent.philox4x32((block & 0xFFFFFFFF, block >> 32, 0, 0), key)
        self.offset += 4
        return low + (int(first) << 32 | int(second)) % (high - low)

    def _check(self) -> None:
        if self.device.capturing is not None:
            raise RuntimeError("the generator of a device that captures a graph cannot be read or set")


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.enable_timing, self.seconds = enable_timing, 0.0

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        assert self.seconds, "an event that was not recorded"

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Event") -> float:
        assert self.enable_timing, "an event without timing"
        assert 0 < self.seconds <= end.seconds
        return (end.seconds - self.seconds) * 1e3


class Stream:
    def wait_stream(self, stream: "Stream") -> None:
        assert isinstance(stream, Stream)


class CUDAGraph:
    """The torch functions that were called in a capture, which a replay calls again, on the same tensors."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def replay(self) -> None:
        for func, args, kwargs, results in self.calls:
            with torch.no_grad():
                again = [each for each in tree_leaves(func(*args, **kwargs)) if isinstance(each, Tensor)]
            with torch._C.DisableTorchFunction():
                for old, new in zip(results, again, strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.detach().copy_(new.detach())
