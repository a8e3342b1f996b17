"""The texts: the library's source without its docstrings, and question/answer pairs from them, as tokens."""

import ast
import hashlib
import json
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

sys.path.append(str(Path(__file__).parents[2] / "examples" / "instruction_tuning"))

from cache import CACHE, made_once
from causal_lm import train_tokenizer
from docstring_data import (
    OPTIONAL_MODULES,
    SKIPPED_MODULES,
    SKIPPED_PACKAGES,
    QuestionAnswer,
    collect_pairs,
    split_pairs,
)
from inputs import PROMPT, InputError, load_splits
from smollm2 import local_or_hub

__all__ = [
    "CACHE",
    "Example",
    "InputError",
    "Prepared",
    "QuestionAnswer",
    "collect_pairs",
    "instruction_pairs",
    "library_sources",
    "local_or_hub",
    "made_once",
    "split_pairs",
    "to_examples",
    "train_tokenizer",
    "without_docstrings",
]

#: Left out of the source: what the docstrings leave out too, tables of characters, and what is not the library's.
SKIPPED = SKIPPED_MODULES | OPTIONAL_MODULES | SKIPPED_PACKAGES | {"encodings", "site-packages"}


@dataclass(frozen=True)
class Example:
    """A question and its answer, as text and as tokens; `answer_ids` ends with the tokenizer's end of a sequence."""

    prompt: str
    answer: str
    prompt_ids: list[int]
    answer_ids: list[int]


@dataclass(frozen=True)
class Prepared:
    """The model that the runs start from, a folder with its tokenizer, the examples, and the record of the preparation."""

    folder: Path
    model: str  # a folder, or a name on the hub
    train: list[Example]
    held_out: list[Example]
    record: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> "Prepared":
        sides = json.loads((folder / "examples.json").read_text())
        model = sides.get("model", str(folder))
        train, held_out = ([Example(**fields) for fields in sides[side]] for side in ("train", "held_out"))
        return cls(folder, model, train, held_out, json.loads((folder / "pretraining.json").read_text()))


def to_examples(pairs: list[QuestionAnswer], tokenizer: PreTrainedTokenizerBase, most_tokens: int) -> list[Example]:
    """The pairs of at most `most_tokens`, in an order that has nothing to do with their names."""
    found = []
    for pair in sorted(pairs, key=lambda pair: hashlib.sha256(pair.name.encode()).digest()):
        if tokenizer.chat_template is None:
            prompt = PROMPT.format(question=pair.question)
        else:
            turn = {"role": "user", "content": pair.question}
            prompt = str(tokenizer.apply_chat_template([turn], add_generation_prompt=True, tokenize=False))
        # A template names the special tokens itself.
        prompt_ids = tokenizer(prompt, add_special_tokens=tokenizer.chat_template is None).input_ids
        answer_ids = [*tokenizer(pair.answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        if len(prompt_ids) + len(answer_ids) <= most_tokens:
            found.append(Example(prompt, pair.answer, prompt_ids, answer_ids))
    return found


def instruction_pairs(name_or_path: str) -> list[QuestionAnswer]:
    """The pairs of a data set with Alpaca's columns: instruction, input (may be empty or absent) and output.

    Each question is there once. `name_or_path` is a name on the hub, a folder or a file.
    """
    splits = load_splits(name_or_path, "--data")
    rows = splits.get("train", next(iter(splits.values())))
    missing = {"instruction", "output"} - set(rows.column_names)
    if missing:
        raise InputError(
            f"--data {name_or_path}: expected the columns instruction, input and output, got {', '.join(rows.column_names)}"
        )
    pairs: dict[str, QuestionAnswer] = {}
    for row in rows:
        question = "\n\n".join(filter(None, (row["instruction"], row.get("input"))))
        if row["output"]:
            pairs.setdefault(question, QuestionAnswer(question, question, row["output"]))
    return list(pairs.values())


def library_sources(stdlib: Path) -> list[str]:
    """The library's modules, without any docstring, sorted by path."""
    paths = (path.relative_to(stdlib) for path in sorted(stdlib.rglob("*.py")))
    return [
        without_docstrings((stdlib / path).read_bytes())
        for path in paths
        if not SKIPPED & {*path.with_suffix("").parts}
    ]


def without_docstrings(source: bytes) -> str:
    """A module's source with the docstrings cut out, and the lines that were nothing but docstring."""
    lines = source.decode(tokenize.detect_encoding(iter(source.splitlines(keepends=True)).__next__)[0]).splitlines(True)
    encoded = [line.encode() for line in lines]  # ast counts columns in bytes of UTF-8
    for node in sorted(_docstrings(ast.parse(source)), key=lambda node: node.lineno, reverse=True):
        assert node.end_lineno is not None
        before = encoded[node.lineno - 1][: node.col_offset]
        after = encoded[node.end_lineno - 1][node.end_col_offset :]
        rest = before + after
        encoded[node.lineno - 1 : node.end_lineno] = [rest] if rest.strip() else []
    return b"".join(encoded).decode()


def _docstrings(tree: ast.Module) -> Iterator[ast.Expr]:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and ast.get_docstring(node, clean=False) is not None
        ):
            statement = node.body[0]
            assert isinstance(statement, ast.Expr)
            yield statement
