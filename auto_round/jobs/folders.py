"""Folders that a run which fails leaves none of behind, and files that are what was written."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from auto_round.core.errors import OutputError

PIECE = 1 << 20


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep other jobs of this machine out of `folder` meanwhile. Raises OutputError when one is there already.

    A process that dies gives up its claim: there is nothing to clean up.
    """
    # Not inside the folder, which may not exist yet, and where a file would be left behind.
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    path = (
        Path(tempfile.gettempdir()) / f"auto_round-{os.getuid() if hasattr(os, 'getuid') else ''}-{name}.lock"
    )
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OutputError(
            f"output folder {folder}: another job is writing there; wait for it, or choose another --output_dir"
        ) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: afterwards it may be somebody else's
        lock.release()


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


def digest(path: Path, offset: int = 0, size: float = math.inf) -> str:
    """Hash of `size` bytes of a file from `offset` on, to its end by default; read in pieces, so that none of it stays
    in memory."""
    state = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        file.seek(offset)
        while size > 0 and (piece := file.read(int(min(size, PIECE)))):
            state.update(piece)
            size -= len(piece)
    return state.hexdigest()
