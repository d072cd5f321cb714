"""`Quantized`, the waist of the system: codecs make it, formats store it, backends multiply by it.

Codes and parameters are made exactly once and are in their storage dtype; nothing is rounded again afterwards.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from auto_round.core.scheme import TensorSpec

Knobs = Mapping[str, Tensor]
"""Small tensors that steer how a weight is quantized; a missing knob is neutral."""

NEUTRAL: Knobs = MappingProxyType({})


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
    """

    spec: TensorSpec
    shape: tuple[int, int]
    codes: Tensor
    params: Mapping[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """Codes and parameters under one roof, for comparing and hashing."""
        return {"codes": self.codes, **self.params}

    def equals(self, other: "Quantized") -> bool:
        """Bit for bit the same codes and parameters, in the same dtypes and shapes, padding left out."""
        if self.spec != other.spec or self.shape != other.shape or self.params.keys() != other.params.keys():
            return False
        mine, theirs = self.tensors(), other.tensors()
        return all(mine[k].dtype == theirs[k].dtype and torch.equal(mine[k], theirs[k]) for k in mine)
