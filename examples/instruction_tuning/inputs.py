"""What the three runs share, prepared once: the model and its tokenizer, the training and the held-out examples.

Everything here raises InputError with the option's name when what the user asked for cannot be used.
"""

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, load_dataset
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
from transformers.utils.logging import disable_progress_bar

from docstring_data import QuestionAnswer, collect_pairs, split_pairs
from neft_kernels import replace_embeddings

VOCAB_SIZE = 4096
MAX_POSITIONS = 1024
# In a model of width 4096 whose embeddings start from LlamaConfig's standard deviation of 0.02, NEFTune's noise is a
# tenth of them: 5 / sqrt(3 * 512 * 4096) = 0.002 at alpha 5 and 512 tokens. At width 192 and 100 tokens it is 0.02, as
# large as such embeddings themselves; 0.2 keeps the proportion. With 0.02, embeddings tied and 400 steps, both noisy runs
# ended worse than the one without noise, by 0.16 (ours) and 0.21 (the Trainer's) in held-out loss.
EMBEDDING_STD = 0.2
PROMPT = "### {question}\n"

HELD_OUT_EXAMPLES = 128  # evaluated several times in each run, and so are as many training examples
HELD_OUT_FRACTION = 0.1  # of a data set that brings no test or validation split
MAX_PROMPT_WORDS = 12  # a text without a question is continued from its first words

# A file's loader, by the ending of its name.
LOADERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}

Example = dict[str, str]  # {"prompt": ..., "completion": ...} or {"text": ...}, as SFTTrainer takes them


class InputError(ValueError):
    """An option whose value cannot be used; the message names the option."""


@dataclass(frozen=True)
class Examples:
    train: list[Example]
    held_out: list[Example]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({"train": self.train, "held_out": self.held_out}))

    @classmethod
    def load(cls, path: Path) -> "Examples":
        return cls(**json.loads(path.read_text()))


def docstring_examples(seed: int) -> Examples:
    """The standard library's docstrings as prompt/completion pairs."""
    try:
        pairs = collect_pairs()
    except FileNotFoundError as error:
        raise InputError(f"--dataset: {error}") from error
    random.Random(seed).shuffle(pairs)
    train, held_out = split_pairs(pairs, HELD_OUT_FRACTION)

    def to_example(pair: QuestionAnswer) -> Example:
        return {"prompt": PROMPT.format(question=pair.question), "completion": pair.answer}

    return Examples([to_example(pair) for pair in train], [to_example(pair) for pair in held_out[:HELD_OUT_EXAMPLES]])


def dataset_examples(name_or_path: str, text_column: str | None, limit: int, seed: int) -> Examples:
    """Examples of a data set on the hub, a folder or a text, JSON, CSV or Parquet file.

    `text_column` is the column to train on; None takes the columns "prompt" and "completion" where both are there, else
    "text". At most `limit` training examples are drawn. The held-out examples are the test or validation split where
    there is one, else a tenth of the data; an example that is in both is dropped from training.
    """
    splits = load_splits(name_or_path, "--dataset")
    train_split = splits.get("train", next(iter(splits.values())))
    held_out_split = next((splits[name] for name in ("test", "validation") if name in splits), None)
    if held_out_split is train_split:
        held_out_split = None

    columns = _columns(train_split, text_column)
    train = _unique_examples(_sample(train_split, limit + HELD_OUT_EXAMPLES, seed), columns)
    if held_out_split is None:
        count = min(HELD_OUT_EXAMPLES, int(len(train) * HELD_OUT_FRACTION))
        train, held_out = train[count:], train[:count]
    else:
        _columns(held_out_split, text_column)
        held_out = _unique_examples(_sample(held_out_split, HELD_OUT_EXAMPLES, seed), columns)
        unseen = {_key(example) for example in held_out}
        train = [example for example in train if _key(example) not in unseen]
    if not train or not held_out:
        raise InputError(f"--dataset {name_or_path}: {len(train)} examples to train on and {len(held_out)} to hold out")
    return Examples(train[:limit], held_out)


def load_splits(name_or_path: str, option: str) -> DatasetDict:
    """The splits of a data set on the hub, a folder or a file; `option` is what error messages call it."""
    path = Path(name_or_path)
    try:
        if path.is_file():
            if path.suffix not in LOADERS:
                raise InputError(f"{option} {path}: the file name must end in one of {', '.join(LOADERS)}")
            options: dict[str, Any] = {"delimiter": "\t"} if path.suffix == ".tsv" else {}
            return load_dataset(LOADERS[path.suffix], data_files=str(path), **options)
        return load_dataset(name_or_path)
    except InputError:
        raise
    except Exception as error:  # each loader has its own exceptions, often wrapped in one that says little
        cause = error.__cause__ or error
        raise InputError(f"{option} {name_or_path}: cannot be loaded: {type(cause).__name__}: {cause}") from error


def _sample(split: Dataset, size: int, seed: int) -> Dataset:
    return split.shuffle(seed=seed).select(range(min(size, len(split))))


def _columns(split: Dataset, text_column: str | None) -> list[str]:
    if text_column is not None:
        columns = [text_column]
    elif {"prompt", "completion"} <= set(split.column_names):
        columns = ["prompt", "completion"]
    else:
        columns = ["text"]
    if len(split) == 0:
        raise InputError("--dataset: a split of it is empty")
    for column in columns:
        if column not in split.column_names:
            raise InputError(
                f"--text-column {column}: no such column, the data set has {', '.join(split.column_names)}"
            )
        if not isinstance(split[0][column], str):
            raise InputError(f"--text-column {column}: expected strings, got {type(split[0][column]).__name__}")
    return columns


def _unique_examples(split: Dataset, columns: list[str]) -> list[Example]:
    examples: dict[str, Example] = {}
    for row in split.select_columns(columns):
        example = row if len(columns) > 1 else {"text": row[columns[0]]}
        if all(value and value.strip() for value in example.values()):
            examples.setdefault(_key(example), example)
    return list(examples.values())


def _key(example: Example) -> str:
    return " ".join(" ".join(example.values()).lower().split())


def first_question(examples: Examples) -> tuple[str, str]:
    """(prompt, its true continuation) of the first held-out example."""
    example = examples.held_out[0]
    if "prompt" in example:
        return example["prompt"], example["completion"]
    words = example["text"].split(" ")
    count = min(MAX_PROMPT_WORDS, len(words) // 2)
    return " ".join(words[:count]), " ".join(words[count:])


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
    disable_progress_bar()  # for one small file
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


def fitting(examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Examples:
    """The examples whose prompt leaves room for an answer within `max_length` tokens."""

    def fits(example: Example) -> bool:
        return len(tokenizer(example.get("prompt", "")).input_ids) < max_length

    kept = Examples([each for each in examples.train if fits(each)], [each for each in examples.held_out if fits(each)])
    if not kept.train or not kept.held_out:
        raise InputError(f"--max-length {max_length}: the prompts are longer, so no answer is left to train on")
    return kept
