"""What a data type must offer, and the functions the rest of the system calls instead of a particular codec."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from auto_round.core.buffers import buffer
from auto_round.core.errors import SchemeError, nearest
from auto_round.core.groups import split
from auto_round.core.quantized import NEUTRAL, Knob, Knobs, Quantized
from auto_round.core.registry import discover
from auto_round.core.ruler import Ruler
from auto_round.core.scheme import FLOAT, Group, Scheme, TensorSpec


class Codec(ABC):
    """One data type: weight and knobs to `Quantized`, and back."""

    name: ClassVar[str]
    presets: ClassVar[Mapping[str, Scheme]]

    @abstractmethod
    def quantize(self, w: Tensor, spec: TensorSpec, knobs: Knobs = NEUTRAL) -> Quantized:
        """Codes and parameters of `w` (O, I), in storage dtype."""

    @abstractmethod
    def dequantize(self, q: Quantized) -> Tensor:
        """The weight (O, I) that `q` stands for, float32."""

    @abstractmethod
    def reject(self, spec: TensorSpec) -> str | None:
        """Why this data type cannot do `spec`, or None."""

    def row_unit(self, spec: TensorSpec) -> int | None:
        """Rows that must be quantized together: 1 when every row stands alone, None when all belong together."""
        return None

    def knobs(self, spec: TensorSpec, shape: tuple[int, int]) -> dict[str, Knob]:
        """What may be tuned for a weight of `shape` (O, I)."""
        return {}

    def search(
        self, w: Tensor, spec: TensorSpec, importance: Tensor | None = None, fixed: Knobs = NEUTRAL
    ) -> Knobs:
        """Knobs that lower the error of `w` (O, I) under `importance`; `fixed` ones are given. Default: none known.

        importance: (I,) second moments, (I, I) Gram matrix of the inputs, or None.
        """
        return NEUTRAL

    def tie(self, weights: Sequence[Tensor], spec: TensorSpec) -> list[Knobs]:
        """For each of `weights` (O, I), the layers of one fused set, the knobs they must share. Default: none."""
        return [NEUTRAL] * len(weights)

    def reach(self, spec: TensorSpec) -> float:
        """The largest magnitude that can be stored; what is beyond would saturate."""
        return math.inf

    def needs_range(self, spec: TensorSpec) -> bool:
        """Whether inputs of `spec` need a calibrated range, because not all of it is found at run time."""
        return not spec.dynamic

    def input_range(self, low: Tensor, high: Tensor, spec: TensorSpec) -> Knobs:
        """Knobs that quantize every input within [low, high], 0-dim each: what is stored along with the layer."""
        raise SchemeError(f"{self.name} has no static range: use act_dynamic=True")

    def found_range(self, x: Tensor, spec: TensorSpec) -> Knobs:
        """What a server finds of the range of inputs `x` (N, I) at run time. Default: as for a weight."""
        return NEUTRAL

    def holds_grid(self, spec: TensorSpec) -> bool:
        """Whether each row has grids of its own that stay while weights move: `snap` and the next three are there."""
        return False

    def compensates(self, spec: TensorSpec) -> bool:
        """Whether optimised RTN should let weights make up for one another's rounding errors too; needs a grid."""
        return False

    def load(self, params: Mapping[str, Tensor], spec: TensorSpec) -> dict[str, Tensor]:
        """The grid that `Quantized.params` stand for, as float32 numbers; each is per group, or one for all."""
        return {key: value.float() for key, value in params.items()}

    def store(self, grid: Mapping[str, Tensor], spec: TensorSpec) -> dict[str, Tensor]:
        """The inverse of `load`: what a knob of the same name may be."""
        return dict(grid)

    def snap(self, values: Tensor, spec: TensorSpec, grid: Knobs) -> Tensor:
        """The representable values nearest to `values`, given their grid as `load` gives it, broadcast to `values`."""
        raise SchemeError(f"{self.name} cannot hold a grid")

    def ruler(self, spec: TensorSpec, grid: Knobs) -> Ruler | None:
        """The same values for compiled loops, which may take the other one at a tie. Default: torch goes by `snap`."""
        return None

    def offsets(self, change: Tensor, spec: TensorSpec, grid: Knobs, groups: Tensor) -> Knobs:
        """Knobs that make `quantize` round `groups` + `change`, (G, K) each, in the place of `groups`."""
        raise SchemeError(f"{self.name} cannot hold a grid")

    def change(self, knobs: Knobs, spec: TensorSpec, grid: Knobs, groups: Tensor) -> Tensor | float:
        """The inverse of `offsets`: by how much `knobs` move what is rounded, (G, K)."""
        raise SchemeError(f"{self.name} cannot hold a grid")

    def even_grid(self, step: Tensor, low: Tensor, spec: TensorSpec) -> Knobs:
        """Knobs that give each group the grid low + step * code, (G, 1) each, as far as there is one; default: none."""
        return NEUTRAL

    def storable(self, scale: Tensor, spec: TensorSpec) -> Tensor:
        """`scale`, or another parameter that `parts` names, rounded to what the file can hold."""
        raise SchemeError(f"{self.name} cannot hold a grid")

    def parts(self, values: Tensor, spec: TensorSpec, grid: Knobs) -> dict[str, Tensor]:
        """`values` (G, K) on a grid as a sum: for each parameter that may be refitted, the part in proportion to it.

        A part that is the same throughout a group is (G, 1).
        """
        return {"scale": values}

    def shared(self, spec: TensorSpec) -> int:
        """Neighbouring groups of a row that share each of the parameters in `parts`."""
        return 1

    def held(self, grid: Mapping[str, Tensor], spec: TensorSpec) -> dict[str, Tensor]:
        """Knobs that hold `grid`, which has (G, 1) for every parameter."""
        return {**grid, "scale": self.store(grid, spec)["scale"]}

    def tuner(self, w: Tensor, spec: TensorSpec, fixed: Knobs) -> Callable[[Knobs], Tensor]:
        """A function from knobs to the fake weight, differentiable in them.

        `fixed` knobs are not tuned; a codec overrides this to compute once what does not depend on the tuned ones.
        """
        return lambda knobs: self.dequantize(self.quantize(w, spec, {**fixed, **knobs})).to(w.dtype)

    def rejects_row(self, columns: int) -> str | None:
        """Why rows of so many columns cannot be held, or None. Default: any can."""
        return None

    def cost(self, spec: TensorSpec, shape: tuple[int, int]) -> float:
        """Bits per weight with everything that is stored for a matrix of `shape` (O, I)."""
        # What is stored follows from shapes alone, so there is no table of overheads to keep true.
        meta = torch.empty(shape, device="meta")
        stored = self.quantize(meta, spec)
        overhead = sum(t.numel() * t.element_size() * 8 for t in stored.params.values())
        return spec.bits + overhead / meta.numel()


