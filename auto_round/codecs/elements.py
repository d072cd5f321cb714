"""What the data types share whose codes are small floats times a scale per group: rounding, tuning, search."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from auto_round.codecs.base import Codec, group_weights
from auto_round.core import rows
from auto_round.core.groups import group_count, group_size, merge, split
from auto_round.core.minifloat import Best, MiniFloat, scaled
from auto_round.core.quantized import NEUTRAL, Knob, Knobs, Quantized
from auto_round.core.ruler import Ruler
from auto_round.core.scheme import TensorSpec


class ElementCodec(Codec):
    """Data types whose codes are small floats times one scale per group.

    A codec says which element it has, and how scales are found, stored and varied; the rest is common. A `grid` is what
    `params` stand for, as float32: "scale" (G, 1), and whatever else there is, the same for all groups of a layer.
    """

    @abstractmethod
    def element(self, spec: TensorSpec) -> MiniFloat:
        """The format of the codes."""

    @abstractmethod
    def grid(self, largest: Tensor, spec: TensorSpec, knobs: Knobs) -> dict[str, Tensor]:
        """The grid of groups whose largest magnitudes are `largest` (G, 1), in storage precision.

        A knob "scale" (as stored) takes the place of the range. Differentiable in the range factors among `knobs`.
        """

    @abstractmethod
    def store(self, grid: Mapping[str, Tensor], spec: TensorSpec) -> dict[str, Tensor]:
        """`grid` in storage dtype: the params."""

    @abstractmethod
    def load(self, params: Mapping[str, Tensor], spec: TensorSpec) -> dict[str, Tensor]:
        """The inverse of `store`."""

    @abstractmethod
    def candidates(self, grid: Mapping[str, Tensor], spec: TensorSpec) -> list[Tensor]:
        """Other scales (G, 1) near those of `grid` that a search should try; storage can hold them."""

    def holds_grid(self, spec: TensorSpec) -> bool:
        """In all groups along rows."""
        return isinstance(spec.group, int) and spec.group != 0

    def compensates(self, spec: TensorSpec) -> bool:
        """Wherever it can: steps grow with the value, so that no scale suits the large ones of a group."""
        return self.holds_grid(spec)

    def snap(self, values: Tensor, spec: TensorSpec, grid: Knobs) -> Tensor:
        """The nearest element, times the scale."""
        scale = self.multiplier(grid)
        return self.element(spec).near(values / scale).mul_(scale)

    def ruler(self, spec: TensorSpec, grid: Knobs) -> Ruler:
        """Elements."""
        element = self.element(spec)
        return Ruler(step=self.multiplier(grid), least=-element.top, most=element.top, element=element)

    def offsets(self, change: Tensor, spec: TensorSpec, grid: Knobs, groups: Tensor) -> Knobs:
        """The rounding offset, in steps of the element at each value."""
        scale = self.multiplier(grid)
        return {"round": change / (self.element(spec).step(groups / scale) * scale)}

    def change(self, knobs: Knobs, spec: TensorSpec, grid: Knobs, groups: Tensor) -> Tensor | float:
        """The rounding offset, in weights."""
        scale = self.multiplier(grid)
        return knobs["round"] * (self.element(spec).step(groups / scale) * scale) if "round" in knobs else 0.0

    def multiplier(self, grid: Mapping[str, Tensor]) -> Tensor:
        """What a code is multiplied by, (G, 1)."""
        return grid["scale"]

    def row_unit(self, spec: TensorSpec) -> int | None:
        """Groups within a row stand alone."""
        return 1 if isinstance(spec.group, int) and spec.group != 0 else None

    def quantize(self, w: Tensor, spec: TensorSpec, knobs: Knobs = NEUTRAL) -> Quantized:
        """uint8 element codes (G, K); params "scale" (G, 1) and whatever else the codec stores."""
        shape, element = (w.shape[0], w.shape[1]), self.element(spec)
        found = None if "round" in knobs else self._compiled(w, spec, knobs)
        if found is None:
            groups = split(w.float(), spec.group)
            grid = self.grid(_largest(groups), spec, knobs)
            # Divided by the scale as stored, which is what a reader multiplies by.
            codes = element.encode(element.near(groups / self.multiplier(grid), knobs.get("round")))
            # Offsets may not write into the padding: it is not stored, and reads back as zero.
            found = grid, split(merge(codes, shape, spec.group), spec.group)
        grid, codes = found
        return Quantized(spec=spec, shape=shape, codes=codes, params=self.store(grid, spec))

    def _compiled(self, w: Tensor, spec: TensorSpec, knobs: Knobs) -> tuple[dict[str, Tensor], Tensor] | None:
        """Grid and codes (G, K) of `w` (O, I) as C finds them, or None where that is torch's to do."""
        ends = rows.ranges(w, spec.group)
        if ends is None:
            return None
        grid = self.grid(torch.maximum(-ends[0], ends[1]), spec, knobs)
        codes = rows.elements(w, spec.group, self.multiplier(grid), self.element(spec))
        return None if codes is None else (grid, codes)

    def dequantize(self, q: Quantized) -> Tensor:
        """element * scale in float32, (O, I)."""
        values = self.element(q.spec).decode(q.codes)
        return merge(values * self.multiplier(self.load(q.params, q.spec)), q.shape, q.spec.group)

    def tuner(self, w: Tensor, spec: TensorSpec, fixed: Knobs) -> Callable[[Knobs], Tensor]:
        """Fused quantize-dequantize with a hand-written backward; float32 (O, I)."""
        groups, shape = split(w.float(), spec.group), (w.shape[0], w.shape[1])
        largest, element = _largest(groups), self.element(spec)

        def fake_weight(knobs: Knobs) -> Tensor:
            every = {**fixed, **knobs}
            scale = self.multiplier(self.grid(largest, spec, every))
            # The same operations in the same order as quantize and dequantize, so that both agree bit for bit.
            return merge(scaled(groups, scale, every.get("round"), element), shape, spec.group)

        return fake_weight

    def knobs(self, spec: TensorSpec, shape: tuple[int, int]) -> dict[str, Knob]:
        """Offsets to the rounding, in steps of the element at the value in question."""
        size = (group_count(shape, spec.group), group_size(shape, spec.group))
        return {"round": Knob(shape=size, neutral=0.0, low=-0.5, high=0.5, per_value=True)}

    def search(
        self, w: Tensor, spec: TensorSpec, importance: Tensor | None = None, fixed: Knobs = NEUTRAL
    ) -> Knobs:
        """{"scale"} of least weighted error among the codec's candidates; with a Gram matrix, of least output error."""
        groups, shape = split(w.float(), spec.group), (w.shape[0], w.shape[1])
        whole = importance is not None and importance.ndim == 2
        diagonal = importance.diagonal() if importance is not None and whole else importance
        grid = self.grid(_largest(groups), spec, fixed)
        # A global scale repeated for every group, as `tie` gives it, would not broadcast to columns of groups.
        grid = {key: value if key == "scale" else value[:1] for key, value in grid.items()}
        weight = group_weights(diagonal, shape, spec.group)
        best = Best(groups, weight, self.element(spec), self.multiplier(grid))

        def near(scale: Tensor) -> list[Tensor]:
            around = self.candidates({**grid, "scale": scale}, spec)
            return [self.multiplier({**grid, "scale": other}) for other in around]

        for scale in near(grid["scale"]):
            best.offer(scale)
        # Blocks and whole tensors have no columns of groups to descend along, and keep the best by weighted error.
        if importance is not None and whole and isinstance(spec.group, int) and spec.group != 0:
            best.on_gram(shape, importance, lambda multiplier: near(self.unmultiplied(multiplier, grid)))
        return {"scale": self.store({**grid, "scale": self.unmultiplied(best.scale, grid)}, spec)["scale"]}

    def unmultiplied(self, multiplier: Tensor, grid: Mapping[str, Tensor]) -> Tensor:
        """The scale whose `multiplier` is given."""
        return multiplier


def _largest(groups: Tensor) -> Tensor:
    return groups.abs().amax(1, keepdim=True)
