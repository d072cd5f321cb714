"""How much memory there is, how much this process uses, and how much a piece of work needs."""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def available_memory() -> int:
    """Bytes of main memory that can be used without swapping."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2  # a guess: nobody tells what is free


def peak_memory() -> int:
    """Largest resident size of this process, in bytes, since `reset_peak` where the system can reset it.

    0 where the system does not tell.
    """
    if STATUS.is_file():
        return _status("VmHWM:")
    if sys.platform == "win32":
        return 0  # Windows keeps no such figure where Python can read it
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_of(device: torch.device) -> int:
    """Largest number of bytes allocated on `device` since `reset_peak`; 0 for the CPU and where nobody counts."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def resident_memory() -> int:
    """Resident size of this process now, in bytes; its peak where the system does not tell."""
    return _status("VmRSS:") if STATUS.is_file() else peak_memory()


def reset_peak() -> None:
    """Let `peak_memory` and `peak_of` count from now on, where the system can do that."""
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
    if CLEAR.exists():
        try:
            CLEAR.write_text("5")  # 5 resets VmHWM, see proc(5)
        except OSError:  # not allowed in some containers: the peak then is that of the whole process
            return


def give_back() -> None:
    """Return freed memory to the system, where the allocator would keep it."""
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):  # glibc
            library.malloc_trim(0)


M_MMAP_THRESHOLD, MAPPED = -3, 1 << 20  # of mallopt(3); bytes from which a tensor gets pages of its own


def exact_allocations() -> None:
    """Let every large tensor take and give back pages of its own, so that memory in use is memory asked for.

    glibc by itself raises the size from which it does so up to 32 MB; below it, gaps between living tensors stay.
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "mallopt"):
            library.mallopt(M_MMAP_THRESHOLD, MAPPED)


def _status(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


class Tally(TorchDispatchMode):
    """Counts the bytes of tensors made while it is active: `peak` by kind of device ("cpu", "cuda").

    What lives inside one operation is not seen; tensors made before are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now: dict[str, int] = defaultdict(int)
        self.peak: dict[str, int] = defaultdict(int)
        self._alive: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func`, and count the storages of what it returns that are new."""
        # In-place operations and views return storages that they were given: those are not new.
        before = {
            t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in before:
                self._count(tensor)
        return out

    def _count(self, tensor: torch.Tensor) -> None:
        storage, kind = tensor.untyped_storage(), tensor.device.type
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.now[kind] += size
        self.peak[kind] = max(self.peak[kind], self.now[kind])
        # The storage and not the tensor: views keep it alive after the tensor that made it is gone.
        weakref.finalize(storage, self._forget, key, kind, size)

    def _forget(self, key: int, kind: str, size: int) -> None:
        self._alive.discard(key)
        self.now[kind] -= size
