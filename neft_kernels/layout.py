"""Token ids as a model looks them up, against those that it was given: in another order, or with some added at one end."""

import torch
from torch import Tensor

__all__ = ["lay_out", "may_be_laid_out"]


def may_be_laid_out(given: Tensor | None, ids: Tensor) -> bool:
    """Whether `ids`, which a model looks up, may be those that it was `given`, ``[B, L]``, transposed or lengthened.

    By their shapes alone: ``[L, B]`` as in XLNet, or ``[B, L + n]`` as in Longformer, which pads, and CPMAnt, which
    prepends a prompt. Of as many sequences as tokens it cannot be told without their values.
    """
    if given is None or given is ids or given.ndim != 2 or ids.ndim != 2 or given.device != ids.device:
        return False
    rows, length = given.shape
    return ids.shape == (length, rows) or (ids.shape[0] == rows and ids.shape[1] > length)


def lay_out(magnitude: float | Tensor, given: Tensor, ids: Tensor, otherwise: float | Tensor) -> float | Tensor:
    """The magnitudes of `ids` from those of the `given` ids, where :func:`may_be_laid_out` holds.

    What a model adds gets no noise. Whether they are transposed, and whether the model adds at the beginning or at the end, is
    decided by the ids' values, on their device: nothing is read back, and nothing is guessed.

    Args:
        magnitude: of `given`, ``[B, L]``, or a number for all of them.
        given: ``[B, L]``.
        ids: ``[L, B]`` or ``[B, L + n]``.
        otherwise: the magnitude of all `ids` if they are not those given, transposed or with some added at one end.
    """
    rows, length = given.shape
    added = ids.shape[1] - length
    if rows == length and added == 0:
        if not isinstance(magnitude, Tensor) or magnitude.ndim == 0:
            return magnitude
        is_transposed = _are_equal(ids, given.mT) & ~_are_equal(ids, given)
        return torch.where(is_transposed, magnitude.mT, magnitude)
    magnitude = torch.as_tensor(magnitude, dtype=torch.float32, device=ids.device).expand(given.shape)
    otherwise = torch.as_tensor(otherwise, dtype=torch.float32, device=ids.device).expand(ids.shape)
    if ids.shape == (length, rows):
        return torch.where(_are_equal(ids, given.mT), magnitude.mT, otherwise)
    at_the_end = torch.where(
        _are_equal(ids[:, added:], given), torch.nn.functional.pad(magnitude, (added, 0)), otherwise
    )
    return torch.where(_are_equal(ids[:, :length], given), torch.nn.functional.pad(magnitude, (0, added)), at_the_end)


def _are_equal(a: Tensor, b: Tensor) -> Tensor:
    """Unlike torch.equal(), on the device."""
    return (a == b).all()
