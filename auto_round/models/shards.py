"""Writing a checkpoint: files planned from shapes alone, header first, then filled tensor by tensor in any order.

The safetensors library writes a file from tensors that are all in memory; a checkpoint larger than memory needs the
header first and each tensor put in its place when it is ready, which is what `ShardWriter` does
(docs/decisions/0005-shards-are-planned-then-filled.md; format: https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from auto_round.core.errors import ModelError, PlanError
from auto_round.core.native import EXACT, address, library
from auto_round.models.checkpoint import (
    DTYPE_NAMES,
    INDEX,
    SINGLE,
    Place,
    TensorInfo,
    natural,
    read_at,
    write_at,
)


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a planned checkpoint: its header bytes, and where each tensor goes."""

    file: str
    header: bytes
    offsets: Mapping[str, int]
    size: int


def parse_size(text: str | int, name: str = "max_shard_size") -> int:
    """``"5GB"`` (decimal), ``"500MB"`` or a number of bytes. Raises PlanError, naming the option, for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(text), re.IGNORECASE)
    if not found or float(found[1]) <= 0:
        raise PlanError(f"{name} {text!r} is not understood; write 5GB or 500MB")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " "))


def plan_shards(infos: Mapping[str, TensorInfo], max_bytes: int) -> list[Shard]:
    """Files of at most `max_bytes` of data (or one layer), filled in natural order of names; exact sizes.

    The tensors of a layer stay together, so that whoever quantizes it writes to one file.
    """
    groups: list[list[str]] = [[]]
    filled = 0
    # Members of a layer are neighbours in this order, which is what `groupby` needs.
    for _, members in groupby(sorted(infos, key=natural), lambda name: name.rpartition(".")[0] or name):
        names = list(members)
        size = sum(infos[name].nbytes for name in names)
        if groups[-1] and filled + size > max_bytes:  # a layer larger than the limit gets a file of its own
            groups.append([])
            filled = 0
        groups[-1] += names
        filled += size
    count = len(groups)
    names = (
        [SINGLE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    )
    return [
        _plan_shard(file, {name: infos[name] for name in group})
        for file, group in zip(names, groups, strict=True)
    ]


def _plan_shard(file: str, infos: Mapping[str, TensorInfo]) -> Shard:
    # transformers 4 refuses a file that does not say which framework it is for.
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
    text += b" " * (-len(text) % 8)  # as the library does, so that data begin aligned
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
        self._files: dict[str, int] = {}
        self._missing = set(infos)

    @property
    def nbytes(self) -> int:
        """Bytes of all shards, exactly."""
        return sum(shard.size for shard in self.shards)

    def __enter__(self) -> ShardWriter:
        try:
            for shard in self.shards:
                # Not truncated: going on with an earlier run counts on what it has put there.
                file = os.open(self.folder / shard.file, os.O_WRONLY | os.O_CREAT, 0o666)
                self._files[shard.file] = file
                if hasattr(os, "posix_fallocate") and shard.size:
                    os.posix_fallocate(file, 0, shard.size)  # a full disk shows now, not after hours
                write_at(file, memoryview(shard.header), 0)
        except OSError:
            self._close()
            raise
        return self

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, this fills files that another process has laid out from the same plan and will close."""
        try:
            for shard in self.shards:
                self._files[shard.file] = os.open(self.folder / shard.file, os.O_WRONLY)
            yield
            for file in self._files.values():
                os.fsync(file)  # what is reported as written must outlive this machine
        finally:
            self._close()

    def put(self, name: str, tensor: Tensor) -> None:
        """Write `tensor` in its place. Raises ValueError when dtype or shape are not the planned ones."""
        info = self.infos[name]
        if tensor.dtype != info.dtype or tuple(tensor.shape) != info.shape:
            raise ValueError(
                f"{name}: planned {info.dtype} {info.shape}, got {tensor.dtype} {tuple(tensor.shape)}"
            )
        file, offset = self._where(name)
        write_at(file, raw_bytes(tensor), offset)
        self._missing.discard(name)

    def copy(self, name: str, place: Place) -> None:
        """Put the bytes at `place`, a tensor of the planned dtype and shape, in the place of `name`."""
        file, offset = self._where(name)
        if place.nbytes != self.infos[name].nbytes:
            raise ValueError(f"{name}: planned {self.infos[name].nbytes} bytes, got {place.nbytes}")
        done = 0
        while done < place.nbytes:
            got = _copy_part(place, done, file, offset + done)
            if not got:
                raise ModelError(f"{place.path}: ends within tensor {name}; copy or download it again")
            done += got
        self._missing.discard(name)

    def written(self, names: Iterable[str]) -> None:
        """These are in their places already: put there by an earlier run, or by another process."""
        self._missing.difference_update(names)

    def file_of(self, name: str) -> str:
        """The file that `name` goes to."""
        return self._shard_of[name].file

    def _where(self, name: str) -> tuple[int, int]:
        shard = self._shard_of[name]
        return self._files[shard.file], shard.offsets[name]

    def _close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            for file in self._files.values():
                # Before anyone moves the files: a name in place must not be on disk earlier than the data.
                os.fsync(file)
        self._close()
        if kind is not None:
            return
        if self._missing:
            raise ValueError(
                f"{len(self._missing)} planned tensors were never written, first {min(self._missing)}"
            )
        if len(self.shards) > 1:  # readers of a single file look for no index
            index = {
                "metadata": {"total_size": sum(info.nbytes for info in self.infos.values())},
                "weight_map": {name: self._shard_of[name].file for name in sorted(self.infos, key=natural)},
            }
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


