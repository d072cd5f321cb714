"""FP8: E4M3 or E5M2 elements with a float scale per tensor, row, group or block of the matrix, largest / 448."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from auto_round.codecs.elements import ElementCodec
from auto_round.core.minifloat import E4M3, E5M2, MiniFloat
from auto_round.core.quantized import Knob, Knobs
from auto_round.core.rounding import STORAGE, cast_to_storage
from auto_round.core.scheme import Group, Scheme, TensorSpec

ELEMENTS = {"": E4M3, "e5m2": E5M2}
# A group of zeros is 0, not 0 / 0.
SMALLEST_SCALE = {"float16": 2.0**-24, "bfloat16": 2.0**-100, "float32": 2.0**-100}
FACTORS = tuple(2.0 ** (step / 8) for step in range(-3, 9) if step)
"""Ranges tried: a little shrunken, and up to twice as wide, which moves values between the binades of the element."""


def _spec(group: Group, scales: str = "bfloat16", *, dynamic: bool = True) -> TensorSpec:
    return TensorSpec(dtype="fp", bits=8, group=group, scale_dtype=scales, dynamic=dynamic)


class Float8(ElementCodec):
    """8-bit floats with float scales."""

    name = "fp"
    presets: ClassVar[Mapping[str, Scheme]] = {
        "FPW8A16": Scheme(weight=_spec(0)),
        "FP8_STATIC": Scheme(weight=_spec(-1), act=_spec(0, dynamic=False)),
        "FP8_BLOCK": Scheme(weight=_spec((128, 128)), act=_spec(128, "float32")),
        "FP8_DYNAMIC": Scheme(weight=_spec(-1), act=_spec(-1, "float32")),
    }

    def reject(self, spec: TensorSpec) -> str | None:
        """Other than 8 symmetric bits; a static range for anything but the whole tensor."""
        if spec.bits != 8 or not spec.sym:
            return f"fp has 8 bits and is symmetric, got {spec}"
        if spec.variant not in ELEMENTS:
            return f"fp has the elements e4m3 and e5m2, got {spec.variant!r}"
        if spec.scale_dtype not in STORAGE:
            return f"fp has {', '.join(STORAGE)} scales, got {spec.scale_dtype}"
        if not spec.dynamic and spec.group != 0:
            return f"fp inputs have a static range for the whole tensor only: use act_group_size 0, got {spec.group}"
        return None

    def element(self, spec: TensorSpec) -> MiniFloat:
        """E4M3 unless said otherwise."""
        return ELEMENTS[spec.variant]

    def knobs(self, spec: TensorSpec, shape: tuple[int, int]) -> dict[str, Knob]:
        """Offsets to the rounding, and a factor on the range of each group."""
        offset = super().knobs(spec, shape)["round"]
        # Beyond 1 too: a wider range shifts all values against the element's steps, which may fit them better.
        factor = Knob(shape=(offset.shape[0], 1), neutral=1.0, low=0.5, high=1.5, per_value=False)
        return {"round": offset, "high": factor}

    def input_range(self, low: Tensor, high: Tensor, spec: TensorSpec) -> Knobs:
        """{"scale"}, (1,), in storage dtype."""
        scale = self._stored(torch.maximum(-low, high) / self.element(spec).top, spec)
        return {"scale": scale.to(STORAGE[spec.scale_dtype]).reshape(1)}

    def grid(self, largest: Tensor, spec: TensorSpec, knobs: Knobs) -> dict[str, Tensor]:
        """{"scale"}."""
        # The largest value becomes the largest element, 448 for E4M3: nothing saturates unless a factor says so.
        wanted = knobs["scale"].float() if "scale" in knobs else largest / self.element(spec).top
        if "high" in knobs:
            wanted = wanted * knobs["high"]
        return {"scale": self._stored(wanted, spec)}

    def store(self, grid: Mapping[str, Tensor], spec: TensorSpec) -> dict[str, Tensor]:
        """{"scale"} in storage dtype."""
        return {"scale": grid["scale"].detach().to(STORAGE[spec.scale_dtype])}  # exact: rounded to it already

    def load(self, params: Mapping[str, Tensor], spec: TensorSpec) -> dict[str, Tensor]:
        """The inverse of `store`."""
        return {"scale": params["scale"].float()}

    def storable(self, scale: Tensor, spec: TensorSpec) -> Tensor:
        """`scale` in its storage dtype."""
        return self._stored(scale, spec)

    def candidates(self, grid: Mapping[str, Tensor], spec: TensorSpec) -> list[Tensor]:
        """Other ranges."""
        return [self._stored(grid["scale"] * factor, spec) for factor in FACTORS]

    @staticmethod
    def _stored(scale: Tensor, spec: TensorSpec) -> Tensor:
        return cast_to_storage(scale, STORAGE[spec.scale_dtype]).clamp(min=SMALLEST_SCALE[spec.scale_dtype])


ENTRIES = (Float8(),)
