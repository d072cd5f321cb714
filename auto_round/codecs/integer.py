"""Integers of 2 to 8 bits with a scale per group, symmetric or with a zero point.

w' = scale * (code - zero), code = clamp(round(w / scale + round_knob) + zero, 0, 2^bits - 1).
Symmetric means full range: the value of largest magnitude in a group becomes the code 0 exactly, so the scale is
negative where that value is positive (behaviour of AutoRound, arXiv:2309.05516 and its full-range variant).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from auto_round.codecs.base import Codec, group_weights
from auto_round.core import rows
from auto_round.core.groups import group_count, group_size, merge, split
from auto_round.core.integer_grid import (
    LEAST_ZERO,
    SMALLEST_SCALE,
    Grid,
    codes_on,
    ends,
    lifted,
    spanning,
    stored,
    top,
)
from auto_round.core.integer_search import refined, swept
from auto_round.core.layouts import middle
from auto_round.core.quantized import NEUTRAL, Knob, Knobs, Quantized
from auto_round.core.rounding import STORAGE
from auto_round.core.ruler import Ruler
from auto_round.core.scheme import Scheme, TensorSpec

MIN_BITS, MAX_BITS = 2, 8
PRECISE = 8  # bits from which on rounding alone is as good as exact


def _with_inputs(bits: int) -> Scheme:
    """Weights with a scale per row, inputs with one per token."""
    spec = TensorSpec(bits=bits, group=-1)
    return Scheme(weight=spec, act=replace(spec, scale_dtype="float32"))  # found at run time, never stored


class Integer(Codec):
    """Integer codes with float scales."""

    name = "int"
    presets: ClassVar[Mapping[str, Scheme]] = {
        **{f"W{bits}A16": Scheme(weight=TensorSpec(bits=bits)) for bits in range(MIN_BITS, MAX_BITS + 1)},
        **{
            f"W{bits}A16G{group}": Scheme(weight=TensorSpec(bits=bits, group=group))
            for bits in range(MIN_BITS, MAX_BITS + 1)
            for group in (64, 32)
        },
        "W4A16_MIXED": Scheme(weight=TensorSpec(bits=4)),  # of experts; the plan has the others in 8 bits
        **dict.fromkeys(("INT8", "INT8_W8A8"), _with_inputs(8)),
        "INT4": _with_inputs(4),
    }

    def reject(self, spec: TensorSpec) -> str | None:
        """Bits outside 2..8 are not representable; groups lie along rows; scales are plain floats."""
        if not MIN_BITS <= spec.bits <= MAX_BITS:
            return (
                f"int has {MIN_BITS} to {MAX_BITS} bits, got {spec.bits}; 16 keeps a layer in floating point"
            )
        if isinstance(spec.group, tuple):
            return f"int has groups along a row, got {spec.group[0]} x {spec.group[1]}: use one number, or data_type fp"
        if spec.scale_dtype not in STORAGE:
            return f"int has {', '.join(STORAGE)} scales, got {spec.scale_dtype}"
        if spec.variant:
            return f"int has no variant {spec.variant!r}: use data_type int"
        if not spec.dynamic and spec.group != 0:
            return f"int inputs have a static range for the whole tensor only: use act_group_size 0, got {spec.group}"
        return None

    def row_unit(self, spec: TensorSpec) -> int | None:
        """Groups lie within a row, unless the whole tensor is one."""
        return None if spec.group == 0 else 1

    def quantize(self, w: Tensor, spec: TensorSpec, knobs: Knobs = NEUTRAL) -> Quantized:
        """uint8 codes (G, K); params scale (G, 1) and, when asymmetric, zero (G, 1) uint8."""
        found = _compiled(w, spec, knobs)
        if found is None:
            # float32: a ratio in bfloat16 has 8 bits, too few to tell which of 256 codes is nearest.
            groups = split(w.float(), spec.group)
            grid = self._grid(groups, spec, knobs)
            found = grid, codes_on(groups, grid, spec, knobs.get("round"))
        grid, codes = found
        params = {"scale": grid.scale.to(STORAGE[spec.scale_dtype])}
        if isinstance(grid.zero, Tensor):
            params["zero"] = grid.zero.to(torch.uint8)
        return Quantized(
            spec=spec, shape=(w.shape[0], w.shape[1]), codes=codes.to(torch.uint8), params=params
        )

    def dequantize(self, q: Quantized) -> Tensor:
        """scale * (code - zero) in float32, (O, I)."""
        zero = q.params["zero"].float() if "zero" in q.params else float(middle(q.spec))
        return merge((q.codes.float() - zero) * q.params["scale"].float(), q.shape, q.spec.group)

    def knobs(self, spec: TensorSpec, shape: tuple[int, int]) -> dict[str, Knob]:
        """Rounding offsets and the two range factors (Eq. 3 of arXiv:2309.05516)."""
        size = group_size(shape, spec.group)
        count = group_count(shape, spec.group)
        # Ranges only shrink, as in the paper: beyond the extremes there is nothing to cover.
        factor = Knob(shape=(count, 1), neutral=1.0, low=0.0, high=1.0, per_value=False)
        offset = Knob(shape=(count, size), neutral=0.0, low=-0.5, high=0.5, per_value=True)
        return {"round": offset, "low": factor, "high": factor}

    def input_range(self, low: Tensor, high: Tensor, spec: TensorSpec) -> Knobs:
        """{"scale"} or {"scale", "zero"}, (1,) each, in storage dtype."""
        low, high = low.clamp(max=0), high.clamp(min=0)  # zero must have a code
        if spec.sym:
            return {"scale": _both_ways(torch.maximum(-low, high), spec).reshape(1)}
        grid = spanning(low, high, spec)
        zero = torch.as_tensor(grid.zero).to(torch.uint8).reshape(1)
        return {"scale": grid.scale.to(STORAGE[spec.scale_dtype]).reshape(1), "zero": zero}

    def found_range(self, x: Tensor, spec: TensorSpec) -> Knobs:
        """{"scale"} of symmetric inputs, (G, 1): servers divide by 127, not by 128 with a sign."""
        return (
            {"scale": _both_ways(split(x, spec.group).abs().amax(1, keepdim=True), spec)}
            if spec.sym
            else NEUTRAL
        )

    def holds_grid(self, spec: TensorSpec) -> bool:
        """In all groups along rows."""
        return isinstance(spec.group, int) and spec.group != 0

    def compensates(self, spec: TensorSpec) -> bool:
        """Except where steps are so small that errors do not show in a model."""
        return self.holds_grid(spec) and spec.bits < PRECISE

    def snap(self, values: Tensor, spec: TensorSpec, grid: Knobs) -> Tensor:
        """scale * (nearest code - zero)."""
        here = Grid(grid["scale"], grid.get("zero", float(middle(spec))))
        return codes_on(values, here, spec, None).sub_(here.zero).mul_(here.scale)

    def ruler(self, spec: TensorSpec, grid: Knobs) -> Ruler:
        """Codes less their zero point."""
        zero = grid.get("zero", float(middle(spec)))
        return Ruler(step=grid["scale"], least=-zero, most=top(spec) - zero)

    def offsets(self, change: Tensor, spec: TensorSpec, grid: Knobs, groups: Tensor) -> Knobs:
        """The rounding offset, in codes."""
        return {"round": change / grid["scale"]}

    def change(self, knobs: Knobs, spec: TensorSpec, grid: Knobs, groups: Tensor) -> Tensor | float:
        """The rounding offset, in weights."""
        return knobs["round"] * grid["scale"] if "round" in knobs else 0.0

    def even_grid(self, step: Tensor, low: Tensor, spec: TensorSpec) -> Knobs:
        """{"scale"} or {"scale", "zero"}; a symmetric grid has its zero in the middle, whatever `low` is."""
        if spec.sym:
            return {"scale": step}
        zero = torch.where(step == 0, torch.zeros_like(step), -low / step).round()
        return {"scale": step, "zero": zero.clamp(LEAST_ZERO, top(spec))}

    def storable(self, scale: Tensor, spec: TensorSpec) -> Tensor:
        """`scale` in its storage dtype, not below the smallest magnitude that it holds."""
        return stored(scale, spec)

    def tuner(self, w: Tensor, spec: TensorSpec, fixed: Knobs) -> Callable[[Knobs], Tensor]:
        """Fused quantize-dequantize with a hand-written backward; float32 (O, I)."""
        groups = split(w.float(), spec.group)
        shape = (w.shape[0], w.shape[1])
        low, high = ends(groups, spec, fixed)

        def fake_weight(knobs: Knobs) -> Tensor:
            every = {**fixed, **knobs}
            factors = (every.get("low"), every.get("high"))
            out: Tensor = _Fake.apply(groups, low, high, every.get("round"), *factors, spec)  # type: ignore[no-untyped-call]
            return merge(out, shape, spec.group)

        return fake_weight

    def _grid(self, groups: Tensor, spec: TensorSpec, knobs: Knobs) -> Grid:
        low, high = ends(groups, spec, knobs)
        return spanning(low * knobs.get("low", 1.0), high * knobs.get("high", 1.0), spec)

    def search(
        self, w: Tensor, spec: TensorSpec, importance: Tensor | None = None, fixed: Knobs = NEUTRAL
    ) -> Knobs:
        """The grid of least importance-weighted squared error: {"scale"} or {"scale", "zero"}, (G, 1) each.

        Given the whole Gram matrix of the inputs, the scales are then refined against the layer's true output error.
        """
        groups, shape = split(w.float(), spec.group), (w.shape[0], w.shape[1])
        diagonal = importance.diagonal() if importance is not None and importance.ndim == 2 else importance
        weight = group_weights(diagonal, shape, spec.group)
        grid = swept(groups, weight, spec)
        if importance is not None and importance.ndim == 2 and spec.group != 0:
            grid = refined(grid, groups, shape, importance, spec)
        return (
            {"scale": grid.scale} if spec.sym else {"scale": grid.scale, "zero": torch.as_tensor(grid.zero)}
        )


ENTRIES = (Integer(),)


def _both_ways(largest: Tensor, spec: TensorSpec) -> Tensor:
    """The scale with which `largest` has a code with either sign: there is one more code below zero than above."""
    return stored(largest / (middle(spec) - 1), spec).to(STORAGE[spec.scale_dtype])


def _compiled(w: Tensor, spec: TensorSpec, knobs: Knobs) -> tuple[Grid, Tensor] | None:
    """Grid and codes (G, K) of `w` (O, I) as C finds them, or None where that is torch's to do."""
    range_ = ends(w, spec, knobs) if "scale" in knobs else rows.ranges(w, spec.group)
    if range_ is None or "round" in knobs:
        return None
    # The grid is torch's here too: it has one value per group, and its rules stand in one place.
    grid = spanning(range_[0] * knobs.get("low", 1.0), range_[1] * knobs.get("high", 1.0), spec)
    codes = rows.integers(w, spec.group, grid.scale, grid.zero, top(spec))
    return None if codes is None else (grid, codes)


