"""Integers of 2 to 8 bits with a scale per group, symmetric or with a zero point.

w' = scale * (code - zero), code = clamp(round(w / scale + round_knob) + zero, 0, 2^bits - 1).
Symmetric means full range: the value of largest magnitude in a group becomes the code 0 exactly, so the scale is
negative where that value is positive (behaviour of AutoRound, arXiv:2309.05516 and its full-range variant).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from auto_round.codecs.base import Codec, group_weights
from auto_round.core import rows
from auto_round.core.groups import group_count, group_size, merge, split
from auto_round.core.layouts import middle
from auto_round.core.quantized import NEUTRAL, Knob, Knobs, Quantized
from auto_round.core.rounding import STORAGE, cast_to_storage
from auto_round.core.scheme import Scheme, TensorSpec

MIN_BITS, MAX_BITS = 2, 8
# 0 / 0 is NaN, so a group of zeros needs a scale: the smallest subnormal of float16, else something far below weights.
SMALLEST_SCALE = {"float16": 2.0**-24, "bfloat16": 2.0**-100, "float32": 2.0**-100}
SEARCH_STEPS = 33  # 1/32 apart between 0.3 and 1.3
REFINE_STEPS = 9  # between the neighbours of the best of those
REFITS = 3
LEAST_ZERO = 1  # see `_lifted`
GRAM_SWEEPS, GRAM_STEPS, GRAM_REACH = 2, 13, 0.18


@dataclass(frozen=True, slots=True)
class Grid:
    """Where the codes of each group lie: scale and zero point, float32 (G, 1), rounded to storage already."""

    scale: Tensor
    zero: Tensor | float


def _top(spec: TensorSpec) -> int:
    return (1 << spec.bits) - 1


def _floor(scale: Tensor, spec: TensorSpec) -> Tensor:
    """`scale` with its magnitude raised to the smallest that storage can hold; the sign is kept."""
    least = SMALLEST_SCALE[spec.scale_dtype]
    # Negative: the largest value is positive.
    return torch.where(scale < 0, scale.clamp(max=-least), scale.clamp(min=least))


def _stored(scale: Tensor, spec: TensorSpec) -> Tensor:
    # Cast before dividing: the file stores the rounded scale, and codes of the unrounded one would not match it.
    return _floor(cast_to_storage(scale, STORAGE[spec.scale_dtype]), spec)


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
            found = grid, _codes(groups, grid, spec, knobs.get("round"))
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
        grid = _grid(low, high, spec)
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

    def snap(self, values: Tensor, spec: TensorSpec, grid: Knobs) -> Tensor:
        """scale * (nearest code - zero)."""
        here = Grid(grid["scale"], grid.get("zero", float(middle(spec))))
        return _codes(values, here, spec, None).sub_(here.zero).mul_(here.scale)

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
        return {"scale": step, "zero": zero.clamp(LEAST_ZERO, _top(spec))}

    def storable(self, scale: Tensor, spec: TensorSpec) -> Tensor:
        """`scale` in its storage dtype, not below the smallest magnitude that it holds."""
        return _stored(scale, spec)

    def tuner(self, w: Tensor, spec: TensorSpec, fixed: Knobs) -> Callable[[Knobs], Tensor]:
        """Fused quantize-dequantize with a hand-written backward; float32 (O, I)."""
        groups = split(w.float(), spec.group)
        shape = (w.shape[0], w.shape[1])
        low, high = _range(groups, spec, fixed)

        def fake_weight(knobs: Knobs) -> Tensor:
            every = {**fixed, **knobs}
            factors = (every.get("low"), every.get("high"))
            out: Tensor = _Fake.apply(groups, low, high, every.get("round"), *factors, spec)  # type: ignore[no-untyped-call]
            return merge(out, shape, spec.group)

        return fake_weight

    def _grid(self, groups: Tensor, spec: TensorSpec, knobs: Knobs) -> Grid:
        low, high = _range(groups, spec, knobs)
        return _grid(low * knobs.get("low", 1.0), high * knobs.get("high", 1.0), spec)

    def search(
        self, w: Tensor, spec: TensorSpec, importance: Tensor | None = None, fixed: Knobs = NEUTRAL
    ) -> Knobs:
        """The grid of least importance-weighted squared error: {"scale"} or {"scale", "zero"}, (G, 1) each.

        A coarse sweep of range factors, a finer one around each group's best, then alternating least squares of the
        scale for fixed codes. The error is measured with the scale in storage dtype. Given the whole Gram matrix of
        the inputs, the scales are then refined against the layer's true output error.
        """
        groups, shape = split(w.float(), spec.group), (w.shape[0], w.shape[1])
        diagonal = importance.diagonal() if importance is not None and importance.ndim == 2 else importance
        weight = group_weights(diagonal, shape, spec.group)
        best = _Best(groups, weight, spec)
        (_sweep_symmetric if spec.sym else _sweep_asymmetric)(best, *_range(groups, spec, NEUTRAL))
        best.refit()
        if importance is not None and importance.ndim == 2 and spec.group != 0:
            _refine_on_gram(best, shape, importance)
        found: dict[str, Tensor] = {"scale": best.scale}
        if not spec.sym:
            found["zero"] = best.zero
        return found


ENTRIES = (Integer(),)


def _both_ways(largest: Tensor, spec: TensorSpec) -> Tensor:
    """The scale with which `largest` has a code with either sign: there is one more code below zero than above."""
    return _stored(largest / (middle(spec) - 1), spec).to(STORAGE[spec.scale_dtype])


def _range(groups: Tensor, spec: TensorSpec, knobs: Knobs) -> tuple[Tensor, Tensor]:
    """(low, high) ends of each group's range: those of the values, or those of a grid given by the knobs."""
    if "scale" not in knobs:
        # Zero is always inside: it gets a code of its own, and padding with zeros changes no range.
        return groups.amin(1, keepdim=True).clamp(max=0), groups.amax(1, keepdim=True).clamp(min=0)
    scale = knobs["scale"].float()
    if spec.sym:
        # A power of two times the scale, which `_grid` divides out again without rounding.
        extreme = -middle(spec) * scale
        return extreme.clamp(max=0), extreme.clamp(min=0)
    return -knobs["zero"].float() * scale, (_top(spec) - knobs["zero"].float()) * scale


