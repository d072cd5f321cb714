"""Weights on disk: reading the tensors of a checkpoint one at a time, without the rest of their files.

Reads are positional system calls, not mapped memory: resident memory is what was asked for, and a file that ends early
is an error that names it and not a crash (format: https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
import struct
import sys
import threading
import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round.core.buffers import tensor_of
from auto_round.core.errors import ModelError
from auto_round.core.quantized import Quantized

SAMPLED, PIECE = 64, 1024  # pieces of a tensor looked at to tell two models apart, and bytes of a piece
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


@dataclass(frozen=True, slots=True)
class Place:
    """Where the bytes of a tensor lie: an open file, the first byte, how many."""

    path: Path
    file: int
    offset: int
    nbytes: int


class TensorStore(ABC):
    """Named tensors that can be looked at without being read."""

    infos: Mapping[str, TensorInfo]

    @abstractmethod
    def get(self, name: str) -> Tensor:
        """The tensor called `name`."""

    def row(self, name: str, index: int) -> Tensor:
        """One entry of the first dimension of the tensor called `name`."""
        return self.get(name)[index]

    def look(self, name: str, row: int | None = None) -> Tensor:
        """The tensor called `name`, or one entry of it, for who looks once: the memory may be that of a mapped file."""
        return self.get(name) if row is None else self.row(name, row)

    def quantized(self, name: str) -> Quantized | None:
        """The matrix (O, I) called `name` as it is stored, or None when it is stored plain, or as nothing we know."""
        return None

    def place(self, name: str) -> Place | None:
        """Where the bytes of the tensor called `name` lie, or None when no file has them as they are."""
        return None

    def announce(self, name: str) -> None:
        """The tensor called `name` will soon be read."""
        return None

    def shards(self, name: str) -> tuple[int, ...]:
        """Numbers of what has to be fetched for the tensor called `name`, best in their order; () when all is here."""
        return ()

    def expect(self, shards: Counter[int]) -> None:
        """Each shard stays here, once fetched, until it was `done` as often as it is counted."""
        return None

    def done(self, shards: Iterable[int]) -> None:
        """Something that was counted has been read from these shards."""
        return None

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of names, dtypes, shapes and a sample of the values: another model has another one."""


class View(TensorStore):
    """A store that shows the tensors of another one, `raw`, in another way."""

    raw: TensorStore

    def expect(self, shards: Counter[int]) -> None:
        """Of the other store."""
        self.raw.expect(shards)

    def done(self, shards: Iterable[int]) -> None:
        """Of the other store."""
        self.raw.done(shards)

    def fingerprint(self) -> str:
        """That of the other store."""
        return self.raw.fingerprint()


