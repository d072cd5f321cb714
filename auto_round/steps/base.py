"""What an algorithm is: a step that looks at a block and returns knobs. It never makes codes and names no data type."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

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
    saved: int = 0
    """Iterations of the recipe that were not needed, and `why`."""
    why: str = ""


class Step(ABC):
    """One algorithm."""

    needs: Needs = Needs.NOTHING
    requires: Needs = Needs.NOTHING
    """`needs` is what the step makes use of; `requires` is what it cannot do without."""
    reshapes: ClassVar[bool] = False
    """Whether `reshape` changes blocks, which must happen once only."""

    def prepare(self, source: Source, plan: Plan) -> None:
        """Called once before the first block."""
        return None

    def reshape(self, block: Block, plan: Plan) -> None:
        """Called before anything is looked at: change weights in a way that leaves what the block computes."""
        return None

    @abstractmethod
    def block(
        self, block: Block, plan: Plan, knobs: dict[str, Knobs], report: BlockReport
    ) -> dict[str, Knobs]:
        """Knobs for the layers of `block`, given those of the steps before."""

    def finish(self) -> None:
        """Called once after the last block."""
        return None


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


def output_loss(out: Tensor, target: Tensor, valid: Tensor | None, trim: float = 0.0) -> Tensor:
    """Mean squared error of block outputs (B, T, ...) over the tokens that count.

    trim: share of the values, those furthest off, that count as right.
    """
    squared = (out - target).square()
    if trim:
        # Set to zero, so that no gradient comes from them.
        worst = squared.detach().flatten().topk(max(1, int(trim * squared.numel()))).indices
        squared = squared.flatten().index_fill(0, worst, 0.0).reshape(squared.shape)
    if valid is None:
        return squared.mean()
    squared = squared.flatten(2)  # several streams in one state, as Gemma 3n has them
    # Padding only: 0, not NaN.
    return (squared * valid.unsqueeze(-1)).sum() / (valid.sum().clamp(min=1) * squared.shape[-1])


def prediction_loss(logits: Tensor, target: Tensor, valid: Tensor | None) -> Tensor:
    """Mean divergence (nats per token that counts) of the predictions `target` from `logits`, (B, T, V) both."""
    each = nn.functional.kl_div(
        logits.log_softmax(-1), target.log_softmax(-1), reduction="none", log_target=True
    )
    apart = each.sum(-1)
    return apart.mean() if valid is None else (apart * valid).sum() / valid.sum().clamp(min=1)


def block_loss(block: Block, rows: Sequence[int], fakes: Mapping[str, Tensor], trim: float = 0.0) -> Tensor:
    """How far `block` with the weights `fakes` is from the original on the samples `rows`, ().

    By the model's predictions when the block can tell them, else by its output.
    """
    out, target, valid = block.run(rows, fakes), block.target(rows), block.valid(rows)
    logits = block.predict(rows, out)
    if logits is None:
        return output_loss(out, target, valid, trim)
    with torch.no_grad():
        wanted = block.predict(rows, target)
    assert wanted is not None, "a block that predicts does so from any hidden states"
    return prediction_loss(logits, wanted, valid)


@torch.no_grad()
def loss_on(block: Block, rows: Sequence[int], fakes: Mapping[str, Tensor], batch_size: int) -> float:
    """Loss of `block` with the weights `fakes` over the samples `rows`."""
    total, count = 0.0, 0
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        loss = block_loss(block, part, fakes)
        total, count = total + loss.item() * len(part), count + len(part)  # the last part may be smaller
    return total / max(1, count)
