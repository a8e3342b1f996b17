"""Small noisy models with a padded batch, and how two runs of them are compared."""

import torch
from conftest import equal_bits
from test_huggingface import build
from test_trainer import D, model

from neft_kernels import NEFTuneEmbedding, replace_embeddings

IDS = torch.tensor([[3, 4, 5, 6, 7], [9, 8, 7, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
WEIGHT = torch.randn(50, D, generator=torch.Generator().manual_seed(0))
LLAMA_INPUTS = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS, "use_cache": False}


def noisy_llama(alpha=5.0, **options):
    return replace_embeddings(model(), alpha=alpha, **options)


def noisy_gemma():
    """Its embeddings are scaled, so noise is added to what they return."""
    return replace_embeddings(build("gemma3, scaled"))


def noisy_module(**options):
    return NEFTuneEmbedding(50, D, _weight=WEIGHT.clone(), **options)


def seeded(call, *args, **kwargs):
    torch.manual_seed(5)
    return call(*args, **kwargs)


def padded_batches():
    """Batches of growing length, with padding; sizes 0 and 1 would be graphs of their own."""
    for length in (6, 9, 14, 23):
        ids = torch.randint(3, 50, (2, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(ids)
        mask[1, length // 2 :] = 0
        yield ids, mask


def llama_batches():
    for ids, mask in padded_batches():
        yield {"input_ids": ids, "attention_mask": mask, "use_cache": False}


def gradients(network):
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def differing(a, b):
    """The names of the tensors that are not equal bit for bit."""
    return [key for key in a.keys() | b.keys() if key not in a or key not in b or not equal_bits(a[key], b[key])]
