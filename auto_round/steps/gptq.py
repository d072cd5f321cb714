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


def feedback(gram: Tensor) -> Tensor:
    """What a column takes over of the errors of those before it: (I, I), upper triangular with a unit diagonal.

    It is U of `gram` = U D U', D diagonal, with the least damping that allows one: the form of LDLQ, the same in exact
    arithmetic as GPTQ's factor of the inverse (arXiv:2307.13304, section 3 and theorem 6), without an inverse.
    A channel without any signal has the damping alone: nothing is passed on from it or to it.
    """
    mean = gram.diagonal().mean().clamp(min=1e-30)
    backwards = gram.flip(0, 1)  # of which the lower factor is the upper one of `gram`
    for share in DAMPING:
        # The _ex form tells of failure; the plain one would raise for a matrix that more damping saves.
        lower, failed = torch.linalg.cholesky_ex(backwards + torch.diag((share * mean).expand(len(gram))))
        if not bool(failed):
            upper: Tensor = lower.flip(0, 1)
            return upper / upper.diagonal()
    # No damping helped: nothing is passed on, plain rounding.
    return torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def rounded_in_order(stack: Stack) -> Tensor:
    """What each weight had become when it was its turn to be rounded, (R, I).

    Eq. 2 and 3 of arXiv:2210.17323, with the lazy updates of its section 3.3.
    """
    # The loudest channels first, while there are still many others to make up for their errors.
    order = stack.gram.diagonal().argsort(descending=True)
    takes, grids = feedback(stack.gram[order][:, order]), stack.columns()
    # Columns as rows of memory, since they are worked on one at a time.
    weight, places = stack.weight.t()[order], (order // stack.size).tolist()
    wanted = weight.clone()
    for start, end in _parts(len(wanted)):
        errors = torch.empty_like(wanted[start:end])
        for j in range(start, end):
            wanted[j].addmv_(errors[: j - start].t(), takes[start:j, j])
            errors[j - start] = weight[j] - stack.snap(wanted[j], grids[places[j]])
        # Once per part: a matrix product in place of many passes over what is left.
        wanted[end:].addmm_(takes[start:end, end:].t(), errors)
    return wanted[order.argsort()].t()


def swept(stack: Stack) -> Tensor:
    """What each weight would best be, given what all others are rounded to; one column after the other, (R, I)."""
    order = stack.gram.diagonal().argsort(descending=True)
    gram, grids, places = stack.gram[order][:, order], stack.columns(), (order // stack.size).tolist()
    values = stack.fake.t()[order]
    # Half the gradient of tr(D H D') in D; a row for each column.
    slope = gram @ (values - stack.weight.t()[order])
    wanted = values.clone()
    alive = int((gram.diagonal() > 0).sum())  # without any input, every weight is as good
    for start, end in _parts(alive):
        moves = torch.empty_like(values[start:end])
        for j in range(start, end):
            slope[j].addmv_(moves[: j - start].t(), gram[start:j, j])
            wanted[j] -= slope[j] / gram[j, j]
            moves[j - start] = stack.snap(wanted[j], grids[places[j]]) - values[j]
        slope[end:].addmm_(gram[start:end, end:].t(), moves)
    return wanted[order.argsort()].t()


def _parts(count: int) -> list[tuple[int, int]]:
    """`count` columns in parts of `COLUMNS`: (first, last + 1)."""
    return [(start, min(start + COLUMNS, count)) for start in range(0, count, COLUMNS)]
