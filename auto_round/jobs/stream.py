"""The loop over a checkpoint that is only read, in parallel: each layer, or set of layers that must agree, is a piece
of work that ends with its bytes in their places. Who does it and in which order changes no byte."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from auto_round.codecs.base import codec_of
from auto_round.core.plan import Plan
from auto_round.core.quantized import Quantized
from auto_round.core.scheme import TensorSpec
from auto_round.jobs.quantize import BlockResult, Observer, Pass, Writer, quantize
from auto_round.jobs.workers import in_threads
from auto_round.models.memory import give_back
from auto_round.sources.base import Block, Needs, Source
from auto_round.sources.tensors import TensorSource
from auto_round.steps.base import BlockReport, Step


class CopyingWriter(Writer, Protocol):
    """A writer that can be told when to copy what stays as it is."""

    def to_copy(self) -> list[str]:
        """Tensors of the source that stay as they are."""

    def copy(self, name: str) -> None:
        """Put the tensor `name` of the source in its place."""


class StreamWriter(CopyingWriter, Protocol):
    """A writer that workers may call at the same time, and that knows what an earlier run has done."""

    @property
    def finished(self) -> Collection[str]:
        """Layers that are written already."""


@dataclass(frozen=True, slots=True)
class Unit:
    """What one worker does at a time: layers of `block`, `fused` when they must share parameters."""

    block: str
    layers: tuple[str, ...]
    fused: bool = False

    @property
    def outside(self) -> bool:
        """Whether it is no part of the model's blocks: an embedding, a head."""
        return self.layers == (self.block,)


class One(Source):
    """A source with nothing but `unit`."""

    can_run = False

    def __init__(self, source: TensorSource, unit: Unit) -> None:
        self._source, self._unit = source, unit

    def blocks(self, needs: Needs, wanted: Iterable[str], finished: Collection[str] = ()) -> Iterator[Block]:
        """The one block."""
        yield self._source.block(self._unit.block, self._unit.layers)


def units(source: TensorSource, plan: Plan, finished: Collection[str] = ()) -> list[Unit]:
    """The work of `plan` in model order, without the layers in `finished`."""
    sharing = {spec: _must_agree(spec) for name in plan.quantized() if (spec := plan[name].weight)}
    fused = {name: members for members in plan.fused for name in members}
    found = []
    for block, layers in source.members(plan.quantized()).items():
        done: set[str] = set()
        for name in layers:
            spec = plan[name].weight
            together = [name]
            if spec is not None and sharing[spec] and name in fused:
                together = [other for other in layers if other in fused[name]]
            if name not in done and not all(other in finished for other in together):
                found.append(Unit(block, tuple(together), len(together) > 1))
            done.update(together)
    return found


def units_of(source: TensorSource, plans: Iterable[Plan], finished: Collection[str] = ()) -> list[Unit]:
    """The units of all plans: what one has made of a weight that was read, the others make too."""
    done, found = set(finished), list[Unit]()
    for plan in plans:
        found += units(source, plan, done)
        done |= {layer for unit in found for layer in unit.layers}
    return found


def elements(unit: Unit, plans: Sequence[Plan]) -> int:
    """Weights of `unit`, whose layers may be in some of the `plans` only."""
    shapes = [next(plan.shapes[name] for plan in plans if name in plan.shapes) for name in unit.layers]
    return sum(rows * columns for rows, columns in shapes)


def room_for(work: Iterable[Unit], plans: Sequence[Plan], workers: int) -> int:
    """Weights that `workers` may have under way: the largest units of blocks one each, or the largest of all.

    An embedding is several times as large as any matrix of a block: for two at a time, every worker would need memory
    that it uses for two pieces of work only.
    """
    sizes = [(elements(unit, plans), unit.outside) for unit in work]
    inside = max((size for size, outside in sizes if not outside), default=0)
    return max(workers * inside, max(sizes, default=(0, False))[0])


def part_of(plan: Plan, unit: Unit) -> Plan:
    """What `plan` has for `unit`: a small plan, since the loop looks through all of it for each block."""
    layers = [name for name in unit.layers if name in plan]
    return plan.only(layers, [frozenset(layers)] if unit.fused else ())


def _must_agree(spec: TensorSpec) -> bool:
    """Whether the layers of a fused set share parameters under `spec`."""
    # Asked with a tiny weight: a list of data types that share something would be a second truth.
    return any(codec_of(spec).tie([torch.ones(1, 1)], spec))


@dataclass(frozen=True, slots=True)
class StreamPass:
    """A `Pass` whose writers may be called by several workers."""

    plan: Plan
    steps: Sequence[Step]
    writers: Sequence[StreamWriter]

    def part(self, unit: Unit) -> Pass:
        """What is to be made of `unit` here."""
        return Pass(part_of(self.plan, unit), self.steps, self.writers)


