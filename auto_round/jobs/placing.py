"""From the user's limits and devices to a `Placement` for one job."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from auto_round.core.placement import Placement
from auto_round.core.plan import Plan
from auto_round.jobs.planner import Costs, base_memory, choose, costs, estimate, rehearse, spread
from auto_round.models.device import Devices
from auto_round.models.subject import Subject
from auto_round.sources.blocks import LiveSource
from auto_round.steps.base import Step

logger = logging.getLogger("auto_round")
SHARE = 0.9  # of a card's free memory that may be planned for; the rest goes to its allocator


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is to be placed. batch, samples, seqlen, iters: of the recipe. source: from samples run at once; steps: from
    samples run at once and iterations. chains: copies of the hidden states."""

    subject: Subject
    plan: Plan
    devices: Devices
    batch: int
    samples: int
    seqlen: int
    iters: int
    chains: int
    low_vram: bool
    source: Callable[[int], LiveSource]
    steps: Callable[[int, int], list[Step]]


def place(
    wish: Wish, *, max_ram: int | None, max_vram: int | None, measure: bool
) -> tuple[Placement, float | None]:
    """The placement, and the estimated seconds when something was measured.

    Nothing is measured unless there is a limit to keep, `measure` asks for it, or blocks run on an accelerator.
    """
    main = wish.devices.main
    homes = _homes(main, low_vram=wish.low_vram)
    layers = _layers(wish)
    if main.type == "cpu" and max_ram is None and not measure:
        return Placement(device=str(main), micro_batch=wish.batch, activations=homes[0], layers=layers), None
    # Without a limit of the user's a card has one all the same: what is free on it.
    if main.type == "cuda" and max_vram is None:
        max_vram = int(torch.cuda.mem_get_info(main)[0] * SHARE)
    found, seconds = measured(wish)
    placed = choose(found, wish.batch, homes, max_ram=max_ram, max_vram=max_vram)
    logger.info(
        "placement: %d samples at once, hidden states in %s; planned peak %.2f GB of main memory%s",
        placed.micro_batch,
        placed.activations,
        (placed.ram or 0) / 1e9,
        f", {placed.vram / 1e9:.2f} GB on {main}" if placed.vram else "",
    )
    return replace(placed, device=str(main), layers=layers), seconds


def measured(wish: Wish) -> tuple[Costs, float]:
    """What the job costs, from a rehearsal on its heaviest block; seconds for all blocks."""
    tree = wish.subject.tree
    assert tree is not None, "a job that runs blocks has a module tree"
    sizes = {block: _bytes(tree.get_submodule(block)) for block in wish.subject.anatomy.in_order()}
    heaviest = max(sizes, key=lambda block: sizes[block])  # what it takes, every other block has room for
    rehearsal = rehearse(wish.source, wish.steps, wish.plan, heaviest)
    states = wish.seqlen * tree.config.get_text_config().hidden_size * torch.float32.itemsize  # type: ignore[union-attr, operator]
    resident = wish.subject.located is None
    found = costs(
        rehearsal, base=base_memory(), outside=0 if resident else _outside(tree, wish.subject),
        block=0 if resident else sizes[heaviest], states=states, samples=wish.samples, chains=wish.chains,
        device=wish.devices.main.type,
    )  # fmt: skip
    one = estimate(rehearsal, wish.iters, wish.batch, wish.samples)
    # The other blocks by their weights: the time of a block grows with what it multiplies by.
    return found, one * sum(sizes.values()) / sizes[heaviest]


def _bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())


def _outside(tree: nn.Module, subject: Subject) -> int:
    """Bytes of the weights outside blocks, without the head."""
    body = subject.anatomy
    inside = tuple(f"{block}." for block in body.in_order())
    without = f"{body.head}." if body.head else "\0"  # no name begins with it
    tensors = tree.state_dict().items()
    return sum(
        t.numel() * t.element_size()
        for name, t in tensors
        if not name.startswith(inside) and not name.startswith(without)
    )


def _homes(main: torch.device, *, low_vram: bool) -> tuple[str, ...]:
    """Where hidden states may be kept, best first."""
    if main.type == "cpu":
        return ("memory", "file")
    host = "pinned" if main.type == "cuda" else "memory"
    return (host, "file") if low_vram else ("device", host, "file")


def _layers(wish: Wish) -> dict[str, str]:
    """Layers that run on another device than their block: as the user says, or spread over several devices."""
    body, devices = wish.subject.anatomy, wish.devices
    if devices.layers:
        said = {name: devices.of(name) for name, layer in body.layers.items() if layer.block is not None}
        return {name: str(device) for name, device in said.items() if device not in (None, devices.main)}
    if len(devices.devices) < 2:
        return {}
    placed: dict[str, str] = {}
    names = [str(device) for device in devices.devices]
    for block in body.in_order():
        own = {n: layer.shape[0] * layer.shape[1] for n, layer in body.layers.items() if layer.block == block}
        placed.update(spread(own, names))
    return placed