class StateDict(TensorStore):
    """The tensors of a live model; a tensor shared by several names is stored under the first."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        seen: dict[tuple[int, int], str] = {}
        self._tensors = {}
        for name, tensor in tensors.items():
            # Tied tensors share memory; on meta nothing has an address.
            key = (tensor.data_ptr(), tensor.numel())
            if tensor.numel() and key in seen and tensor.device.type != "meta":
                continue
            seen[key] = name
            self._tensors[name] = tensor
        self.infos = {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in self._tensors.items()}

    def get(self, name: str) -> Tensor:
        """The tensor called `name`."""
        return self._tensors[name].detach()

    def fingerprint(self) -> str:
        """From `SAMPLED` values of each tensor, evenly spaced."""
        state = hashlib.blake2b(digest_size=16)
        for name, info in self.infos.items():
            state.update(f"{name} {info.dtype} {info.shape}".encode())
            flat = self._tensors[name].detach().reshape(-1)
            # A sample: gigabytes would take minutes.
            state.update(_bytes(flat[:: max(1, flat.numel() // SAMPLED)]))
        return state.hexdigest()


def _bytes(flat: Tensor) -> bytes:
    return flat.cpu().contiguous().view(torch.uint8).numpy().tobytes()


class Checkpoint(TensorStore):
    """The safetensors shards of a folder. Opening reads and checks the headers only.

    Reads are positional, so threads may share it, and a file that is cut off is an error and no crash.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[str, Place] = {}
        infos: dict[str, TensorInfo] = {}
        for shard, expected in _shards(folder).items():
            path = folder / shard
            start, header = _read_header(path)
            # Open as long as the store lives: places hand the descriptor on, and reading needs no look-up of a name.
            file = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, file)
            found = infos_of(header, expected, infos, path)
            infos.update(found)
            for name in found:
                begin, end = header[name]["data_offsets"]
                self._places[name] = Place(path, file, start + begin, end - begin)
        # In one order whatever the order of shards: new files are planned from it.
        self.infos = {name: infos[name] for name in sorted(infos, key=natural)}

    def get(self, name: str) -> Tensor:
        """The tensor called `name`, read now."""
        return self.rows(name, 0, self.infos[name].shape[0]) if self.infos[name].shape else self._read(name)

    def fingerprint(self) -> str:
        """From `SAMPLED` evenly spaced pieces of each tensor, so that it takes little time for any size."""
        state, piece = hashlib.blake2b(digest_size=16), memoryview(bytearray(PIECE))
        for name, info in self.infos.items():
            state.update(f"{name} {info.dtype} {info.shape}".encode())
            place = self._places[name]
            for at in range(0, place.nbytes, max(PIECE, place.nbytes // SAMPLED)):
                got = read_at(place.file, piece[: min(PIECE, place.nbytes - at)], place.offset + at)
                state.update(piece[:got])
        return state.hexdigest()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Entries `start` to `stop` of the first axis of the tensor called `name`."""
        shape = self.infos[name].shape
        # Rows of the first axis are contiguous, so a few of them (one expert, say) are one read.
        each = self._places[name].nbytes // shape[0] if shape[0] else 0
        flat = self._read(name, start * each, (stop - start) * each)
        return flat.reshape(stop - start, *shape[1:])

    def row(self, name: str, index: int) -> Tensor:
        """One entry of the first dimension, without reading the others."""
        return self.rows(name, index, index + 1)[0]

    def look(self, name: str, row: int | None = None) -> Tensor:
        """As `get` and `row`; large ones are mapped, which takes a sixth of the time of reading."""
        info, place = self.infos[name], self._places[name]
        each = place.nbytes if row is None else place.nbytes // info.shape[0]
        mapped = _mapped(place, each * (row or 0), each, info.dtype)
        if mapped is None:
            return super().look(name, row)
        return mapped.view(info.shape if row is None else info.shape[1:])

    def place(self, name: str) -> Place:
        """Where the tensor called `name` lies."""
        return self._places[name]

    def announce(self, name: str) -> None:
        """Tell the system that the tensor called `name` will soon be read."""
        place = self._places[name]
        if hasattr(os, "posix_fadvise"):
            # Only a hint: the kernel reads ahead while other layers are worked on, and nobody waits.
            os.posix_fadvise(place.file, place.offset, place.nbytes, os.POSIX_FADV_WILLNEED)

    def _read(self, name: str, skip: int = 0, nbytes: int | None = None) -> Tensor:
        info, place = self.infos[name], self._places[name]
        nbytes = place.nbytes if nbytes is None else nbytes
        tensor = torch.empty(nbytes // info.dtype.itemsize, dtype=info.dtype)
        if not nbytes:
            return tensor
        # Into the tensor's own memory, with no copy in between.
        buffer, done = tensor.view(torch.uint8).numpy().data, 0
        while done < nbytes:
            # In a loop, for Linux hands out at most 2 GiB per call.
            got = read_at(place.file, buffer[done:], place.offset + skip + done)
            if not got:
                raise ModelError(f"{place.path}: ends within tensor {name}; copy or download it again")
            done += got
        return tensor if info.shape else tensor.reshape(())


def infos_of(
    header: Mapping[str, Any], expected: set[str] | None, known: Collection[str], path: Path
) -> dict[str, TensorInfo]:
    """The tensors that the header of the shard `path` adds to those in `known`.

    expected: the tensors that the index says it has, if there is one. Raises ModelError when one of them is absent.
    """
    absent = sorted((expected or set()) - header.keys())
    if absent:
        raise ModelError(
            f"{path.parent / INDEX}: tensor {absent[0]} should be in {path.name} but is not; "
            "download the index and that shard again"
        )
    return {
        name: TensorInfo(_dtype(entry["dtype"], path, name), tuple(entry["shape"]))
        for name, entry in header.items()
        # In two shards: the index says which one counts.
        if expected is None or name not in known or name in expected
    }


MAPPED = 1 << 20
"""Bytes from which on a tensor is mapped rather than read."""
POPULATE = 22  # MADV_POPULATE_READ of Linux 5.14, which Python 3.14 has no name for


def _mapped(place: Place, skip: int, nbytes: int, dtype: torch.dtype) -> Tensor | None:
    """The values at `place`, flat, in memory that the system shares with its cache of the file; None to read them.

    All pages are asked for at once: a file that ends early is noticed here, as an error, and not when they are used.
    """
    begin = place.offset + skip
    ahead = begin % mmap.ALLOCATIONGRANULARITY
    if nbytes < MAPPED or not sys.platform.startswith("linux") or begin % dtype.itemsize:
        return None
    try:
        # A private copy as far as anyone writes: the file stays as it is.
        area = mmap.mmap(place.file, ahead + nbytes, access=mmap.ACCESS_COPY, offset=begin - ahead)
        area.madvise(POPULATE)
    except (OSError, ValueError):  # an older system, or a file that was cut off, which reading will say
        return None
    return tensor_of(area, ahead, nbytes).view(dtype)


_seek_and_transfer = threading.Lock()


def read_at(file: int, buffer: memoryview, offset: int) -> int:
    """Fill `buffer` from `offset` of `file`; the number of bytes, which may be less."""
    if hasattr(os, "preadv"):
        return os.preadv(file, [buffer], offset)
    with _seek_and_transfer:  # Windows has no positional reads
        os.lseek(file, offset, os.SEEK_SET)
        data = os.read(file, len(buffer))
    buffer[: len(data)] = data
    return len(data)


def write_at(file: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at `offset` of `file`."""
    done = 0
    while done < len(data):
        if hasattr(os, "pwrite"):
            done += os.pwrite(file, data[done:], offset + done)
            continue
        with _seek_and_transfer:
            os.lseek(file, offset + done, os.SEEK_SET)
            done += os.write(file, data[done:])


def natural(name: str) -> list[object]:
    """Sorting key that puts layers.2 before layers.10."""
    # Pairs, since a number and a word cannot be compared with each other.
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def has_safetensors(folder: Path) -> bool:
    """Whether `folder` holds safetensors weights."""
    return (folder / INDEX).is_file() or any(folder.glob("*.safetensors"))


def _shards(folder: Path) -> dict[str, set[str] | None]:
    """Shard -> the tensors that the index says it has; None without an index. Raises ModelError for a missing one."""
    if not (folder / INDEX).is_file():
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        if not names:
            raise ModelError(f"{folder}: no safetensors weights found")
        return dict.fromkeys(names)  # None: nobody says what each holds, so every tensor counts
    shards = indexed_shards(folder / INDEX)
    for name in shards:
        if not (folder / name).is_file():
            raise ModelError(f"{folder}: shard {name} is named in {INDEX} but missing; download it again")
    return dict(shards)


def indexed_shards(path: Path) -> dict[str, set[str]]:
    """Shard -> the tensors that the index file `path` says it has. Raises ModelError when it says nothing usable."""
    shards: dict[str, set[str]] = {}
    for tensor, name in read_index(path).items():
        shards.setdefault(name, set()).add(tensor)
    return dict(sorted(shards.items()))


def read_index(path: Path) -> dict[str, str]:
    """Tensor -> shard, as the index file `path` says. Raises ModelError when it says nothing usable."""
    try:
        shards = json.loads(path.read_text())["weight_map"]
        if not shards or not all(isinstance(shard, str) for shard in shards.values()):
            raise ValueError(f"it names {sorted(map(str, shards))[:3]}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: no usable weight_map ({error}); download it again") from error
    for name in shards.values():
        if Path(name).name != name:  # an index from elsewhere must not make us open ../../secret
            raise ModelError(f"{path}: shard name {name!r} points outside the folder")
    return dict(shards)


LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""


def _read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Offset of the data of the safetensors file `path`, and its header. Raises ModelError for a damaged one.

    The library's own reader maps the file, which fails for one that is larger than memory.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, LONGEST_HEADER):  # before reading: damage may claim exabytes
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        _check_header(header, size - 8 - length)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{path}: truncated or damaged safetensors file ({error}); copy or download it again"
        ) from error
    return 8 + length, header


def _check_header(header: Mapping[str, Any], nbytes: int) -> None:
    """Raise ValueError unless the tensors fill `nbytes` without gaps or overlaps, each as large as its shape says."""
    position = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if not all(isinstance(n, int) and n >= 0 for n in (begin, end, *entry["shape"])):
            raise ValueError(f"tensor {name} has the shape {entry['shape']} at {begin} to {end}")
        if begin != position:
            raise ValueError(f"tensor {name} begins at byte {begin}, the one before ends at {position}")
        dtype = DTYPES.get(entry["dtype"])
        # An unknown dtype is named by `_dtype`.
        if dtype is not None and end - begin != math.prod(entry["shape"]) * dtype.itemsize:
            raise ValueError(f"tensor {name} has {end - begin} bytes for the shape {entry['shape']}")
        position = end
    if position != nbytes:
        raise ValueError(f"the header describes {position} bytes of data, the file has {nbytes}")


def _dtype(name: str, path: Path, tensor: str) -> torch.dtype:
    if name not in DTYPES:
        raise ModelError(
            f"{path}: tensor {tensor} has dtype {name}, which is not supported ({', '.join(DTYPES)})"
        )
    return DTYPES[name]


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
