"""Contract: an embedding whose weights are no ordinary table keeps its own forward, and noise goes on what it returns."""

import copy

import bitsandbytes
import pytest
import torch
import transformers
from torch import nn
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

from neft_kernels import add_noise, describe, no_noise, noise_magnitude, replace_embeddings, restore_embeddings

VOCABULARY, WIDTH = 50, 64
IDS = torch.arange(3, 17).view(2, 7)
MASK = torch.tensor([[1] * 4 + [0] * 3, [1] * 7])


def torchao(weight_dtype, granularity):
    def quantized(embedding):
        config = IntxWeightOnlyConfig(weight_dtype=weight_dtype, granularity=granularity)
        quantize_(embedding, config, filter_fn=lambda module, name: isinstance(module, nn.Embedding))
        return embedding

    return quantized


def eight_bits(embedding):
    new = bitsandbytes.nn.Embedding8bit(VOCABULARY, WIDTH, dtype=embedding.weight.dtype)
    new.weight = bitsandbytes.nn.Int8Params(embedding.weight.data, requires_grad=False, has_fp16_weights=False)
    return new.to("cpu")  # which quantises


def four_bits(quant_type):
    def quantized(embedding):
        new = bitsandbytes.nn.Embedding4bit(VOCABULARY, WIDTH, dtype=embedding.weight.dtype)
        new.weight = bitsandbytes.nn.Params4bit(embedding.weight.data, requires_grad=False, quant_type=quant_type)
        return new.to("cpu")

    return quantized


class Halves(torch.Tensor):
    """A table of which every row is half of what is stored: all that makes a tensor subclass of its own kind."""

    def __deepcopy__(self, memo):
        return memo.setdefault(
            id(self), nn.Parameter(self.as_subclass(torch.Tensor).detach().clone().as_subclass(Halves))
        )

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        return out.as_subclass(torch.Tensor) / 2 if func is nn.functional.embedding else out


def halved(embedding):
    embedding.weight = nn.Parameter(embedding.weight.data.as_subclass(Halves))
    return embedding


KINDS = {
    "torchao int8 by row": torchao(torch.int8, PerAxis(0)),
    "torchao int4 by group": torchao(torch.int4, PerGroup(32)),
    "bitsandbytes int8": eight_bits,
    "bitsandbytes nf4": four_bits("nf4"),
    "bitsandbytes fp4": four_bits("fp4"),
    "tensor subclass": halved,
}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def build(kind, dtype=torch.float32):
    """A model in training mode whose embedding is quantised."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).to(dtype)
    model.model.embed_tokens = KINDS[kind](model.model.embed_tokens)
    return model.train()


def embedded(model, seed=1):
    """What the embedding returns in a forward pass of the model, and the loss."""
    outputs = []
    handle = model.model.embed_tokens.register_forward_hook(lambda module, args, output: outputs.append(output))
    torch.manual_seed(seed)
    loss = model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss
    handle.remove()
    (output,) = outputs
    return output.detach(), loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_noise_is_added_to_what_the_embedding_returns(kind, dtype):
    model = build(kind, dtype)
    plain, plain_loss = embedded(model)
    assert plain.dtype == dtype
    weight = model.model.embed_tokens.weight
    assert type(weight) is not nn.Parameter

    replace_embeddings(model, alpha=5.0)
    (report,) = describe(model)
    assert (report.strategy, report.state) == ("add_noise", "on")
    assert model.model.embed_tokens.weight is weight
    noisy, loss = embedded(model)
    torch.manual_seed(1)
    magnitude = noise_magnitude(IDS, WIDTH, 5.0, attention_mask=MASK)
    assert torch.equal(noisy, add_noise(plain, magnitude))
    assert torch.equal(noisy[0, 4:], plain[0, 4:])
    assert (noisy != plain).any(-1)[MASK.bool()].all()
    assert loss != plain_loss

    loss.backward()  # into what can be trained
    assert model.lm_head.weight.grad.abs().max() > 0
    with no_noise(model):
        assert torch.equal(embedded(model)[0], plain)
    assert torch.equal(embedded(model.eval())[0], plain)


def test_restoring_leaves_no_trace(kind):
    model = build(kind)
    embedding = model.model.embed_tokens
    plain, _ = embedded(model)
    was = type(embedding), set(vars(embedding)), len(embedding._forward_hooks)
    assert model.model.embed_tokens is restore_embeddings(replace_embeddings(model)).model.embed_tokens
    assert (type(embedding), set(vars(embedding)), len(embedding._forward_hooks)) == was
    assert not describe(model)
    assert torch.equal(embedded(model)[0], plain)


def test_copies_are_as_noisy_and_independent(kind):
    model = build(kind)
    parameters = dict(model.named_parameters())
    replace_embeddings(model)
    assert all(parameter is parameters.pop(name) for name, parameter in model.named_parameters())
    assert not parameters
    twin = copy.deepcopy(model)
    assert torch.equal(embedded(twin)[0], embedded(model)[0])
    restore_embeddings(twin)
    assert describe(model)
    assert not describe(twin)