def _grid(low: Tensor, high: Tensor, spec: TensorSpec) -> Grid:
    """The grid that spans [low, high]. Differentiable by straight-through rounding."""
    if spec.sym:
        extreme = torch.where(-low > high, low, high)  # a tie goes to the high end, as in AutoRound
        return Grid(_stored(-extreme / middle(spec), spec), float(middle(spec)))
    low = _lifted(low, high, spec)
    scale = _stored((high - low) / _top(spec), spec)
    ratio = -low / scale
    zero = ratio + (ratio.round() - ratio).detach()
    return Grid(scale, zero.clamp(LEAST_ZERO, _top(spec)))


def _compiled(w: Tensor, spec: TensorSpec, knobs: Knobs) -> tuple[Grid, Tensor] | None:
    """Grid and codes (G, K) of `w` (O, I) as C finds them, or None where that is torch's to do."""
    ends = _range(w, spec, knobs) if "scale" in knobs else rows.ranges(w, spec.group)
    if ends is None or "round" in knobs:
        return None
    # The grid is torch's here too: it has one value per group, and its rules stand in one place.
    grid = _grid(ends[0] * knobs.get("low", 1.0), ends[1] * knobs.get("high", 1.0), spec)
    codes = rows.integers(w, spec.group, grid.scale, grid.zero, _top(spec))
    return None if codes is None else (grid, codes)


