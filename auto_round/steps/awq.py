"""AWQ (arXiv:2306.00978): channels with large inputs get more of a weight's grid, at the cost of what makes them.

Only the sizes of channels change here, and what the block computes does not. Rounding is left to the steps that follow.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from auto_round.codecs.base import codec_of, fake
from auto_round.core.groups import split
from auto_round.core.plan import Plan
from auto_round.core.quantized import Knobs
from auto_round.core.scheme import TensorSpec
from auto_round.sources.base import Block, Needs
from auto_round.sources.channels import Channels
from auto_round.steps.base import BlockReport, Step, specs_of

logger = logging.getLogger("auto_round")
ROWS = 256  # of each weight that factors are judged by: enough to tell which are good
SMALLEST = 1e-4  # of a factor and of a weight's mean, as in the paper's code
MOST = 64.0  # a factor beyond would only serve a channel that is nearly always zero


@dataclass(kw_only=True)
class Awq(Step):
    """Scales channels by the factors of least output error of the layers that read them, where there are any such.

    n_grid: shares of the inputs' size that are tried. duo_scaling: whether the weights' size counts too; None is both.
    Layers whose inputs have a calibrated range are left alone: it would have to be found again.
    """

    n_grid: int = 20
    duo_scaling: bool | None = True
    needs: Needs = field(default=Needs.STATISTICS, init=False)
    requires: Needs = field(default=Needs.STATISTICS, init=False)
    reshapes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._places, self._scaled = 0, list[float]()

    def reshape(self, block: Block, plan: Plan) -> None:
        """Scale all channels of `block` where that lowers the error of plain rounding."""
        if block.folded:  # done for another plan
            return
        specs = specs_of(block, plan)
        for channels in block.channels():
            if not _eligible(channels, specs, plan):
                continue
            self._places += 1
            factors, share = self._best(block, channels, specs)
            if factors is not None:
                block.scale_channels(channels, factors)
                self._scaled.append(share)

    def block(
        self, block: Block, plan: Plan, knobs: dict[str, Knobs], report: BlockReport
    ) -> dict[str, Knobs]:
        """Nothing more to do."""
        return knobs

    def finish(self) -> None:
        """Say what was done."""
        kept = math.exp(sum(map(math.log, self._scaled)) / len(self._scaled)) if self._scaled else 1.0
        logger.info(
            "awq: channels scaled at %d of %d places, where rounding has %.2f of its error before",
            len(self._scaled),
            self._places,
            kept,
        )

    def _best(
        self, block: Block, channels: Channels, specs: dict[str, TensorSpec]
    ) -> tuple[Tensor | None, float]:
        """(the factors (I,) of least error or None when nothing is better than none, their share of its error)."""
        gram = block.importance(channels.readers[0])
        assert gram is not None, "channels are found by their readers' inputs"
        weights = {name: _some_rows(block.weights[name]).float() for name in channels.readers}
        size = (gram if gram.ndim == 1 else gram.diagonal()).sqrt()
        parts = [_relative(weights[name], specs[name]) for name in channels.readers]
        best, least, plain = None, math.inf, math.nan
        for factors in self._candidates(size, torch.cat(parts).mean(0)):
            error = sum(
                _error(weights[name], specs[name], factors.to(gram.device), gram) for name in channels.readers
            )
            if math.isnan(plain):  # the first candidate changes nothing
                plain = least = error
            elif error < least:
                best, least = factors, error
        return best, least / plain if plain else 1.0

    def _candidates(self, size: Tensor, weight: Tensor) -> Iterator[Tensor]:
        """All ones, then the factors of the grid. size, weight: of inputs and of weights, by channel (I,)."""
        yield torch.ones_like(size)
        both = (False, True) if self.duo_scaling is None else (self.duo_scaling,)
        count = max(2, self.n_grid // len(both))
        for duo in both:
            for step in range(0 if duo else 1, count):
                share = step / (count - 1)
                factors = size.pow(share)
                if duo:
                    factors = factors / (weight.pow(1 - share) + SMALLEST)
                factors = factors.clamp(min=SMALLEST)
                yield (factors / (factors.max() * factors.min()).sqrt()).clamp(1 / MOST, MOST)


def _eligible(channels: Channels, specs: dict[str, TensorSpec], plan: Plan) -> bool:
    """Whether all that read `channels` are quantized and do not mind, and so the maker if it is a layer."""
    for name in channels.readers:
        if name not in specs or ((act := plan[name].act) is not None and not act.dynamic):
            return False
    if channels.norm:
        return True
    maker = specs.get(channels.maker)
    # A matrix with one scale for all of it would lose by rows of different size.
    return maker is not None and codec_of(maker).holds_grid(maker)


def _some_rows(weight: Tensor) -> Tensor:
    """`ROWS` evenly spaced rows of `weight` (O, I)."""
    return weight[:: max(1, len(weight) // ROWS)]


def _relative(weight: Tensor, spec: TensorSpec) -> Tensor:
    """Size of each value beside the largest of its group, (O, I)."""
    group = spec.group if isinstance(spec.group, int) and spec.group > 0 else -1
    groups = split(weight.abs(), group)
    return (groups / groups.amax(1, keepdim=True).clamp(min=1e-12)).reshape(len(weight), -1)[
        :, : weight.shape[1]
    ]


def _error(weight: Tensor, spec: TensorSpec, factors: Tensor, gram: Tensor) -> float:
    """Output error of rounding `weight` times `factors`: tr(D gram D') of the difference D."""
    difference = fake(weight * factors, spec) / factors - weight
    seen = difference * gram if gram.ndim == 1 else difference @ gram
    return float((seen * difference).sum())
