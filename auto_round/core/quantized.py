"""`Quantized`, the waist of the system: codecs make it, formats store it, backends multiply by it.

Codes and parameters are made exactly once and are in their storage dtype; nothing is rounded again afterwards.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from auto_round.core.scheme import TensorSpec

Knobs = Mapping[str, Tensor]
"""Small tensors that steer how a weight is quantized; a missing knob is neutral."""

NEUTRAL: Knobs = MappingProxyType({})  # read-only, since it is a default argument everywhere
INPUT = "input_"


@dataclass(frozen=True, slots=True)
class Knob:
    """One thing that may be tuned: its shape, the value that changes nothing, and the allowed range.

    `per_value` tells rounding offsets (one per weight) from range factors (one per group), which have learning rates
    of their own.
    """

    shape: tuple[int, ...]
    neutral: float
    low: float
    high: float
    per_value: bool


@dataclass(frozen=True, slots=True)
class Quantized:
    """One quantized matrix.

    codes: (G, K) unsigned integers, row-major groups of `spec.group` values, padding included.
    params: tensors with one row per group, in storage dtype: "scale" and, for asymmetric types, "zero".
    shape: (O, I) of the matrix before padding.
    inputs: the calibrated range of the layer's inputs, in storage dtype, (1,) each: "scale" or "global_scale"; empty
    when inputs stay in floating point or their range is found at run time.
    """

    spec: TensorSpec
    shape: tuple[int, int]
    codes: Tensor
    params: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Codes, parameters and input ranges under one roof, for comparing and hashing."""
        return {"codes": self.codes, **self.params, **input_tensors(self)}

    def equals(self, other: "Quantized") -> bool:
        """Bit for bit the same codes, padding included, parameters and input ranges, in the same dtypes and shapes."""
        mine, theirs = self.tensors(), other.tensors()
        if self.spec != other.spec or self.shape != other.shape or mine.keys() != theirs.keys():
            return False
        # torch.equal alone would call a float16 and a float32 scale of the same value equal.
        return all(mine[k].dtype == theirs[k].dtype and torch.equal(mine[k], theirs[k]) for k in mine)


def input_tensors(q: Quantized) -> dict[str, Tensor]:
    """The input range of `q` under the names that checkpoints give it: "input_scale", "input_global_scale"."""
    return {f"{INPUT}{key}": value for key, value in q.inputs.items()}


def inputs_among(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `input_tensors`, for a reader: whatever input range there is among `tensors`."""
    return {key.removeprefix(INPUT): value for key, value in tensors.items() if key.startswith(INPUT)}
