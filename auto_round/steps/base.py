"""What an algorithm is: a step that looks at a block and returns knobs. It never makes codes and names no data type."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from auto_round.codecs.base import codec_of, fake
from auto_round.core.groups import group_size, merge, split
from auto_round.core.plan import Plan
from auto_round.core.quantized import NEUTRAL, Knobs, Quantized
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


class Stack:
    """Layers of one spec with the same inputs, row upon row: what a method that goes by layers works on at once.

    weight: (R, I) float32, the rows of all layers. gram: (I, I), X'X of their inputs. grid: what `quantize` stored
    beside the codes, (G, 1) each. moved: what is rounded on it in the place of weight, (R, I); fake: what it becomes.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], gram: Tensor, spec: TensorSpec, knobs: Mapping[str, Knobs]
    ) -> None:
        self.gram, self.spec, self._codec = gram, spec, codec_of(spec)
        self._before = {name: knobs.get(name, NEUTRAL) for name in weights}
        self.weight = torch.cat([weight.float() for weight in weights.values()])
        self.size = group_size((1, self.weight.shape[1]), spec.group)  # -1, or more than a row, is the row
        made = [self._codec.quantize(weights[name], spec, own) for name, own in self._before.items()]
        self.fake = torch.cat([self._codec.dequantize(q) for q in made])
        grids = [self._loaded(q) for q in made]
        self.grid = {key: torch.cat([grid[key] for grid in grids]) for key in grids[0]}
        self._rows = [len(weight) for weight in weights.values()]
        self.moved = torch.cat(
            [self._moved(weights[n], own, q) for (n, own), q in zip(self._before.items(), made)]
        )

    def _moved(self, weight: Tensor, knobs: Knobs, q: Quantized) -> Tensor:
        groups = split(weight.float(), self.spec.group)
        change = self._codec.change(knobs, self.spec, self._loaded(q), groups)
        return merge(groups + change, q.shape, self.spec.group)

    def _loaded(self, q: Quantized) -> dict[str, Tensor]:
        """The grid of `q`, (G, 1) each."""
        count = len(q.codes)
        loaded = self._codec.load(q.params, self.spec)
        return {key: value.reshape(-1, 1).expand(count, 1) for key, value in loaded.items()}

    def columns(self) -> list[Knobs]:
        """The grid of each column of groups, (R,) each."""
        rows = len(self.weight)
        apart = {key: value.reshape(rows, -1).t().contiguous() for key, value in self.grid.items()}
        return [{key: value[j] for key, value in apart.items()} for j in range(len(apart["scale"]))]

    def snap(self, values: Tensor, grid: Knobs) -> Tensor:
        """What can be stored nearest to `values`."""
        # The codec's own rounding, so that what is compared here is what `quantize` will make of the knobs.
        found = self._codec.snap(values, self.spec, grid)
        assert found is not None, "a stack is made of layers whose codec can hold a grid"
        return found

    def parts(self, values: Tensor) -> dict[str, Tensor]:
        """`values` (R, I) as a sum with a part, (R, I), for each parameter of the grid that may be refitted."""
        shape = (self.weight.shape[0], self.weight.shape[1])
        apart = self._codec.parts(split(values, self.spec.group), self.spec, self.grid)
        return {key: merge(part, shape, self.spec.group) for key, part in apart.items()}

    @property
    def shared(self) -> int:
        """Groups of a row, side by side, that share each of those parameters."""
        return self._codec.shared(self.spec)

    def rescale(self, factors: Mapping[str, Tensor]) -> None:
        """Offer the parameters of `parts` times factors (G, 1), as stored, with the codes that there are."""
        grid = {
            key: self._codec.storable(self.grid[key] * factor, self.spec) for key, factor in factors.items()
        }
        apart = self._codec.parts(split(self.moved, self.spec.group), self.spec, self.grid)
        moved = torch.stack([apart[key] * factor for key, factor in factors.items()]).sum(0)
        self.offer(merge(moved, (self.weight.shape[0], self.weight.shape[1]), self.spec.group), grid)

    def loss(self, fake: Tensor) -> Tensor:
        """Output error of each row with the weight `fake`: the diagonal of D gram D', (R, 1)."""
        difference = fake - self.weight
        return ((difference @ self.gram) * difference).sum(1, keepdim=True)

    def offer(self, moved: Tensor, changed: Knobs = NEUTRAL) -> None:
        """Take `moved` (R, I), rounded on the grid with what is `changed`, in the rows where it has less error."""
        grid = {**self.grid, **changed}
        shape = (self.weight.shape[0], self.weight.shape[1])
        fake = merge(self.snap(split(moved, self.spec.group), grid), shape, self.spec.group)
        # Row by row: rows of a layer do not depend on one another, so each keeps its own best.
        better = self.loss(fake) < self.loss(self.fake)
        self.fake, self.moved = torch.where(better, fake, self.fake), torch.where(better, moved, self.moved)
        chosen = better.repeat_interleave(len(grid["scale"]) // shape[0], 0)
        self.grid = {key: torch.where(chosen, value, self.grid[key]) for key, value in grid.items()}

    def knobs(self) -> dict[str, Knobs]:
        """Layer -> its knobs, with the grid and the offsets found."""
        groups = split(self.weight, self.spec.group)
        change = split(self.moved, self.spec.group) - groups
        offsets = self._codec.offsets(change, self.spec, self.grid, groups)
        every = {**self._codec.held(self.grid, self.spec), **offsets}
        parts = {key: self._apart(value) for key, value in every.items()}
        return {
            name: {**own, **{key: part[i] for key, part in parts.items()}}
            for i, (name, own) in enumerate(self._before.items())
        }

    def _apart(self, value: Tensor) -> list[Tensor]:
        """`value` by layer; each row has the same number of entries."""
        each = len(value) // len(self.weight)
        return list(value.split([rows * each for rows in self._rows]))


def stacks_of(
    block: Block, plan: Plan, knobs: Mapping[str, Knobs], *, selective: bool = False
) -> list[Stack]:
    """The layers of `block` that have a Gram matrix, and a codec and groups that can hold a grid.

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
    return [
        Stack({name: block.weights[name] for name in names}, grams[key], spec, knobs)
        for (key, spec), names in alike.items()
    ]


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
