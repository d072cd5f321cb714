"""Where integer codes lie: the scale and zero point of each group, as they are stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from auto_round.core.layouts import middle
from auto_round.core.quantized import Knobs
from auto_round.core.rounding import STORAGE, cast_to_storage
from auto_round.core.scheme import TensorSpec

# 0 / 0 is NaN, so a group of zeros needs a scale: the smallest subnormal of float16, else something far below weights.
SMALLEST_SCALE = {"float16": 2.0**-24, "bfloat16": 2.0**-100, "float32": 2.0**-100}
LEAST_ZERO = 1  # see `lifted`


@dataclass(frozen=True, slots=True)
class Grid:
    """Where the codes of each group lie: scale and zero point, float32 (G, 1), rounded to storage already."""

    scale: Tensor
    zero: Tensor | float


def top(spec: TensorSpec) -> int:
    """The largest code."""
    return (1 << spec.bits) - 1


def _floor(scale: Tensor, spec: TensorSpec) -> Tensor:
    """`scale` with its magnitude raised to the smallest that storage can hold; the sign is kept."""
    least = SMALLEST_SCALE[spec.scale_dtype]
    # Negative: the largest value is positive.
    return torch.where(scale < 0, scale.clamp(max=-least), scale.clamp(min=least))


def stored(scale: Tensor, spec: TensorSpec) -> Tensor:
    """`scale` as its storage holds it, in float32; not below the smallest magnitude."""
    # Cast before dividing: the file stores the rounded scale, and codes of the unrounded one would not match it.
    return _floor(cast_to_storage(scale, STORAGE[spec.scale_dtype]), spec)


def ends(groups: Tensor, spec: TensorSpec, knobs: Knobs) -> tuple[Tensor, Tensor]:
    """(low, high) ends of each group's range: those of the values, or those of a grid given by the knobs."""
    if "scale" not in knobs:
        # Zero is always inside: it gets a code of its own, and padding with zeros changes no range.
        return groups.amin(1, keepdim=True).clamp(max=0), groups.amax(1, keepdim=True).clamp(min=0)
    scale = knobs["scale"].float()
    if spec.sym:
        # A power of two times the scale, which `spanning` divides out again without rounding.
        extreme = -middle(spec) * scale
        return extreme.clamp(max=0), extreme.clamp(min=0)
    return -knobs["zero"].float() * scale, (top(spec) - knobs["zero"].float()) * scale


def spanning(low: Tensor, high: Tensor, spec: TensorSpec) -> Grid:
    """The grid that spans [low, high]. Differentiable by straight-through rounding."""
    if spec.sym:
        extreme = torch.where(-low > high, low, high)  # a tie goes to the high end, as in AutoRound
        return Grid(stored(-extreme / middle(spec), spec), float(middle(spec)))
    low = lifted(low, high, spec)
    scale = stored((high - low) / top(spec), spec)
    ratio = -low / scale
    zero = ratio + (ratio.round() - ratio).detach()
    return Grid(scale, zero.clamp(LEAST_ZERO, top(spec)))


def lifted(low: Tensor, high: Tensor, spec: TensorSpec) -> Tensor:
    """`low`, moved down to one step below zero in the groups whose zero point would be 0.

    GPTQ checkpoints store the zero point less one, and several readers do not wrap -1 around.
    """
    if spec.sym:
        return low
    scale = stored((high - low) / top(spec), spec)
    return torch.where((-low / scale).round() < LEAST_ZERO, -high / (top(spec) - 1), low)


def codes_on(groups: Tensor, grid: Grid, spec: TensorSpec, offset: Tensor | None) -> Tensor:
    """The codes of `groups` (G, K) as floats; offset: moves them before they are rounded."""
    ratio = groups / grid.scale
    if offset is not None:
        ratio = ratio + offset
    return ratio.round().add_(grid.zero).clamp_(0, top(spec))
