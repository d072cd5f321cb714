"""From the user's limits and devices to a `Placement` for one job."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from auto_round.core.errors import PlanError
from auto_round.core.placement import Placement
from auto_round.jobs.planner import (
    Costs,
    Making,
    Rehearsal,
    Stage,
    base_memory,
    choose,
    estimate,
    per_sample,
    rehearse,
    rounded,
    spread,
)
from auto_round.jobs.quantize import quantize
from auto_round.jobs.stream import One, Unit, elements, part_of, units_of
from auto_round.models.device import Devices
from auto_round.models.memory import Tally, give_back
from auto_round.models.subject import Subject
from auto_round.models.window import windows
from auto_round.sources.tensors import TensorSource

logger = logging.getLogger("auto_round")
SHARE = 0.9  # of a card's free memory that may be planned for; the rest goes to its allocator


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is to be placed. batch, samples, iters: of the recipe. chains: copies of the hidden states while a block is
    worked on; chains_outside: while a layer after the blocks is. nblocks: blocks tuned together. resident: whether the
    model is in memory as a whole. keeps: whether what is made stays in memory. stage: for rehearsals."""

    subject: Subject
    devices: Devices
    batch: int
    samples: int
    iters: int
    chains: int
    chains_outside: int
    nblocks: int
    low_vram: bool
    resident: bool
    keeps: bool
    stage: Stage


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the job that was rehearsed. times: how often the job has its like, by size."""

    costs: Costs
    rehearsal: Rehearsal
    times: float


def place(
    wish: Wish, *, max_ram: int | None, max_vram: int | None, measure: bool
) -> tuple[Placement, float | None]:
    """The placement, and the estimated seconds when something was measured.

    Nothing is measured unless there is a limit to keep, `measure` asks for it, or blocks run on an accelerator.
    """
    main = wish.devices.main
    homes, why = _homes(main, low_vram=wish.low_vram)
    layers = _layers(wish)
    if main.type == "cpu" and max_ram is None and not measure:
        placed = Placement(device=str(main), micro_batch=wish.batch, activations=homes[0])
        return replace(placed, layers=layers, why=why), None
    # Without a limit of the user's a card has one all the same: what is free on it.
    if main.type == "cuda" and max_vram is None:
        max_vram = int(torch.cuda.mem_get_info(main)[0] * SHARE)
    parts = list(_parts(wish))
    found = _with_kept(wish, parts) if wish.keeps else [part.costs for part in parts]
    placed = choose(found, wish.batch, homes, max_ram=max_ram, max_vram=max_vram)
    logger.info(
        "placement: %d samples at once, hidden states in %s; planned peak %.2f GB of main memory%s",
        placed.micro_batch,
        placed.activations,
        (placed.ram or 0) / 1e9,
        f", {placed.vram / 1e9:.2f} GB on {main}" if placed.vram else "",
    )
    seconds = _seconds(wish, parts, placed.micro_batch, wish.iters)
    return replace(placed, device=str(main), layers=layers, why=why), seconds


def seconds_by_steps(wish: Wish) -> Callable[[int], float]:
    """Estimated seconds of the job by the number of sign steps, from a rehearsal with the whole batch at once."""
    parts = list(_parts(wish))
    return lambda iters: _seconds(wish, parts, wish.batch, iters)


def _seconds(wish: Wish, parts: Sequence[Part], at_once: int, iters: int) -> float:
    about = {"iters": iters, "batch": wish.batch, "at_once": at_once, "samples": wish.samples}
    return sum(part.times * estimate(part.rehearsal, **about) for part in parts)


def _parts(wish: Wish) -> Iterator[Part]:
    """What the heaviest block and the layers outside blocks cost, from rehearsals."""
    tree, stage = wish.subject.tree, wish.stage
    assert tree is not None, "a job that runs blocks has a module tree"
    body = wish.subject.anatomy
    together = [each for blocks in body.block_lists for each in windows(blocks, wish.nblocks)]
    sizes = {each[0]: sum(_bytes(tree.get_submodule(block)) for block in each) for each in together}
    heaviest = max(sizes, key=lambda first: sizes[first])  # what it takes, every other one has room for
    quantized = dict.fromkeys(name for making in stage.makings for name in making.plan.quantized())
    outside = [name for name in quantized if body.layers[name].block is None]
    for name in (heaviest, *outside):
        inside = name == heaviest
        chains = wish.chains if inside else wish.chains_outside
        found = rehearse(stage, name)
        costs = Costs(
            name=name, base=base_memory(), outside=0 if wish.resident else _outside(tree, wish.subject),
            block=0 if wish.resident else sizes[heaviest], fixed=found.whole.peak - per_sample(found),
            per_sample=per_sample(found), states=stage.states, samples=wish.samples, chains=chains,
            calls=found.whole.calls, device=wish.devices.main.type,
        )  # fmt: skip
        # The other blocks by their weights: the time of a block grows with what it multiplies by.
        yield Part(costs, found, sum(sizes.values()) / sizes[heaviest] if inside else 1.0)


def _with_kept(wish: Wish, parts: Sequence[Part]) -> list[Costs]:
    """The costs with the codes of all layers, which stay in memory."""
    kept = int(sum(part.times * part.rehearsal.whole.kept for part in parts))
    return [replace(part.costs, base=part.costs.base + kept) for part in parts]


def place_stream(
    source: TensorSource, makings: Sequence[Making], *, workers: int, max_ram: int | None, measure: bool
) -> tuple[Placement, float | None]:
    """The placement of a stream, and its estimated seconds: as many workers as have room for a layer of a block each.

    Raises PlanError that names the smallest limit that would do.
    """
    placed = Placement(device="cpu", micro_batch=1, workers=workers)
    if max_ram is None and not measure:
        return placed, None
    found = list(_measured_units(source, makings))
    base, most = base_memory(), max((one.peak for one in found), default=0)
    inside = max((one.peak for one in found if not one.outside), default=0)
    fit = workers if max_ram is None else min(workers, (max_ram - base) // max(1, inside))
    if max_ram is not None and (fit < 1 or base + most > max_ram):
        raise PlanError(
            f"max_ram {max_ram:,} bytes is not enough: this process takes {base:,} and its largest layer {most:,}. "
            f"Give --max-ram {rounded(base + most)}"
        )
    why = (f"{fit} of {workers} workers have room for a layer each",) if fit < workers else ()
    seconds = sum(one.seconds for one in found) / fit
    # What `room_for` lets the workers have under way.
    return replace(placed, workers=fit, ram=base + max(most, fit * inside), why=why), seconds


@dataclass(frozen=True, slots=True)
class _Measured:
    """The largest unit of a kind: its peak in bytes, and the seconds that all of the kind will take."""

    outside: bool
    peak: int
    seconds: float


def _measured_units(source: TensorSource, makings: Sequence[Making]) -> Iterator[_Measured]:
    """Every kind of unit, from doing its largest."""
    plans = [making.plan for making in makings]

    def size(unit: Unit) -> int:
        return elements(unit, plans)

    def kind(unit: Unit) -> object:
        schemes = frozenset(tuple(plan.get(name) for plan in plans) for name in unit.layers)
        return unit.outside, unit.fused, schemes

    kinds: dict[object, list[Unit]] = {}
    for unit in units_of(source, plans):
        kinds.setdefault(kind(unit), []).append(unit)
    for alike in kinds.values():
        largest = max(alike, key=size)
        passes = [making.rehearsed(1)[0] for making in makings]
        first, *others = (replace(each, plan=part_of(each.plan, largest)) for each in passes)
        started = time.perf_counter()
        with Tally() as tally:
            quantize(One(source, largest), first.plan, first.steps, first.writers, others=others)
        seconds = time.perf_counter() - started
        everything = seconds * sum(map(size, alike)) / size(largest)
        yield _Measured(largest.outside, tally.peak["cpu"], everything)
    give_back()


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


def _homes(main: torch.device, *, low_vram: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Where hidden states may be kept, best first, and why."""
    if main.type == "cpu":
        nothing = "low_gpu_mem_usage: blocks run on the CPU, so there is no device memory to save"
        return ("memory", "file"), (nothing,) if low_vram else ()
    host = "pinned" if main.type == "cuda" else "memory"
    if low_vram:
        return (host, "file"), ("low_gpu_mem_usage: hidden states stay off the device",)
    return ("device", host, "file"), ()


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
