"""emulation.cpp from Python, and the launches that tests of the CUDA kernels make."""

import ctypes
import math
import os
import subprocess
from pathlib import Path

import torch
from torch.utils import cpp_extension

from neft_kernels.ops import reference

ROOT = Path(__file__).parents[3]
ELEMENTS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # in the order of emulation.cpp


def build(folder):
    """The library, compiled into `folder`."""
    target = folder / "emulation.so"
    include = [f"-I{path}" for path in (ROOT / "csrc", *cpp_extension.include_paths())]
    flags = ["-std=c++17", "-ffp-contract=off", "-fno-strict-aliasing", "-Wall", "-Werror", "-shared", "-fPIC"]
    source = Path(__file__).parent / "emulation.cpp"
    subprocess.run([os.environ.get("CXX", "g++"), *flags, *include, "-o", target, source], check=True)
    loaded = ctypes.CDLL(str(target))
    loaded.token_of.restype = ctypes.c_int64
    return loaded


def pointer(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


class Arguments(ctypes.Structure):
    """As in emulation.cpp."""

    _fields_ = (
        ("element", ctypes.c_int32),
        ("id_bytes", ctypes.c_int32),
        ("storage", ctypes.c_void_p),
        ("storage_bytes", ctypes.c_int64),
        ("in_offset_bytes", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("column_stride", ctypes.c_int64),
        ("num_rows", ctypes.c_int64),
        ("ids", ctypes.c_void_p),
        ("token_magnitude", ctypes.c_void_p),
        ("seed", ctypes.c_int64),
        ("first_token", ctypes.c_int64),
        ("num_tokens", ctypes.c_int64),
        ("num_columns", ctypes.c_int64),
        ("magnitude", ctypes.c_float),
        ("stream", ctypes.c_uint32),
        ("guard_after", ctypes.c_int32),
        ("noise", ctypes.c_int32),
        ("seed_by_value", ctypes.c_int32),
        ("symmetric", ctypes.c_int32),
        ("few_threads", ctypes.c_int32),
        ("out", ctypes.c_void_p),
        ("times_written", ctypes.c_void_p),
    )


class Index(ctypes.Structure):
    _fields_ = (("x", ctypes.c_uint32), ("y", ctypes.c_uint32), ("z", ctypes.c_uint32))

    def last(self):
        return Index(self.x - 1, self.y - 1, self.z - 1)


class Launch(ctypes.Structure):
    """As in emulation.cpp."""

    _fields_ = (
        ("grid", Index),
        ("threads", Index),
        ("aligned", ctypes.c_int32),
        ("parameter_bytes", ctypes.c_int32),
        ("parameters", ctypes.c_ubyte * 128),
    )


IDENTITIES = ((0, 0, 0), (-1, 2**32 - 1, 2**32 - 2), (2**62 + 13, 7, 2**61), (-(2**63), 2**31, 2**63 - 5))


def arguments_of(rows, ids=None, token_magnitude=None, magnitude=0.0, identity=IDENTITIES[1], **switches):
    """Those of a launch on a table or, without ids, on rows; and the output that it will fill."""
    seed, stream, first_token = identity
    num_tokens = len(rows) if ids is None else len(ids)
    out = torch.empty(num_tokens, rows.shape[1], dtype=rows.dtype)
    arguments = Arguments(
        element=ELEMENTS.index(rows.dtype),
        id_bytes=0 if ids is None else ids.element_size(),
        storage=rows.untyped_storage().data_ptr(),
        storage_bytes=rows.untyped_storage().nbytes(),
        in_offset_bytes=rows.storage_offset() * rows.element_size(),
        row_stride=rows.stride(0),
        column_stride=rows.stride(1),
        num_rows=switches.pop("num_rows", len(rows)),
        ids=pointer(ids),
        token_magnitude=pointer(token_magnitude),
        seed=seed,
        first_token=first_token,
        num_tokens=num_tokens,
        num_columns=rows.shape[1],
        magnitude=magnitude,
        stream=stream,
        out=out.data_ptr(),
        **switches,
    )
    return arguments, out


def expected_of(
    rows,
    ids=None,
    token_magnitude=None,
    magnitude=0.0,
    identity=IDENTITIES[1],
    noise=reference.UNIFORM,
    symmetric=False,
):
    seed, stream, first_token = identity
    arguments = (torch.tensor([seed]), token_magnitude, magnitude, stream, first_token, noise, symmetric)
    if ids is None:
        return reference.add_noise(rows, *arguments)
    valid = (ids >= 0) & (ids < len(rows))
    out = reference.noisy_embedding(torch.where(valid, ids, 0), rows, *arguments)
    out[~valid] = math.nan
    return out


def table(dtype, width, num_rows=8):
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(width)).to(dtype)


def ids_of(dtype, num_rows=8):
    """In and out of range, and out of it only if read as unsigned or cut to 32 bits."""
    far = 2**31 - 1 if dtype == torch.int32 else 2**32
    return torch.tensor([0, num_rows - 1, num_rows, -1, 3, far, -far], dtype=dtype)


PER_TOKEN = torch.tensor([0.5, 0.0, 0.0, 1e-3, 3.0, 0.25, 1.0])  # a zero on a row in range and on one out of range

# Around a vector, a block of columns, a warp's piece of a row, and a block of threads.
WIDTHS = (1, 3, 4, 8, 9, 31, 64, 127, 130, 512, 516, 1032, 2048, 4160, 5003)


LAYOUTS = {  # of a table of [9, 64], and whether 16-byte accesses are possible
    "rows apart": (lambda t: torch.cat([t, t], dim=1)[:, :64], True),
    "rows an odd number of elements apart": (lambda t: torch.cat([t, t[:, :1]], dim=1)[:, :64], False),
    "columns apart": (lambda t: t.repeat_interleave(3, dim=1)[:, ::3], False),
    "transposed": (lambda t: t.T.contiguous().T, False),
    "off by one element": (lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape), False),
    "one row for all": (lambda t: t[:1].expand(t.shape), True),
}
