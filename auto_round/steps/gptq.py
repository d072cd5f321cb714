"""GPTQ (arXiv:2210.17323): round column after column, and let the columns still to come make up for each error.

The grid is the one found before and stays: so columns may go in any order, that of their importance, and files need no
`g_idx`. What comes out is a rounding offset for every weight: where GPTQ wanted it when its turn came. Rounding that
gives GPTQ's codes; tuning may start there, and changes first the weights that lie near the middle between two codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from auto_round.core.plan import Plan
from auto_round.core.quantized import Knobs
from auto_round.sources.base import Block, Needs
from auto_round.steps.base import BlockReport, Stack, Step, stacks_of

DAMPING = (0.01, 0.03, 0.1, 0.3, 1.0)  # of the mean second moment, tried in turn until H can be inverted
COLUMNS = 64  # columns whose errors are passed on to the rest at once


@dataclass(kw_only=True)
class Gptq(Step):
    """Rounding offsets of least output error per layer, kept in the rows where they lower it.

    sweeps: passes of coordinate descent afterwards, in which each column is rounded anew given all others.
    selective: only for layers whose codec asks for it.
    """

    sweeps: int = 1
    selective: bool = False
    needs: Needs = Needs.STATISTICS

    def block(
        self, block: Block, plan: Plan, knobs: dict[str, Knobs], report: BlockReport
    ) -> dict[str, Knobs]:
        """`knobs` with offsets for the layers that have a grid and a Gram matrix."""
        found = dict(knobs)
        for stack in stacks_of(block, plan, knobs, selective=self.selective):
            stack.offer(rounded_in_order(stack))
            for _ in range(self.sweeps):
                stack.offer(swept(stack))
            found |= stack.knobs()
            report.kept = "gptq"
        return found


def inverse_factor(gram: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of `gram` (I, I), with the least damping that allows one.

    A channel without any signal has the damping alone: nothing is passed on from it or to it.
    """
    mean = gram.diagonal().mean().clamp(min=1e-30)
    for share in DAMPING:
        lower, failed = torch.linalg.cholesky_ex(gram + torch.diag((share * mean).expand(len(gram))))
        if not bool(failed):
            # The _ex forms tell of failure; the plain ones would raise for a matrix that more damping saves.
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bool(failed):
                factor: Tensor = upper
                return factor
    # No damping helped: nothing is passed on, plain rounding.
    return torch.diag((gram.diagonal() + mean).rsqrt())


def rounded_in_order(stack: Stack) -> Tensor:
    """What each weight had become when it was its turn to be rounded, (R, I).

    Eq. 2 and 3 of arXiv:2210.17323, with the lazy updates of its section 3.3.
    """
    # The loudest channels first, while there are still many others to make up for their errors.
    order = stack.gram.diagonal().argsort(descending=True)
    upper, grids = inverse_factor(stack.gram[order][:, order]), stack.columns()
    # Columns as rows of memory, since they are worked on one at a time.
    rest, places = stack.weight.t()[order].contiguous(), (order // stack.size).tolist()
    for start in range(0, len(rest), COLUMNS):
        end = min(start + COLUMNS, len(rest))
        errors = torch.empty_like(rest[start:end])
        for j in range(start, end):
            error = (rest[j] - stack.snap(rest[j], grids[places[j]])) / upper[j, j]
            rest[j + 1 : end].addr_(upper[j, j + 1 : end], error, alpha=-1)
            errors[j - start] = error
        # Once per block of columns: a matrix product in place of many passes over what is left.
        rest[end:].addmm_(upper[start:end, end:].t(), errors, alpha=-1)
    return rest[order.argsort()].t()


def swept(stack: Stack) -> Tensor:
    """What each weight would best be, given what all others are rounded to; one column after the other, (R, I)."""
    gram, grids = stack.gram, stack.columns()
    values = stack.fake.t().contiguous()
    slope = gram @ (values - stack.weight.t())  # half the gradient of tr(D H D') in D; a row for each column
    wanted = values.clone()
    for j in gram.diagonal().argsort(descending=True).tolist():
        if gram[j, j] > 0:  # without any input, every weight is as good
            wanted[j] = values[j] - slope[j] / gram[j, j]
            new = stack.snap(wanted[j], grids[j // stack.size])
            slope.addr_(gram[j], new - values[j])
            values[j] = new
    return wanted.t()
