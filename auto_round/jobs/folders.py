"""Making folders so that a run that fails leaves none of its own behind."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def missing(folder: Path) -> list[Path]:
    """`folder` and those of its parents that do not exist yet, innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove `folders`, innermost first, up to the first that holds something."""
    for folder in folders:
        if folder.is_dir():
            if any(folder.iterdir()):
                return
            folder.rmdir()


def sync(folder: Path) -> None:
    """Make renames inside `folder` last, where the system can open folders."""
    if hasattr(os, "O_DIRECTORY"):
        # A rename is an entry of the folder: syncing the file alone may leave it under its old name after a crash.
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
