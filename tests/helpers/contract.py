"""Values that try the noise contract, and results in the representation of ``independent``."""

import numpy as np
import torch

from helpers import independent

INTEGERS = {2: np.uint16, 4: np.uint32, 8: np.uint64}

SUBNORMAL = 1e-40  # in float32, whose smallest normal number is 1.2e-38
ROUNDS_TO_ZERO = 1e-50  # in float32
MAGNITUDES = (
    0.0,
    ROUNDS_TO_ZERO,
    2.0**-149,
    SUBNORMAL,
    1e-6,
    5.0 / 4096**0.5,
    1.0,
    100.0,
    1e30,
    float(np.finfo(np.float32).max),
)
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
SEEDS = (0, 1, -1, 42, -123456789, 2**31, 2**32, 2**62 - 57, INT64_MAX, INT64_MIN)
STREAMS = (0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
FIRST_TOKENS = (0, 1, 2**31 - 2, 2**32 - 3, 2**32 - 1, 2**32, 2**32 + 5, 2**33 + 2**32 - 1, 2**62, 2**63 - 100)


def magnitude_bits(dtype_name):
    """Zero, the smallest and largest subnormal, smallest normal and two largest finite numbers, infinity, two NaNs."""
    fraction = {"float64": 52, "float32": 23, "float16": 10, "bfloat16": 7}[dtype_name]
    sign = 8 * np.dtype(independent.STORAGE[dtype_name]).itemsize - 1
    infinity = 2**sign - 2**fraction
    quiet, signalling = infinity + 2 ** (fraction - 1), infinity + 1
    return (0, 1, 2**fraction - 1, 2**fraction, infinity - 2, infinity - 1, infinity, quiet, signalling)


def to_storage(values, dtype_name):
    """float32 values in the representation that `independent` takes."""
    if dtype_name == "bfloat16":
        return independent.float32_to_bfloat16(values.astype(np.float32))
    return values.astype(independent.STORAGE[dtype_name])


def to_tensor(array, dtype_name):
    signed = array.view(np.dtype(f"int{8 * array.itemsize}"))
    return torch.from_numpy(signed.copy()).view(getattr(torch, dtype_name))


def to_storage_array(tensor, dtype_name):
    signed = tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    return signed.numpy().view(independent.STORAGE[dtype_name])


def is_nan(array, dtype_name):
    return np.isnan(independent.bfloat16_to_float32(array) if dtype_name == "bfloat16" else array)


def differences(tensor, expected, dtype_name, unchanged=False):
    """Indices at which tensor differs in a bit from expected; any NaN equals any other unless `unchanged` there."""
    assert tensor.dtype == getattr(torch, dtype_name)
    assert tuple(tensor.shape) == expected.shape
    actual = to_storage_array(tensor, dtype_name)
    integer = INTEGERS[actual.itemsize]
    same = actual.view(integer) == np.ascontiguousarray(expected).view(integer)
    both_nan = is_nan(actual, dtype_name) & is_nan(expected, dtype_name) & ~np.asarray(unchanged)
    return np.argwhere(~(same | both_nan))
