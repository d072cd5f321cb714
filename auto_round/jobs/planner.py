"""Memory and time before the work: what its heaviest parts take is measured on the real thing, the rest is counted.

`rehearse` runs the job's own loop on one part with random tokens and tallies every tensor; `predict` is plain
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
from auto_round.formats.base import Format
from auto_round.jobs.quantize import Pass, quantize
from auto_round.models.memory import Tally, give_back, resident_memory
from auto_round.sources.base import Block, Needs, Source
from auto_round.sources.blocks import LiveSource
from auto_round.sources.outside_block import OutsideBlock
from auto_round.steps.base import Step

SAMPLES = 4  # of a rehearsal: enough for some to be tuned on, and one held out
MORE_ITERS = 2  # in a longer run: the difference is the time of iterations alone
FORWARDS = 3  # times of a forward pass that forward and backward take
CHECKS = 10  # times that the held-out loss is measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What one part of a job takes, in bytes: a block, or a layer outside the blocks.

    name: that part. base: this process before the work. outside: weights outside the blocks that embedding the samples
    needs. block: the heaviest block as stored. fixed, per_sample: tensors while the part is worked on, and for every
    sample run at once. states: hidden states of one sample; chains: copies of them that live at a time. calls: what
    each sample keeps beside them, such as its mask. device: kind of the main device.
    """

    name: str = "the heaviest block"
    base: int
    outside: int
    block: int
    fixed: int
    per_sample: int
    states: int
    chains: int
    samples: int
    calls: int = 0
    device: str = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run through a part. peak: bytes of its tensors, without hidden states that are stored. kept: of its quantized
    form. calls: what a sample keeps. seconds, observing: of it all, and of the first pass over the samples."""

    peak: int
    kept: int
    calls: int
    seconds: float
    observing: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """Of one part, with samples one at a time. whole, half: on samples of the real length and of `share` of it.

    iteration: seconds of one sample in one iteration.
    """

    whole: Run
    half: Run
    share: float
    iteration: float


class OneBlock(Source):
    """A source of a single part, made when it is asked for."""

    can_run = True

    def __init__(self, source: LiveSource, make: Callable[[], Block]) -> None:
        self.source, self.make, self.seconds = source, make, 0.0

    def blocks(self, needs: Needs, wanted: Iterable[str], finished: Collection[str] = ()) -> Iterator[Block]:
        """That part."""
        started = time.perf_counter()
        block = self.make()
        self.seconds = time.perf_counter() - started
        yield block

    def done(self, block: Block, replaced: Mapping[str, Tensor]) -> None:
        """As the source does it, but a model in memory keeps its weights."""
        inside = not isinstance(block, OutsideBlock)
        self.source.done(block, {name: block.weights[name].float() for name in replaced if inside})


class Packed:
    """A writer that packs what it is given, for `formats`, and drops it."""

    def __init__(self, formats: Sequence[Format]) -> None:
        self.formats, self.nbytes = formats, 0

    def add(self, name: str, q: Quantized) -> None:
        """One finished layer."""
        self.nbytes += sum(tensor.nbytes for tensor in q.tensors().values())
        for fmt in self.formats:
            fmt.write(q)

    def rewrite(self, name: str, tensor: Tensor) -> None:
        """Nothing."""


StepMaker = Callable[[int, "int | None"], "list[Step]"]


@dataclass(frozen=True, slots=True)
class Making:
    """One plan of a job and the formats that it is made for. steps: from samples at once and iterations, None for those
    of the recipe."""

    plan: Plan
    formats: Sequence[Format]
    steps: StepMaker

    def rehearsed(self, at_once: int, iters: int | None = None) -> tuple[Pass, Packed]:
        """(the same with a writer that drops what it gets, that writer)."""
        writer = Packed(self.formats)
        # The block is run for real later, from weights as they are.
        steps = [step for step in self.steps(at_once, iters) if not step.reshapes]
        return Pass(self.plan, steps, [writer]), writer


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What a rehearsal needs. source: from the length of the samples, for one sample at a time. makings: what the job
    makes of each part. drawn: samples of an iteration. states: bytes of the hidden states of a sample of `seqlen`."""

    source: Callable[[int], LiveSource]
    makings: Sequence[Making]
    seqlen: int
    drawn: int
    states: int

    def run(self, part: str, length: int, iters: int) -> Run:
        """Once through `part`, a block or a layer outside the blocks."""
        made = self.source(length)
        passes, writers = zip(*(making.rehearsed(1, iters) for making in self.makings))
        needs = max((step.needs for each in passes for step in each.steps), default=Needs.NOTHING)
        first, *others = passes
        one = OneBlock(made, made.sample(part, needs))
        started = time.perf_counter()
        with Tally() as tally:
            quantize(one, first.plan, first.steps, first.writers, others=others)
        kind = made.execution.device.type
        # A block that is run stores its targets, in main memory here; a layer outside computes its own when asked.
        stored = kind == "cpu" and needs is not Needs.NOTHING and part not in made.anatomy.layers
        targets = self.states * SAMPLES * length // self.seqlen if stored else 0
        return Run(
            peak=max(0, tally.peak[kind] - targets), kept=sum(w.nbytes for w in writers),
            calls=made.call_bytes // SAMPLES, seconds=time.perf_counter() - started, observing=one.seconds / SAMPLES,
        )  # fmt: skip