def group_weights(importance: Tensor | None, shape: tuple[int, int], group: Group) -> Tensor | None:
    """Importance per input channel as one weight per grouped value, or None.

    Channels without any signal get the mean, so that a group is never free to become anything; a group of which more
    than half is without signal is weighted evenly.
    """
    if importance is None:
        return None
    # Of the live channels only: dead ones would pull their own substitute towards zero.
    floor = importance[importance > 0].mean() if bool((importance > 0).any()) else importance.new_ones(())
    weights = torch.where(importance > 0, importance, floor.to(importance.dtype)).float()
    grouped = split(weights.expand(shape), group)
    dead = split((importance <= 0).float().expand(shape), group).mean(1, keepdim=True) > 0.5
    # Weights of 1 make it a plain least-squares fit: better than one ruled by the few channels that were seen.
    return torch.where(dead, torch.ones_like(grouped), grouped)


def codecs() -> dict[str, Codec]:
    """All data types by name."""
    return discover("auto_round.codecs")


def codec_of(spec: TensorSpec) -> Codec:
    """The codec of `spec`. Raises SchemeError when there is none or it cannot do the settings."""
    known = codecs()
    if spec.dtype not in known:
        raise SchemeError(
            f"data type {spec.dtype!r} is unknown.{nearest(spec.dtype, known)} Known: {', '.join(known)}"
        )
    reason = known[spec.dtype].reject(spec)
    if reason:
        raise SchemeError(reason)
    return known[spec.dtype]


