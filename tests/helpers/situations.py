"""Models that look tokens up and return the embeddings, and what their noise was."""

import torch
import transformers
from torch import nn

from neft_kernels import describe, no_noise

SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
IDS = torch.tensor([[3, 4, 5, 6, 7, 8], [3, 4, 5, 0, 0, 0]])
MASK = (IDS != 0).to(torch.int64)
ALPHA, WIDTH = 5.0, 16


def bound(length):
    return ALPHA / (length * WIDTH) ** 0.5


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).train()


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=60, d_model=WIDTH, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).train()


class Looks(nn.Module):
    """A model that takes whatever it is given."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(60, WIDTH)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, lengths=None, inputs_embeds=None):
        return self.embedding(input_ids) if inputs_embeds is None else inputs_embeds


def bounds(model):
    return describe(model)[0].last_magnitude


def notes(model):
    return [report.note for report in describe(model)]


def noise_of(model, *args, **kwargs):
    """What is added to each token, ``[..., D]``, of a model that returns its embeddings."""
    with no_noise(model):
        plain = model(*args, **kwargs)
    return model(*args, **kwargs) - plain
