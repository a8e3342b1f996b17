"""Small models, plain and noisy, and batches for them."""

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from neft_kernels import NEFTuneEmbedding, describe, no_noise, replace_embeddings

D = 16
IDS = torch.tensor([[3, 4, 5, 6, 7], [9, 8, 7, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
WEIGHT = torch.randn(50, D, generator=torch.Generator().manual_seed(0))
LLAMA_INPUTS = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS, "use_cache": False}

SMALL = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
BART = {
    "vocab_size": 50,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
}
NO_DROPOUT = {"dropout": 0.0, "dropout_rate": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}

# model class, config, the noisy embeddings and their strategy
MODELS = {
    "llama": ("LlamaForCausalLM", {**SMALL, "num_key_value_heads": 2}, {"model.embed_tokens": "fused"}),
    "qwen3, tied": (
        "Qwen3ForCausalLM",
        {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True},
        {"model.embed_tokens": "fused"},
    ),
    "gemma3, scaled": (
        "Gemma3ForCausalLM",
        {**SMALL, "num_key_value_heads": 2, "head_dim": 8},
        {"model.embed_tokens": "add_noise"},
    ),
    "t5, shared table": (
        "T5ForConditionalGeneration",
        {**T5, "decoder_start_token_id": 0},
        {"shared": "fused", "encoder.embed_tokens": "fused", "decoder.embed_tokens": "fused"},
    ),
    "bart, shared and scaled": (
        "BartForConditionalGeneration",
        {**BART, "scale_embedding": True},
        {
            "model.shared": "add_noise",
            "model.encoder.embed_tokens": "add_noise",
            "model.decoder.embed_tokens": "add_noise",
        },
    ),
}


def build(name):
    class_name, options, _ = MODELS[name]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    return model_class(model_class.config_class(**options, **NO_DROPOUT)).train()


def batch():
    torch.manual_seed(1)
    ids = torch.randint(3, 50, (2, 7))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def names(model):
    return [report.name for report in describe(model)]


def noise_in(model, inputs):
    """What the noise adds to each noisy embedding's output in one forward pass, by name."""
    outputs = {}

    def record(name):
        def hook(module, args, output):
            outputs[f"{name}, of the decoder" if name in outputs else name] = output.detach().clone()

        return hook

    # Hooks run in their order, so these see the output with its noise.
    modules = {name: model.get_submodule(name) for name in names(model)}
    handles = [module.register_forward_hook(record(name)) for name, module in modules.items()]
    model(**inputs)
    noisy = dict(outputs)
    outputs.clear()
    with no_noise(model):
        model(**inputs)
    for handle in handles:
        handle.remove()
    return {name: noisy[name] - outputs[name] for name in noisy}


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=D,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).train()


def rows(count=12):
    torch.manual_seed(1)
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 50, (count, 9)).tolist()]


def noisy_llama(alpha=5.0, **options):
    return replace_embeddings(llama(), alpha=alpha, **options)


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
