"""The training and the held-out examples, prepared once for all runs.

Everything here raises InputError with the option's name when what the user asked for cannot be used.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from transformers import PreTrainedTokenizerBase

from docstring_data import QuestionAnswer, collect_pairs, split_pairs

PROMPT = "### {question}\n"

HELD_OUT_EXAMPLES = 128  # at most
HELD_OUT_FRACTION = 0.1  # of a data set that brings no test or validation split
MAX_PROMPT_WORDS = 12  # a text without a question is continued from its first words

# A file's loader, by the ending of its name.
LOADERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}

#: A text, or the turns of a chat.
Prompt = str | list[dict[str, str]]
#: {"prompt": Prompt, "completion": Prompt} or {"text": str}, as SFTTrainer takes them.
Example = dict[str, Any]


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

    def first(self, train: int, held_out: int) -> "Examples":
        return Examples(self.train[:train], self.held_out[:held_out])


def docstring_examples(seed: int, stdlib: Path | None = None) -> Examples:
    """The standard library's docstrings as prompt/completion pairs. `stdlib`: see `collect_pairs`."""
    try:
        pairs = collect_pairs(stdlib)
    except FileNotFoundError as error:
        raise InputError(f"--dataset: {error}") from error
    random.Random(seed).shuffle(pairs)
    train, held_out = split_pairs(pairs, HELD_OUT_FRACTION)

    def to_example(pair: QuestionAnswer) -> Example:
        return {"prompt": pair.question, "completion": pair.answer}

    return Examples([to_example(pair) for pair in train], [to_example(pair) for pair in held_out])


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


def in_model_format(examples: Examples, tokenizer: PreTrainedTokenizerBase, prompt_format: str) -> Examples:
    """Pairs as turns of a chat if the tokenizer has a template for them; else with the prompt in `prompt_format`."""

    def formatted(example: Example) -> Example:
        if "text" in example:
            return example
        if tokenizer.chat_template is None:
            return {**example, "prompt": prompt_format.format(question=example["prompt"])}
        return {
            "prompt": [{"role": "user", "content": example["prompt"]}],
            "completion": [{"role": "assistant", "content": example["completion"]}],
        }

    return Examples([formatted(each) for each in examples.train], [formatted(each) for each in examples.held_out])


def question_and_answer(example: Example) -> tuple[Prompt, str]:
    """What the model is asked, and the true answer. A text is to be continued from its first words."""
    if "text" in example:
        words = example["text"].split(" ")
        count = min(MAX_PROMPT_WORDS, len(words) // 2)
        return " ".join(words[:count]), " ".join(words[count:])
    answer = example["completion"]
    return example["prompt"], answer if isinstance(answer, str) else answer[0]["content"]


def prompt_text(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the model reads before it answers."""
    if isinstance(prompt, str):
        return prompt
    return str(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False))


def fitting(examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Examples:
    """The pairs of at most `max_length` tokens, and all texts, which SFTTrainer cuts."""

    def fits(example: Example) -> bool:
        if "text" in example:
            return True
        prompt, answer = question_and_answer(example)
        text = prompt_text(prompt, tokenizer) + answer
        return len(tokenizer(text).input_ids) < max_length  # one is left for the end

    kept = Examples([each for each in examples.train if fits(each)], [each for each in examples.held_out if fits(each)])
    if not kept.train or not kept.held_out:
        raise InputError(
            f"--max-length {max_length}: {len(kept.train)} pairs to train on and {len(kept.held_out)} held out are that short"
        )
    return kept
