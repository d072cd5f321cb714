"""Memory and time before the work: what one block takes is measured on the real thing, the rest is counted.

`rehearse` runs the job's own loop on one block with random tokens and tallies every tensor; `predict` is plain
arithmetic on what it found; `choose` picks the fastest placement within the limits, or says what the smallest needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from auto_round.core.errors import PlanError
from auto_round.core.placement import Placement
from auto_round.core.plan import Plan
from auto_round.core.quantized import Quantized
from auto_round.jobs.quantize import quantize
from auto_round.models.memory import Tally, give_back, resident_memory
from auto_round.sources.base import Block, Needs, Source
from auto_round.sources.blocks import LiveSource
from auto_round.sources.live_block import LiveBlock
from auto_round.steps.base import Step

SAMPLES = 4  # of a rehearsal: enough for two at a time to be tuned on, and one held out
MORE_ITERS = 4  # in a second, longer run: the difference is the time of iterations alone
CHECKS = 20  # times that the held-out loss is measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What a job takes, in bytes and seconds.

    base: this process before the work. outside: weights outside the blocks that embedding the samples needs. block: the
    heaviest block as stored. fixed, per_sample: tensors while a block is worked on, and for every sample run at once.
    states: hidden states of one sample; chains: copies of them that live at a time. device: kind of the main device.
    """

    base: int
    outside: int
    block: int
    fixed: int
    per_sample: int
    states: int
    chains: int
    samples: int
    device: str = "cpu"
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """Of one block: peak bytes of its tensors without hidden states, and seconds, by samples run at once."""

    bytes_by_batch: Mapping[int, int]
    seconds: float
    seconds_per_iteration: float
    seconds_per_sample: float


class OneBlock(Source):
    """A source of a single block, made when it is asked for."""

    can_run = True

    def __init__(self, source: LiveSource, make: Callable[[], LiveBlock]) -> None:
        self.source, self.make, self.seconds = source, make, 0.0

    def blocks(self, needs: Needs, wanted: Iterable[str], finished: Collection[str] = ()) -> Iterator[Block]:
        """That block."""
        started = time.perf_counter()
        block = self.make()
        self.seconds = time.perf_counter() - started
        yield block

    def done(self, block: Block, replaced: Mapping[str, Tensor]) -> None:
        """As the source does it, but a model in memory keeps its weights."""
        self.source.done(block, {name: block.weights[name].float() for name in replaced})


class Nowhere:
    """A writer that drops what it is given."""

    def add(self, name: str, q: Quantized) -> None:
        """Nothing."""


def rehearse(
    source: Callable[[int], LiveSource], steps: Callable[[int, int], list[Step]], plan: Plan, block: str
) -> Rehearsal:
    """Run the job on `block`. source: from samples at once; steps: from samples at once and iterations."""

    def once(batch: int, iters: int) -> tuple[int, float, float]:
        made = source(batch)
        its = steps(batch, iters)
        needs = max((step.needs for step in its), default=Needs.NOTHING)
        one = OneBlock(made, made.sample(block, needs))
        started = time.perf_counter()
        with Tally() as tally:
            quantize(one, plan, its, [Nowhere()])
        return tally.peak[made.execution.device.type], time.perf_counter() - started, one.seconds

    # Also warms up: the first run pays for imports and for the allocator's first pages, so its time is not used.
    first, _, _ = once(1, 1)
    second, short, observed = once(2, 1)
    _, long, _ = once(2, 1 + MORE_ITERS)
    give_back()
    return Rehearsal(
        {1: first, 2: second}, short, max(0.0, long - short) / MORE_ITERS / 2, observed / SAMPLES
    )