def work_of(source: TensorSource, passes: Sequence[StreamPass]) -> list[Unit]:
    """The units of all passes that are not done yet."""
    writers = [writer for each in passes for writer in each.writers]
    # A layer counts once every format has it; one that a single format lacks is made again for all.
    done = set.intersection(*({*writer.finished} for writer in writers)) if writers else set()
    return units_of(source, (each.plan for each in passes), done)


def stream(
    source: TensorSource,
    passes: Sequence[StreamPass],
    observers: Sequence[Observer] = (),
    *,
    workers: int,
) -> None:
    """Quantize every layer of the plans and copy every other tensor, `workers` at a time."""
    for each in passes:
        for step in each.steps:
            step.prepare(source, each.plan)
    layers = work_of(source, passes)
    progress = Progress(layers, observers)
    work: list[_Piece] = [
        _Piece(tuple({shard for layer in unit.layers for shard in source.shards(layer)}), unit)
        for unit in layers
    ]
    for writer in (writer for each in passes for writer in each.writers):
        work += [_Piece(source.store.shards(name), _copying(writer, name)) for name in writer.to_copy()]
    # In model order, unless the store says that it has tensors at hand in another one.
    work.sort(key=lambda piece: max(piece.shards, default=0))
    source.store.expect(Counter(shard for piece in work for shard in piece.shards))

    def do(piece: _Piece) -> BlockResult | None:
        result = None
        if isinstance(piece.work, Unit):
            if piece.work.outside:
                give_back()  # what smaller pieces have left in the heaps of the workers, before the largest begins
            result = run_unit(source, passes, piece.work)
        else:
            piece.work()
        source.store.done(piece.shards)
        return result

    def announce(piece: _Piece) -> None:
        if isinstance(piece.work, Unit):
            for layer in piece.work.layers:
                source.announce(layer)

    def size(piece: _Piece) -> int:
        return elements(piece.work, plans) if isinstance(piece.work, Unit) else 0

    plans = [each.plan for each in passes]
    room = room_for(layers, plans, workers)
    for result in in_threads(do, work, workers=workers, upcoming=announce, size=size, room=room):
        if result is not None:
            progress.add(result)


def run_unit(source: TensorSource, passes: Sequence[StreamPass], unit: Unit) -> BlockResult | None:
    """Quantize the layers of `unit` and hand them to the writers of `passes`."""
    seen = _Seen()
    first, *others = (each.part(unit) for each in passes)
    quantize(One(source, unit), first.plan, first.steps, first.writers, [seen], others)
    return seen.result


@dataclass(frozen=True, slots=True)
class _Piece:
    """Something to do, and the shards that it reads."""

    shards: tuple[int, ...]
    work: Unit | Callable[[], None]


def _copying(writer: StreamWriter, name: str) -> Callable[[], None]:
    return lambda: writer.copy(name)


class _Seen:
    """An observer of one unit."""

    result: BlockResult | None = None

    def started(self, plan: Plan, blocks: int) -> None:
        """Nothing to do."""

    def finished(self, result: BlockResult) -> None:
        """Keep the result."""
        self.result = result


class Progress:
    """Tells observers of a block when the last of its units is done."""

    def __init__(self, work: Sequence[Unit], observers: Sequence[Observer]) -> None:
        self._observers = observers
        self._missing: dict[str, int] = {}
        for unit in work:
            self._missing[unit.block] = self._missing.get(unit.block, 0) + 1
        self._results: dict[str, list[BlockResult]] = {}

    def add(self, result: BlockResult) -> None:
        """A unit is done."""
        results = self._results.setdefault(result.name, [])
        results.append(result)
        if len(results) < self._missing[result.name]:  # units of a block end in any order
            return
        whole = BlockResult(
            result.name,
            sum(part.layers for part in results),
            BlockReport(kept=result.report.kept),
            sum(part.seconds for part in results),
        )
        for observer in self._observers:
            observer.finished(whole)


class Locked:
    """A writer that cannot be called by several workers at a time, for workers."""

    def __init__(self, writer: CopyingWriter) -> None:
        self._writer, self._lock = writer, threading.Lock()
        self.finished: Collection[str] = ()

    def add(self, name: str, q: Quantized) -> None:
        """One finished layer."""
        with self._lock:
            self._writer.add(name, q)

    def rewrite(self, name: str, tensor: Tensor) -> None:
        """A changed tensor that is not quantized."""
        with self._lock:
            self._writer.rewrite(name, tensor)

    def to_copy(self) -> list[str]:
        """What the writer says."""
        return self._writer.to_copy()

    def copy(self, name: str) -> None:
        """One tensor that stays as it is."""
        with self._lock:
            self._writer.copy(name)
