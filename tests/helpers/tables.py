"""Models whose table is plain, scaled, quantised, wrapped or unreadable, and their ratio of noise to embeddings."""

import pytest
import torch
from torch import nn

from neft_kernels import no_noise

VOCABULARY, WIDTH = 400, 32
#: By name: a model whose table is of `embedding`, and what it multiplies the rows by.
TABLES = ("plain", "scaled", "quantized", "wrapped")


class Scaled(nn.Embedding):
    def forward(self, input):
        return super().forward(input) * 7.0


class Wrapped(nn.Module):
    """Like an adapter's layer around a table, which keeps the table as it was before."""

    def __init__(self):
        super().__init__()
        self.original = nn.Embedding(VOCABULARY, WIDTH)  # not looked up
        self.base = nn.Embedding(VOCABULARY, WIDTH)

    def forward(self, input):
        return self.base(input) + 1.0


class Unreadable(nn.Module):
    """An embedding whose table is no embedding module's."""

    def __init__(self, table):
        super().__init__()
        self.rows = table

    def forward(self, input):
        return self.rows[input]


class Model(nn.Module):
    def __init__(self, table):
        super().__init__()
        torch.manual_seed(0)
        self.table = {"scaled": Scaled, "wrapped": lambda *_: Wrapped()}.get(table, nn.Embedding)(VOCABULARY, WIDTH)
        if table == "quantized":
            pytest.importorskip("torchao")
            from torchao.quantization import IntxWeightOnlyConfig, quantize_
            from torchao.quantization.granularity import PerAxis

            config = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
            quantize_(self.table, config, filter_fn=lambda module, name: isinstance(module, nn.Embedding))

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids, attention_mask=None, position_ids=None, labels=None):
        return self.table(input_ids)


def padded_batch(rows=8, length=50):
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(length) < torch.arange(rows)[:, None] * 6 + 5).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def ratio_by_hand(model, batch):
    """Of the noise that `model` adds to the embeddings without it, over the tokens that have noise."""
    with no_noise(model):
        clean = model(**batch).detach().double()
    noise = model(**batch).detach().double() - clean
    noisy = noise.abs().amax(-1) > 0
    return (noise[noisy].square().mean() / clean[noisy].square().mean()).sqrt().item()