PIECE = 1 << 24
"""Bytes that are copied at a time."""


def _copy_part(place: Place, done: int, file: int, offset: int) -> int:
    """Copy the next piece of `place`, within the kernel where it can; the number of bytes."""
    count = min(PIECE, place.nbytes - done)
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(place.file, file, count, place.offset + done, offset)
        except OSError as error:
            # Another file system, or one that cannot: copied through memory instead. Anything else is a real failure.
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
    buffer = memoryview(bytearray(count))
    got = read_at(place.file, buffer, place.offset + done)
    write_at(file, buffer[:got], offset)
    return got


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of `tensor` in row-major order, without a copy where possible."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    # Bytes, since numpy knows neither bfloat16 nor float8; and it gives no buffer for nothing.
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


COLUMNS = 1 << 14
# Odd, so that no change of one word can vanish.
_FACTORS = torch.randint(-(1 << 62), 1 << 62, (COLUMNS,), generator=torch.Generator().manual_seed(0)) | 1
_STEP = 0x5851F42D4C957F2D
SOURCE = Path(__file__).with_name("shards.c")


def checksum(tensor: Tensor) -> int:
    """A 64-bit number that tells damaged or misplaced bytes, at the speed of memory; not for adversaries.

    The bytes as 64-bit integers in rows of `COLUMNS`: a polynomial down each column, fixed odd factors across the
    columns, modulo 2^64.
    """
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    if data.storage_offset() % 8:  # after a tensor of odd size in the same mapped file
        data = data.clone()
    whole = data.numel() // (8 * COLUMNS) * 8 * COLUMNS
    sums = torch.nn.functional.pad(data[whole:], (0, whole + 8 * COLUMNS - data.numel())).view(torch.int64)
    table, functions = data[:whole].view(torch.int64).view(-1, COLUMNS), library(SOURCE, EXACT)
    if functions is not None and len(table):
        sums = sums.contiguous()  # of a short end, padding made a copy already
        sizes = (ctypes.c_ssize_t(len(table)), ctypes.c_ssize_t(COLUMNS), ctypes.c_uint64(_STEP))
        functions.fold(address(table), *sizes, address(sums))
    else:
        for row in table:
            sums.mul_(_STEP).add_(row)  # 128 kB that stay in the cache
    return int((sums * _FACTORS).sum())
