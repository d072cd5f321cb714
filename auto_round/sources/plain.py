"""Quantized checkpoints as plain ones: every stored matrix is shown, and dequantized when it is read, under the name
and in the shape that the unquantized model has.

FP8 with scales per tensor, row or block, MXFP4 experts (`_blocks`, `_scales`), and every format this package reads:
NVFP4 and integers of compressed-tensors, auto-round, GPTQ and AWQ. Partners may lie in different shards.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round.codecs.base import codec_of
from auto_round.core.errors import FormatError, ModelError
from auto_round.core.minifloat import e8m0_value
from auto_round.core.quantized import Quantized
from auto_round.core.rotation import read_rotations
from auto_round.core.scheme import TensorSpec
from auto_round.formats.base import Format, planned_tensors
from auto_round.formats.reading import described
from auto_round.models import load
from auto_round.models.checkpoint import Place, TensorInfo, TensorStore, View
from auto_round.models.load import ModelFiles
from auto_round.models.stored import block_of

logger = logging.getLogger("auto_round")
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = ("weight_scale_inv", "weight_scale")
MARKS = ("qweight", "weight_packed")
RANGES = ("input_scale", "activation_scale", "k_scale", "v_scale", "weight_scale", "weight_scale_inv")
"""Names of tensors that say something about quantized numbers only, and mean nothing once the weights are plain."""
BLOCKS, SCALES_OF_BLOCKS = "_blocks", "_scales"
E2M1_VALUES = (
    0.0,
    0.5,
    1.0,
    1.5,
    2.0,
    3.0,
    4.0,
    6.0,
)  # OCP MX v1.0, section 5.3.3; the fourth bit is the sign


@dataclass(frozen=True, slots=True)
class Derived:
    """A plain tensor made of stored ones. make: from the stored ones, or their rows, to the plain one in float32.

    read: from the stored ones to codes and grids, for those that have them.
    """

    info: TensorInfo
    parts: tuple[str, ...]
    make: Callable[[Mapping[str, Tensor]], Tensor]
    read: Callable[[Mapping[str, Tensor]], Quantized] | None = None


class PlainStore(View):
    """A store whose quantized tensors are shown as `derived` ones, and whose `hidden` tensors are not shown."""

    def __init__(self, raw: TensorStore, derived: Mapping[str, Derived], hidden: set[str]) -> None:
        self.raw, self._derived = raw, derived
        kept = {name: info for name, info in raw.infos.items() if name not in hidden and name not in derived}
        self.infos = {**kept, **{name: one.info for name, one in derived.items()}}

    def get(self, name: str) -> Tensor:
        """The tensor called `name`, dequantized if need be."""
        if name not in self._derived:
            return self.raw.get(name)
        one = self._derived[name]
        return one.make({part: self.raw.get(part) for part in one.parts}).to(one.info.dtype)

    def row(self, name: str, index: int) -> Tensor:
        """One entry of the first dimension; of stacked experts, only its own parts are read."""
        if name not in self._derived:
            return self.raw.row(name, index)
        one = self._derived[name]
        if len(one.info.shape) < 3:
            return self.get(name)[index]
        own = {part: self.raw.row(part, index).unsqueeze(0) for part in one.parts}
        return one.make(own)[0].to(one.info.dtype)

    def quantized(self, name: str) -> Quantized | None:
        """What one of the formats of this package reads of the tensor called `name`."""
        one = self._derived.get(name)
        if one is None:
            return self.raw.quantized(name)
        return None if one.read is None else one.read({part: self.raw.get(part) for part in one.parts})

    def place(self, name: str) -> Place | None:
        """That of a tensor which is stored plain."""
        return None if name in self._derived else self.raw.place(name)

    def announce(self, name: str) -> None:
        """The parts of the tensor called `name` will soon be read."""
        for part in self._derived[name].parts if name in self._derived else (name,):
            self.raw.announce(part)

    def shards(self, name: str) -> tuple[int, ...]:
        """Those of its parts."""
        parts = self._derived[name].parts if name in self._derived else (name,)
        return tuple(sorted({shard for part in parts for shard in self.raw.shards(part)}))


def open_folder(folder: Path, store: TensorStore | None = None) -> ModelFiles:
    """The files of a model folder as those of an unquantized model; `store` has its tensors if they are elsewhere.

    Raises ModelError or FormatError for a quantization that is not understood.
    """
    files = load.open_folder(folder, store)
    settings = files.config.get("quantization_config") or files.config.get("quantization")
    if settings is None:
        return files
    turned = read_rotations(settings)
    if turned is not None and turned.online:
        raise ModelError(
            f"{folder}: it is quantized already, and turns inputs at run time ({', '.join(turned.online)}), so that "
            "its weights alone are no model: give the original"
        )
    derived, hidden = _derived(files.store, files.config)
    if not derived:
        raise ModelError(
            f"{folder}: config.json says it is quantized (quant_method {settings.get('quant_method')!r}), but it has "
            "no quantized tensor that is understood; remove that entry from config.json if the weights are plain"
        )
    integers = any(name.endswith(MARKS) for name in files.store.infos)
    logger.log(
        logging.WARNING if integers else logging.INFO,
        "%s is quantized already: %d tensors are dequantized as they are read%s",
        folder,
        len(derived),
        "; what cannot keep its grid is rounded a second time, which costs accuracy: the original model is better"
        if integers
        else "",
    )
    left = ("quantization_config", "quantization")
    config = {key: value for key, value in files.config.items() if key not in left}
    return replace(files, store=PlainStore(files.store, derived, hidden), config=config, packed=True)


def _derived(store: TensorStore, config: Mapping[str, Any]) -> tuple[dict[str, Derived], set[str]]:
    """Plain tensors by name, and the stored ones that they stand for."""
    found: dict[str, Derived] = {}
    hidden: set[str] = set()
    dtype = _dtype(config)
    packed = {name.rpartition(".")[0] for name in store.infos if name.endswith(tuple(f".{m}" for m in MARKS))}
    for layer, (fmt, spec) in _understood(config, packed).items():
        stored = {name for name in store.infos if name.rpartition(".")[0] == layer}
        if fmt is None or spec is None:
            raise FormatError(f"{layer}: config.json says it is not quantized, but its tensors are packed")
        found[f"{layer}.weight"] = _packed(layer, stored, store, fmt, spec, dtype)
        hidden |= {name for name in stored if not name.endswith(".bias")}
    for name, info in store.infos.items():
        if name.endswith(BLOCKS) and f"{name.removesuffix(BLOCKS)}{SCALES_OF_BLOCKS}" in store.infos:
            plain = name.removesuffix(BLOCKS)
            found[plain] = _mxfp4(plain, info, dtype)
            hidden |= set(found[plain].parts)
        elif info.dtype in FLOAT8 and name not in hidden:
            found[name] = _float8(name, store, dtype)
            hidden.add(name)
        elif name.rpartition(".")[2] in RANGES:
            hidden.add(name)
    return found, hidden


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    text = config.get("text_config") or config
    said = str(text.get("dtype") or text.get("torch_dtype") or config.get("torch_dtype") or "bfloat16")
    known = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
    return known.get(said.removeprefix("torch."), torch.bfloat16)


def _understood(
    config: Mapping[str, Any], layers: set[str]
) -> dict[str, tuple[Format | None, TensorSpec | None]]:
    if not layers:
        return {}
    said = described(config, sorted(layers), {layer for layer in layers if block_of(f"{layer}.weight")})
    if said is None:
        return dict.fromkeys(layers, (None, None))
    return {layer: (said.format, said.schemes[layer].weight) for layer in sorted(layers)}


def _packed(
    layer: str, stored: set[str], store: TensorStore, fmt: Format, spec: TensorSpec, dtype: torch.dtype
) -> Derived:
    """A matrix in one of the formats that this package reads."""
    suffixes = {name: name.rpartition(".")[2] for name in stored}
    mark = next(name for name, suffix in suffixes.items() if suffix in MARKS)
    shape = _shape(layer, {suffixes[name]: store.infos[name] for name in stored}, fmt, spec)
    parts = tuple(sorted(name for name in stored if not name.endswith(".bias")))
    assert mark in parts, "a mark is a part"

    def read(tensors: Mapping[str, Tensor]) -> Quantized:
        return fmt.read({suffixes[name]: tensor for name, tensor in tensors.items()}, spec, shape)

    def make(tensors: Mapping[str, Tensor]) -> Tensor:
        q = read(tensors)
        return codec_of(q.spec).dequantize(q)

    return Derived(TensorInfo(dtype, shape), parts, make, read)


def _shape(layer: str, infos: Mapping[str, TensorInfo], fmt: Format, spec: TensorSpec) -> tuple[int, int]:
    """(O, I): of those shapes that the packed tensor may be of, the one that the format would store as found."""
    packed = next(infos[mark] for mark in MARKS if mark in infos)
    a, b = packed.shape
    more = packed.dtype.itemsize * 8 // spec.bits if 32 % spec.bits == 0 else 0
    wide = (a * 32 // spec.bits, b * 32 // spec.bits) if not more else (a * more, b * more)
    for shape in ((a, wide[1]), (b, wide[0]), (wide[1], a)):
        try:
            planned = planned_tensors(fmt, spec, shape)
        except (ValueError, RuntimeError):  # a shape that the format cannot lay out
            continue
        if all(infos[key].shape == tuple(t.shape) for key, t in planned.items() if key in infos):
            return shape
    raise FormatError(f"{layer}: tensors of shape {packed.shape} are no {spec} matrix in format {fmt.name}")


def _float8(name: str, store: TensorStore, dtype: torch.dtype) -> Derived:
    """An FP8 tensor with one scale, one per row, or one per block; with none it is only cast."""
    base = name.removesuffix("weight")
    scale = next(
        (f"{base}{s}" for s in SCALES if name.endswith("weight") and f"{base}{s}" in store.infos), None
    )
    if scale is None and name.endswith("weight"):
        raise ModelError(
            f"{name} is FP8, but none of {', '.join(SCALES)} is beside it; download the model again"
        )
    shape = store.infos[name].shape

    def make(tensors: Mapping[str, Tensor]) -> Tensor:
        values = tensors[name].float()
        return values if scale is None else values.mul_(_spread(tensors[scale].float(), tuple(values.shape)))

    return Derived(TensorInfo(dtype, shape), (name,) if scale is None else (name, scale), make)


def _spread(scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`scale` as one value per value of `shape`: of a tensor, of rows, or of blocks that cover the matrix."""
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.ndim == 1:
        return scale.reshape(-1, *[1] * (len(shape) - 1))
    for axis, size in enumerate(shape):
        if scale.shape[axis] not in (1, size):
            # Sizes of blocks are powers of two, as a rule 128; the last block may be partly outside.
            block = 1 << max(0, -(-size // scale.shape[axis]) - 1).bit_length()
            scale = scale.repeat_interleave(block, axis).narrow(axis, 0, size)
    return scale


def _mxfp4(name: str, blocks: TensorInfo, dtype: torch.dtype) -> Derived:
    """Stacked experts, (E, O, I / 32, 16) bytes of two values each with (E, O, I / 32) exponents, as (E, I, O)."""
    experts, rows, groups, half = blocks.shape
    columns = groups * half * 2
    signed = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], dtype=torch.float32)

    def make(tensors: Mapping[str, Tensor]) -> Tensor:
        codes = tensors[f"{name}{BLOCKS}"]
        # The low half of a byte is the even column.
        pairs = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
        scale = e8m0_value(tensors[f"{name}{SCALES_OF_BLOCKS}"]).unsqueeze(-1)
        # GPT-OSS keeps its plain experts transposed, (E, I, O), and its packed ones by rows.
        return (signed[pairs.int()] * scale).reshape(-1, rows, columns).transpose(1, 2)

    parts = (f"{name}{BLOCKS}", f"{name}{SCALES_OF_BLOCKS}")
    return Derived(TensorInfo(dtype, (experts, columns, rows)), parts, make)
