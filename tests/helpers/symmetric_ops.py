"""Tokens in pairs, for symmetric noise: ids, magnitudes and a table."""

import torch

from neft_kernels.ops import reference

KINDS = reference.NOISE_KINDS
#: Around a vector and a batch of the widest kernel, and in several pieces of a row.
WIDTHS = (1, 9, 130, 515)
IDS = torch.tensor([[0, 6, 3], [2, 2, 5]])
OTHER_IDS = torch.tensor([[0, 1, 3], [4, 2, 6]])  # some equal those of IDS
PER_TOKEN = torch.tensor([[0.5, 0.0, 1e-3], [0.25, 3.0, 1e-20]])
OTHER_PER_TOKEN = torch.tensor([[0.5, 2.0, 0.0], [0.0, 3.0, 0.125]])  # both of a pair, either, and none
IDENTITY = {"seed": -(2**40) - 3, "stream": 2**32 - 1, "first_token": 2**32 - 3}


def table(width, dtype, device="cpu"):
    return torch.randn(7, width, generator=torch.Generator().manual_seed(width)).to(dtype).to(device)
