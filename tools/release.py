"""What a release needs, checked and prepared without the network and without torch.

    python -m tools.release check [--tag vX.Y.Z]
    python -m tools.release links URL REF         in a checkout that is thrown away

The version stands in ``neft_kernels/__init__.py`` alone. `links` makes the links of the README absolute, because an index page
does not have the repository's files, and names the repository in the metadata.
"""

import argparse
import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
UNRELEASED = "unreleased"


def version(root: Path = ROOT) -> str:
    tree = ast.parse((root / "neft_kernels" / "__init__.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return ast.literal_eval(node.value)
    raise SystemExit("neft_kernels/__init__.py has no __version__")


def problems(tag: str | None, root: Path = ROOT) -> list[str]:
    """What is wrong with the release that `tag` would make. Without a tag the changelog may be unreleased."""
    number = version(root)
    found = []
    heading = re.search(r"^## \[(.+?)\] - (.+)$", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    if heading is None or heading.group(1) != number:
        newest = heading.group(1) if heading else "nothing"
        found.append(f"the first entry of CHANGELOG.md is {newest}, not {number}")
    elif tag and not re.fullmatch(r"\d{4}-\d\d-\d\d", heading.group(2)):
        found.append(f"CHANGELOG.md has no date for {number}, but {heading.group(2)!r}")
    if tag and tag != f"v{number}":
        found.append(f"the tag is {tag}, and the version v{number}")
    if 'dynamic = ["version"]' not in (root / "pyproject.toml").read_text():
        found.append("pyproject.toml has a version of its own")
    citation = (root / "CITATION.cff").read_text()
    found += [
        f"CITATION.cff has no {key}"
        for key in ("cff-version", "message", "title", "authors")
        if not re.search(rf"^{key}:", citation, re.MULTILINE)
    ]
    return found


def with_absolute_links(text: str, url: str, ref: str) -> str:
    """`text` with links to files of the repository at `url` as it is at `ref`."""

    def absolute(found: re.Match) -> str:
        picture, name, target = found.groups()
        if re.match(r"\w+:", target) or target.startswith("#"):
            return found.group()
        kind = "raw" if picture else "blob"
        return f"{picture}[{name}]({url}/{kind}/{ref}/{target})"

    return LINK.sub(absolute, text)


def write_links(url: str, ref: str, root: Path = ROOT) -> None:
    url = url.rstrip("/")
    readme, project = root / "README.md", root / "pyproject.toml"
    readme.write_text(with_absolute_links(readme.read_text(), url, ref))
    urls = {
        "Repository": url,
        "Documentation": f"{url}/tree/{ref}/docs",
        "Changelog": f"{url}/blob/{ref}/CHANGELOG.md",
        "Issues": f"{url}/issues",
    }
    table = "".join(f'{name} = "{target}"\n' for name, target in urls.items())
    text, mark = project.read_text(), "[project.scripts]"
    if mark not in text or "[project.urls]" in text:
        raise SystemExit("pyproject.toml has no [project.scripts], or has [project.urls] already")
    project.write_text(text.replace(mark, f"[project.urls]\n{table}\n{mark}", 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="version, changelog, citation and the tag agree")
    check.add_argument("--tag")
    links = commands.add_parser("links", help="writes URLs into README.md and pyproject.toml")
    links.add_argument("url", help="of the repository")
    links.add_argument("ref", help="the tag or commit that the links lead to")
    links.add_argument("--root", type=Path, default=ROOT, help="the checkout; default: this one")
    commands.add_parser("version", help="prints the version")
    options = parser.parse_args()
    if options.command == "links":
        write_links(options.url, options.ref, options.root)
    elif options.command == "version":
        print(version())
    else:
        found = problems(options.tag)
        if found:
            raise SystemExit("\n".join(found))
        print(f"version {version()}: changelog and citation agree" + (", and so does the tag" if options.tag else ""))


if __name__ == "__main__":
    main()
