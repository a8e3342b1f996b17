"""Comparison of tensors bit for bit."""

import torch


def equal_bits(a, b):
    """Whether two tensors are equal bit for bit, any NaN being equal to any other."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = a.cpu(), b.cpu()
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    same = a.contiguous().view(integers) == b.contiguous().view(integers)
    return bool((same | (a.isnan() & b.isnan())).all())


def differing(a, b):
    """The names of the tensors that are not equal bit for bit."""
    return [key for key in a.keys() | b.keys() if key not in a or key not in b or not equal_bits(a[key], b[key])]


def expected_embedding_grad(grad, ids, num_embeddings, padding_idx=-1, scale_grad_by_freq=False):
    """The CPU's gradient of a table: sums in fp64, where those of a few hundred numbers of lower precision are exact."""
    kept = ids.flatten() != padding_idx
    rows = torch.zeros(num_embeddings, grad.shape[-1], dtype=torch.float64)
    rows.index_add_(0, ids.flatten()[kept].long(), grad.reshape(-1, grad.shape[-1])[kept].double())
    if scale_grad_by_freq:
        rows /= torch.bincount(ids.flatten(), minlength=num_embeddings).clamp(min=1)[:, None]
    return rows.to(grad.dtype)
