"""`Placement`: where a job's tensors live and how many samples run at once, with what that was predicted to take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

HOMES = ("device", "memory", "pinned", "file")
"""Where hidden states may be kept between blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Made by the planner before the work; sources follow it and decide nothing.

    device: where blocks run. layers: layer -> device, for layers inside blocks that run elsewhere. micro_batch:
    samples run at once. activations: one of `HOMES`. workers: of a stream; None when blocks are run. ram, vram:
    predicted peak bytes of the process and of the main device; None when nothing was predicted. why: what decided.
    """

    device: str
    micro_batch: int
    activations: str = "memory"
    layers: Mapping[str, str] = field(default_factory=dict)
    ram: int | None = None
    vram: int | None = None
    workers: int | None = None
    why: tuple[str, ...] = ()