def estimate(rehearsal: Rehearsal, iters: int, batch: int, samples: int) -> float:
    """Seconds for the rehearsed block in earnest."""
    each = rehearsal.seconds_per_sample
    # The rehearsal itself had one iteration on two samples, and every sample went through twice.
    rest = rehearsal.seconds - 2 * rehearsal.seconds_per_iteration - 2 * SAMPLES * each
    tuning = (
        iters * batch * rehearsal.seconds_per_iteration + min(CHECKS, iters) * max(1, samples // 8) * each
    )
    return max(0.0, rest) + (tuning if iters else 0.0) + 2 * samples * each


def costs(
    rehearsal: Rehearsal,
    *,
    base: int,
    outside: int,
    block: int,
    states: int,
    samples: int,
    chains: int,
    device: str,
) -> Costs:
    """`rehearsal` without its hidden states, as a line in the number of samples run at once."""
    one, two = rehearsal.bytes_by_batch[1], rehearsal.bytes_by_batch[2]
    slope = max(0, two - one)  # noise must not make more samples look cheaper
    return Costs(
        base=base, outside=outside, block=block, fixed=max(0, one - slope - SAMPLES * states), per_sample=slope,
        states=states, chains=chains, samples=samples, device=device,
    )  # fmt: skip


def predict(costs: Costs, activations: str, micro_batch: int) -> tuple[int, int]:
    """Peak bytes of (main memory, main device)."""
    store = costs.states * costs.samples
    here = 0 if activations in ("file", "device") else store
    there = store if activations == "device" else 0
    work = costs.fixed + micro_batch * costs.per_sample
    embedding = costs.outside + costs.block + max(1, costs.chains - 1) * here
    if costs.device == "cpu":
        return costs.base + max(embedding, work + costs.chains * here), 0
    return costs.base + max(embedding, costs.block + costs.chains * here), work + costs.chains * there


def choose(
    costs: Costs, wanted: int, homes: Sequence[str], *, max_ram: int | None, max_vram: int | None
) -> Placement:
    """The first placement within the limits: hidden states in the first of `homes` and most samples at once.

    Raises PlanError that names the smallest limit that would do.
    """
    # Divisors only: a batch must be a whole number of turns.
    sizes = [size for size in range(wanted, 0, -1) if wanted % size == 0]
    tried = [(home, size, *predict(costs, home, size)) for home in homes for size in sizes]
    for home, size, ram, vram in tried:
        if (max_ram is None or ram <= max_ram) and (max_vram is None or vram <= max_vram):
            return Placement(device=costs.device, micro_batch=size, activations=home, ram=ram, vram=vram)
    least_ram, least_vram = min(t[2] for t in tried), min(t[3] for t in tried)
    if max_ram is not None and least_ram > max_ram:
        raise PlanError(
            f"max_ram {max_ram:,} bytes is not enough: one sample at a time with hidden states in {homes[-1]} needs "
            f"{least_ram:,}, of which {costs.base:,} are this process and {costs.outside + costs.block:,} weights. "
            f"Give --max-ram {_rounded(least_ram)} or a smaller seqlen"
        )
    assert max_vram is not None, "one of the limits was missed"
    raise PlanError(
        f"max_vram {max_vram:,} bytes is not enough: one sample at a time needs {least_vram:,}. "
        f"Give --max-vram {_rounded(least_vram)}, a smaller seqlen, or more devices"
    )


def _rounded(nbytes: int) -> str:
    return f"{-(-nbytes // 10**7) / 100:.2f}GB"  # rounded up, so that the number said is enough


def spread(weights: Mapping[str, int], devices: Sequence[str]) -> dict[str, str]:
    """Layer -> device for the layers of a block, heaviest first, each to the device with the least; the first device
    starts with half of everything, since it has the hidden states and the rest of the block."""
    load = dict.fromkeys(devices, 0)
    load[devices[0]] = sum(weights.values()) // (2 * len(devices)) if len(devices) > 1 else 0
    placed = {}
    for name in sorted(weights, key=lambda name: -weights[name]):
        device = min(load, key=lambda d: load[d])
        load[device] += weights[name]
        placed[name] = device
    return {name: placed[name] for name in weights if placed[name] != devices[0]}


def base_memory() -> int:
    """Bytes that this process takes before the work, what the allocator keeps given back."""
    give_back()
    return resident_memory()
