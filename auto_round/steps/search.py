"""Optimised RTN: ask each codec for the range of least error, weighted by the inputs' second moments where known."""

from __future__ import annotations

from auto_round.codecs.base import codec_of
from auto_round.core.plan import Plan
from auto_round.core.quantized import NEUTRAL, Knobs
from auto_round.sources.base import Block, Needs
from auto_round.steps.base import BlockReport, Step, specs_of


class Search(Step):
    """Knobs of least weighted error for every layer; with weights alone when there is no data."""

    needs = Needs.STATISTICS

    def block(
        self, block: Block, plan: Plan, knobs: dict[str, Knobs], report: BlockReport
    ) -> dict[str, Knobs]:
        """`knobs` with those found by each layer's codec."""
        found = dict(knobs)
        for name, spec in specs_of(block, plan).items():
            before = knobs.get(name, NEUTRAL)
            better = codec_of(spec).search(block.weights[name], spec, block.importance(name), before)
            found[name] = {**before, **better}
        report.kept = "searched"
        return found
