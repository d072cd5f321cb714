"""MX types: MXFP4, MXFP6, MXFP8, MXINT4. Small elements with one power of two (E8M0, a byte) per group, usually of 32.

OCP Microscaling v1.0, section 6.3: the scale is 2^(floor(log2(largest)) - emax of the element). The variant "rceil"
rounds it up instead, to the smallest power of two under which nothing saturates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from auto_round.codecs.elements import ElementCodec
from auto_round.core.minifloat import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    E8M0_BIAS,
    INT4,
    MiniFloat,
    e8m0_byte,
    e8m0_value,
    power_of_two_scale,
)
from auto_round.core.quantized import Knobs
from auto_round.core.scheme import Scheme, TensorSpec

SCALES = "e8m0"
SHIFTS = (-2, -1, 1)
"""Exponents tried besides the usual one: a smaller scale saturates the largest values, a larger one coarsens all."""


def _both(dtype: str, bits: int, inputs: str = "") -> Scheme:
    """Weights and inputs alike, the inputs in the dialect `inputs`."""
    weight = TensorSpec(dtype=dtype, bits=bits, group=32, scale_dtype=SCALES)
    act = TensorSpec(dtype=dtype, bits=bits, group=32, scale_dtype=SCALES, variant=inputs)
    return Scheme(weight=weight, act=act)


class Microscaling(ElementCodec):
    """A family of elements with power-of-two scales. elements: (bits, dialect) -> element."""

    elements: ClassVar[Mapping[tuple[int, str], MiniFloat]]

    def reject(self, spec: TensorSpec) -> str | None:
        """Bits and elements that the family lacks; zero points; blocks; ranges fixed before run time."""
        element, _ = _dialect(spec)
        if (spec.bits, element) not in self.elements:
            known = ", ".join(f"{bits} {word}".strip() for bits, word in self.elements)
            return f"{self.name} has these bits and elements: {known}; got {spec.bits} {element}".rstrip()
        if not spec.sym:
            return f"{self.name} is symmetric: leave sym at true"
        if isinstance(spec.group, tuple) or spec.group == 0:
            return f"{self.name} has groups along a row, got {spec.group}: use group_size 32"
        if spec.scale_dtype != SCALES:
            return (
                f"{self.name} has powers of two as scales, got scale_dtype {spec.scale_dtype}: leave it out"
            )
        if not spec.dynamic:
            return f"{self.name} finds its scales at run time: leave act_dynamic at true"
        return None

    def element(self, spec: TensorSpec) -> MiniFloat:
        """That of the bits and the dialect."""
        return self.elements[spec.bits, _dialect(spec)[0]]

    def grid(self, largest: Tensor, spec: TensorSpec, knobs: Knobs) -> dict[str, Tensor]:
        """{"scale"}: powers of two."""
        if "scale" in knobs:
            return self.load(knobs, spec)  # as found by a search: there is no range left to look at
        return {"scale": power_of_two_scale(largest, self.element(spec), up=_dialect(spec)[1])}

    def storable(self, scale: Tensor, spec: TensorSpec) -> Tensor:
        """The power of two nearest to `scale`, by its logarithm."""
        # Nearest on a logarithmic axis: a factor of two up or down is the same mistake.
        return e8m0_value((scale.log2().round() + E8M0_BIAS).clamp(0, 2 * E8M0_BIAS).int())

    def store(self, grid: Mapping[str, Tensor], spec: TensorSpec) -> dict[str, Tensor]:
        """{"scale"}: exponent + 127, uint8."""
        return {"scale": e8m0_byte(grid["scale"])}

    def load(self, params: Mapping[str, Tensor], spec: TensorSpec) -> dict[str, Tensor]:
        """The inverse of `store`."""
        return {"scale": e8m0_value(params["scale"])}

    def candidates(self, grid: Mapping[str, Tensor], spec: TensorSpec) -> list[Tensor]:
        """Neighbouring powers of two."""
        byte = e8m0_byte(grid["scale"]).int()
        return [e8m0_value((byte + shift).clamp(0, 254)) for shift in SHIFTS]  # 255 is NaN


def _dialect(spec: TensorSpec) -> tuple[str, bool]:
    """(element, scale rounded up) of "e5m2", "rceil" or "e5m2_rceil"."""
    words = spec.variant.split("_")
    # "rceil" speaks of the scale and may stand beside an element: "e5m2_rceil".
    return "_".join(word for word in words if word != "rceil"), "rceil" in words


class MXFloat(Microscaling):
    """Small floats."""

    name = "mx_fp"
    elements: ClassVar[Mapping[tuple[int, str], MiniFloat]] = {
        (4, ""): E2M1,
        (6, ""): E2M3,
        (6, "e3m2"): E3M2,
        (8, ""): E4M3,
        (8, "e5m2"): E5M2,
    }
    presets: ClassVar[Mapping[str, Scheme]] = {
        "MXFP4": _both("mx_fp", 4),
        "MXFP6": _both("mx_fp", 6),
        "MXFP8": _both("mx_fp", 8),
        "MXFP4_RCEIL": _both("mx_fp", 4, "rceil"),
        "MXFP8_RCEIL": _both("mx_fp", 8, "rceil"),
    }


class MXInt(Microscaling):
    """Integers with their sign apart, in steps of a quarter."""

    name = "mx_int"
    elements: ClassVar[Mapping[tuple[int, str], MiniFloat]] = {(4, ""): INT4}
    presets: ClassVar[Mapping[str, Scheme]] = {"MXINT4": _both("mx_int", 4)}


ENTRIES = (MXFloat(), MXInt())
