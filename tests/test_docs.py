"""The README and the pages of docs/ are short enough, link to what exists, run, and name what there is."""

import ast
import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from neft_kernels import describe, replace_embeddings

REPOSITORY = Path(__file__).parent.parent
README, CONTRIBUTING = REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"
PAGES = [
    *(README, CONTRIBUTING, REPOSITORY / "CHANGELOG.md", REPOSITORY / "examples" / "README.md"),
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
MAX_README_LINES = 150

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: Of a link or a picture: [text](target).
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)

name_of = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))


def blocks(page, language):
    return [body for found, body in FENCE.findall(page.read_text()) if found == language]


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = HEADING.findall(FENCE.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page):
    links = LINK.findall(FENCE.sub("", page.read_text()))
    broken = []
    for link in links:
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def read_variables(source):
    """The environment variables that Python `source` reads or sets: all strings that look like one, if it touches any."""
    if not re.search(r"os\.(environ|getenv)", source):
        return set()
    strings = {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
    return {each for each in strings if isinstance(each, str) and re.fullmatch(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+", each)}


def make_targets():
    makefile = (REPOSITORY / "Makefile").read_text()
    return set(re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE).group(1).split())


def named_targets(page):
    return set(re.findall(r"`make ([a-z][a-z-]*)", page.read_text())) | {
        target for body in blocks(page, "sh") for target in re.findall(r"^make ([a-z-]+)", body, re.MULTILINE)
    }


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= MAX_README_LINES


@name_of
def test_links_lead_somewhere(page):
    """To a file of the repository, and to a heading in it where the link names one."""
    assert broken_links(page) == []


def test_a_link_to_nowhere_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One two\n[a](#one-two) [b](page.md#one-two) [c](#three) [d](missing.md) [e](https://example.org)\n"
    )
    assert broken_links(page) == ["#three", "missing.md"]


def tiny_llama():
    """A model with embeddings of the width and the size of SmolLM2-135M's, and a batch of 256 and of 64 tokens."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 1000, "hidden_size": 576, "intermediate_size": 128, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4, pad_token_id=0))
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.136)
    input_ids, attention_mask = torch.randint(1, 1000, (2, 256)), torch.ones(2, 256, dtype=torch.int64)
    input_ids[1, 64:] = attention_mask[1, 64:] = 0
    return model.train(), {"input_ids": input_ids, "attention_mask": attention_mask}


def training_step(model, batch):
    model(**batch, labels=batch["input_ids"]).loss.backward()


@name_of
def test_snippets_run(page, tmp_path):
    """In order, with a training step after each."""
    model, batch = tiny_llama()
    names = {
        **batch,
        "model": model,
        "dataset": [{"input_ids": ids, "labels": ids} for ids in batch["input_ids"]],
        "args": TrainingArguments(output_dir=str(tmp_path), use_cpu=True, max_steps=1, report_to=[]),
    }
    for number, snippet in enumerate(blocks(page, "python")):
        exec(compile(snippet, f"{page.name}, snippet {number}", "exec"), names)
        training_step(model, batch)


def test_what_a_page_shows_is_printed(capsys):
    """But for the backend, which depends on the machine, and the last digit of a ratio that changes with the training."""
    varies = re.compile(r"(?<=backend ')\w+(?=')|\d(?= of the embeddings)")
    shown = re.compile(r"^```python\n(.*?)^```\n\n```output\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    found = shown.findall((REPOSITORY / "docs" / "get-started.md").read_text())
    assert len(found) == 3
    names = {}
    for snippet, output in found:
        exec(snippet, names)
        assert varies.sub("", capsys.readouterr().out) == varies.sub("", output)


def test_describe_prints_what_the_readme_shows():
    """But for the backend, which depends on the machine."""
    model, batch = tiny_llama()
    replace_embeddings(model, alpha=5.0)
    training_step(model, batch)
    shown = re.search(r"<!-- describe -->\n```\n(.*?)\n```", README.read_text(), re.DOTALL).group(1)
    backend = re.compile(r"(?<=backend ')\w+(?=')")
    assert backend.sub("", shown) == backend.sub("", str(describe(model)))


@name_of
def test_programs_in_commands_exist(page):
    named = {path for body in blocks(page, "sh") for path in re.findall(r"(?<![\w./-])[\w/]+\.py\b", body)}
    assert [path for path in sorted(named) if not (REPOSITORY / path).is_file()] == []


def test_every_switch_is_in_the_docs_and_no_other():
    sources = [REPOSITORY / "setup.py", *(REPOSITORY / "neft_kernels").rglob("*.py")]
    read = set().union(*(read_variables(source.read_text()) for source in sources))
    rows = re.findall(r"^\| `(\w+)` \|", (REPOSITORY / "docs" / "switches.md").read_text(), re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert set(rows) == read


def test_a_switch_is_found_however_it_is_read():
    read = ("os.environ['A_B']", "SWITCH = 'A_B'; os.environ.get(SWITCH)", "_choice('A_B'); os.environ.get(name)")
    assert [read_variables(source) for source in read] == [{"A_B"}] * 3
    assert read_variables("SWITCH = 'A_B'") == set()


@name_of
def test_targets_of_make_exist(page):
    assert named_targets(page) <= make_targets()


def test_every_target_of_make_is_described():
    assert named_targets(CONTRIBUTING) == make_targets()


def test_the_map_of_the_house_is_whole():
    """Every file of the package is in it, and no other."""
    (the_map,) = (body for body in blocks(CONTRIBUTING, "") if body.startswith("neft_kernels/"))
    package, _, _ = the_map.partition("\ncsrc/")
    files = {path.name for path in (REPOSITORY / "neft_kernels").rglob("*.py") if not path.name.startswith("__")}
    assert set(re.findall(r"\w+\.py", package)) == files


@name_of
def test_files_in_the_text_exist(page):
    folders = "benchmarks|csrc|docs|examples|experiments|neft_kernels|tests|tools"
    named = re.findall(rf"`((?:{folders})/[\w./]+)`", page.read_text())
    assert [path for path in named if "NAME" not in path and not (REPOSITORY / path).exists()] == []


def test_extras_exist():
    declared = (REPOSITORY / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    declared = set(re.findall(r"^(\w+) = \[", declared.partition("\n[tool")[0], re.MULTILINE))
    named = set(re.findall(r"`(?:neft-kernels)?\[(\w+)\]`", README.read_text()))
    assert "huggingface" in named
    assert named <= declared
