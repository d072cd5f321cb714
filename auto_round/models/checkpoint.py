"""Weights on disk: reading shards lazily, planning shards from shapes alone, and writing them tensor by tensor.

The safetensors library writes a file from tensors that are all in memory; a checkpoint larger than memory needs the
header first and each tensor put in its place when it is ready, which is what `ShardWriter` does
(docs/decisions/0005-shards-are-planned-then-filled.md; format: https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from auto_round.core.errors import ModelError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Dtype and shape of a stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorStore(ABC):
    """Named tensors that can be looked at without being read."""

    infos: Mapping[str, TensorInfo]

    @abstractmethod
    def get(self, name: str) -> Tensor:
        """The tensor called `name`."""

    def row(self, name: str, index: int) -> Tensor:
        """One entry of the first dimension of the tensor called `name`."""
        return self.get(name)[index]


class StateDict(TensorStore):
    """The tensors of a live model; a tensor shared by several names is stored under the first."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        seen: dict[tuple[int, int], str] = {}
        self._tensors = {}
        for name, tensor in tensors.items():
            key = (tensor.data_ptr(), tensor.numel())
            if tensor.numel() and key in seen and tensor.device.type != "meta":
                continue
            seen[key] = name
            self._tensors[name] = tensor
        self.infos = {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in self._tensors.items()}

    def get(self, name: str) -> Tensor:
        """The tensor called `name`."""
        return self._tensors[name].detach()


class Checkpoint(TensorStore):
    """The safetensors shards of a folder. Opening reads and checks the headers only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards: dict[str, Any] = {}
        self._where: dict[str, str] = {}
        infos: dict[str, TensorInfo] = {}
        for shard in _shard_names(folder):
            handle = _open_shard(folder / shard)
            self._shards[shard] = handle
            for name in handle.keys():  # noqa: SIM118 - a file handle, not a dict
                part = handle.get_slice(name)
                infos[name] = TensorInfo(
                    _dtype(part.get_dtype(), folder / shard, name), tuple(part.get_shape())
                )
                self._where[name] = shard
        self.infos = {name: infos[name] for name in sorted(infos, key=natural)}

    def get(self, name: str) -> Tensor:
        """The tensor called `name`, read now."""
        return self._shards[self._where[name]].get_tensor(name)

    def row(self, name: str, index: int) -> Tensor:
        """One entry of the first dimension, without reading the others."""
        return self._shards[self._where[name]].get_slice(name)[index]


def natural(name: str) -> list[object]:
    """Sorting key that puts layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def has_safetensors(folder: Path) -> bool:
    """Whether `folder` holds safetensors weights."""
    return (folder / INDEX).is_file() or any(folder.glob("*.safetensors"))


def _shard_names(folder: Path) -> list[str]:
    if (folder / INDEX).is_file():
        names = _indexed(folder / INDEX)
        for name in names:
            if Path(name).name != name:
                raise ModelError(f"{folder / INDEX}: shard name {name!r} points outside the folder")
            if not (folder / name).is_file():
                raise ModelError(f"{folder}: shard {name} is named in {INDEX} but missing; download it again")
        return names
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise ModelError(f"{folder}: no safetensors weights found")
    return names


def _indexed(path: Path) -> list[str]:
    """The files that the index `path` names. Raises ModelError when it names none."""
    try:
        shards = set(json.loads(path.read_text())["weight_map"].values())
        if not shards or not all(isinstance(shard, str) for shard in shards):
            raise ValueError(f"it names {sorted(map(str, shards))}")
        return sorted(shards)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: no usable weight_map ({error}); download it again") from error


def _open_shard(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ModelError(
            f"{path}: truncated or damaged safetensors file ({error}); copy or download it again"
        ) from error


def _dtype(name: str, path: Path, tensor: str) -> torch.dtype:
    if name not in DTYPES:
        raise ModelError(
            f"{path}: tensor {tensor} has dtype {name}, which is not supported ({', '.join(DTYPES)})"
        )
    return DTYPES[name]


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a planned checkpoint: its header bytes, and where each tensor goes."""

    file: str
    header: bytes
    offsets: Mapping[str, int]
    size: int


def parse_size(text: str | int) -> int:
    """``"5GB"`` (decimal), ``"500MB"`` or a number of bytes. Raises ModelError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(text), re.IGNORECASE)
    if not found or float(found[1]) <= 0:
        raise ModelError(f"shard size {text!r} is not understood; write 5GB or 500MB")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " "))


