"""Choosing one option for each of many things, so that the costs stay within a budget and the losses are least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from auto_round.core.errors import PlanError

UNITS = 1 << 14
"""Into so many equal parts the budget is divided; costs are rounded up to whole ones."""


@dataclass(frozen=True, slots=True)
class Option:
    """What one choice costs, in whole units, and what is lost by it."""

    cost: int
    loss: float


def allocate(groups: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """The number of the option for each of `groups`.

    A knapsack by dynamic programming over the cost above the cheapest options, in `UNITS` steps; what rounding left of
    the budget then goes to the best exchanges that still fit. Raises PlanError when the cheapest options cost more.
    """
    least = [min(option.cost for option in options) for options in groups]
    room = budget - sum(least)
    if room < 0:
        raise PlanError(f"the cheapest options cost {sum(least):,}, more than the budget of {budget:,}")
    unit = max(1, -(-room // UNITS))
    states = room // unit + 1
    best = torch.zeros(states, dtype=torch.float64)  # least loss of the groups so far within i units
    taken: list[torch.Tensor] = []
    for options, base in zip(groups, least, strict=True):
        tries = torch.full((len(options), states), torch.inf, dtype=torch.float64)
        for number, option in enumerate(options):
            steps = -(-(option.cost - base) // unit)
            if steps < states:
                tries[number, steps:] = best[: states - steps] + option.loss
        best, chosen = tries.min(0)
        taken.append(chosen.to(torch.uint8))
    found, left = [0] * len(groups), states - 1
    for at in reversed(range(len(groups))):
        found[at] = int(taken[at][left])
        left -= -(-(groups[at][found[at]].cost - least[at]) // unit)
    return _spent(groups, found, budget)


def _spent(groups: Sequence[Sequence[Option]], found: list[int], budget: int) -> list[int]:
    """`found` after the exchanges that gain most per cost, as long as one fits into what is left."""
    found = list(found)
    left = budget - sum(options[at].cost for options, at in zip(groups, found, strict=True))
    while True:
        exchanges = [
            ((options[at].loss - other.loss) / max(1, other.cost - options[at].cost), group, number)
            for group, (options, at) in enumerate(zip(groups, found, strict=True))
            for number, other in enumerate(options)
            if other.loss < options[at].loss and other.cost - options[at].cost <= left
        ]
        if not exchanges:
            return found
        _, group, number = max(exchanges)
        left -= groups[group][number].cost - groups[group][found[group]].cost
        found[group] = number
