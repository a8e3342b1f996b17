"""Launches Triton's kernels on less of the host's time than Triton takes itself."""

import contextlib
import struct
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.driver import driver

__all__ = ["INTERPRETED", "MAX_GRID_Y", "launch_kernel", "seed_arguments", "tile_grid"]

#: Whether Triton interprets its kernels, on any device, instead of compiling them.
INTERPRETED = triton.knobs.runtime.interpret
#: What CUDA allows of the second and the third dimension of a grid.
MAX_GRID_Y = 65535

#: In place of a seed on the device: an empty tensor is a null pointer.
_NO_SEED = torch.empty(0, dtype=torch.int64, device="cpu")
#: Compiled kernels by all that they depend on. A function is the quicker key: to hash a kernel takes Triton a while.
_compiled: dict[tuple, Any] = {}


def launch_kernel(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: tuple,
    numbers: tuple[int | float, ...],
    *constants: Any,
    num_warps: int = 4,
    max_registers: int | None = None,
) -> None:
    """Launches a kernel of `tensors`, `numbers` and `constants`. `num_warps`, and `max_registers` of a thread on NVIDIA's
    GPUs, must follow from the constants.

    A compiled kernel is kept here, because Triton's own look-up takes longer than the launch. Triton says what the code
    depends on, which differs by backend: types, alignment, on AMD also whether 32 bits address all of a tensor. Triton's
    knobs, and its hooks that run before a kernel, count as they were when the kernel was first launched.
    """
    arguments = (*tensors, *numbers, *constants)
    with _device_of(tensors[0]):
        if INTERPRETED:
            kernel[grid](*arguments)
            return
        device = driver.active.get_current_device()
        *_, target, _, bind = kernel.device_caches[device]
        _, specialization, _ = bind(*arguments)
        key = (kernel.fn, device, *specialization)
        compiled = _compiled.get(key)
        if compiled is not None:
            compiled[grid](*arguments)
            return
        options: dict[str, Any] = {"num_warps": num_warps, "enable_fp_fusion": False}
        if max_registers is not None and target.backend == "cuda":
            options["maxnreg"] = max_registers
        compiled = kernel[grid](*arguments, **options)
        if compiled is not None:  # None: a hook of Triton's compiles it elsewhere
            # Triton's asynchronous mode returns a promise of the kernel.
            _compiled[key] = compiled.result() if hasattr(compiled, "result") else compiled


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the GPU of `tensor` the current one, where it is another."""
    if tensor.is_cuda:
        index = tensor.get_device()
        return contextlib.nullcontext() if index == torch.cuda.current_device() else torch.cuda.device(index)
    return torch.xpu.device(tensor.get_device()) if tensor.is_xpu else contextlib.nullcontext()


def tile_grid(num_tokens: int, tokens_of_tile: int, column_tiles: int) -> tuple[int, int, int]:
    """The tiles of a row; and the tiles of tokens, in as few parts as fit, which are equally large."""
    token_tiles = -(-num_tokens // tokens_of_tile)
    parts = -(-token_tiles // MAX_GRID_Y)
    return column_tiles, -(-token_tiles // parts), parts


def seed_arguments(seed: Tensor, device: torch.device) -> tuple[Tensor, int, int]:
    """A tensor with the seed on `device` and two zeros; or if the seed is on the CPU, a null pointer and its halves."""
    if seed.device == device:
        return seed, 0, 0
    return _NO_SEED, *struct.unpack("<ii", struct.pack("<q", seed.item()))
