"""NVFP4: E2M1 elements in groups of 16, whose scales are small floats themselves.

With E4M3 scales there is one more scale for the whole tensor, `global_scale` = 448 * 6 / largest, by which the scales
of the groups are multiplied when stored: w' = element * scale / global_scale. Layers that a server merges share it.
With E5M3 scales, unsigned and of a wider range, there is none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from auto_round.codecs.elements import ElementCodec
from auto_round.core.groups import group_count
from auto_round.core.minifloat import E2M1, E4M3, UE5M3, MiniFloat
from auto_round.core.quantized import NEUTRAL, Knob, Knobs
from auto_round.core.rounding import straight_through
from auto_round.core.scheme import Scheme, TensorSpec

SCALES = {"e4m3": E4M3, "e5m3": UE5M3}
SMALLEST_RANGE = 2.0**-100  # keeps the global scale finite
STATIC_GLOBAL = "static_gs"
REACH = 8
"""Codes of a scale tried on either side of the usual one: a factor of two, 4 / 6 ("four over six") included."""


def _both(scales: str, inputs: str) -> Scheme:
    weight = TensorSpec(dtype="nv_fp", bits=4, group=16, scale_dtype=scales)
    act = TensorSpec(dtype="nv_fp", bits=4, group=16, scale_dtype=scales, variant=inputs)
    return Scheme(weight=weight, act=act)


class NVFloat(ElementCodec):
    """FP4 with scales of two levels."""

    name = "nv_fp"
    presets: ClassVar[Mapping[str, Scheme]] = {
        "NVFP4": _both("e4m3", STATIC_GLOBAL),
        "NVFP4_E5M3": _both("e5m3", ""),
    }

    def reject(self, spec: TensorSpec) -> str | None:
        """Other than 4 symmetric bits in groups along a row; ranges of groups fixed before run time."""
        if spec.bits != 4 or not spec.sym:
            return f"nv_fp has 4 bits and is symmetric, got {spec}"
        if isinstance(spec.group, tuple) or spec.group == 0:
            return f"nv_fp has groups along a row, got {spec.group}: use group_size 16"
        if spec.scale_dtype not in SCALES:
            return f"nv_fp has {' or '.join(SCALES)} scales, got scale_dtype {spec.scale_dtype}: leave it out"
        if spec.variant not in ("", STATIC_GLOBAL) or (spec.variant and spec.scale_dtype != "e4m3"):
            return (
                f"nv_fp has no variant {spec.variant!r} with {spec.scale_dtype} scales: use data_type nv_fp"
            )
        if not spec.dynamic:
            return (
                "nv_fp finds the scales of groups at run time: leave act_dynamic at true, and use act_data_type "
                "nv_fp4_with_static_gs for a calibrated global scale"
            )
        return None

    def element(self, spec: TensorSpec) -> MiniFloat:
        """E2M1."""
        return E2M1

    def row_unit(self, spec: TensorSpec) -> int | None:
        """The global scale is one for all rows."""
        # A few rows at a time would each find another largest value.
        return 1 if spec.scale_dtype != "e4m3" else None

    def knobs(self, spec: TensorSpec, shape: tuple[int, int]) -> dict[str, Knob]:
        """Offsets to the rounding, and a factor on the scale of each group."""
        offset = super().knobs(spec, shape)["round"]
        factor = Knob(shape=(offset.shape[0], 1), neutral=1.0, low=0.5, high=1.5, per_value=False)
        return {"round": offset, "high": factor}

    def tie(self, weights: Sequence[Tensor], spec: TensorSpec) -> list[Knobs]:
        """{"global_scale"}: that of all the weights together, repeated for every group, so that layers stack."""
        if spec.scale_dtype != "e4m3":
            return [NEUTRAL] * len(weights)
        # The largest value of all: the smallest of their global scales, under which no layer's scales overflow.
        shared = _global_scale(torch.stack([w.abs().amax().float() for w in weights]).amax()).reshape(1, 1)
        counts = [group_count((w.shape[0], w.shape[1]), spec.group) for w in weights]
        return [{"global_scale": shared.repeat(count, 1)} for count in counts]

    def reach(self, spec: TensorSpec) -> float:
        """Where there is no global scale, that of the largest scale."""
        return math.inf if spec.scale_dtype == "e4m3" else E2M1.top * SCALES[spec.scale_dtype].top

    def needs_range(self, spec: TensorSpec) -> bool:
        """With a calibrated global scale."""
        return spec.variant == STATIC_GLOBAL

    def input_range(self, low: Tensor, high: Tensor, spec: TensorSpec) -> Knobs:
        """{"global_scale"}, (1,) float32."""
        return {"global_scale": _global_scale(torch.maximum(-low, high))}

    def grid(self, largest: Tensor, spec: TensorSpec, knobs: Knobs) -> dict[str, Tensor]:
        """{"scale"}: small floats; {"global_scale"} with E4M3 scales."""
        grid = {}
        if spec.scale_dtype == "e4m3":
            shared = knobs["global_scale"] if "global_scale" in knobs else _global_scale(largest.amax())
            grid["global_scale"] = shared.reshape(-1, 1)
        kind = SCALES[spec.scale_dtype]
        if "scale" in knobs:
            wanted = kind.decode(knobs["scale"])
        else:
            # Maps the group's largest value to 6, the largest E2M1; the global scale brings it into the range of E4M3.
            wanted = largest / E2M1.top * grid.get("global_scale", 1.0)
        if "high" in knobs:
            wanted = wanted * knobs["high"]
        # Never zero: readers divide by it. A group far below the others is then stored as zeros.
        return {"scale": straight_through(kind.near, wanted).clamp(min=kind.smallest), **grid}

    def multiplier(self, grid: Mapping[str, Tensor]) -> Tensor:
        """scale / global_scale."""
        return grid["scale"] / grid["global_scale"] if "global_scale" in grid else grid["scale"]

    def unmultiplied(self, multiplier: Tensor, grid: Mapping[str, Tensor]) -> Tensor:
        """multiplier * global_scale, which rounding takes back to the stored value."""
        if "global_scale" not in grid:  # E5M3 reaches far enough by itself
            return multiplier
        return E4M3.near(multiplier * grid["global_scale"])

    def store(self, grid: Mapping[str, Tensor], spec: TensorSpec) -> dict[str, Tensor]:
        """{"scale"}: the bits of a small float, uint8; {"global_scale"}: (1,) float32."""
        shared = {key: value.reshape(-1)[:1] for key, value in grid.items() if key == "global_scale"}
        return {**shared, "scale": SCALES[spec.scale_dtype].encode(grid["scale"].detach())}

    def load(self, params: Mapping[str, Tensor], spec: TensorSpec) -> dict[str, Tensor]:
        """The inverse of `store`."""
        return {**params, "scale": SCALES[spec.scale_dtype].decode(params["scale"])}

    def storable(self, scale: Tensor, spec: TensorSpec) -> Tensor:
        """The small float nearest to `scale`, never zero."""
        kind = SCALES[spec.scale_dtype]
        return kind.near(scale).clamp(min=kind.smallest)

    def candidates(self, grid: Mapping[str, Tensor], spec: TensorSpec) -> list[Tensor]:
        """The scales within a factor of two."""
        kind = SCALES[spec.scale_dtype]
        code = kind.encode(grid["scale"]).int()
        largest = int(kind.encode(torch.tensor(kind.top, dtype=torch.float32)))
        shifts = [shift for shift in range(-REACH, REACH + 1) if shift]
        # Codes of positive floats are in the order of their values, so neighbours are one apart; code 0 is zero.
        return [kind.decode((code + shift).clamp(1, largest)) for shift in shifts]


def _global_scale(largest: Tensor) -> Tensor:
    """448 * 6 / largest, (1,) float32: the scale of the group with the largest value becomes 448."""
    return (E4M3.top * E2M1.top / largest.clamp(min=SMALLEST_RANGE)).reshape(1)


ENTRIES = (NVFloat(),)
