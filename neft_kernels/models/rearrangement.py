"""Token ids that a model rearranges before it looks them up."""

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["is_rearranged", "rearrange"]


def is_rearranged(given: Tensor, ids: Tensor) -> bool:
    """Whether `ids`, judged by shape, may be a transposed or lengthened copy of `given`, ``[B, L]``.

    XLNet transposes them to ``[L, B]``. Longformer pads them at the end and CPMAnt puts a prompt before them, ``[B, L + n]``.
    """
    if given is ids or given.ndim != 2 or ids.ndim != 2 or given.device != ids.device:
        return False
    rows, length = given.shape
    return ids.shape == (length, rows) or (ids.shape[0] == rows and ids.shape[1] > length)


def rearrange(magnitude: float | Tensor, given: Tensor, ids: Tensor, otherwise: float | Tensor) -> float | Tensor:
    """The magnitudes of `ids` from those of the `given` ids, where :func:`is_rearranged` holds.

    How they were rearranged is decided by the values of the ids, on their device. Nothing is read back to the host. Tokens
    that the model added get no noise.

    Args:
        magnitude: of `given`, ``[B, L]``, or a number for all of them.
        given: ``[B, L]``.
        ids: ``[L, B]`` or ``[B, L + n]``.
        otherwise: the magnitudes if `ids` are no known rearrangement of `given`.
    """
    rows, length = given.shape
    added = ids.shape[1] - length
    if ids.shape == given.shape:
        if not isinstance(magnitude, Tensor) or magnitude.ndim == 0:
            return magnitude
        is_transposed = _equal(ids, given.mT) & ~_equal(ids, given)
        return torch.where(is_transposed, magnitude.mT, magnitude)
    magnitude = torch.as_tensor(magnitude, dtype=torch.float32, device=ids.device).expand(given.shape)
    result = torch.as_tensor(otherwise, dtype=torch.float32, device=ids.device).expand(ids.shape)
    if ids.shape == (length, rows):
        return torch.where(_equal(ids, given.mT), magnitude.mT, result)
    result = torch.where(_equal(ids[:, added:], given), pad(magnitude, (added, 0)), result)
    return torch.where(_equal(ids[:, :length], given), pad(magnitude, (0, added)), result)


def _equal(a: Tensor, b: Tensor) -> Tensor:
    """As torch.equal(), but on the device."""
    return (a == b).all()