class _Fake(torch.autograd.Function):
    """Quantize-dequantize of grouped weights; the backward is that of the straight-through definition.

    Saved for the backward: which codes were not clamped, one float per weight, and per-group values.
    """

    @staticmethod
    def forward(
        ctx: Any,
        groups: Tensor,
        low: Tensor,
        high: Tensor,
        offset: Tensor | None,
        low_factor: Tensor | None,
        high_factor: Tensor | None,
        spec: TensorSpec,
    ) -> Tensor:
        lo = low if low_factor is None else low * low_factor
        hi = high if high_factor is None else high * high_factor
        given, lo = lo, lifted(lo, hi, spec)
        grid = spanning(lo, hi, spec)
        ratio = groups / grid.scale
        wanted = (ratio if offset is None else ratio + offset).round().add_(grid.zero)
        codes = wanted.clamp(0, top(spec))
        inside = wanted == codes
        level = codes.sub_(grid.zero)
        # d out / d scale, where the zero point is held: level - inside * w / scale
        slope = level - ratio.mul_(inside)
        ctx.save_for_backward(inside, slope, grid.scale, low, high, lo, hi, lo != given)
        ctx.spec, ctx.has = spec, (offset is not None, low_factor is not None, high_factor is not None)
        return level.mul_(grid.scale)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        inside, slope, scale, low, high, lo, hi, lifted = ctx.saved_tensors
        (grad,) = upstream
        d_scale = d_zero = None
        if ctx.has[1] or ctx.has[2]:
            d_scale = (grad * slope).sum(1, keepdim=True)
        passed = grad * inside
        if d_scale is not None and not ctx.spec.sym:
            # zero = round(-low / scale): moving it shifts every clamped value by one scale.
            d_zero = -(grad - passed).sum(1, keepdim=True) * scale
        d_offset = passed.mul_(scale) if ctx.has[0] else None  # in place: it is as large as the weights
        if d_scale is None:
            return None, None, None, d_offset, None, None, None
        # A scale held at the smallest one does not follow its range, so no gradient goes there.
        floored = scale.abs() <= SMALLEST_SCALE[ctx.spec.scale_dtype]
        if d_zero is None:
            at_low = -lo > hi
            d_extreme = -d_scale.masked_fill(floored, 0) / middle(ctx.spec)
            d_low, d_high = d_extreme * at_low, d_extreme * ~at_low
        else:
            d_scale = (d_scale + d_zero * lo / scale.square()).masked_fill(floored, 0)
            d_low = -d_scale / top(ctx.spec) - d_zero / scale
            d_high = d_scale / top(ctx.spec) - d_low * lifted / (top(ctx.spec) - 1)
            d_low = d_low * ~lifted
        return None, None, None, d_offset, d_low * low, d_high * high, None
