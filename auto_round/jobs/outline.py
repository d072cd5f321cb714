"""What a job would do, before anything is done: layers and reasons, bytes of every format, memory and time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from auto_round.core.placement import Placement
from auto_round.core.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """plans: by the formats that share one. blocks: their number. sizes: format -> bytes of its weight files, or why it
    cannot hold the plan. seconds: of all the work, from a rehearsal of its heaviest parts; None when there was none."""

    plans: Mapping[str, Plan]
    blocks: int
    source_bytes: int
    sizes: Mapping[str, int | str]
    placement: Placement
    seconds: float | None

    @property
    def plan(self) -> Plan:
        """The first of the plans."""
        return next(iter(self.plans.values()))


def schemes(plan: Plan) -> dict[str, int]:
    """Scheme -> number of layers."""
    return dict(Counter(str(scheme) for scheme in plan.values()))


def reasons(plan: Plan) -> dict[str, int]:
    """Reason -> number of layers that have another scheme than the rest because of it."""
    return dict(Counter(reason for name, reason in plan.why.items() if name in plan))
