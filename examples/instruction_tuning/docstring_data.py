"""Question/answer pairs from the docstrings of the Python standard library.

The sources of the standard library are parsed, never imported, so nothing is downloaded and nothing is executed:

    What does `textwrap.dedent` do?   ->   Remove any common leading whitespace from every line in `text`. ...

A given Python always yields the same pairs in the same order.
"""

import ast
import hashlib
import inspect
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Test suites, applications and jokes that ship with the library, and parts that many installations leave out.
SKIPPED_MODULES = frozenset({"test", "idlelib", "pydoc_data", "ensurepip", "turtledemo", "this", "antigravity"})
OPTIONAL_MODULES = frozenset({"tkinter", "turtle", "distutils", "lib2to3"})
SKIPPED_PACKAGES = frozenset({"test", "tests"})

MIN_ANSWER_CHARS = 50  # shorter docstrings hardly say more than the name does
MAX_ANSWER_CHARS = 600  # longer ones are manuals


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class QuestionAnswer:
    """One instruction-tuning example; `name` is the dotted name that the question is about."""

    name: str
    question: str
    answer: str


def collect_pairs(stdlib: Path | None = None) -> list[QuestionAnswer]:
    """All pairs of the running Python, in the order of their names, each question and each answer once.

    `stdlib` is the folder with the library's sources, the running Python's own by default. Raises FileNotFoundError
    where the sources are not installed (a zipped or stripped Python).
    """
    stdlib = stdlib or Path(sysconfig.get_paths()["stdlib"])
    questions: set[str] = set()
    answers: set[str] = set()
    pairs = []
    for pair in _documented(stdlib):
        answer_key = _normalised(pair.answer)
        if pair.question in questions or answer_key in answers:
            continue
        questions.add(pair.question)
        answers.add(answer_key)
        pairs.append(pair)
    if not pairs:
        raise FileNotFoundError(f"no Python sources of the standard library under {stdlib}")
    return pairs


def split_pairs(
    pairs: list[QuestionAnswer], held_out_fraction: float = 0.1
) -> tuple[list[QuestionAnswer], list[QuestionAnswer]]:
    """Splits into (train, held-out) by a hash of the answer's first paragraph.

    Docstrings that share their summary land on the same side, so no answer is seen in training and asked for later;
    and a pair keeps its side when other pairs come or go with another version of Python.
    """
    train: list[QuestionAnswer] = []
    held_out: list[QuestionAnswer] = []
    for pair in pairs:
        summary = _normalised(pair.answer.split("\n\n")[0])
        digest = hashlib.sha256(summary.encode()).digest()
        is_held_out = int.from_bytes(digest[:8], "big") < held_out_fraction * 2**64
        (held_out if is_held_out else train).append(pair)
    return train, held_out


def _documented(stdlib: Path) -> Iterator[QuestionAnswer]:
    for module_name, path in _public_modules(stdlib):
        tree = ast.parse(path.read_bytes(), filename=str(path))
        yield from _pair("What is the module `{}` for?", module_name, tree)
        yield from _documented_members(tree, module_name)


def _public_modules(stdlib: Path) -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of every public module that is written in Python, sorted by name."""
    for name in sorted(sys.stdlib_module_names - SKIPPED_MODULES - OPTIONAL_MODULES):
        if name.startswith("_"):
            continue
        if (stdlib / f"{name}.py").is_file():
            yield name, stdlib / f"{name}.py"
        package = stdlib / name
        modules = {}
        for path in package.rglob("*.py"):
            parts = path.relative_to(stdlib).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            if not any(part.startswith("_") or part in SKIPPED_PACKAGES for part in parts):
                modules[".".join(parts)] = path
        yield from sorted(modules.items())


def _documented_members(scope: ast.AST, scope_name: str) -> Iterator[QuestionAnswer]:
    """Pairs of the public classes, functions and methods of a module or class, in source order.

    Definitions inside `if` and `try` count, those inside functions do not.
    """
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if node.name.startswith("_"):
                continue
            name = f"{scope_name}.{node.name}"
            if isinstance(node, ast.ClassDef):
                yield from _pair("What is the class `{}`?", name, node)
                yield from _documented_members(node, name)
            else:
                yield from _pair("What does `{}` do?", name, node)
        elif isinstance(node, ast.If | ast.Try | ast.ExceptHandler | ast.With):
            yield from _documented_members(node, scope_name)


def _pair(template: str, name: str, node: Documented) -> Iterator[QuestionAnswer]:
    docstring = ast.get_docstring(node, clean=False)
    if docstring is None:
        return
    answer = inspect.cleandoc(docstring).strip()
    if MIN_ANSWER_CHARS <= len(answer) <= MAX_ANSWER_CHARS:
        yield QuestionAnswer(name, template.format(name), answer)


def _normalised(text: str) -> str:
    return " ".join(text.lower().split())
