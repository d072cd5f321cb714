"""Weights that are quantized already keep their grid where the new type can hold it: no second rounding."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from auto_round.codecs.base import codec_of, fake
from auto_round.core.groups import group_size
from auto_round.core.plan import Plan
from auto_round.core.quantized import NEUTRAL, Knobs, Quantized
from auto_round.core.scheme import TensorSpec
from auto_round.sources.base import Block
from auto_round.steps.base import BlockReport, Step, specs_of

logger = logging.getLogger("auto_round")
NEAR = 0.02
"""A grid counts as kept when no weight is off by more than this share of a step."""
EXACT, KEPT, AGAIN = "kept exactly", f"kept up to {NEAR:.0%} of a step", "rounded a second time"


class Keep(Step):
    """Replaces the knobs of layers whose stored codes the new type can take over; comes last, for nothing is better.

    stored: layer -> its weight as it is stored, or None.
    """

    def __init__(self, stored: Callable[[str], Quantized | None]) -> None:
        self._stored, self._lock = stored, threading.Lock()
        self._outcomes: Counter[tuple[str, str, str]] = Counter()

    def block(
        self, block: Block, plan: Plan, knobs: dict[str, Knobs], report: BlockReport
    ) -> dict[str, Knobs]:
        """`knobs` with the grids that are kept in the place of what was found for them."""
        found = dict(knobs)
        for name, spec in specs_of(block, plan).items():
            stored = self._stored(name)
            if stored is None:
                continue
            fixed = block.tied.get(name, NEUTRAL)
            grid, outcome = kept(block.weights[name], stored, spec, fixed)
            if grid is not None:
                found[name] = grid
            with self._lock:  # a stream runs blocks side by side
                self._outcomes[str(stored.spec), str(spec), outcome] += 1
        return found

    def finish(self) -> None:
        """Say what became of the layers that were quantized before."""
        for (before, after, outcome), count in sorted(self._outcomes.items()):
            level = logging.WARNING if outcome == AGAIN else logging.INFO
            logger.log(level, "%d layers from %s to %s: %s", count, before, after, outcome)
        self._outcomes.clear()


def kept(w: Tensor, stored: Quantized, spec: TensorSpec, fixed: Knobs) -> tuple[Knobs | None, str]:
    """(knobs that make of `w` (O, I) what `stored` stands for, or None; what that comes to)."""
    exact = codec_of(stored.spec).dequantize(stored)
    lines = even_lines(stored, group_size(stored.shape, spec.group))
    if lines is None:
        return None, AGAIN
    step, low = lines
    grid = codec_of(spec).even_grid(step, low, spec)
    if not grid:
        return None, AGAIN
    knobs = {**fixed, **grid}
    off = (fake(w.float(), spec, knobs) - exact).abs().reshape(len(step), -1).amax(1, keepdim=True)
    if not bool((off <= NEAR * step.abs()).all()):
        return None, AGAIN
    return knobs, KEPT if bool(off.any()) else EXACT


def even_lines(q: Quantized, size: int) -> tuple[Tensor, Tensor] | None:
    """(step, low) of each group of `size` values, (G, 1), if `q` stands for low + step * code; None for other groups.

    Found by asking what the codes 0 and 1 stand for, so that nothing need be known of the type; whether the other codes
    are spaced alike is for the caller to see.
    """
    columns, own = q.shape[1], q.codes.shape[1]
    if columns % own or columns % size or (own % size and size % own):
        return None
    codec, each = codec_of(q.spec), min(own, size)
    low, next_ = (
        codec.dequantize(
            Quantized(spec=q.spec, shape=q.shape, codes=torch.full_like(q.codes, code), params=q.params)
        ).reshape(-1, each)[:, :1]
        for code in (0, 1)
    )
    step = next_ - low
    if size > own:  # several groups in the place of one: only if they are alike
        steps, lows = step.reshape(-1, size // own), low.reshape(-1, size // own)
        if not (bool((steps == steps[:, :1]).all()) and bool((lows == lows[:, :1]).all())):
            return None
        step, low = steps[:, :1], lows[:, :1]
    return step, low
