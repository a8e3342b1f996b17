"""Checks of the ops' arguments. Each raises an error that names the argument, what was expected, and what came."""

import math
import numbers

import torch
from torch import Tensor

from .reference import NOISE_KINDS

_ID_DTYPES = frozenset((torch.int64, torch.int32))
_OTHER_ID_DTYPES = frozenset(
    (torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)  # converted to int64
)
FLOAT_DTYPES = frozenset((torch.float32, torch.float64, torch.float16, torch.bfloat16))


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """`value` of argument `name` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def check_bool(name: str, value: bool) -> None:
    """`value`, the argument `name`, is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, not {type(value).__name__}")


def check_noise(noise: str) -> int:
    """Returns the kind of noise as the ops take it."""
    check_choice("noise", noise, NOISE_KINDS)
    return NOISE_KINDS.index(noise)


def check_symmetric(symmetric: bool, tokens_shape: torch.Size, name: str) -> None:
    """If `symmetric` is True, the tokens are two halves. `name` is the argument whose tokens have `tokens_shape`."""
    check_bool("symmetric", symmetric)
    if symmetric and math.prod(tokens_shape) % 2:
        raise ValueError(
            f"symmetric=True needs an even number of tokens, half of them with the negative noise of the others, but {name} "
            f"has {math.prod(tokens_shape)} tokens; give each example twice, such as torch.cat(({name}, {name}))"
        )


def check_alpha(alpha: float) -> None:
    """`alpha` is a finite number >= 0."""
    check_number("alpha", alpha)


def check_number(name: str, value: float) -> None:
    """`value`, the argument `name`, is a finite number >= 0."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    if not 0 <= value < math.inf:  # also false for NaN
        raise ValueError(f"{name} must be finite and >= 0, not {value}")


def check_input_ids(input_ids: Tensor, device: torch.device) -> Tensor:
    """Returns `input_ids` as int32 or int64."""
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids must be a tensor, not {type(input_ids).__name__}")
    if input_ids.is_nested:
        raise TypeError("input_ids is a nested tensor, which has no noise yet; pad it, or pack it and pass cu_seq_lens")
    if input_ids.device != device:
        raise ValueError(f"input_ids is on {input_ids.device}, but weight is on {device}; move one of them")
    if input_ids.dtype in _ID_DTYPES:
        return input_ids
    if input_ids.dtype not in _OTHER_ID_DTYPES:
        raise TypeError(f"input_ids must have an integer dtype, not {input_ids.dtype}")
    return input_ids.to(torch.int64)


def check_values(values: Tensor, name: str, ndim: int | None) -> None:
    """`values` is a floating-point tensor that noise can be added to. `ndim` None allows any but 0."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(values).__name__}")
    if values.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, not {values.dtype}")
    if ndim is None and values.ndim == 0:
        raise ValueError(f"{name} must have at least one dimension, [..., embedding_dim]")
    if ndim is not None and values.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, but has shape {list(values.shape)}")


def check_magnitude(
    magnitude: float | Tensor, tokens_shape: torch.Size, device: torch.device
) -> tuple[Tensor | None, float]:
    """Returns `magnitude` as the ops take it: a tensor of `tokens_shape` or None, and the number that holds if it is None."""
    if isinstance(magnitude, (float, int, numbers.Real)):
        # Also false for NaN.
        if not 0 <= magnitude < math.inf:
            raise ValueError(f"magnitude must be finite and >= 0, not {magnitude}")
        return None, float(magnitude)
    if not isinstance(magnitude, Tensor):
        raise TypeError(f"magnitude must be a number or a float32 tensor, not {type(magnitude).__name__}")
    if magnitude.dtype != torch.float32:
        raise TypeError(f"magnitude must be float32, not {magnitude.dtype}")
    if magnitude.requires_grad:
        raise ValueError("magnitude requires a gradient, but there is none with respect to it; detach it")
    if magnitude.device != device:
        raise ValueError(f"magnitude is on {magnitude.device}, but the embeddings are on {device}; move it")
    if magnitude.shape == tokens_shape:
        return magnitude, 0.0
    if not broadcasts(magnitude.shape, tokens_shape):
        raise ValueError(f"magnitude of shape {list(magnitude.shape)} does not broadcast to {list(tokens_shape)}")
    return magnitude.expand(tokens_shape), 0.0


def check_seed(seed: int | Tensor, device: torch.device) -> Tensor:
    """Returns `seed` as an int64 tensor of one element, on `device` or on the CPU, from where kernels take it by value."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(f"seed must be one int64 element, not {list(seed.shape)} of {seed.dtype}")
        if seed.device != device and seed.device.type != "cpu":
            raise ValueError(f"seed is on {seed.device}, but the embeddings are on {device}; move it")
        return seed
    if isinstance(seed, int) and not isinstance(seed, bool):
        if not -(1 << 63) <= seed < 1 << 63:
            raise ValueError(f"seed must fit in 64 bits, not {seed}")
        # A compiled graph with tensors of two devices would not become a CUDA graph.
        return torch.full((1,), seed, dtype=torch.int64, device=device if torch.compiler.is_compiling() else "cpu")
    raise TypeError(f"seed must be an int, an int64 tensor of one element or None, not {type(seed).__name__}")


def check_counters(stream: int, first_token: int) -> None:
    """`stream` and `first_token` are integers that fit into the generator's counter."""
    for name, value in (("stream", stream), ("first_token", first_token)):
        if not isinstance(value, (numbers.Integral, torch.SymInt)):
            raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if not 0 <= stream < 1 << 32:
        raise ValueError(f"stream must be in [0, 2**32), not {stream}")
    if not 0 <= first_token < 1 << 63:
        raise ValueError(f"first_token must be in [0, 2**63), not {first_token}")


def check_padding_idx(padding_idx: int | None, num_embeddings: int) -> int:
    """Returns `padding_idx` counted from the front, -1 for none, as aten's backward takes it."""
    if padding_idx is None:
        return -1
    if not -num_embeddings <= padding_idx < num_embeddings:
        raise ValueError(f"padding_idx must be in [-{num_embeddings}, {num_embeddings}), not {padding_idx}")
    return padding_idx % num_embeddings


def check_magnitude_values(token_magnitude: Tensor | None, magnitude: float) -> None:
    """All magnitudes are finite and >= 0 in float32."""
    if token_magnitude is None:
        token_magnitude = torch.tensor(magnitude, dtype=torch.float64, device="cpu").to(torch.float32)
    bad = ~((token_magnitude >= 0) & (token_magnitude < math.inf))
    if bad.any():
        raise ValueError(f"magnitude must be finite and >= 0, but is {token_magnitude[bad][0].item()}")


def check_id_values(input_ids: Tensor, num_embeddings: int) -> None:
    """All ids are rows of the table."""
    bad = (input_ids < 0) | (input_ids >= num_embeddings)
    if bad.any():
        position = bad.nonzero()[0].tolist()
        raise IndexError(
            f"input_ids{position} is {input_ids[tuple(position)].item()}, but ids must be in [0, {num_embeddings}), "
            "the rows of weight"
        )


def broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    """Whether a tensor of `shape` can be expanded to the shape `to`."""
    missing = len(to) - len(shape)
    return missing >= 0 and all(have in (1, want) for have, want in zip(shape, to[missing:], strict=True))
