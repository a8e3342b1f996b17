"""Models with a region that holds the embedding and is checkpointed, and a training step of them."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from neft_kernels import replace_embeddings

IDS = torch.tensor([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]])
MASK = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])


class Region(nn.Module):
    """An embedding and a layer whose gradient depends on what the embedding returned."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layer = nn.Embedding(8, 4), nn.Linear(4, 3)

    def forward(self, ids, like):
        return torch.tanh(self.layer(self.embedding(ids) + like))


class RegionWithMask(Region):
    def forward(self, ids, like, attention_mask=None):
        return super().forward(ids, like)


class RegionWithPositions(Region):
    def forward(self, ids, like, position_ids=None):
        return super().forward(ids, like)


class Model(nn.Module):
    """Checkpoints its region, which is given the mask if it takes it."""

    def __init__(self, how, region):
        super().__init__()
        self.region, self.how = region(), how

    def get_input_embeddings(self):
        return self.region.embedding

    def forward(self, input_ids, attention_mask=None):
        like = torch.zeros(4, requires_grad=True)  # a reentrant region has gradients only if one of its inputs has
        args = (input_ids, like, *([attention_mask] if type(self.region) is RegionWithMask else []))
        if self.how is None:
            return self.region(*args)
        return checkpoint(self.region, *args, use_reentrant=self.how == "reentrant")


def step(how, alpha=5.0, region=RegionWithMask, **inputs):
    """The output, and the gradients of all parameters."""
    model = replace_embeddings(Model(how, region), alpha=alpha).train()
    torch.manual_seed(1)
    out = model(IDS, **inputs)
    out.square().sum().backward()
    return out.detach(), [parameter.grad for parameter in model.parameters()]


def assert_equal(one, other):
    assert torch.equal(one[0], other[0])
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


class RegionOfAView(Region):
    """Looks up a view of the ids that it is given."""

    def forward(self, ids, like):
        return super().forward(ids.view(-1, ids.shape[-1] // 2), like)


class RegionOfASlice(Region):
    def forward(self, ids, like):
        return super().forward(ids[1:], like)
