"""What an algorithm is: a step that looks at a block and returns knobs. It never makes codes and names no data type."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from auto_round.codecs.base import fake
from auto_round.core.plan import Plan
from auto_round.core.quantized import NEUTRAL, Knobs
from auto_round.core.scheme import TensorSpec
from auto_round.sources.base import Block, Needs, Source


@dataclass(slots=True)
class BlockReport:
    """What a step found out about a block: losses by candidate, and which candidate was kept."""

    losses: dict[str, float] = field(default_factory=dict)
    kept: str = ""
    iterations: int = 0


class Step(ABC):
    """One algorithm."""

    needs: Needs = Needs.NOTHING
    requires: Needs = Needs.NOTHING
    """`needs` is what the step makes use of; `requires` is what it cannot do without."""

    def prepare(self, source: Source, plan: Plan) -> None:
        """Called once before the first block."""
        return None

    @abstractmethod
    def block(
        self, block: Block, plan: Plan, knobs: dict[str, Knobs], report: BlockReport
    ) -> dict[str, Knobs]:
        """Knobs for the layers of `block`, given those of the steps before."""


def specs_of(block: Block, plan: Plan) -> dict[str, TensorSpec]:
    """Layer -> spec for the layers of `block` that are quantized."""
    schemes = {name: plan[name] for name in block.weights if name in plan}
    return {name: scheme.weight for name, scheme in schemes.items() if scheme.weight is not None}


def fakes_of(block: Block, plan: Plan, knobs: Mapping[str, Knobs]) -> dict[str, Tensor]:
    """Layer -> what its weight becomes with `knobs`, (O, I) float32."""
    return {
        name: fake(block.weights[name].float(), spec, knobs.get(name, NEUTRAL))
        for name, spec in specs_of(block, plan).items()
    }


def output_loss(out: Tensor, target: Tensor, valid: Tensor | None) -> Tensor:
    """Mean squared error of block outputs (B, T, H) over the tokens that count."""
    squared = (out - target).square()
    if valid is None:
        return squared.mean()
    return (squared * valid.unsqueeze(-1)).sum() / (valid.sum().clamp(min=1) * out.shape[-1])


@torch.no_grad()
def loss_on(block: Block, rows: Sequence[int], fakes: Mapping[str, Tensor], batch_size: int) -> float:
    """Loss of `block` with the weights `fakes` over the samples `rows`."""
    total, count = 0.0, 0
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        loss = output_loss(block.run(part, fakes), block.target(part), block.valid(part))
        total, count = total + loss.item() * len(part), count + len(part)
    return total / max(1, count)
