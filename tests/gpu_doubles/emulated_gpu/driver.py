"""Triton's launches on the emulated GPU: a driver for Triton, which then compiles kernels for it and launches them there.

with emulated_gpu(90) as gpu:
    kernel[grid](tensors_on_the_cpu, ...)
    gpu.launches[-1].traffic
"""

import contextlib
import struct
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import ptx
from .machine import Launch, Traffic
from .memory import Memory

_FORMATS = {"i8": "b", "i16": "h", "i32": "i", "i64": "q", "u8": "B", "u16": "H", "u32": "I", "u64": "Q"}
_FORMATS |= {"i1": "?", "fp32": "f", "fp64": "d"}


def memories_of(tensors: list[Tensor]) -> dict[int, Memory]:
    """The storages of `tensors` by address, of which their elements alone may be touched."""
    found: dict[int, Memory] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        memory = found.get(storage.data_ptr())
        if memory is None:
            data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            memory = found[storage.data_ptr()] = Memory("a tensor", data, np.zeros(len(data), bool))
        assert memory.accessible is not None
        strides = [stride * tensor.itemsize for stride in tensor.stride()]
        first = memory.accessible[tensor.storage_offset() * tensor.itemsize :]
        if tensor.numel():
            np.lib.stride_tricks.as_strided(first, (*tensor.shape, tensor.itemsize), (*strides, 1))[...] = True
    return found


@dataclass(frozen=True)
class Window:
    """Stands for a tensor of any size at `address`, of which memory holds `elements` only, from element `first` on."""

    elements: Tensor  # contiguous
    first: int
    address: int = 1 << 44

    @property
    def dtype(self) -> torch.dtype:
        return self.elements.dtype

    def data_ptr(self) -> int:
        return self.address

    def memories(self) -> dict[int, Memory]:
        data = self.elements.flatten().view(torch.uint8).numpy()
        return {self.address + self.first * self.elements.itemsize: Memory("a window", data)}


@dataclass(frozen=True)
class Record:
    """A launch that has run."""

    kernel: ptx.Kernel
    grid: tuple[int, int, int]
    traffic: Traffic
    tensors: dict[str, Tensor]  # the arguments that are tensors, by name
    memories: dict[int, Memory]

    def times_written(self, name: str) -> Tensor:
        """How often each byte of a tensor's storage was written: uint8, where a write by several threads at once is one."""
        return torch.from_numpy(self.memories[self.tensors[name].untyped_storage().data_ptr()].times_written)


class EmulatedGPU:
    """What Triton needs to know of a GPU, and the last launches. All GPUs of a process share Triton's caches."""

    def __init__(self, target: Any) -> None:
        self.target = target
        self.launches: deque[Record] = deque(maxlen=4)
        self.ptx: dict[str, str] = {}  # of the module that is being loaded
        self.utils = self
        #: The blocks of a grid that run, by number; None: all.
        self.blocks: list[int] | None = None

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return repr(self.target)  # compiled kernels are kept by device

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_device_properties(self, device: str) -> dict[str, int]:
        return {"max_shared_mem": 99 << 10}

    def note_ptx(self, module: Any, function: Any, name: str, metadata_group: dict[str, str], hash: str) -> None:
        (path,) = (Path(path) for file, path in metadata_group.items() if file.endswith(".ptx"))
        self.ptx[name] = path.read_text()

    def load_binary(self, name: str, binary: bytes, shared: int, device: str) -> tuple[Any, ...]:
        return "module", ptx.parse(self.ptx[name])[name], 0, 0, 1024

    def unload_module(self, module: str) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        names = source.fn.arg_names
        kinds = {name if isinstance(name, str) else names[name[0]]: kind for name, kind in source.signature.items()}

        def launch(x: int, y: int, z: int, stream: int, kernel: ptx.Kernel, *rest: Any) -> None:
            arguments = dict(zip(names, rest[-len(names) :], strict=True))
            tensors, parameters = {}, b""
            for name, kind in kinds.items():
                if kind == "constexpr":
                    continue
                value = arguments[name]
                if kind.startswith("*"):
                    tensors[name], value, kind = value, value.data_ptr(), "u64"
                form = _FORMATS[kind]
                parameters += b"\0" * (-len(parameters) % struct.calcsize(form)) + struct.pack(form, value)
            parameters += b"\0" * (-len(parameters) % 8) + bytes(16)  # no scratch memory
            with torch._C.DisableTorchFunction():  # a mode may take the tensors for a GPU's
                memories = memories_of([each for each in tensors.values() if isinstance(each, Tensor)])
                for window in tensors.values():
                    if isinstance(window, Window):
                        memories |= window.memories()
            threads = (metadata.num_warps * 32, 1, 1)
            traffic = Launch(kernel, (x, y, z), threads, parameters, memories, metadata.shared, self.blocks).run()
            self.launches.append(Record(kernel, (x, y, z), traffic, tensors, memories))

        return launch


@contextlib.contextmanager
def emulated_gpu(capability: int) -> Iterator[EmulatedGPU]:
    """Triton compiles for a GPU of `capability`, such as 90, and launches on the emulated one, in memory of the CPU."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    gpu = EmulatedGPU(GPUTarget("cuda", capability, 32))
    before, hook = driver._active, knobs.runtime.kernel_load_start_hook
    driver.set_active(gpu)
    knobs.runtime.kernel_load_start_hook = gpu.note_ptx
    try:
        yield gpu
    finally:
        driver.set_active(before)
        knobs.runtime.kernel_load_start_hook = hook
