"""GGUF files as input: headers read by the `gguf` package, tensors read and dequantized one at a time.

Reads are positional, as for safetensors, so that a file larger than memory can be read, and one that is cut off or
damaged is an error that names it.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import struct
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from auto_round.codecs.base import codecs
from auto_round.codecs.blocks import BlockCodec
from auto_round.core.errors import ModelError
from auto_round.core.quantized import Quantized
from auto_round.models.checkpoint import PIECE, SAMPLED, TensorInfo, TensorStore, natural, read_at

PLAIN = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}
MOST = 1 << 24  # entries of a list; vocabularies are a sixteenth of it
CHUNK = 1 << 22  # values that are float32 at a time
SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
DAMAGED = (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError)


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a file. type: as in `codecs` ("q4_k") or "f16" and the like. shape: as torch has it."""

    type: str
    shape: tuple[int, ...]
    file: int
    path: Path
    offset: int
    nbytes: int

    @property
    def rows(self) -> int:
        """Rows of all matrices in it, each of whole blocks; 1 for a vector of blocks."""
        return math.prod(self.shape[:-1])

    def read(self, start: int, stop: int) -> Tensor:
        """The bytes of rows `start` to `stop`, (R, bytes of a row) uint8. Raises ModelError when the file ends."""
        each = self.nbytes // max(1, self.rows)
        raw = torch.empty(stop - start, each, dtype=torch.uint8)
        buffer, done = raw.view(-1).numpy().data, 0
        while done < raw.numel():
            got = read_at(self.file, buffer[done:], self.offset + start * each + done)
            if not got:
                raise ModelError(f"{self.path}: ends within a tensor; copy or download it again")
            done += got
        return raw


class GgufFile:
    """The header of one model: its values by key, and its tensors by llama.cpp's names, over all parts of a split."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.path = paths[0]
        self.values: dict[str, Any] = {}
        self.tensors: dict[str, Stored] = {}
        for path in paths:
            reader = header_of(path)
            file = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, file)
            # The first part has the model's values; those of the others only say which part they are.
            self.values = {**_values(reader, path), **self.values}
            for tensor in reader.tensors:
                # GGUF names the fastest axis first.
                shape = tuple(int(size) for size in reversed(tensor.shape))
                place = (int(tensor.data_offset), int(tensor.n_bytes))
                found = Stored(tensor.tensor_type.name.lower(), shape, file, path, *place)
                if tensor.name in self.tensors:
                    raise ModelError(f"{path}: tensor {tensor.name} is in another part of the file too")
                self.tensors[tensor.name] = found

    def quantized(self) -> dict[str, int]:
        """Type -> number of tensors of it, for those that are not floating point."""
        found: dict[str, int] = {}
        for tensor in self.tensors.values():
            if tensor.type not in PLAIN:
                found[tensor.type] = found.get(tensor.type, 0) + 1
        return found


def parts_of(path: Path) -> list[Path]:
    """All files of the model that `path` is, or is a part of. Raises ModelError for a missing part."""
    split = SPLIT.search(path.name)
    if split is None:
        return [path]
    stem = path.name[: split.start()]
    paths = [path.with_name(f"{stem}-{i:05}-of-{split[2]}.gguf") for i in range(1, int(split[2]) + 1)]
    missing = [part.name for part in paths if not part.is_file()]
    if missing or not paths:
        raise ModelError(
            f"{path}: one of {split[2]} parts; {missing[0] if missing else path.name} is missing"
        )
    return paths


def gguf_files(folder: Path) -> list[Path]:
    """The parts of the only GGUF model in `folder`; empty when there is none, or there are several."""
    found = sorted(folder.glob("*.gguf"))
    models = {SPLIT.sub("", path.name) for path in found}
    return parts_of(found[0]) if len(models) == 1 else []


def header_of(path: Path) -> Any:
    """The package's reader of `path`. Raises ModelError for a file that is damaged or cut off."""
    try:
        import gguf
    except ImportError as error:
        raise ModelError(f"{path}: reading it needs the gguf package: pip install gguf") from error

    # Over private methods of the package (gguf 0.19): it maps the file, checks no length, and takes seconds for the
    # lists of a vocabulary. Drop when it does better.
    class Bounded(gguf.GGUFReader):
        """Beyond the end there is an error; without one, a damaged length makes the reader go on for years."""

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            if int(offset) + int(count) * dtype().itemsize > len(self.data):
                raise ValueError("it ends before its header or data do")
            return super()._get(offset, dtype, count, override_order)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != gguf.GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            begin = int(orig_offs) + 12
            kind, length = self._get(begin - 12, np.uint32), self._get(begin - 8, np.uint64)
            count, item = int(length[0]), gguf.GGUFValueType(kind[0])
            if count > MOST:
                raise ValueError(f"a list of {count} values")
            if item == gguf.GGUFValueType.STRING:
                parts = self._strings(begin, count)
                size = 8 * count + sum(len(part) for part in parts)
            elif item in self.gguf_scalar_to_np:
                parts = [self._get(begin, self.gguf_scalar_to_np[item], count)] if count else []
                size = sum(part.nbytes for part in parts)
            else:
                return super()._get_field_parts(orig_offs, raw_type)
            types = [gguf.GGUFValueType.ARRAY, item] if count else [gguf.GGUFValueType.ARRAY]
            return 12 + size, [kind, length, *parts], list(range(2, 2 + len(parts))), types

        def _strings(self, begin: int, count: int) -> list[Any]:
            """The bytes of `count` strings, each behind its length."""
            raw, size = self.data.data, struct.Struct("@Q")
            if self.byte_order == "S":
                size = struct.Struct(">Q" if sys.byteorder == "little" else "<Q")
            found = []
            for _ in range(count):
                end = begin + 8
                end += size.unpack_from(raw, begin)[0] if end <= len(raw) else 1
                if end > len(raw):
                    raise ValueError("it ends within a list of strings")
                found.append(np.frombuffer(raw[begin + 8 : end], np.uint8))
                begin = end
            return found

    try:
        return Bounded(path)
    except DAMAGED as error:
        raise ModelError(
            f"{path}: truncated or damaged GGUF file ({error}); copy or download it again"
        ) from error


