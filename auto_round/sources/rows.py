"""Where hidden states are kept between blocks: in memory, on the device, pinned, or in a file."""

from __future__ import annotations

import math
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round.models.checkpoint import read_at, write_at
from auto_round.models.shards import raw_bytes

CHUNK = 8  # samples looked at together where all of them count


class Rows(ABC):
    """Hidden states of all samples, (N, T, H) float32, of which some are looked at at a time."""

    shape: tuple[int, ...]

    @abstractmethod
    def __getitem__(self, rows: Sequence[int]) -> Tensor:
        """Those of the samples `rows`."""

    @abstractmethod
    def __setitem__(self, rows: Sequence[int], value: Tensor) -> None:
        """Replace those of the samples `rows`."""

    @abstractmethod
    def like(self) -> Rows:
        """Room of the same shape in the same place."""

    def __len__(self) -> int:
        return self.shape[0]

    def copy(self) -> Rows:
        """The same values once more."""
        other = self.like()
        for rows in self.chunks():
            other[rows] = self[rows]
        return other

    def chunks(self) -> Iterator[list[int]]:
        """All sample numbers, some at a time."""
        for start in range(0, len(self), CHUNK):
            yield list(range(start, min(start + CHUNK, len(self))))

    def tokens(self, valid: Tensor | None) -> Iterator[Tensor]:
        """(M, H) states of the tokens that count, some samples at a time. valid: (N, T) bool, None when all do."""
        for rows in self.chunks():
            yield self[rows].flatten(0, -2) if valid is None else self[rows][valid[rows]]


class MemoryRows(Rows):
    """In main memory, pinned or not, or on a device."""

    def __init__(
        self, shape: tuple[int, ...], device: torch.device | str = "cpu", *, pinned: bool = False
    ) -> None:
        self.shape, self._device, self._pinned = shape, device, pinned
        self._values = torch.empty(shape, dtype=torch.float32, device=device, pin_memory=pinned)

    def __getitem__(self, rows: Sequence[int]) -> Tensor:
        return self._values[list(rows)]

    def __setitem__(self, rows: Sequence[int], value: Tensor) -> None:
        self._values[list(rows)] = value.to(self._values)

    def like(self) -> Rows:
        """Room of the same shape in the same place."""
        return MemoryRows(self.shape, self._device, pinned=self._pinned)


class FileRows(Rows):
    """In a file that vanishes with the process. Read and written, not mapped: it takes no memory of this process."""

    def __init__(self, shape: tuple[int, ...], folder: Path | None) -> None:
        self.shape, self._folder = shape, folder
        self._each = math.prod(shape[1:]) * torch.float32.itemsize
        # Without a name where the system allows it, so that a killed run leaves nothing behind.
        self._file: Any = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - open as long as it is used
        weakref.finalize(self, self._file.close)

    def __getitem__(self, rows: Sequence[int]) -> Tensor:
        found = torch.empty(len(rows), *self.shape[1:], dtype=torch.float32)
        for at, row in enumerate(rows):
            buffer, done = raw_bytes(found[at]), 0
            while done < self._each:
                got = read_at(self._file.fileno(), buffer[done:], row * self._each + done)
                assert got, f"sample {row} was never written"
                done += got
        return found

    def __setitem__(self, rows: Sequence[int], value: Tensor) -> None:
        for row, one in zip(rows, value.to("cpu", torch.float32), strict=True):
            write_at(self._file.fileno(), raw_bytes(one), row * self._each)

    def like(self) -> Rows:
        """Room of the same shape in another file."""
        return FileRows(self.shape, self._folder)


class Notices:
    """What blocks leave for later blocks besides hidden states, for every sample: keys and values in Gemma 3n and 4."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        """dtype: that of the products in blocks, which need no more of it."""
        self._dtype = dtype
        self._left: dict[Any, dict[int, tuple[Tensor, ...]]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(t.nbytes for own in self._left.values() for tensors in own.values() for t in tensors)

    def post(self, rows: Sequence[int], found: Mapping[Any, tuple[Tensor, ...]]) -> None:
        """Keep what the samples `rows` left; tensors have the samples first."""
        for key, tensors in found.items():
            for at, row in enumerate(rows):
                # A copy: a part of a batch would keep all of it in memory.
                own = (tensor[at : at + 1].detach().to("cpu", self._dtype, copy=True) for tensor in tensors)
                self._left.setdefault(key, {})[row] = tuple(own)

    def show(self, rows: Sequence[int], device: torch.device) -> dict[Any, tuple[Tensor, ...]]:
        """What is kept of the samples `rows`, in float32."""
        return {
            key: tuple(
                torch.cat(parts).to(device, torch.float32)
                for parts in zip(*(own[row] for row in rows), strict=True)
            )
            for key, own in self._left.items()
            if all(row in own for row in rows)
        }