def _lifted(low: Tensor, high: Tensor, spec: TensorSpec) -> Tensor:
    """`low`, moved down to one step below zero in the groups whose zero point would be 0.

    GPTQ checkpoints store the zero point less one, and several readers do not wrap -1 around.
    """
    if spec.sym:
        return low
    scale = _stored((high - low) / _top(spec), spec)
    return torch.where((-low / scale).round() < LEAST_ZERO, -high / (_top(spec) - 1), low)


def _codes(groups: Tensor, grid: Grid, spec: TensorSpec, offset: Tensor | None) -> Tensor:
    ratio = groups / grid.scale
    if offset is not None:
        ratio = ratio + offset
    return ratio.round().add_(grid.zero).clamp_(0, _top(spec))


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
        given, lo = lo, _lifted(lo, hi, spec)
        grid = _grid(lo, hi, spec)
        ratio = groups / grid.scale
        wanted = (ratio if offset is None else ratio + offset).round().add_(grid.zero)
        codes = wanted.clamp(0, _top(spec))
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
            d_low = -d_scale / _top(ctx.spec) - d_zero / scale
            d_high = d_scale / _top(ctx.spec) - d_low * lifted / (_top(ctx.spec) - 1)
            d_low = d_low * ~lifted
        return None, None, None, d_offset, d_low * low, d_high * high, None


class _Best:
    """The best grid of each group so far."""

    def __init__(self, groups: Tensor, weight: Tensor | None, spec: TensorSpec) -> None:
        self.groups, self.weight, self.spec = groups, weight, spec
        # Infinite, so that the first offer is taken everywhere.
        self.error = groups.new_full((groups.shape[0], 1), torch.inf)
        self.scale = torch.zeros_like(self.error)
        self.zero = torch.zeros_like(self.error)
        self.factors = [torch.ones_like(self.error), torch.ones_like(self.error)]

    def offer(self, grid: Grid, *factors: Tensor | float) -> None:
        """Keep `grid` in the groups where it has less error than the best; `factors` are remembered along with it."""
        level = _codes(self.groups, grid, self.spec, None).sub_(grid.zero)
        difference = level.mul_(grid.scale).sub_(self.groups).square_()
        if self.weight is not None:
            difference.mul_(self.weight)
        error = difference.sum(1, keepdim=True)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, grid.scale, self.scale)
        self.zero = torch.where(better, torch.as_tensor(grid.zero, dtype=error.dtype), self.zero)
        for i, factor in enumerate(factors):
            self.factors[i] = torch.where(better, torch.as_tensor(factor, dtype=error.dtype), self.factors[i])

    def refit(self) -> None:
        """Least-squares scale for the current codes, rounded to storage, kept where it helps; a few times over."""
        weight = torch.ones_like(self.groups) if self.weight is None else self.weight
        for _ in range(REFITS):
            zero = float(middle(self.spec)) if self.spec.sym else self.zero
            level = _codes(self.groups, Grid(self.scale, zero), self.spec, None).sub_(zero)
            power = (weight * level.square()).sum(1, keepdim=True)
            scale = (weight * level * self.groups).sum(1, keepdim=True) / power.clamp(min=1e-30)
            # Where every code is the zero point, any scale fits as well: the old one stays.
            usable = (power > 0) & (scale != 0)
            self.offer(Grid(_stored(torch.where(usable, scale, self.scale), self.spec), zero))


