"""Scales by least squares after rounding: the codes stay, the scales of a row are solved for together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from auto_round.core.plan import Plan
from auto_round.core.quantized import Knobs
from auto_round.sources.base import Block, Needs
from auto_round.steps.base import BlockReport, Stack, Step, stacks_of

RIDGE = 1e-4  # share of the mean power of a row's groups
ROWS = 1 << 24  # values of the products that are in memory at once


@dataclass(kw_only=True)
class Refit(Step):
    """Scales, in storage dtype, of least output error for the codes at hand; kept in the rows where they lower it.

    selective: only for layers whose codec asks for it.
    """

    selective: bool = False
    needs: Needs = Needs.STATISTICS

    def block(
        self, block: Block, plan: Plan, knobs: dict[str, Knobs], report: BlockReport
    ) -> dict[str, Knobs]:
        """`knobs` with new scales, and with offsets that keep the codes."""
        found = dict(knobs)
        for stack in stacks_of(block, plan, knobs, selective=self.selective):
            stack.rescale(best_factors(stack))
            found |= stack.knobs()
        return found


def best_factors(stack: Stack) -> dict[str, Tensor]:
    """By what to multiply each parameter for least tr(D gram D'), (G, 1) each; 1 where that would be absurd.

    The normal equations of a row: sum_h f_h F_g gram_gh F_h' = F_g gram w', F_g what parameter g is part of its fake
    weight: one for every group or, where groups share it, for these together.
    """
    rows, columns = stack.weight.shape
    parts, size = stack.parts(stack.fake), stack.size * stack.shared
    count = -(-columns // size)
    unknowns = count * len(parts)
    found = []
    for chosen in torch.arange(rows, device=stack.weight.device).split(max(1, ROWS // (unknowns * columns))):
        own = {key: part[chosen] for key, part in parts.items()}
        # F_g gram: F_g has values in group g alone, so the rows of gram of that group are all it meets.
        seen = stack.fake.new_empty(len(chosen), unknowns, columns)
        for i, part in enumerate(own.values()):
            for g in range(count):
                here = slice(g * size, (g + 1) * size)
                seen[:, i * count + g] = part[:, here] @ stack.gram[here]
        system = torch.cat([_by_group(seen * part.unsqueeze(1), size) for part in own.values()], 2)
        wanted = seen @ stack.weight[chosen].unsqueeze(-1)
        power = system.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
        system += torch.diag_embed((RIDGE * power).unsqueeze(1).expand(-1, unknowns))
        # On both sides, so that what the data do not determine stays at a factor of 1.
        wanted += (RIDGE * power)[:, None, None]
        found.append(torch.linalg.solve(system, wanted).reshape(-1, len(parts), count))
    factors = torch.cat(found)
    # Beyond, or NaN, the system was ill-conditioned: such a scale would only fit rounding errors.
    factors = torch.where((factors > 0.25) & (factors < 4.0), factors, torch.ones_like(factors))
    every = factors.repeat_interleave(stack.shared, 2)
    return {key: every[:, i].reshape(-1, 1) for i, key in enumerate(parts)}


def _by_group(values: Tensor, size: int) -> Tensor:
    """Sums of `values` (R, U, I) over groups of `size` columns, of which the last may be shorter; (R, U, G)."""
    short = -values.shape[2] % size
    padded = torch.nn.functional.pad(values, (0, short))
    return padded.view(*values.shape[:2], -1, size).sum(3)
