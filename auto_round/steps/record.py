"""Keeps what calibration found out about the inputs of every layer, for a file of it: changes no knobs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from auto_round.core.plan import Plan
from auto_round.core.quantized import Knobs
from auto_round.sources.base import Block, Needs
from auto_round.steps.base import BlockReport, Step

Save = Callable[[Mapping[str, Tensor], Mapping[str, int]], None]


class Record(Step):
    """Importance of the inputs of all layers that blocks come with, also of those that stay in floating point.

    save: called once at the end with layer -> sums of squares (I,) float32, and with layer -> tokens for the layers
    of experts that saw only some.
    """

    needs = requires = Needs.STATISTICS

    def __init__(self, save: Save) -> None:
        self._save = save
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}

    def block(
        self, block: Block, plan: Plan, knobs: dict[str, Knobs], report: BlockReport
    ) -> dict[str, Knobs]:
        """`knobs` as they are."""
        for name in block.weights:
            moments = block.importance(name)
            if moments is None:
                continue
            squares = moments.diagonal() if moments.ndim == 2 else moments
            self._sums[name] = squares.float().cpu().clone()  # a view would keep the whole Gram matrix
            expert = name.rpartition(".")[0]
            # Starved experts come with the sums of all tokens of their block.
            if expert in block.tokens and name not in block.starved:
                self._tokens[name] = block.tokens[expert]
        return knobs

    def finish(self) -> None:
        """Hand everything over."""
        self._save(self._sums, self._tokens)
