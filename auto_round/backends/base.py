"""What a kernel library must offer, and the choice among them for one layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import nn

from auto_round.core.errors import FormatError, nearest
from auto_round.core.registry import discover
from auto_round.core.scheme import TensorSpec
from auto_round.formats.base import Format


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One layer of a quantized checkpoint that needs a module. shape: (O, I). act: spec of its inputs, or None."""

    name: str
    format: Format
    spec: TensorSpec
    shape: tuple[int, int]
    device: str
    dtype: torch.dtype
    bias: torch.dtype | None
    act: TensorSpec | None = None


class Kernel(nn.Module):
    """A layer of a loaded checkpoint, as some backend runs it."""

    backend: str
    site: Site


class Backend(ABC):
    """One kernel library."""

    name: str
    aliases: tuple[str, ...] = ()
    priority: int
    devices: tuple[str, ...]
    summary: str

    @abstractmethod
    def reject(self, site: Site) -> str | None:
        """Why this backend cannot run `site`, or None."""

    @abstractmethod
    def build(self, site: Site) -> Kernel:
        """An empty module on the meta device whose buffers have the names, shapes and dtypes of the checkpoint."""

    def finish(self, module: Kernel, *, cache: bool) -> None:
        """After loading: check, repack. `cache` allows keeping a dequantized copy of the weight."""
        return None


def backends() -> dict[str, Backend]:
    """All backends by name, best first."""
    found = discover("auto_round.backends")
    return dict(sorted(found.items(), key=lambda item: (-item[1].priority, item[0])))


def choose(site: Site, wanted: str = "auto") -> Backend:
    """The best backend for `site`, or the one called `wanted`.

    Raises FormatError with every backend's reason when none can run it.
    """
    known = backends()
    if wanted != "auto":
        named = [b for b in known.values() if wanted == b.name or wanted in b.aliases]
        if not named:
            every = [name for b in known.values() for name in (b.name, *b.aliases)]
            raise FormatError(
                f"backend {wanted!r} is unknown.{nearest(wanted, every)} Available: auto, {', '.join(every)}"
            )
        known = {b.name: b for b in named}
    reasons = {name: backend.reject(site) for name, backend in known.items()}
    for name, reason in reasons.items():
        if reason is None:
            return known[name]
    raise FormatError(
        f"{site.name}: no backend can run it. " + "; ".join(f"{n}: {r}" for n, r in reasons.items())
    )
