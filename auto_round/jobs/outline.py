"""What a job would do, before anything is done: layers and reasons, bytes of every format, memory and time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from auto_round.core.placement import Placement
from auto_round.core.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """blocks: their number. sizes: format -> bytes of its weight files, or why it cannot hold the plan. seconds: of all
    the work, from a rehearsal of its heaviest parts; None when there was none."""

    plan: Plan
    blocks: int
    source_bytes: int
    sizes: Mapping[str, int | str]
    placement: Placement
    seconds: float | None

    def schemes(self) -> dict[str, int]:
        """Scheme -> number of layers."""
        return dict(Counter(str(scheme) for scheme in self.plan.values()))

    def reasons(self) -> dict[str, int]:
        """Reason -> number of layers that have another scheme than the rest because of it."""
        return dict(Counter(reason for name, reason in self.plan.why.items() if name in self.plan))
