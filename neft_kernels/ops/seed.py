"""Seeds of the noise, drawn from PyTorch's default generator of the device."""

import threading

import torch
from torch import Tensor

from .reference import philox4x32

__all__ = ["draw_seed"]

_MOST_NEGATIVE = -(1 << 63)
_NUM_SEEDS = (1 << 64) - 1  # torch.randint leaves out the largest int64
_WORD_MASK = 0xFFFFFFFF
#: How far a kernel of PyTorch moves the offset of the generator for one random number.
_OFFSET_STEP = 4

_generator_lock = threading.Lock()


def draw_seed(device: torch.device, by_value: bool = True) -> Tensor:
    """A seed from the default generator of `device`, int64 ``[1]``. The host does not wait for the device.

    On a CUDA device ``torch.randint`` would launch a kernel. So the host computes the number that it would draw, and moves the
    generator on as it would. The result is a CPU tensor, which the ops pass to their kernels by value. Where calls are
    recorded to be repeated, and if not `by_value`, ``torch.randint`` draws a tensor on the device.
    """
    if by_value and device.type == "cuda" and _host_can_draw(device):
        return torch.full((1,), _next_of_generator(device), dtype=torch.int64, device="cpu")
    return torch.randint(_MOST_NEGATIVE, _MOST_NEGATIVE + _NUM_SEEDS, (1,), device=device)


def _host_can_draw(device: torch.device) -> bool:
    """Whether nothing records what is called now, to repeat it later with other random numbers."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
        or device.index != torch.cuda.current_device()  # of which it is not known whether it captures a graph
        or torch.cuda.is_current_stream_capturing()
    )


def _next_of_generator(device: torch.device) -> int:
    """What ``torch.randint`` would draw on a CUDA `device`: two words of a Philox call, modulo the number of seeds."""
    generator = torch.cuda.default_generators[device.index]
    with _generator_lock:
        key, offset = generator.initial_seed(), generator.get_offset()
        generator.set_offset(offset + _OFFSET_STEP)
    block = offset // _OFFSET_STEP
    high, low, *_ = philox4x32((block & _WORD_MASK, block >> 32, 0, 0), (key & _WORD_MASK, key >> 32))
    return ((high << 32 | low) % _NUM_SEEDS) + _MOST_NEGATIVE
