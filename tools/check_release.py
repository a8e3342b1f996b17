"""Are the files of a release whole, and right for an index page? They are looked into and run, and uploaded nowhere.

python -m tools.check_release URL FOLDER
"""

import argparse
import email
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from email.message import Message
from pathlib import Path

from tools.release import LINK, ROOT, version

IN_WHEEL = ("neft_kernels/__init__.py", "neft_kernels/py.typed", "neft_kernels/ops/_C_cpu.abi3.so")
IN_SOURCES = ("csrc/registration.h", "tests/test_contract.py", "docs/contract.md", "mkdocs.yml", "Makefile", "LICENSE")


def problems(url: str, folder: Path) -> Iterator[str]:
    wheels, sources = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    if not wheels or len(sources) != 1:
        yield f"{folder} has {len(wheels)} wheels and {len(sources)} source distributions"
        return
    with tarfile.open(sources[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        root = sources[0].name.removesuffix(".tar.gz")
        yield from wrong_metadata(url, read_metadata(archive.extractfile(f"{root}/PKG-INFO").read()))  # type: ignore[union-attr]
    yield from (f"{sources[0].name} lacks {name}" for name in IN_SOURCES if name not in names)
    for wheel in wheels:
        yield from wrong_wheel(url, wheel)


def read_metadata(raw: bytes) -> Message:
    return email.message_from_bytes(raw)


def wrong_wheel(url: str, wheel: Path) -> Iterator[str]:
    if not re.search(r"-cp310-abi3-manylinux_2_28_\w+\.whl$", wheel.name):
        yield f"{wheel.name} is not a cp310-abi3 wheel for manylinux_2_28"
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as unpacked:
        names = archive.namelist()
        yield from (f"{wheel.name} lacks {name}" for name in IN_WHEEL if name not in names)
        yield from (
            f"{wheel.name} has {name}" for name in names if re.search(r"lib(torch|c10)|(^|/)(tests|tools)/", name)
        )
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        yield from wrong_metadata(url, read_metadata(archive.read(metadata)))
        archive.extractall(unpacked)
        command = [sys.executable, str(ROOT / "tools" / "check_wheel.py")]
        environment = os.environ | {"PYTHONPATH": unpacked}
        done = subprocess.run(command, cwd=unpacked, env=environment, capture_output=True, text=True, check=False)
        if done.returncode or unpacked not in done.stdout:
            yield f"{wheel.name} does not run: {done.stdout}{done.stderr}"


def wrong_metadata(url: str, metadata: Message) -> Iterator[str]:
    if metadata["Version"] != version():
        yield f"the metadata has version {metadata['Version']}, not {version()}"
    urls = metadata.get_all("Project-URL") or []
    if f"Repository, {url}" not in urls:
        yield f"the metadata has no URL of the repository, but {urls}"
    page = metadata.get_payload() or metadata["Description"]
    assert isinstance(page, str)
    for _, _, target in LINK.findall(page):
        if not re.match(r"https://|#", target):
            yield f"the page has a link that an index cannot follow: {target}"
    if not LINK.search(page):
        yield "the page has no links at all"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url", help="of the repository, as the metadata must have it")
    parser.add_argument("folder", type=Path, help="with the wheels and the source distribution")
    options = parser.parse_args()
    found = list(problems(options.url.rstrip("/"), options.folder))
    if found:
        raise SystemExit("\n".join(found))
    print(f"{options.folder}: {', '.join(sorted(path.name for path in options.folder.iterdir()))} are whole")


if __name__ == "__main__":
    main()
