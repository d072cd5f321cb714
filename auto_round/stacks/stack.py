"""Layers of one spec with the same inputs, as one matrix on a grid: what methods work on that go by layers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

import torch
from torch import Tensor

from auto_round.codecs.base import codec_of
from auto_round.core.groups import group_size, merge, split
from auto_round.core.quantized import NEUTRAL, Knobs, Quantized
from auto_round.core.ruler import Ruler
from auto_round.core.scheme import TensorSpec


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
        self._loss = self.loss(self.fake)

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

    def ruler(self) -> Ruler | None:
        """What `snap` rounds to, for compiled code: numbers for all, or one for each group. None: only `snap` knows."""
        return self._codec.ruler(self.spec, self.grid)

    def parts(self, values: Tensor) -> dict[str, Tensor]:
        """`values` (R, I) as a sum with a part for each parameter of the grid that may be refitted.

        A part is (R, I), or has one number for each group of a row.
        """
        rows = len(self.weight)
        apart = self._codec.parts(split(values, self.spec.group), self.spec, self.grid)
        return {
            key: part.reshape(rows, -1) if part.shape[1] == 1 else self._whole(part)
            for key, part in apart.items()
        }

    def _whole(self, groups: Tensor) -> Tensor:
        return merge(groups, (self.weight.shape[0], self.weight.shape[1]), self.spec.group)

    @property
    def shared(self) -> int:
        """Groups of a row, side by side, that share each of those parameters."""
        return self._codec.shared(self.spec)

    def storable(self, values: Tensor) -> Tensor:
        """`values` of a parameter of `parts` as near as a file can hold them."""
        return self._codec.storable(values, self.spec)

    def loss(self, fake: Tensor) -> Tensor:
        """Output error of each row with the weight `fake`: the diagonal of D gram D', (R, 1)."""
        difference = fake - self.weight
        return ((difference @ self.gram) * difference).sum(1, keepdim=True)

    def rounded(self, moved: Tensor, grid: Knobs | None = None) -> Tensor:
        """What `moved` (R, I) becomes on `grid`, or on that of the stack."""
        return self._whole(self.snap(split(moved, self.spec.group), self.grid if grid is None else grid))

    def offer(self, moved: Tensor) -> None:
        """Take what becomes of `moved` (R, I) in the rows where it has less error."""
        fake = self.rounded(moved)
        loss = self.loss(fake)
        self._take(loss < self._loss, moved, fake, self.grid, loss)

    def rescale(self, grid: Knobs, gain: Tensor) -> None:
        """Take the parameters `grid` (G, 1) of `parts` for the codes that there are, where that has a `gain` (R, 1)."""
        apart = self._codec.parts(split(self.moved, self.spec.group), self.spec, self.grid)
        # A parameter of 0 stays 0, and so does its part.
        scaled = [
            apart[key] * torch.where(self.grid[key] == 0, 1.0, new / self.grid[key])
            for key, new in grid.items()
        ]
        moved, whole = self._whole(reduce(torch.add, scaled)), {**self.grid, **grid}
        self._take(gain > 0, moved, self.rounded(moved, whole), whole, self._loss - gain)

    def _take(self, better: Tensor, moved: Tensor, fake: Tensor, grid: Knobs, loss: Tensor) -> None:
        # Row by row: rows of a layer do not depend on one another, so each keeps its own best.
        self.fake, self.moved = torch.where(better, fake, self.fake), torch.where(better, moved, self.moved)
        self._loss = torch.where(better, loss, self._loss)
        chosen = better.repeat_interleave(len(grid["scale"]) // len(self.weight), 0)
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
