"""What the block types of ggml share: fixed blocks along a row, one canonical layout of bytes, a grid per group."""

from __future__ import annotations

import ctypes
from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from auto_round.codecs.base import Codec
from auto_round.core.errors import SchemeError
from auto_round.core.fitting import half
from auto_round.core.native import address, in_threads, library
from auto_round.core.quantized import NEUTRAL, Knob, Knobs, Quantized
from auto_round.core.rounding import straight_through
from auto_round.core.ruler import Ruler
from auto_round.core.scheme import Scheme, TensorSpec


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
        if "name" in vars(cls):  # what types share has no name of its own, and no preset
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

    def shared(self, spec: TensorSpec) -> int:
        """Those of a super-block share the parameters in floating point."""
        return self.block // self.group

    @property
    def levels(self) -> tuple[int, int]:
        """Bounds of code - zero."""
        return -self.zero, (1 << self.bits) - 1 - self.zero

    def row_unit(self, spec: TensorSpec) -> int:
        """Every row stands alone."""
        return 1

    def quantize(self, w: Tensor, spec: TensorSpec, knobs: Knobs = NEUTRAL) -> Quantized:
        """uint8 codes (G, K). Raises SchemeError when the row is no multiple of the block."""
        reason = self.rejects_row(w.shape[1])
        if reason:
            raise SchemeError(f"{self.name}: {reason}")
        groups = w.float().reshape(-1, self.group)  # rows are whole blocks: nothing to pad
        params = self.moved(self._given(knobs) or self.start(groups), knobs)
        step, low = self.grid(params)
        level = _ratio(groups, step, low, knobs.get("round")).round_().clamp_(*self.levels)
        return Quantized(
            spec=spec,
            shape=(w.shape[0], w.shape[1]),
            codes=level.add_(self.zero).to(torch.uint8),
            params={name: tensor.to(self.stored[name]) for name, tensor in params.items()},
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

    def search(
        self, w: Tensor, spec: TensorSpec, importance: Tensor | None = None, fixed: Knobs = NEUTRAL
    ) -> Knobs:
        """Parameters of low error, weighted by `importance` (I,) or by the diagonal of a Gram matrix (I, I)."""
        diagonal = importance.diagonal() if importance is not None and importance.ndim == 2 else importance
        kernels = library(KERNELS) if w.device.type == "cpu" else None
        if kernels is not None:
            return self._compiled_search(getattr(kernels, self.name), w, diagonal)
        found, weight = [], None
        for rows in row_chunks((w.shape[0], w.shape[1])):
            x = w[rows].float().reshape(-1, self.group).t().contiguous()
            # The last run may be shorter.
            if diagonal is not None and (weight is None or weight.shape != x.shape):
                weight = alive(diagonal).expand(len(w[rows]), -1).reshape(-1, self.group).t().contiguous()
            found.append(self.fit(x, weight))
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}

    def holds_grid(self, spec: TensorSpec) -> bool:
        """Always: rows are whole blocks."""
        return True

    def compensates(self, spec: TensorSpec) -> bool:
        """Except where steps are so small that errors do not show in a model."""
        return self.bits < PRECISE

    def load(self, params: Mapping[str, Tensor], spec: TensorSpec) -> dict[str, Tensor]:
        """The parameters by name, float32, repeated for every group of a super-block."""
        groups = max(t.numel() for t in params.values())
        return {
            name: t.float().reshape(-1).repeat_interleave(groups // t.numel()).unsqueeze(1)
            for name, t in params.items()
        }

    def held(self, grid: Mapping[str, Tensor], spec: TensorSpec) -> dict[str, Tensor]:
        """The inverse of `load`: one number for each super-block where it has one."""
        together = {name: grid[name].reshape(-1, self.shared(spec)) for name in self.stored}
        return {
            name: t[:, :1] if dtype == torch.float16 else t
            for (name, t), dtype in zip(together.items(), self.stored.values())
        }

    def snap(self, values: Tensor, spec: TensorSpec, grid: Knobs) -> Tensor:
        """step * (nearest level) + low."""
        step, low = self._lines(grid)
        level = _ratio(values, step, low, None).round_().clamp_(*self.levels).mul_(step)
        return level if low is None else level.add_(low)

    def ruler(self, spec: TensorSpec, grid: Knobs) -> Ruler:
        """Levels on the lines of groups."""
        step, low = self._lines(grid)
        least, most = self.levels
        return Ruler(step=step, least=float(least), most=float(most), low=0.0 if low is None else low)

    def offsets(self, change: Tensor, spec: TensorSpec, grid: Knobs, groups: Tensor) -> Knobs:
        """The rounding offset, in steps."""
        return {"round": _ratio(change, self._lines(grid)[0], None, None)}

    def change(self, knobs: Knobs, spec: TensorSpec, grid: Knobs, groups: Tensor) -> Tensor | float:
        """The rounding offset, in weights."""
        return knobs["round"] * self._lines(grid)[0] if "round" in knobs else 0.0

    def storable(self, scale: Tensor, spec: TensorSpec) -> Tensor:
        """In float16, as all parameters that are no integers."""
        return half(scale)

    def parts(self, values: Tensor, spec: TensorSpec, grid: Knobs) -> dict[str, Tensor]:
        """Steps, and the offset where there is one."""
        low = self._lines(grid)[1]
        if low is None:
            return {"scale": values}
        offset = next(name for name in self.stored if name in ("min", "offset"))
        return {"scale": values - low, offset: low}

    def _lines(self, grid: Knobs) -> tuple[Tensor, Tensor | None]:
        """(step, low) in the shape of the grid's parameters, whatever it is."""
        step, low = self.grid(grid)
        shape = grid["scale"].shape
        return step.view(shape), None if low is None else low.view(shape)

    @abstractmethod
    def results(self, groups: int) -> tuple[list[Tensor | None], dict[str, Tensor]]:
        """Empty float32 tensors for `groups` groups: in the order of the compiled search's arguments, and by name."""

    def _compiled_search(self, search: Callable[..., None], w: Tensor, importance: Tensor | None) -> Knobs:
        """The same by the functions of ggml_search.c, with more candidates: on as many threads as torch has."""
        rows, columns = w.shape
        # float32 by name here and in `results`: C takes addresses, and torch's default dtype is the caller's to set.
        flat = torch.ones(columns, dtype=torch.float32)
        weights = flat if importance is None else alive(importance).contiguous()
        outputs, named = self.results(w.numel() // self.group)

        def run(part: slice) -> None:
            x = w[part].float().contiguous()  # kept by this name while C reads it
            # Each thread writes to its own rows of the shared results: no lock, no joining afterwards.
            pointers = [None if t is None else t[part.start * len(t) // rows :].data_ptr() for t in outputs]
            sizes = (ctypes.c_ssize_t(x.shape[0]), ctypes.c_ssize_t(columns))
            search(address(x), address(weights), *sizes, *map(ctypes.c_void_p, pointers))

        in_threads(run, rows, COMPILED_CHUNK // columns)
        return named

    def _given(self, knobs: Knobs) -> dict[str, Tensor]:
        """The parameters among the knobs, if a search has found some."""
        return {name: knobs[name].float() for name in self.stored if name in knobs}


KERNELS = Path(__file__).with_name("ggml_search.c")
COMPILED_CHUNK = 1 << 20  # values of a matrix in lower precision that one thread holds as float32
PRECISE = 8  # bits from which on nothing is left to gain
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


def _ratio(groups: Tensor, step: Tensor, low: Tensor | None, offset: Tensor | None) -> Tensor:
    """Where `groups` (G, K) lie between the levels of their grids."""
    # ggml multiplies by the reciprocal, and gives blocks of zeros the reciprocal 0.
    inverse = torch.where(step == 0, torch.zeros_like(step), 1 / step)
    ratio = (groups if low is None else groups - low) * inverse
    return ratio if offset is None else ratio + offset
