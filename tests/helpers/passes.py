"""A small model whose inner module looks tokens up, and a batch for it."""

import torch
from torch import nn

from neft_kernels import describe, replace_embeddings

IDS = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]])
MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
BY_LENGTH = (5.0 / (4 * 4) ** 0.5, 5.0 / (2 * 4) ** 0.5)  # of four tokens and of two, width 4


class Inner(nn.Module):
    """Looks tokens up; `fails` before it does so."""

    def __init__(self):
        super().__init__()
        self.embedding, self.fails = nn.Embedding(8, 4), None

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, labels=None):
        if self.fails is not None:
            raise self.fails
        return self.embedding(input_ids)


def last(model):
    (report,) = describe(model)
    return report.last_magnitude


def model_of(cls):
    model = cls()
    model.inner = Inner()
    model.get_input_embeddings = lambda: model.inner.embedding
    return replace_embeddings(model, alpha=5.0).train()