def _values(reader: Any, path: Path) -> dict[str, Any]:
    try:
        return {key: entry.contents() for key, entry in reader.fields.items() if not key.startswith("GGUF.")}
    except DAMAGED as error:
        raise ModelError(f"{path}: its header holds a value that cannot be read ({error})") from error


@dataclass(frozen=True, slots=True)
class Shown:
    """A tensor as checkpoints have it: where it is stored, and what has been done to it.

    expert: which of stacked matrices it is. order: row i of the file is row order[i] here. plus: what was added to it.
    transposed: whether checkpoints store it (I, O). shape: in a checkpoint.
    """

    stored: Stored
    shape: tuple[int, ...]
    expert: int | None = None
    order: Tensor | None = field(default=None, compare=False)
    plus: float = 0.0
    transposed: bool = False

    def rows(self) -> tuple[int, int]:
        """First row in the file, and the number of rows."""
        if self.expert is None:
            return 0, self.stored.rows
        each = self.stored.rows // self.stored.shape[0]
        return self.expert * each, each

    def chunks(self) -> Iterator[tuple[slice | Tensor, Tensor]]:
        """(rows here, their values (R, I) float32), a few rows at a time. A vector is one row."""
        first, count = self.rows()
        columns = self.stored.shape[-1]
        step = max(1, CHUNK // max(1, columns))
        for start in range(0, count, step):
            stop = min(start + step, count)
            values = floats(self.stored, self.stored.read(first + start, first + stop))
            if self.plus:
                values = values - self.plus
            here = slice(start, stop) if self.order is None or count == 1 else self.order[start:stop]
            yield here, values


def floats(stored: Stored, raw: Tensor) -> Tensor:
    """What the bytes `raw` of rows of a tensor stand for, (R, I) float32. Raises ModelError for an unknown type."""
    codec = codecs().get(stored.type)
    if isinstance(codec, BlockCodec):
        return codec.dequantize(codec.unpack(raw, codec.spec(), (raw.shape[0], stored.shape[-1])))
    if stored.type in PLAIN:
        return raw.view(PLAIN[stored.type]).float()
    import gguf

    try:
        kind = gguf.GGMLQuantizationType[stored.type.upper()]
        return torch.from_numpy(gguf.quants.dequantize(raw.numpy(), kind)).float()
    except NotImplementedError as error:
        raise ModelError(
            f"{stored.path}: tensors of type {stored.type.upper()} cannot be dequantized. "
            "Take a file of another type, or the original model"
        ) from error


class GgufStore(TensorStore):
    """A GGUF model under the names, in the shapes and with the rows that its checkpoint in safetensors has."""

    def __init__(self, file: GgufFile, shown: Mapping[str, Shown], dtype: torch.dtype) -> None:
        """dtype: of all tensors, as they are shown."""
        self._file = file  # open as long as its tensors may be read
        self._shown = {name: shown[name] for name in sorted(shown, key=natural)}
        self.infos = {name: TensorInfo(dtype, one.shape) for name, one in self._shown.items()}

    def get(self, name: str) -> Tensor:
        """The tensor called `name`, dequantized."""
        one, info = self._shown[name], self.infos[name]
        _, count = one.rows()
        out = torch.empty(count, one.stored.shape[-1], dtype=info.dtype)
        for here, values in one.chunks():
            out[here] = values.to(info.dtype)
        if (
            count == 1 and one.order is not None
        ):  # a bias: one row, whose values go with the rows of its matrix
            out = torch.empty_like(out).index_copy_(1, one.order, out)
        return (out.t().contiguous() if one.transposed else out).reshape(one.shape)

    def quantized(self, name: str) -> Quantized | None:
        """The matrix (O, I) as it is stored, if that is one of the block types that `codecs` knows."""
        one = self._shown.get(name)
        codec = None if one is None else codecs().get(one.stored.type)
        if one is None or not isinstance(codec, BlockCodec):
            return None
        first, count = one.rows()
        raw = one.stored.read(first, first + count)
        if one.order is not None:
            # Rows can move while they are packed: no block reaches from one row into the next.
            raw = torch.empty_like(raw).index_copy_(0, one.order, raw)
        return codec.unpack(raw, codec.spec(), (count, one.stored.shape[-1]))

    def announce(self, name: str) -> None:
        """Tell the system that the tensor called `name` will soon be read."""
        one = self._shown[name]
        first, count = one.rows()
        each = one.stored.nbytes // max(1, one.stored.rows)
        if hasattr(os, "posix_fadvise"):
            place = one.stored.offset + first * each
            os.posix_fadvise(one.stored.file, place, count * each, os.POSIX_FADV_WILLNEED)

    def fingerprint(self) -> str:
        """From `SAMPLED` evenly spaced pieces of each tensor, so that it takes little time for any size."""
        state, piece = hashlib.blake2b(digest_size=16), memoryview(bytearray(PIECE))
        for name, one in self._shown.items():
            state.update(f"{name} {one.stored.type} {one.shape} {one.expert}".encode())
            whole = one.stored
            for at in range(0, whole.nbytes, max(PIECE, whole.nbytes // SAMPLED)):
                got = read_at(whole.file, piece[: min(PIECE, whole.nbytes - at)], whole.offset + at)
                state.update(piece[:got])
        return state.hexdigest()
