"""Optimised RTN: ask each codec for the range of least error, weighted by the inputs' second moments where known."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from auto_round.codecs.base import codec_of
from auto_round.core.plan import Plan
from auto_round.core.quantized import NEUTRAL, Knobs
from auto_round.sources.base import Block, Needs
from auto_round.steps.base import BlockReport, Step, specs_of


class Search(Step):
    """Knobs of least weighted error for every layer; with weights alone when there is no data.

    given: importance (I,) by layer from elsewhere, which is then all that counts. brief: leave correlations between
    inputs to the steps that follow, where the codec can hold its grid for them; selective: where it asks for them.
    """

    def __init__(
        self, given: Mapping[str, Tensor] | None = None, *, brief: bool = False, selective: bool = False
    ) -> None:
        self.given, self.brief, self.selective = given, brief, selective
        self.needs = Needs.STATISTICS if given is None else Needs.NOTHING

    def block(
        self, block: Block, plan: Plan, knobs: dict[str, Knobs], report: BlockReport
    ) -> dict[str, Knobs]:
        """`knobs` with those found by each layer's codec."""
        found = dict(knobs)
        for name, spec in specs_of(block, plan).items():
            before, codec = knobs.get(name, NEUTRAL), codec_of(spec)
            importance = block.importance(name) if self.given is None else self.given.get(name)
            brief = codec.holds_grid(spec) if self.brief else self.selective and codec.compensates(spec)
            if brief and importance is not None and importance.ndim == 2:
                importance = importance.diagonal()
            # `before` holds what a fused set shares, which a search may not change.
            better = codec.search(block.weights[name], spec, importance, before)
            found[name] = {**before, **better}
        report.kept = "searched"
        return found