def _refine_on_gram(best: _Best, shape: tuple[int, int], gram: Tensor) -> None:
    """Coordinate descent of the scales on tr(D gram D'), D = fake - w: one column of groups after the other.

    All rows move at once; each takes the candidate that lowers its output error given the errors of its other groups.
    """
    size, columns = best.groups.shape[1], best.groups.shape[0] // shape[0]
    gram = torch.nn.functional.pad(gram, (0, columns * size - shape[1], 0, columns * size - shape[1]))
    weights = best.groups.reshape(shape[0], columns, size)
    scales = best.scale.reshape(shape[0], columns, 1).clone()
    zeros = best.zero.reshape(shape[0], columns, 1)
    grids = [Grid(scales[:, j], zeros[:, j]) for j in range(columns)]
    error = torch.cat([_error(weights[:, j], grid, best.spec) for j, grid in enumerate(grids)], 1)
    for j in [*range(columns)] * GRAM_SWEEPS:
        here = slice(j * size, (j + 1) * size)
        own = gram[here, here]
        # What the other groups of each row contribute to the gradient at this one; they stay while it moves.
        outside = error @ gram[:, here] - error[:, here] @ own

        def cost(difference: Tensor, own: Tensor = own, outside: Tensor = outside) -> Tensor:
            return ((difference @ own + 2 * outside) * difference).sum(1, keepdim=True)

        scale, kept = scales[:, j], error[:, here]
        lowest = cost(kept)
        level = (kept + weights[:, j]) / scale  # the codes less their zero point, as floats
        power = ((level @ own) * level).sum(1, keepdim=True).clamp(min=1e-30)
        fitted = (((weights[:, j] @ own) - outside) * level).sum(1, keepdim=True) / power
        factors = _spaced(1 - GRAM_REACH, 1 + GRAM_REACH, GRAM_STEPS)
        for candidate in (fitted, *(scale * factor for factor in factors)):
            # A fitted scale of zero or of the other sign would turn all codes around: the old one stands in for it.
            usable = torch.where(candidate * scale > 0, candidate, scale)
            stored = _stored(usable, best.spec)
            difference = _error(weights[:, j], Grid(stored, zeros[:, j]), best.spec)
            total = cost(difference)
            better = total < lowest
            lowest = torch.where(better, total, lowest)
            scales[:, j] = torch.where(better, stored, scales[:, j])
            kept = torch.where(better, difference, kept)
        error[:, here] = kept
    best.scale = scales.reshape(-1, 1)


def _spaced(low: float, high: float, count: int) -> list[float]:
    """Evenly spaced numbers from `low` to `high`, of float32 whatever the default dtype of the process."""
    numbers: list[float] = torch.linspace(low, high, count, dtype=torch.float32).tolist()
    return numbers


def _error(groups: Tensor, grid: Grid, spec: TensorSpec) -> Tensor:
    """fake - w of grouped weights."""
    return (_codes(groups, grid, spec, None) - grid.zero) * grid.scale - groups


def _sweep_symmetric(best: _Best, low: Tensor, high: Tensor) -> None:
    """Shrunken and widened ranges from either end: a scale of the other sign holds the other side better."""
    magnitude = torch.maximum(-low, high)
    positive = high >= -low  # a tie goes to the high end, as in `_grid`
    own = torch.where(positive, magnitude, -magnitude)
    best.offer(_grid(low, high, best.spec), 1.0)  # plain rounding, so that a search is never worse
    for sign in (1.0, -1.0):
        for factor in _spaced(0.3, 1.3, SEARCH_STEPS):
            extreme = own * (sign * factor)
            best.offer(_grid(extreme.clamp(max=0), extreme.clamp(min=0), best.spec), sign * factor)
    center, step = best.factors[0], 1.0 / (SEARCH_STEPS - 1)  # a center for each group
    for shift in _spaced(-step, step, REFINE_STEPS):
        extreme = own * (center + shift)
        best.offer(_grid(extreme.clamp(max=0), extreme.clamp(min=0), best.spec), center + shift)


def _sweep_asymmetric(best: _Best, low: Tensor, high: Tensor) -> None:
    """Both ends shrunk independently: a coarse table, then finer steps of each end in turn."""
    coarse = _spaced(0.4, 1.1, 8)
    best.offer(_grid(low, high, best.spec), 1.0, 1.0)  # plain rounding first
    for a in coarse:
        for b in coarse:
            best.offer(_grid(low * a, high * b, best.spec), a, b)
    for step in (0.05, 0.025, 0.0125):
        for moves in ((-step, 0.0), (step, 0.0), (0.0, -step), (0.0, step)):
            left, right = best.factors[0] + moves[0], best.factors[1] + moves[1]
            best.offer(_grid(low * left, high * right, best.spec), left, right)
