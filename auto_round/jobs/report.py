"""What a run did, as data: one JSON file with its blocks, its placement, and planned beside measured memory."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from auto_round.core.placement import Placement
from auto_round.core.plan import Plan
from auto_round.jobs.quantize import BlockResult
from auto_round.version import __version__


class Report:
    """An observer that keeps every result; `write` makes the file."""

    def __init__(self) -> None:
        self._results: list[BlockResult] = []
        self._plan: Plan | None = None
        self._started = time.perf_counter()  # not the clock, which may be set while a job runs

    def started(self, plan: Plan, blocks: int) -> None:
        """Remember the plan."""
        self._plan = plan

    def finished(self, result: BlockResult) -> None:
        """Remember a block."""
        self._results.append(result)

    def content(
        self, placement: Placement, measured: dict[str, int], seconds: float | None
    ) -> dict[str, Any]:
        """Everything, ready for JSON. seconds: what was estimated before."""
        plan = self._plan
        return {
            "auto_round": __version__,
            "seconds": {"planned": seconds, "measured": time.perf_counter() - self._started},
            "memory": {"planned": {"ram": placement.ram, "vram": placement.vram}, "measured": measured},
            "placement": asdict(placement),
            "layers": {name: str(scheme) for name, scheme in plan.items()} if plan is not None else {},
            "why": dict(plan.why) if plan is not None else {},
            "blocks": [asdict(result) for result in self._results],
        }

    def write(
        self, path: Path, placement: Placement, measured: dict[str, int], seconds: float | None
    ) -> None:
        """Write it to `path`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.content(placement, measured, seconds), indent=1, default=str) + "\n")
