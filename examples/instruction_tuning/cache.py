"""Folders that are made once and kept in the user's cache."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

CACHE = Path.home() / ".cache" / "neft_kernels"


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`; if it does not exist yet, `make` fills it. An interrupted `make` leaves no folder that looks complete."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}-unfinished-", dir=folder.parent))
        try:
            make(unfinished)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder
