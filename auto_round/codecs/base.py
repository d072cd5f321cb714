"""What a data type must offer, and the functions the rest of the system calls instead of a particular codec."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from auto_round.core.errors import NotYetError, SchemeError, nearest
from auto_round.core.quantized import NEUTRAL, Knob, Knobs, Quantized
from auto_round.core.registry import discover
from auto_round.core.rounding import straight_through
from auto_round.core.scheme import FLOAT, Scheme, TensorSpec


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

    def tie(self, weights: Sequence[Tensor], spec: TensorSpec) -> Knobs:
        """What the layers of one fused set, with their `weights` (O, I), must have in common. Default: nothing."""
        return NEUTRAL

    def needs_range(self, spec: TensorSpec) -> bool:
        """Whether inputs of `spec` need a calibrated range, because not all of it is found at run time."""
        return not spec.dynamic

    def input_range(self, low: Tensor, high: Tensor, spec: TensorSpec) -> Knobs:
        """Knobs that quantize every input within [low, high], 0-dim each: what is stored along with the layer."""
        raise SchemeError(f"{self.name} has no static range: use act_dynamic=True")

    def tuner(self, w: Tensor, spec: TensorSpec, fixed: Knobs) -> Callable[[Knobs], Tensor]:
        """A function from knobs to the fake weight, differentiable in them.

        `fixed` knobs are not tuned; a codec overrides this to compute once what does not depend on the tuned ones.
        """
        return lambda knobs: self.dequantize(self.quantize(w, spec, {**fixed, **knobs})).to(w.dtype)

    def cost(self, spec: TensorSpec, shape: tuple[int, int]) -> float:
        """Bits per weight with everything that is stored for a matrix of `shape` (O, I)."""
        meta = torch.empty(shape, device="meta")
        stored = self.quantize(meta, spec)
        overhead = sum(t.numel() * t.element_size() * 8 for t in stored.params.values())
        return spec.bits + overhead / meta.numel()


class BlockCodec(Codec):
    """A data type of fixed blocks along a row, with one canonical layout of bytes (those of ggml).

    Each group has a grid: fake = step * (code - zero) + low. Parameters are what is stored of it: `fit` finds good
    ones, `start` plain ones, `moved` applies tuned factors. They pass between these as float32 of storage precision.
    """

    bits: ClassVar[int]
    group: ClassVar[int]  # values that share a step
    block: ClassVar[int]  # values that share a block of bytes
    nbytes: ClassVar[int]  # bytes of a block
    zero: ClassVar[int] = 0  # the code that stands for 0 in types without offsets
    has_low: ClassVar[bool] = False
    stored: ClassVar[Mapping[str, torch.dtype]]  # parameter -> dtype in the file
    mixtures: ClassVar[tuple[str, ...]] = ()  # presets beside that of the type's own name

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):
            names = cls.mixtures or (cls.name.upper(),)
            cls.presets = {f"GGUF:{name}": Scheme(weight=cls.spec()) for name in names}

    @abstractmethod
    def start(self, x: Tensor) -> dict[str, Tensor]:
        """Parameters of the groups `x` (G, K) from their extremes alone."""

    @abstractmethod
    def fit(self, x: Tensor, weight: Tensor | None) -> dict[str, Tensor]:
        """Parameters of low weighted error of the groups `x` (K, G), a group per column; `weight` is (K, G) or None."""

    @abstractmethod
    def moved(self, params: Mapping[str, Tensor], knobs: Knobs) -> Mapping[str, Tensor]:
        """`params` with the factors "high" on steps and "low" on offsets, in storage precision, differentiable."""

    @abstractmethod
    def grid(self, params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """(step, low), each (G, 1) float32."""

    @abstractmethod
    def pack(self, q: Quantized) -> Tensor:
        """The bytes of `q`: (O, I / block * nbytes) uint8."""

    @abstractmethod
    def unpack(self, packed: Tensor, spec: TensorSpec, shape: tuple[int, int]) -> Quantized:
        """The inverse of `pack`."""

    @classmethod
    def spec(cls) -> TensorSpec:
        """The only spec there is of this type."""
        return TensorSpec(dtype=cls.name, bits=cls.bits, group=cls.group, sym=not cls.has_low)

    def reject(self, spec: TensorSpec) -> str | None:
        """Everything about these types is fixed."""
        own = self.spec()
        if (spec.bits, spec.group, spec.sym) == (own.bits, own.group, own.sym):
            return None
        return f"{self.name} is {own} and nothing else, got {spec}. Leave bits, group_size and sym out"

    def rejects_row(self, columns: int) -> str | None:
        """Why rows of so many values cannot be cut into blocks, or None."""
        return f"rows of {columns} are no multiple of {self.block}" if columns % self.block else None

    def cost(self, spec: TensorSpec, shape: tuple[int, int]) -> float:
        """Bits per weight; the same for every shape."""
        return self.nbytes * 8 / self.block

    @property
    def levels(self) -> tuple[int, int]:
        """Bounds of code - zero."""
        return -self.zero, (1 << self.bits) - 1 - self.zero

    def quantize(self, w: Tensor, spec: TensorSpec, knobs: Knobs = NEUTRAL) -> Quantized:
        """uint8 codes (G, K), made in runs of rows so that a huge matrix needs little memory beside its codes.

        Raises SchemeError when the row is no multiple of the block.
        """
        reason = self.rejects_row(w.shape[1])
        if reason:
            raise SchemeError(f"{self.name}: {reason}")
        parts = [
            self._quantized_rows(
                w[rows].float(), {k: _rows_of(t, rows, w.shape[0]) for k, t in knobs.items()}
            )
            for rows in row_chunks((w.shape[0], w.shape[1]))
        ]
        codes, params = torch.cat([codes for codes, _ in parts]), parts[0][1]
        return Quantized(
            spec=spec,
            shape=(w.shape[0], w.shape[1]),
            codes=codes,
            params={k: torch.cat([part[k] for _, part in parts]).to(self.stored[k]) for k in params},
        )

    def dequantize(self, q: Quantized) -> Tensor:
        """step * (code - zero) + low in float32, (O, I); the operations and their order are those of ggml."""
        step, low = self.grid({name: tensor.float() for name, tensor in q.params.items()})
        out = q.codes.float()
        if self.zero:
            out = out.sub_(self.zero)
        out = out.mul_(step)
        return (out if low is None else out.add_(low)).reshape(q.shape)

    def knobs(self, spec: TensorSpec, shape: tuple[int, int]) -> dict[str, Knob]:
        """Rounding offsets, and a factor on each group's step and offset."""
        count = shape[0] * shape[1] // self.group
        factor = Knob(shape=(count, 1), neutral=1.0, low=0.5, high=1.5, per_value=False)
        found = {
            "round": Knob((count, self.group), neutral=0.0, low=-0.5, high=0.5, per_value=True),
            "high": factor,
        }
        return {**found, "low": factor} if self.has_low else found

    def tuner(self, w: Tensor, spec: TensorSpec, fixed: Knobs) -> Callable[[Knobs], Tensor]:
        """The parameters to start from are found once; float32 (O, I)."""
        groups = w.float().reshape(-1, self.group)
        params = self._given(fixed) or self.start(groups)

        def fake_weight(knobs: Knobs) -> Tensor:
            every = {**fixed, **knobs}
            step, low = self.grid(self.moved(params, every))
            level = straight_through(torch.round, _ratio(groups, step, low, every.get("round")))
            out = level.clamp(*self.levels) * step
            return (out if low is None else out + low).reshape(w.shape)

        return fake_weight

    def search(self, w: Tensor, spec: TensorSpec, importance: Tensor | None = None) -> Knobs:
        """Parameters of low error, weighted by `importance` (I,) or by the diagonal of a Gram matrix (I, I)."""
        diagonal = importance.diagonal() if importance is not None and importance.ndim == 2 else importance
        found, weight = [], None
        for rows in row_chunks((w.shape[0], w.shape[1])):
            x = w[rows].float().reshape(-1, self.group).t().contiguous()
            if diagonal is not None and (weight is None or weight.shape != x.shape):
                weight = alive(diagonal).expand(len(w[rows]), -1).reshape(-1, self.group).t().contiguous()
            found.append(self.fit(x, weight))
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}

    def _given(self, knobs: Knobs) -> dict[str, Tensor]:
        """The parameters among the knobs, if a search has found some."""
        return {name: knobs[name].float() for name in self.stored if name in knobs}

    def _quantized_rows(self, w: Tensor, knobs: Knobs) -> tuple[Tensor, Mapping[str, Tensor]]:
        groups = w.reshape(-1, self.group)
        params = self.moved(self._given(knobs) or self.start(groups), knobs)
        step, low = self.grid(params)
        level = _ratio(groups, step, low, knobs.get("round")).round().clamp(*self.levels)
        return (level + self.zero).to(torch.uint8), params


ROW_CHUNK = 1 << 16  # values that are handled together: they and their temporaries fit the second-level cache


def row_chunks(shape: tuple[int, int]) -> list[slice]:
    """Runs of rows of a matrix of `shape` (O, I), at least one row each, of about `ROW_CHUNK` values."""
    step = max(1, ROW_CHUNK // max(1, shape[1]))
    return [slice(start, start + step) for start in range(0, max(1, shape[0]), step)]


def alive(importance: Tensor) -> Tensor:
    """`importance` (I,) with the mean in place of channels without any signal, scaled to a mean of 1."""
    positive = importance.float().clamp(min=0)
    mean = positive.mean().clamp(min=1e-30)
    return torch.where(positive > 0, positive, mean) / mean


def _rows_of(knob: Tensor, rows: slice, count: int) -> Tensor:
    """The part of a knob that belongs to some of `count` rows."""
    each = knob.shape[0] // count
    return knob[rows.start * each : rows.stop * each]


def _ratio(groups: Tensor, step: Tensor, low: Tensor | None, offset: Tensor | None) -> Tensor:
    """Where `groups` (G, K) lie between the levels of their grids."""
    inverse = torch.where(step == 0, torch.zeros_like(step), 1 / step)
    ratio = (groups if low is None else groups - low) * inverse
    return ratio if offset is None else ratio + offset


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


CHUNK = 1 << 18
"""Values handled at a time on the CPU: their float32 copies then stay in the cache of a core."""


def encode(w: Tensor, spec: TensorSpec, knobs: Knobs = NEUTRAL) -> Quantized:
    """`Codec.quantize` of `w` (O, I), on the CPU a few rows at a time; the codes are the same."""
    codec = codec_of(spec)
    unit = codec.row_unit(spec) if w.device.type == "cpu" else None
    rows = None if unit is None else max(unit, CHUNK // max(1, w.shape[1]) // unit * unit)
    if rows is None or rows >= w.shape[0]:
        return codec.quantize(w, spec, knobs)
    parts = [slice(start, min(start + rows, w.shape[0])) for start in range(0, w.shape[0], rows)]
    done = []
    for part in parts:
        own = {key: _rows_of(knob, part, w.shape[0], unit or 1) for key, knob in knobs.items()}
        done.append(codec.quantize(w[part], spec, own).tensors())
    whole = {key: torch.cat([tensors[key] for tensors in done]) for key in done[0]}
    return Quantized(spec=spec, shape=(w.shape[0], w.shape[1]), codes=whole.pop("codes"), params=whole)


def _rows_of(tensor: Tensor, part: slice, count: int, unit: int) -> Tensor:
    """The entries (per row, or per `unit` rows) for the rows `part` of a matrix of `count` rows."""
    step = 1 if tensor.shape[0] % count == 0 else unit
    entries = tensor.shape[0] // -(-count // step)
    return tensor[part.start // step * entries : -(-part.stop // step) * entries]


def fake(w: Tensor, spec: TensorSpec, knobs: Knobs = NEUTRAL) -> Tensor:
    """What is left of `w` (O, I) after quantizing and dequantizing it, in the dtype of `w`."""
    codec = codec_of(spec)
    return codec.dequantize(codec.quantize(w, spec, knobs)).to(w.dtype)


def stored_inputs(act: TensorSpec | None, low: Tensor, high: Tensor) -> Knobs:
    """What is stored of the range [low, high] of a layer's inputs; empty when all is found at run time."""
    if act is None or not codec_of(act).needs_range(act):
        return NEUTRAL
    return codec_of(act).input_range(low, high, act)


PLANNED: tuple[str, ...] = (
    "MXFP4",
    "MXFP6",
    "MXFP8",
    "MXFP4_RCEIL",
    "MXFP8_RCEIL",
    "MXINT4",
    "NVFP4",
    "NVFP4_E5M3",
    "FPW8A16",
)
PLANNED += ("FP8_STATIC", "FP8_BLOCK", "INT8", "INT8_W8A8", "INT4", "W4A16_MIXED")


def presets() -> dict[str, Scheme]:
    """All named schemes that work, BF16 (leave in floating point) included."""
    found = {name: scheme for codec in codecs().values() for name, scheme in codec.presets.items()}
    return {**found, "BF16": FLOAT}


def preset(name: str) -> Scheme:
    """The scheme called `name`, in any case. Raises SchemeError with the nearest known name."""
    known = presets()
    key = name.strip().upper()
    if key in known:
        return known[key]
    if key in PLANNED or key.startswith("GGUF:"):
        raise NotYetError(f"scheme {name!r} is not there yet. Available: {', '.join(known)}")
    raise SchemeError(f"scheme {name!r} is unknown.{nearest(name, known)} Available: {', '.join(known)}")