def plan_shards(infos: Mapping[str, TensorInfo], max_bytes: int) -> list[Shard]:
    """Files of at most `max_bytes` of data (or one tensor), filled in natural order of names; exact sizes."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name in sorted(infos, key=natural):
        if groups[-1] and filled + infos[name].nbytes > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += infos[name].nbytes
    count = len(groups)
    names = (
        [SINGLE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    )
    return [
        _plan_shard(file, {name: infos[name] for name in group})
        for file, group in zip(names, groups, strict=True)
    ]


def _plan_shard(file: str, infos: Mapping[str, TensorInfo]) -> Shard:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, position = {}, 0
    # Widest dtype first keeps every tensor aligned to its element size without gaps, which the format forbids.
    for name in sorted(infos, key=lambda n: (-infos[n].dtype.itemsize, natural(n))):
        info = infos[name]
        end = position + info.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [position, end],
        }
        offsets[name], position = position, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return Shard(
        file=file,
        header=struct.pack("<Q", len(text)) + text,
        offsets={name: start + offset for name, offset in offsets.items()},
        size=start + position,
    )


class ShardWriter:
    """Fills planned shards in any order. A context manager; leaving it without error requires every tensor."""

    def __init__(self, folder: Path, infos: Mapping[str, TensorInfo], max_bytes: int) -> None:
        self.folder, self.infos = folder, infos
        self.shards = plan_shards(infos, max_bytes)
        self._shard_of = {name: shard for shard in self.shards for name in shard.offsets}
        self._files: dict[str, BinaryIO] = {}
        self._missing = set(infos)

    @property
    def nbytes(self) -> int:
        """Bytes of all shards, exactly."""
        return sum(shard.size for shard in self.shards)

    def __enter__(self) -> ShardWriter:
        try:
            for shard in self.shards:
                file = self._files[shard.file] = (self.folder / shard.file).open("wb")
                if hasattr(os, "posix_fallocate") and shard.size:
                    os.posix_fallocate(file.fileno(), 0, shard.size)  # a full disk shows now, not after hours
                file.write(shard.header)
        except OSError:
            for opened in self._files.values():
                opened.close()
            raise
        return self

    def put(self, name: str, tensor: Tensor) -> None:
        """Write `tensor` in its place. Raises ValueError when dtype or shape are not the planned ones."""
        info = self.infos[name]
        if tensor.dtype != info.dtype or tuple(tensor.shape) != info.shape:
            raise ValueError(
                f"{name}: planned {info.dtype} {info.shape}, got {tensor.dtype} {tuple(tensor.shape)}"
            )
        shard = self._shard_of[name]
        file = self._files[shard.file]
        file.seek(shard.offsets[name])
        file.write(raw_bytes(tensor))
        self._missing.discard(name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.flush()
            if kind is None:
                os.fsync(file.fileno())
            file.close()
        if kind is not None:
            return
        if self._missing:
            raise ValueError(
                f"{len(self._missing)} planned tensors were never written, first {min(self._missing)}"
            )
        if len(self.shards) > 1:
            index = {
                "metadata": {"total_size": sum(info.nbytes for info in self.infos.values())},
                "weight_map": {name: self._shard_of[name].file for name in sorted(self.infos, key=natural)},
            }
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of `tensor` in row-major order, without a copy where possible."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def names_match(
    layers: Iterable[str],
    infos: Mapping[str, TensorInfo],
    prefix: str,
    saved: Callable[[str], str] = str,
) -> dict[str, str] | None:
    """Tensor name in the module tree -> name in the checkpoint, which may lack or add the base model's `prefix`.

    saved: how checkpoints of this architecture spell a name, where that differs. None when some tensor is not found.
    """
    found: dict[str, str] = {}
    for name in layers:
        spellings = dict.fromkeys((name, saved(name)))
        candidates = [c for s in spellings for c in (s, s.removeprefix(f"{prefix}."), f"{prefix}.{s}")]
        match = next((candidate for candidate in candidates if candidate in infos), None)
        if match is None:
            return None
        found[name] = match
    return found
