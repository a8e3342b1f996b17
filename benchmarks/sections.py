"""The parts of README.md and of docs/ that are written by programs, between comments that mark them."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"


def write_section(readme: Path, name: str, text: str) -> None:
    """Puts `text` between the two comments of `readme` that mark the section `name`."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, _, rest = readme.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{readme} has no section between {begin} and {end}")
    readme.write_text(f"{before}{begin}\n{text}\n{end}{after}")