def rehearse(stage: Stage, part: str) -> Rehearsal:
    """Run the job on `part`, one sample at a time, which takes no more than any placement will."""
    length = max(1, stage.seqlen // 2)
    # Also warms up: the first run pays for imports and for the allocator's first pages, so its time is not used.
    half = stage.run(part, length, 1)
    whole, longer = (stage.run(part, stage.seqlen, iters) for iters in (1, 1 + MORE_ITERS))
    give_back()
    iteration = max(0.0, longer.seconds - whole.seconds) / MORE_ITERS / stage.drawn
    return Rehearsal(whole=whole, half=half, share=length / stage.seqlen, iteration=iteration)


def estimate(rehearsal: Rehearsal, *, iters: int, batch: int, at_once: int, samples: int) -> float:
    """Seconds for the rehearsed part in earnest, with `at_once` of `batch` samples run together."""
    each, one = rehearsal.whole.observing, rehearsal.iteration
    # Forward and backward are each sample's own; making the weights is done once for those run together.
    own = min(one, FORWARDS * each)
    # The rehearsal itself had one iteration, and every sample went through twice.
    rest = rehearsal.whole.seconds - SAMPLES * one - 2 * SAMPLES * each
    step = -(-batch // at_once) * (one - own) + batch * own
    tuning = iters * step + min(CHECKS, iters) * max(1, samples // 8) * each
    return max(0.0, rest) + (tuning if iters else 0.0) + 2 * samples * each


def per_sample(rehearsal: Rehearsal) -> int:
    """Bytes that every further sample run at once takes: what grows with the length."""
    growth = rehearsal.whole.peak - rehearsal.half.peak
    return max(0, min(rehearsal.whole.peak, int(growth / max(1e-9, 1 - rehearsal.share))))


def predict(costs: Costs, activations: str, micro_batch: int) -> tuple[int, int]:
    """Peak bytes of (main memory, main device)."""
    store = costs.states * costs.samples
    here = 0 if activations in ("file", "device") else store
    there = store if activations == "device" else 0
    work = costs.fixed + micro_batch * costs.per_sample
    base = costs.base + costs.calls * costs.samples
    embedding = costs.outside + costs.block + here  # a second chain is made when the embedding is gone
    if costs.device == "cpu":
        return base + max(embedding, work + costs.chains * here), 0
    return base + max(embedding, costs.block + costs.chains * here), work + costs.chains * there


def choose(
    parts: Sequence[Costs], wanted: int, homes: Sequence[str], *, max_ram: int | None, max_vram: int | None
) -> Placement:
    """The first placement within the limits: hidden states in the first of `homes` and most samples at once.

    Raises PlanError that names the smallest limit that would do.
    """
    # Divisors only: a batch must be a whole number of turns.
    sizes = [size for size in range(wanted, 0, -1) if wanted % size == 0]
    tried = []
    for home in homes:
        for size in sizes:
            peaks = [predict(part, home, size) for part in parts]
            tried.append((home, size, max(ram for ram, _ in peaks), max(vram for _, vram in peaks)))
    for home, size, ram, vram in tried:
        if (max_ram is None or ram <= max_ram) and (max_vram is None or vram <= max_vram):
            return Placement(device=parts[0].device, micro_batch=size, activations=home, ram=ram, vram=vram)
    least_ram, least_vram = min(t[2] for t in tried), min(t[3] for t in tried)
    if max_ram is not None and least_ram > max_ram:
        most = max(parts, key=lambda part: predict(part, homes[-1], 1)[0])
        raise PlanError(
            f"max_ram {max_ram:,} bytes is not enough: one sample at a time with hidden states in {homes[-1]} needs "
            f"{least_ram:,}, of which {most.base:,} are this process and the rest {most.name}. "
            f"Give --max-ram {rounded(least_ram)} or a smaller seqlen"
        )
    assert max_vram is not None, "one of the limits was missed"
    raise PlanError(
        f"max_vram {max_vram:,} bytes is not enough: one sample at a time needs {least_vram:,}. "
        f"Give --max-vram {rounded(least_vram)}, a smaller seqlen, or more devices"
    )


def rounded(nbytes: int) -> str:
    """`nbytes` as a limit is written, rounded up."""
    return f"{-(-nbytes // 10**7) / 100:.2f}GB"


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
