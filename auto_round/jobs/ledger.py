"""What a stream has written so far: one line per layer beside the files that are being filled.

A killed run leaves its planned files with some places filled. The ledger says which, and with what checksums; going on
reads these places back, so that a line whose data never reached the disk costs one layer and no more.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from auto_round.core.errors import PlanError
from auto_round.jobs.manifest import differences

LEDGER = "ledger.jsonl"


class Ledger:
    """The ledger in a staging folder. done: layer -> tensor -> checksum, from an earlier run.

    manifest: everything that the outcome depends on (`jobs.manifest`). Without `resume` an earlier run does not count.
    """

    def __init__(self, manifest: Mapping[str, Any], *, resume: bool) -> None:
        self._manifest = json.loads(json.dumps(manifest, default=str))
        self._resume = resume
        self._lock = threading.Lock()
        self._file: TextIO | None = None
        self.count = 0

    def about(self, **facts: object) -> None:
        """More that the outcome depends on."""
        self._manifest.update(json.loads(json.dumps(facts)))

    def earlier(self, staging: Path) -> dict[str, dict[str, int]] | None:
        """What an earlier run with the same manifest wrote in `staging`; None when there is nothing to go on with.

        Raises PlanError naming what has changed since.
        """
        path = staging / LEDGER
        if not self._resume or not path.is_file():
            return None
        manifest, *entries = _lines(path) or [None]
        if manifest is None:
            return None
        changed = differences(manifest, self._manifest)
        if changed:
            raise PlanError(
                f"{staging}: these layers were made by another run; {'; '.join(changed)}. Give the earlier settings "
                "to go on with it, or leave out resume (--resume) to start again"
            )
        return {entry["layer"]: entry["tensors"] for entry in entries}

    def begin(self, staging: Path, done: Mapping[str, Mapping[str, int]]) -> None:
        """Start the file anew with what is `done`."""
        fresh = staging / f"{LEDGER}.new"
        self._file = fresh.open("w")
        self._write(self._manifest)
        for layer, tensors in done.items():
            self.add(layer, tensors)
        # Only now: a crash before this leaves the earlier run's file, and with it what that run did.
        os.replace(fresh, staging / LEDGER)

    def add(self, layer: str, tensors: Mapping[str, int]) -> None:
        """The tensors of `layer` are in their places. Threads may call it at the same time."""
        self._write({"layer": layer, "tensors": dict(tensors)})
        self.count += 1

    def _write(self, entry: Mapping[str, Any]) -> None:
        assert self._file is not None, "begin comes first"
        with self._lock:
            self._file.write(json.dumps(entry) + "\n")
            # To the system, not to the disk: a line that outlives its data is found out by its checksum.
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _lines(path: Path) -> list[Any]:
    """The whole lines of the file; one that was cut off by a crash is left out."""
    found = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):  # a crash may cut the last one
            found.append(json.loads(line))
    return found
