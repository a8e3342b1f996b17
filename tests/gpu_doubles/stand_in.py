"""Stands in for torch's CUDA side where there is no GPU, so that programs for GPUs can be run before there is one.

with stand_in_gpu():
    torch.randn(3, device="cuda")  # in memory of the CPU, and computed there

Tensors know that they are "on the device": their device says so, they do not mix with others, and reading them is waiting.
Triton kernels run on the emulated GPU. In place of the CUDA extension the CPU's runs, so of that backend a run shows
that the program around it works, and nothing else. torch.compile stops at the graphs: what Inductor would make of them for a
GPU is not seen. Times are the CPU's, and say nothing. What there is nothing here for raises, as torch.cuda does without a GPU.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily
from torch.utils._pytree import tree_leaves

from gpu_doubles.streams import CUDAGraph, Event, Generator, Stream
from neft_kernels.ops.backends import extensions, forget_choices, switches
from neft_kernels.ops.registration import implementation as implementation_of
from neft_kernels.ops.registration import with_checks

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
_NO_NUMPY = (Tensor.numpy, Tensor.__array__, Tensor.__dlpack__)
_READ_BY_THE_HOST = (Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__)
_READ_BY_THE_HOST += (Tensor.nonzero, torch.nonzero, torch.equal, Tensor.equal, Tensor.__contains__)
_MAY_MIX = (Tensor.copy_, Tensor.__getitem__, Tensor.__setitem__, Tensor.to)
_MOVES = (Tensor.to, Tensor.cuda, Tensor.cpu)


class Device(TorchFunctionMode):
    """Which storages are on the device, and what torch functions do with tensors of them."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}  # and their bytes, by address
        self.peak = 0
        self.sync_debug_mode = "default"
        self.capturing: list[tuple] | None = None
        self.inside_an_op = False
        self.generator = Generator(self)

    def holds(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.storages

    def take(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.allocated())

    def allocated(self) -> int:
        """Bytes of the tensors that are alive, of which those that a single operator of torch frees itself are not seen."""
        self.storages = {key: entry for key, entry in self.storages.items() if not entry[0].expired()}
        return sum(size for _, size in self.storages.values())

    def waits(self, what: str) -> None:
        if self.capturing is not None:
            raise RuntimeError(f"{what}: operation not permitted when stream is capturing")
        if self.sync_debug_mode == "error":
            raise RuntimeError(f"{what}: called a synchronizing CUDA operation")

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        here = [each for each in tensors if self.holds(each)]
        descriptor = getattr(func, "__self__", None)
        if descriptor is Tensor.device:
            return CUDA if here else args[0].device
        if descriptor is Tensor.is_cuda or func is Tensor.get_device:
            return bool(here) if descriptor is Tensor.is_cuda else len(here) - 1
        if func in (Tensor.backward, torch.autograd.backward):
            return self._backward(*args, **kwargs)
        if here and func in _NO_NUMPY:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
        if here and func in _READ_BY_THE_HOST:
            self.waits(func.__name__)
        is_ours = isinstance(func, torch._ops.OpOverload) and func.namespace == "neft_kernels"
        seed = _seed(func, args) if is_ours else None  # on the CPU it is given by value
        elsewhere = [each for each in tensors if each.ndim and not self.holds(each) and each is not seed]
        if here and elsewhere and func not in _MAY_MIX and descriptor is None:
            raise RuntimeError(f"{func}: Expected all tensors to be on the same device, but found cuda:0 and cpu!")

        args, target = _without_device(func, args, kwargs)
        target = target or (CUDA if here else CPU)
        generator = kwargs.get("generator")
        if generator is not None and target == CUDA:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        if func in _MOVES and (target == CUDA) != bool(here):
            self.waits(func.__name__)
            result = Tensor.to(*args, **kwargs)
            result = result.clone() if result.untyped_storage()._cdata == args[0].untyped_storage()._cdata else result
        elif func in _MOVES:
            result = Tensor.to(*args, **kwargs)
        elif here and is_ours:
            result = self._run(func, args)
        else:
            if target == CUDA and not tensors and "data" not in kwargs and func in (torch.tensor, torch.as_tensor):
                self.waits(func.__name__)  # from the memory of the host
            draws_seed = target == CUDA and func is torch.randint and tuple(args[2:]) == ((1,),)
            result = torch.tensor([self.generator.draw(*args[:2])]) if draws_seed else func(*args, **kwargs)
        results = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        if target == CUDA:
            for each in results:
                if each.device.type == "cpu":  # rather than "meta"
                    self.take(each)
        if self.capturing is not None and not self.inside_an_op and results:
            self.capturing.append((func, args, {**kwargs, **({} if here else {"device": target})}, results))
        return result

    def _backward(self, tensors: Any, grad_tensors: Any = None, *_: Any, **options: Any) -> None:
        """What torch.autograd.backward does with its arguments, within this mode: it recomputes checkpointed regions."""
        tensors = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
        given = options.get("gradient", grad_tensors)
        gradients = [given] if isinstance(given, Tensor) else given or [None] * len(tensors)
        gradients = [torch.ones_like(t) if g is None else g for t, g in zip(tensors, gradients, strict=True)]
        keep, create = bool(options.get("retain_graph")), bool(options.get("create_graph"))
        with self:
            Variable._execution_engine.run_backward(
                tensors, tuple(gradients), keep, create, (), allow_unreachable=True, accumulate_grad=True
            )

    def _run(self, func: Any, args: tuple) -> Tensor:
        """An op of this package, past torch's dispatcher, which takes the tensors for what they are."""
        op, backend = func._schema.name.split("::")[1], func._overloadname
        if backend == "cuda":
            return _by_the_cpu(op, args)
        if op == "token_magnitude" and backend == "triton":
            implementation: Callable[..., Tensor] = implementation_of(op, "triton")
        elif backend in ("triton", "reference"):
            implementation = with_checks(op, implementation_of(op, "triton" if backend == "triton" else "reference"))
        else:
            raise NotImplementedError(f"Could not run '{func}' with arguments from the 'CUDA' backend")
        self.inside_an_op = True
        try:
            with self:
                return implementation(*args)
        finally:
            self.inside_an_op = False


def _without_device(func: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, torch.device | None]:
    """`args` for the CPU, and the device that they or `kwargs`, which is changed, asked for."""
    if func in (Tensor.cuda, Tensor.cpu):
        return args[:1], CUDA if func is Tensor.cuda else CPU
    place = args[1] if func is Tensor.to and len(args) > 1 else kwargs.get("device")
    if isinstance(place, (str, torch.device, int)) and not isinstance(place, bool):
        target = torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
        if target.type == "meta":
            return args, target
        if target.type not in ("cuda", "cpu") or target.index:
            raise RuntimeError(f"there is no device {place} here")
        if "device" in kwargs:
            kwargs["device"] = CPU
        else:
            args = (args[0], CPU, *args[2:])
        return args, CUDA if target.type == "cuda" else CPU
    return args, None


def _seed(func: Any, args: tuple) -> Tensor | None:
    """The seed among the arguments of an op of this package."""
    names = [argument.name for argument in func._schema.arguments]
    return args[names.index("seed")] if "seed" in names else None


def _by_the_cpu(op: str, args: tuple) -> Tensor:
    """What the CUDA extension would return: the CPU extension's, which looks at the ids and refuses those out of range."""
    if op == "add_noise":
        return torch.ops.neft_kernels.add_noise.cpu(*args)
    ids, weight, *noise = args
    valid = (ids >= 0) & (ids < weight.shape[0])
    out = torch.ops.neft_kernels.noisy_embedding.cpu(torch.where(valid, ids, 0), weight, *noise)
    return out.masked_fill_(~valid[..., None], float("nan"))


@contextlib.contextmanager
def stand_in_gpu(name: str = "no GPU, a stand-in") -> Iterator[Device]:
    """Until it ends, "cuda" is a device that is there. Triton has to run on the emulated GPU, see helpers/devices.py."""
    device = Device()
    compile_for_real = torch.compile

    @contextlib.contextmanager
    def capture(graph: CUDAGraph) -> Iterator[None]:
        device.capturing = graph.calls
        try:
            yield
        finally:
            device.capturing = None

    def compiled(module: Callable[..., Any]) -> Callable[..., Any]:
        """Traced by torch.compile and run as traced, on tensors that look like the CPU's."""
        traced = compile_for_real(module, backend="aot_eager")

        class Compiled(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.module = module

            def forward(self, *args: Tensor) -> Tensor:
                with _pop_mode_temporarily(), mock.patch.object(torch.cuda, "is_available", return_value=False):
                    result = traced(*args)
                device.take(result)
                return result

        return Compiled()

    def reset_peak() -> None:
        device.peak = device.allocated()

    def memory_stats() -> dict[str, int]:
        return {"requested_bytes.all.current": device.allocated(), "requested_bytes.all.peak": device.peak}

    def missing(*_: Any) -> None:
        raise NotImplementedError("the stand-in has no allocator; memory_stats has the bytes that tensors need")

    stream = Stream()
    replaced = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_device_name": lambda: name,
        "get_device_capability": lambda: (9, 0),
        "manual_seed": torch.manual_seed,  # which calls the next one
        "manual_seed_all": device.generator.manual_seed,
        "default_generators": (device.generator,),
        "get_rng_state": lambda _=None: device.generator.get_state(),
        "set_rng_state": lambda state, _=None: device.generator.set_state(state),
        "_initialized": True,
        "synchronize": lambda: device.waits("synchronize"),
        "set_sync_debug_mode": lambda mode: setattr(device, "sync_debug_mode", mode),
        "device": lambda _: contextlib.nullcontext(),
        "device_of": lambda _: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: device.capturing is not None,
        "stream": lambda _: contextlib.nullcontext(),
        "current_stream": lambda: stream,
        "graph": capture,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": reset_peak,
        "memory_stats": memory_stats,
        # Which else would say 0.
        **dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved"), missing),
        **{each.__name__: each for each in (Event, Stream, CUDAGraph)},
    }
    forget_choices()
    try:
        with (
            mock.patch.multiple(torch.cuda, **replaced),
            mock.patch.object(switches, "interpret_triton", False),
            mock.patch.dict(extensions, cuda=extensions["cpu"]),
            mock.patch.object(torch, "compile", compiled),
            device,
        ):
            yield device
    finally:
        forget_choices()
