"""How many sign steps a block gets within a time budget, from what a rehearsal of one block took."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from auto_round.core.errors import PlanError

UNITS = {"s": 1, "m": 60, "h": 3600}
FEWEST = 10
"""With fewer steps than that, their large step size does more harm than good: there are none instead."""
RECIPE_STEPS = ((1000, "best"), (200, "default"), (50, "light"), (FEWEST, "a short one"))


@dataclass(frozen=True, slots=True)
class Chosen:
    """Sign steps per block, and the sentence that says why."""

    iters: int
    why: str


def parse_duration(text: str | int | float) -> float:
    """Seconds that "10m", "90s", "1h30m" or a plain number of seconds stand for. Raises PlanError for anything else."""
    said = str(text).strip().lower()
    parts = re.findall(r"(\d+(?:\.\d+)?)([smh])", said)
    seconds = sum(float(number) * UNITS[unit] for number, unit in parts)
    if re.fullmatch(r"\d+(\.\d+)?", said):
        seconds = float(said)
    elif "".join(number + unit for number, unit in parts) != said.replace(" ", ""):
        seconds = 0
    if seconds <= 0:
        raise PlanError(
            f"time_budget {text!r} is not understood; write 10m, 90s, 1h30m or a number of seconds"
        )
    return seconds


def within(budget: float, seconds: Callable[[int], float], most: int) -> Chosen:
    """As many steps as fit into `budget` seconds, `most` of them at best.

    seconds: of the whole job by its number of steps, estimated.
    """
    least, each = seconds(0), (seconds(2 * FEWEST) - seconds(FEWEST)) / FEWEST
    fit = most if each <= 0 else math.floor((budget - seconds(FEWEST)) / each) + FEWEST
    iters = min(most, fit) if fit >= min(FEWEST, most) else 0
    measured = f"estimated {least:.0f} s without tuning and {each:.2f} s for a step of all blocks"
    if budget < least:
        return Chosen(
            0, f"{measured}: no time for any step, and the work will take longer than {budget:.0f} s"
        )
    recipe = next(
        (name for count, name in RECIPE_STEPS if iters >= count), "none, what comes before tuning only"
    )
    return Chosen(iters, f"{measured}: {iters} steps fit into {budget:.0f} s (recipe {recipe})")