CHUNK = 1 << 20
"""Values handled at a time on the CPU: their float32 copies then stay in the cache of a core."""


def encode(w: Tensor, spec: TensorSpec, knobs: Knobs = NEUTRAL) -> Quantized:
    """`Codec.quantize` of `w` (O, I), on the CPU a few rows at a time; the codes are the same."""
    codec = codec_of(spec)
    # An accelerator has no such cache to stay in, and would be kept waiting by many small launches.
    unit = codec.row_unit(spec) if w.device.type == "cpu" else None
    rows = None if unit is None else max(unit, CHUNK // max(1, w.shape[1]) // unit * unit)  # whole units
    if rows is None or rows >= w.shape[0]:
        return codec.quantize(w, spec, knobs)
    unit, units = unit or 1, -(-w.shape[0] // (unit or 1))
    whole: dict[str, Tensor] = {}
    for start in range(0, w.shape[0], rows):
        part = slice(start, min(start + rows, w.shape[0]))
        own = {key: _rows_of(knob, part, w.shape[0], unit) for key, knob in knobs.items()}
        made = codec.quantize(w[part], spec, own).tensors()
        if not whole:
            sizes = {key: (len(t) * unit // rows * units, *t.shape[1:]) for key, t in made.items()}
            whole = {key: buffer(sizes[key], t.dtype) for key, t in made.items()}
        for key, tensor in made.items():
            # Put in place while it is in the cache: joining all parts at the end would read them from memory again.
            at = start // unit * (len(whole[key]) // units)
            whole[key][at : at + len(tensor)] = tensor
    return Quantized(spec=spec, shape=(w.shape[0], w.shape[1]), codes=whole.pop("codes"), params=whole)


def _rows_of(tensor: Tensor, part: slice, count: int, unit: int) -> Tensor:
    """The entries (per row, or per `unit` rows) for the rows `part` of a matrix of `count` rows."""
    # Knobs come per row (or per group of a row), except those of blocks of rows, which have fewer entries than rows.
    step = 1 if tensor.shape[0] % count == 0 else unit
    entries = tensor.shape[0] // -(-count // step)
    return tensor[part.start // step * entries : -(-part.stop // step) * entries]


def fake(w: Tensor, spec: TensorSpec, knobs: Knobs = NEUTRAL) -> Tensor:
    """What is left of `w` (O, I) after quantizing and dequantizing it, in the dtype of `w`."""
    codec = codec_of(spec)
    return codec.dequantize(codec.quantize(w, spec, knobs)).to(w.dtype)


def fake_inputs(x: Tensor, act: TensorSpec, fixed: Knobs) -> Tensor:
    """What is left of the inputs `x` (..., I) of a layer, in the dtype of `x`; gradients pass through unchanged.

    `fixed`: what was calibrated; empty when all is found at run time.
    """
    # In float32: scales that are found at run time are not rounded to the model's dtype.
    flat, codec = x.detach().float().reshape(-1, x.shape[-1]), codec_of(act)
    fixed = fixed or codec.found_range(flat, act)
    found = codec.tuner(flat, act, fixed)(NEUTRAL).reshape(x.shape).to(x.dtype)
    # The difference is zero, so the value is `found` exactly and the gradient is that of `x`.
    return found + (x - x.detach()) if x.requires_grad else found


def stored_inputs(act: TensorSpec | None, low: Tensor, high: Tensor) -> Knobs:
    """What is stored of the range [low, high] of a layer's inputs; empty when all is found at run time."""
    if act is None or not codec_of(act).needs_range(act):
        return NEUTRAL
    return codec_of(act).input_range(low, high, act)


def presets() -> dict[str, Scheme]:
    """All named schemes that work, BF16 (leave in floating point) included."""
    found = {name: scheme for codec in codecs().values() for name, scheme in codec.presets.items()}
    return {**found, "BF16": FLOAT}


def preset(name: str) -> Scheme:
    """The scheme called `name`, in any case. Raises SchemeError with the nearest known name."""
    known = presets()
    key = name.strip().upper()  # presets are written in capitals only
    if key in known:
        return known[key]
    raise SchemeError(f"scheme {name!r} is unknown.{nearest(name, known)} Available: {', '.join(known)}")
