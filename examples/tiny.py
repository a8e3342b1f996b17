"""What the examples train when their configuration names no model and no data set: nothing has to be downloaded.

The model is a Llama or a BERT of two layers with random weights, and the data are questions about functions of Python's
standard library with their docstrings as answers.
"""

import inspect
import itertools
import math
import os
import statistics
import string
import textwrap
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER = Path(__file__).resolve().parent.parent / "build" / "examples"
MODULES = (math, statistics, itertools, string, textwrap, os.path)
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"


def pairs() -> list[tuple[str, str]]:
    """Questions and answers."""
    found = []
    for module in MODULES:
        for name, function in sorted(vars(module).items()):
            text = inspect.getdoc(function)
            if not name.startswith("_") and callable(function) and text:
                found.append((f"What does {module.__name__}.{name} do?", text.split("\n\n")[0][:200]))
    return found


def model(kind: str = "llama") -> str:
    """The path of a folder with a model of `kind`, "llama" or "bert", and its tokenizer. The first call makes it."""
    folder = FOLDER / kind
    if not folder.exists():
        made = FOLDER / f"{kind}.{os.getpid()}"
        _make(kind, made)
        try:
            made.rename(folder)
        except OSError:  # another process was faster
            if not folder.exists():
                raise
    return str(folder)


def _make(kind: str, folder: Path) -> None:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(itertools.chain(*pairs()), vocab_size=512, special_tokens=list(SPECIAL.values()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, model_max_length=256, **SPECIAL)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    if kind == "bert":
        BertModel(BertConfig(**sizes, **ids, max_position_embeddings=256)).save_pretrained(folder)
    else:
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        LlamaForCausalLM(LlamaConfig(**sizes, **ids, **ends, num_key_value_heads=4)).save_pretrained(folder)
