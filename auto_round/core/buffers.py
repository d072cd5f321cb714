"""Memory for large tensors that are written once and soon gone: asked for in huge pages, which the system hands out
several times faster than the small ones that torch takes."""

from __future__ import annotations

import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

LARGE = 1 << 22
"""Bytes from which on it pays; a small tensor would waste most of a page of 2 MB."""


def buffer(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialized tensor in main memory."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    area = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel that was built without them: small pages do too
        area.madvise(mmap.MADV_HUGEPAGE)
    return tensor_of(area, 0, nbytes).view(dtype).view(shape)


def tensor_of(area: mmap.mmap, begin: int, nbytes: int) -> Tensor:
    """`nbytes` bytes of `area` from `begin` on, (N,) uint8; the tensor keeps the area alive."""
    storage = torch.frombuffer(area, dtype=torch.uint8).untyped_storage()
    # By an operation, for what operations make is what is counted when memory is planned (`models.memory.Tally`).
    return torch.empty(0, dtype=torch.uint8).set_(storage, begin, (nbytes,))  # type: ignore[call-overload, no-any-return]
