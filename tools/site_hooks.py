"""What mkdocs does besides: pages from outside of docs/, links to them, and a check of the docstrings.

The README is the first page of the site. Whatever pages link to in the repository becomes a part of the site: Markdown as a
page, source files as pages of code, pictures and records as they are. So the site needs no other server, and a link to a
file that is missing fails ``make docs``.
"""

import logging
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
CODE = {".py": "python", ".h": "cpp", ".cpp": "cpp", ".cu": "cpp", ".cuh": "cpp", ".cff": "yaml", "": "text"}
README = "README.md"
log = logging.getLogger("mkdocs.hooks.site")


# --- pages and links ------------------------------------------------------------------------------------------------


def in_site(path: str) -> str:
    """Where the file `path` of the repository lies in the site."""
    if path == README:
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"source/{path}.md" if Path(path).suffix in CODE else path


def targets(path: str) -> Iterator[str]:
    """The files of the repository that the page `path` links to."""
    for _, link, _ in LINK.findall(FENCE.sub("", (ROOT / path).read_text())):
        if not re.match(r"\w+:|#", link):
            yield posixpath.normpath(posixpath.join(posixpath.dirname(path), link.partition("#")[0]))


def with_links_of_site(text: str, path: str) -> str:
    """The page `path` of the repository, with links to where the files lie in the site."""
    here = posixpath.dirname(in_site(path))

    def moved(found: re.Match) -> str:
        opening, link, closing = found.groups()
        if re.match(r"\w+:|#", link):
            return found.group()
        file, mark, anchor = link.partition("#")
        target = in_site(posixpath.normpath(posixpath.join(posixpath.dirname(path), file)))
        return f"{opening}{posixpath.relpath(target, here or '.')}{mark}{anchor}{closing}"

    parts = re.split(f"({FENCE.pattern})", text, flags=FENCE.flags)
    text = "".join(part if part.startswith("```") else LINK.sub(moved, part) for part in parts)
    return text.replace(
        "<details>", '<details markdown="1">'
    )  # whose contents are Markdown on GitHub without being told


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what lies outside of docs/ and is linked to, from page to page."""
    todo = [README, "CHANGELOG.md", *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    seen: set[str] = set()
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        source = ROOT / path
        if not source.is_file():
            log.warning("a page links to %s, which is not a file", path)
            continue
        if source.suffix == ".md":
            todo += targets(path)
        if path.startswith("docs/"):
            continue
        if source.suffix == ".md":
            text = with_links_of_site(source.read_text(), path)
            files.append(File.generated(config, in_site(path), content=text))
        elif source.suffix in CODE:
            code = f'# {path}\n\n```{CODE[source.suffix]} linenums="1"\n{source.read_text()}\n```\n'
            files.append(File.generated(config, in_site(path), content=code))
        else:
            files.append(File.generated(config, in_site(path), content=source.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Redirects the links of the pages in docs/. Those of generated pages were redirected already."""
    if page.file.generated_by:
        return markdown
    return with_links_of_site(markdown, f"docs/{page.file.src_uri}")


# --- docstrings -----------------------------------------------------------------------------------------------------

ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):<code>([\w.]+)</code>")


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Sphinx's roles in docstrings become links, and the colons before a block of code go."""

    def link(found: re.Match) -> str:
        name = found.group(1).removeprefix("neft_kernels.")
        target = name if name.startswith("torch.") else f"neft_kernels.{name}"
        return f'<autoref optional identifier="{target}"><code>{name}</code></autoref>'

    return ROLE.sub(link, html).replace("<p>::</p>", "")


def on_pre_build(config: MkDocsConfig) -> None:
    """Warns, and so fails, where the reference lacks a public name or a docstring."""
    package = griffe.load("neft_kernels", search_paths=[str(ROOT)])
    listed = re.findall(r"^::: neft_kernels\.([\w.]+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    for name in sorted({*map(str, package.exports or ()), "NEFTuneCallback", "patch_transformers"} - set(listed)):
        log.warning("docs/api.md lacks neft_kernels.%s", name)
    for name in listed:
        for path in without_docstring(package[name]):
            log.warning("%s has no docstring", path)


def without_docstring(documented: Any) -> Iterator[str]:
    """The paths of `documented` and its public members that have no docstring."""
    if documented.is_alias:
        documented = documented.final_target
    if not documented.docstring:
        yield documented.path
    if documented.is_class:
        for name, member in documented.members.items():
            # Methods of torch and of transformers are documented there.
            is_inherited = name in ("forward", "backward", "setup_context") or name.startswith("on_")
            if member.is_function and not name.startswith("_") and not is_inherited and not member.docstring:
                yield member.path
