"""`auto-round verify FOLDER`: the findings, one a line."""

from __future__ import annotations

from rich.console import Console

from auto_round.core.errors import PlanError, VerificationError
from auto_round.jobs.verify import verify


def report(folder: str, tp: str, console: Console) -> None:
    """Print what is wrong with the checkpoint in `folder`. Raises VerificationError when anything is.

    tp: degrees of tensor parallelism, comma separated.
    """
    parts = [part.strip() for part in tp.split(",") if part.strip()]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise PlanError(f"--tp {tp!r}: give degrees of tensor parallelism, such as 2,4,8")
    found = verify(folder, tp=map(int, parts))
    for finding in found:
        console.print(str(finding), markup=False, soft_wrap=True)
    if found:
        raise VerificationError(f"{folder}: {len(found)} findings")  # exit code 1, for scripts
    console.print(f"{folder}: nothing found", markup=False, soft_wrap=True)
