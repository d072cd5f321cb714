"""GPTQ (arXiv:2210.17323): round column after column, and let the columns still to come make up for each error.

The grid is the one found before and stays: so columns may go in any order, that of their importance, and files need no
`g_idx`. What comes out is a rounding offset for every weight: where GPTQ wanted it when its turn came. Rounding that
gives GPTQ's codes; tuning may start there, and changes first the weights that lie near the middle between two codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from auto_round.codecs.base import codec_of
from auto_round.core.plan import Plan
from auto_round.core.quantized import Knobs
from auto_round.core.scheme import TensorSpec
from auto_round.sources.base import Block, Needs
from auto_round.stacks.columns import in_turn
from auto_round.stacks.refit import refit
from auto_round.stacks.stack import Stack
from auto_round.steps.base import BlockReport, Step, specs_of

DAMPING = (0.01, 0.03, 0.1, 0.3, 1.0)  # of the mean second moment, tried in turn until H can be inverted


@dataclass(kw_only=True)
class Gptq(Step):
    """Rounding offsets of least output error per layer, kept in the rows where they lower it.

    rounds: how often. refits: whether scales are fitted to the codes after each round, by least squares.
    selective: only for layers whose codec asks for it.
    """

    rounds: int = 1
    refits: bool = False
    selective: bool = False
    needs: Needs = Needs.STATISTICS

    def block(
        self, block: Block, plan: Plan, knobs: dict[str, Knobs], report: BlockReport
    ) -> dict[str, Knobs]:
        """`knobs` with offsets, and refitted scales, for the layers that have a grid and a Gram matrix."""
        found = dict(knobs)
        turns: Turns | None = None
        for stack in stacks_of(block, plan, knobs, selective=self.selective):
            # Neighbours often share their inputs: q and k of one type, v of another.
            turns = turns if turns is not None and turns.gram is stack.gram else turns_of(stack.gram)
            for _ in range(self.rounds):
                # In turn: swept from GPTQ's codes where the old ones were better, models are some per cent worse.
                stack.offer(rounded_in_order(stack, turns))
                stack.offer(swept(stack, turns))
                if self.refits:
                    refit(stack)
            found |= stack.knobs()
            report.kept = "gptq"
        return found


def stacks_of(block: Block, plan: Plan, knobs: Mapping[str, Knobs], *, selective: bool) -> Iterator[Stack]:
    """The layers of `block` that have a Gram matrix, and a codec and groups that can hold a grid; made one at a time.

    selective: of these, only the layers whose codec asks for it.
    """
    alike: dict[tuple[int, TensorSpec], list[str]] = {}
    grams: dict[int, Tensor] = {}
    for name, spec in specs_of(block, plan).items():
        gram, codec = block.importance(name), codec_of(spec)
        wanted = codec.compensates(spec) if selective else codec.holds_grid(spec)
        if gram is not None and gram.ndim == 2 and wanted:
            # Layers with the very same input share one Gram matrix, found by the identity of the tensor.
            grams[id(gram)] = gram
            alike.setdefault((id(gram), spec), []).append(name)
    for (key, spec), names in alike.items():
        yield Stack({name: block.weights[name] for name in names}, grams[key], spec, knobs)


@dataclass(frozen=True, slots=True)
class Turns:
    """In which order the columns of a layer are rounded, and what they take over of the errors of others.

    order: (I,), the loudest channels first, while there are many others to make up for their errors. before: (I, I) in
    that order, what each takes of those that had their turn, by GPTQ. others: what it takes of all others, in a sweep.
    """

    gram: Tensor
    order: Tensor
    before: Tensor
    others: Tensor


def turns_of(gram: Tensor) -> Turns:
    """What GPTQ and the sweep have to know of the inputs X, from X'X (I, I)."""
    order = gram.diagonal().argsort(descending=True)
    ordered = gram[order][:, order]
    before = feedback(ordered).t().contiguous()
    power = ordered.diagonal().unsqueeze(1)
    # The minimum of tr(D gram D') in column j is where d_j = -sum_i gram[j, i] d_i / gram[j, j] over the others.
    # Without any input, every weight is as good: plain rounding.
    others = torch.where(power > 0, ordered / power.clamp(min=1e-30), torch.zeros_like(ordered))
    return Turns(gram, order, before, others.fill_diagonal_(0))


def feedback(gram: Tensor) -> Tensor:
    """What a column takes over of the errors of those before it: (I, I), upper triangular with a unit diagonal.

    It is U of `gram` = U D U', D diagonal, with the least damping that allows one: the form of LDLQ, the same in exact
    arithmetic as GPTQ's factor of the inverse (arXiv:2307.13304, section 3 and theorem 6), without an inverse.
    A channel without any signal has the damping alone: nothing is passed on from it or to it.
    """
    mean = gram.diagonal().mean().clamp(min=1e-30)
    for share in DAMPING:
        damped = gram.flip(0, 1)  # of which the lower factor is the upper one of `gram`
        damped.diagonal().add_(share * mean)
        # The _ex form tells of failure; the plain one would raise for a matrix that more damping saves.
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            upper: Tensor = lower.flip(0, 1)
            return upper / upper.diagonal()
    # No damping helped: nothing is passed on, plain rounding.
    return torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def rounded_in_order(stack: Stack, turns: Turns) -> Tensor:
    """What each weight had become when it was its turn to be rounded, (R, I). Eq. 2 and 3 of arXiv:2210.17323."""
    return in_turn(stack, turns.order, turns.before)


def swept(stack: Stack, turns: Turns) -> Tensor:
    """What each weight would best be, given what all others are rounded to; one column after the other, (R, I)."""
    return in_turn(stack, turns.order, turns.others, stack.fake)
