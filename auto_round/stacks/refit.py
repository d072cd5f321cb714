"""Scales by least squares after rounding: the codes stay, the scales of a row are solved for together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from auto_round.stacks.columns import Part, normal_equations, parts_of
from auto_round.stacks.stack import Stack

RIDGE = 1e-4  # share of the mean power of a row's groups
VALUES = 1 << 24  # of the systems that are in memory at once
LEAST, MOST = 0.25, 4.0  # a factor beyond would only fit rounding errors: the system is ill-conditioned


def refit(stack: Stack) -> None:
    """Take scales, in storage dtype, of least output error for the codes at hand, in the rows where they lower it."""
    rows, columns = stack.weight.shape
    parts = parts_of(stack)
    unknowns = -(-columns // (stack.size * stack.shared)) * len(parts)
    step = max(1, VALUES // unknowns**2)
    found = [_refitted(stack, parts, slice(start, min(start + step, rows))) for start in range(0, rows, step)]
    grid = {key: torch.cat([own[key] for own, _ in found]).reshape(-1, 1) for key in parts}
    stack.rescale(grid, torch.cat([gain for _, gain in found]))


def _refitted(stack: Stack, parts: Mapping[str, Part], chosen: slice) -> tuple[dict[str, Tensor], Tensor]:
    """The stored parameters of the `chosen` rows (r, groups), and by how much they lower the loss of each (r, 1)."""
    system, slope = normal_equations(stack, list(parts.values()), chosen)
    power = system.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).clamp(min=1e-30)
    # What the data do not determine stays as it is.
    damped = system + torch.diag_embed((RIDGE * power).expand_as(slope))
    factors = 1 - torch.linalg.solve(damped, slope)
    factors = torch.where((factors > LEAST) & (factors < MOST), factors, torch.ones_like(factors))  # nor NaN
    grid, changes = {}, []
    for key, factor in zip(parts, factors.chunk(len(parts), 1)):
        now = stack.grid[key].reshape(len(stack.weight), -1)[chosen]
        grid[key] = stack.storable(now * factor.repeat_interleave(stack.shared, 1))
        stored = torch.where(now == 0, torch.ones_like(now), grid[key] / now)
        changes.append(stored[:, :: stack.shared] - 1)
    change = torch.cat(changes, 1)
    # The loss is quadratic in the changes, so its difference needs no pass over the weights.
    curve = (system @ change.unsqueeze(-1)).squeeze(-1)
    return grid, -((curve + 2 * slope) * change).sum(1, keepdim=True)
