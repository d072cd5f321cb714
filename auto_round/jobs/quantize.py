"""The loop: every planned layer once, in model order, from a source through the steps to the writers.

RTN is the empty list of steps; optimised RTN and SignRound are other lists; streaming is another source.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from auto_round.codecs import base as codecs
from auto_round.codecs.base import codec_of
from auto_round.core.errors import ModelError, SchemeError
from auto_round.core.plan import Plan
from auto_round.core.quantized import NEUTRAL, Knobs, Quantized
from auto_round.core.rounding import all_finite
from auto_round.core.scheme import TensorSpec
from auto_round.sources.base import Block, Needs, Source
from auto_round.steps.base import BlockReport, Step, specs_of


class Writer(Protocol):
    """Takes the quantized layers as they are made."""

    def add(self, name: str, q: Quantized) -> None:
        """One finished layer."""

    def rewrite(self, name: str, tensor: torch.Tensor) -> None:
        """A tensor that is not quantized but has changed, in its storage dtype."""


@dataclass(frozen=True, slots=True)
class BlockResult:
    """What an observer learns about a finished block. tokens, starved: of its experts, see `Block`."""

    name: str
    layers: int
    report: BlockReport
    seconds: float
    tokens: Mapping[str, int] = field(default_factory=dict)
    starved: Collection[str] = ()


class Observer(Protocol):
    """Watches the loop; the library itself prints nothing."""

    def started(self, plan: Plan, blocks: int) -> None:
        """The plan is made; `blocks` blocks will follow."""

    def finished(self, result: BlockResult) -> None:
        """One block is done."""


@dataclass(frozen=True, slots=True)
class Pass:
    """What is made of each block: the layers of a plan, with knobs from the steps, into the writers."""

    plan: Plan
    steps: Sequence[Step]
    writers: Sequence[Writer]


def quantize(
    source: Source,
    plan: Plan,
    steps: Sequence[Step],
    writers: Sequence[Writer],
    observers: Sequence[Observer] = (),
    others: Sequence[Pass] = (),
) -> None:
    """Quantize every layer of `plan` and hand it to each writer.

    others: further plans that are made from the same blocks; what comes next in the model runs on the result of `plan`.
    Raises ModelError naming a layer that is not finite.
    """
    passes = (Pass(plan, steps, writers), *others)
    # The most that any step makes use of; gathered once per block for all of them.
    needs = max((step.needs for each in passes for step in each.steps), default=Needs.NOTHING)
    for each in passes:
        for step in each.steps:
            step.prepare(source, each.plan)
    wanted = dict.fromkeys(name for each in passes for name in each.plan.quantized())
    for block in source.blocks(needs, wanted):
        started = time.perf_counter()
        made = [quantize_block(block, each) for each in passes]
        replaced, report = made[0]
        # Before the clock stops: moving the activations on is part of a block's time.
        source.done(block, replaced)
        seconds = time.perf_counter() - started
        layers = len({name for weights, _ in made for name in weights.layers})
        result = BlockResult(block.name, layers, report, seconds, dict(block.tokens), sorted(block.starved))
        del block, made, replaced  # before the next block is read and tuned, not after it
        for observer in observers:
            observer.finished(result)


class Fakes(Mapping[str, torch.Tensor]):
    """Layer -> what its weight becomes, (O, I) float32; made when it is looked at, for a stream never does.

    rewritten: tensors that changed without being quantized, which are among the values too.
    """

    def __init__(
        self, made: Mapping[str, Quantized], rewritten: Mapping[str, torch.Tensor] = NEUTRAL
    ) -> None:
        self._made, self._rewritten = made, rewritten
        self.layers = tuple(made)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._rewritten:
            return self._rewritten[name]
        return codec_of(self._made[name].spec).dequantize(self._made[name])

    def __iter__(self) -> Iterator[str]:
        yield from self._made
        yield from self._rewritten

    def __len__(self) -> int:
        return len(self._made) + len(self._rewritten)


def quantize_block(block: Block, job: Pass) -> tuple[Fakes, BlockReport]:
    """(what the weights become, what the steps found out) for one block."""
    report, specs = BlockReport(kept="plain"), specs_of(block, job.plan)
    check_finite(block, specs)
    for step in job.steps:
        step.reshape(block, job.plan)
    block.tied, block.rewritten = tied(block, specs, job.plan), dict(block.folded)
    knobs: dict[str, Knobs] = dict(block.tied)
    for step in job.steps:
        knobs = step.block(block, job.plan, knobs, report)
    made = {}
    for name, spec in specs.items():
        q = encode(name, block.weights[name], spec, knobs.get(name, NEUTRAL))
        # Not the codec's: input ranges are found with the block, and are stored beside its weights.
        q = replace(q, inputs=block.inputs.get(name, NEUTRAL))
        made[name] = q
        for writer in job.writers:
            writer.add(name, q)
    for name, tensor in block.rewritten.items():
        for writer in job.writers:
            writer.rewrite(name, tensor)
    return Fakes(made, block.rewritten), report


def tied(block: Block, specs: dict[str, TensorSpec], plan: Plan) -> dict[str, Knobs]:
    """Layer -> what the layers of its fused set must share, for the sets of `block`; layers alone are a set of one."""
    found: dict[str, Knobs] = {}
    sets = [tuple(name for name in specs if name in members) for members in plan.fused]
    alone = [(name,) for name in specs if not any(name in names for names in sets)]
    for names in (*sets, *alone):
        for spec in {specs[name]: None for name in names}:  # only equal specs can share; in model order
            same = [name for name in names if specs[name] == spec]
            shared = codec_of(spec).tie([block.weights[name] for name in same], spec)
            found.update({name: knobs for name, knobs in zip(same, shared) if knobs})
    return found


def check_finite(block: Block, specs: dict[str, TensorSpec]) -> None:
    """Raise ModelError when a weight that is to be quantized has NaN or Inf."""
    for name in specs:
        if not all_finite(block.weights[name]):
            bad = int((~torch.isfinite(block.weights[name])).sum())
            raise ModelError(
                f"{name}.weight has {bad} values that are NaN or Inf. Repair the checkpoint, or keep the layer in "
                f"floating point with ignore_layers={name!r}"
            )


def encode(name: str, weight: torch.Tensor, spec: TensorSpec, knobs: Knobs) -> Quantized:
    """The one place where codes are made. Raises SchemeError when a weight or a stored parameter overflows."""
    reach = codec_of(spec).reach(spec)
    if reach < math.inf and bool((largest := weight.abs().max()) > reach):
        raise SchemeError(
            f"{name}: {largest.item():.3g}-sized weights overflow {spec.dtype}, which holds up to {reach:g} with "
            f"{spec.scale_dtype} scales. Use another scheme, or keep this layer in floating point with ignore_layers"
        )
    q = codecs.encode(weight.detach(), spec, knobs)
    for key, tensor in q.params.items():
        # float16 ends at 65504, and one infinite scale turns a whole group into NaN at load.
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise SchemeError(
                f"{name}: a {key} of {weight.abs().max().item():.3g}-sized weights overflows {spec.scale_dtype}. "
                "Use another scale_dtype, or keep this layer in floating point with ignore_layers"
            )
    return q
