"""What the checks share: models and batches small enough to compare bit for bit.

Gradients are compared exactly too: what comes down to an embedding is made of small integers, whose sums no order rounds.
"""

import torch
import torch.distributed as dist
from torch import nn
from transformers import Gemma3TextConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from neft_kernels import replace_embeddings

VOCAB, WIDTH = 50, 16
SEED = 7
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
}
GEMMA = {**LLAMA, "head_dim": 8, "sliding_window": 64}


class Lookup(nn.Module):
    """An embedding inside of a model that knows of the sequences; returns the embeddings."""

    def __init__(self, scaled=False, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embed = (
            Gemma3TextScaledWordEmbedding(VOCAB, WIDTH, 0, WIDTH**0.5) if scaled else nn.Embedding(VOCAB, WIDTH, 0)
        ).to(dtype)

    def forward(self, input_ids, attention_mask=None, position_ids=None, cu_seq_lens_q=None, labels=None):
        return self.embed(input_ids)


def llama(**options):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA, **options)).train()


def gemma_config(**options):
    return Gemma3TextConfig(**GEMMA, **options)


def ids(rows, length, seed=1):
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def upstream(shape, dtype=torch.float32):
    """A gradient for what an embedding returns: integers from -4 to 4."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(2)).to(dtype)


def batches(rows, length):
    """Batches of `rows` x `length` tokens, and what a model may be told of their sequences."""
    batch = ids(rows, length)
    ones = torch.ones_like(batch)
    right, left = ones.clone(), ones.clone()
    right[0, -length // 3 :] = 0
    left[-1, : length // 3] = 0
    # Three sequences in each row; the second begins and the third ends inside of some rank's part.
    ends = (length // 2 - 1, length // 2 + 2, length)
    positions = torch.cat([torch.arange(end - start) for start, end in zip((0, *ends), ends, strict=False)])
    told = {
        "nothing": {},
        "right padding": {"attention_mask": right},
        "left padding": {"attention_mask": left},
        "packed": {"position_ids": positions.expand(rows, length).contiguous()},
        "one row of positions": {"position_ids": positions[None].contiguous()},
    }
    return {name: {"input_ids": batch, **kwargs} for name, kwargs in told.items()}


def of_one_process(model, batch, stream=0, gradient=None, **options):
    """What one process alone makes of the whole batch: embeddings and, for `gradient`, the gradient of the table."""
    replace_embeddings(model, stream=stream, **options)
    torch.manual_seed(SEED)
    embeds = model(**batch)
    embeds.backward(upstream(embeds.shape, embeds.dtype))
    return embeds.detach(), model.embed.weight.grad


def draw_differently():
    """Ranks that compute one replica need not have drawn the same numbers; the first one's count."""
    torch.manual_seed(SEED + dist.get_rank())


def summed(gradient, group=None):
    gradient = gradient.clone()
    dist.all_reduce(gradient, group=group)
    return gradient
