"""SignRound: signed gradient descent on rounding offsets and range factors (arXiv:2309.05516, Eq. 3 and Algorithm 1).

Three repairs of the published procedure: tuning starts from what the steps before it found; the best state is chosen on
samples that are held out from training, not on each step's own random batch; and what is kept is the best of tuned,
start and plain rounding on those samples.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from auto_round.codecs.base import codec_of
from auto_round.core.errors import AutoRoundError
from auto_round.core.plan import Plan
from auto_round.core.quantized import NEUTRAL, Knobs
from auto_round.core.rounding import cast_to_storage
from auto_round.core.scheme import TensorSpec
from auto_round.sources.base import Block, Needs
from auto_round.steps.base import BlockReport, Step, block_loss, fakes_of, loss_on, specs_of

HELD_OUT_SHARE, HELD_OUT_MOST = 8, 16  # an eighth of the samples, at most 16
CHECKS, CHECK_STEPS = 10, 5  # held-out losses while tuning, at least so many steps apart
BFLOAT16_NOISE = 2.0**-18 / 3  # mean squared relative error of rounding to 8 significant bits, at most
TRIMMED = 0.001  # share of the outputs that an outlier-trimmed loss leaves out
RANGE_SHARE = 1 / 16  # rate of a range that a search has found, to that of the offsets
LOSS_FACTOR = 1000.0  # keeps small gradients out of underflow; their sign is all that counts
VECTOR_STEPS = 15  # a norm or bias moves as a weight of 4 bits would, but is not rounded
AS_GOOD_AS_EXACT = "as good as exact"
MANY_ITERS, FEW_BITS = 1000, 3  # from that many iterations on, layers of few bits learn at twice the rate


@dataclass(slots=True)
class Trainable:
    """One tuned tensor: how far `below` and `above` its `start` it may go, its learning rate, its best value so far."""

    value: Tensor
    start: Tensor
    below: float
    above: float
    rate: float
    best: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Layers of one spec and one width, tuned as one matrix, row upon row: one fake weight for all of them."""

    names: tuple[str, ...]
    rows: list[int]
    tuner: Callable[[Knobs], Tensor]
    tuned: dict[str, Trainable]

    def fakes(self) -> dict[str, Tensor]:
        """Layer -> its weight under the present knobs, differentiable in them."""
        whole = self.tuner({key: t.value for key, t in self.tuned.items()})
        return dict(zip(self.names, whole.split(self.rows)))

    def best(self) -> dict[str, dict[str, Tensor]]:
        """Layer -> its best knobs."""
        parts = {key: _by_layer(t.best, self.rows) for key, t in self.tuned.items()}
        return {name: {key: part[i] for key, part in parts.items()} for i, name in enumerate(self.names)}


@dataclass(frozen=True, slots=True)
class Vectors:
    """Tuned norms and biases: each is its value at the `start`, in storage dtype, plus a number of `step`s."""

    start: dict[str, Tensor]
    step: dict[str, Tensor]
    tuned: dict[str, Trainable]

    def fakes(self) -> dict[str, Tensor]:
        """Name -> its present value, as the file will hold it, differentiable in the steps."""
        return {name: self._value(name, t.value) for name, t in self.tuned.items()}

    def best(self) -> dict[str, Tensor]:
        """Name -> its best value, in storage dtype."""
        return {name: self._value(name, t.best).to(self.start[name].dtype) for name, t in self.tuned.items()}

    def _value(self, name: str, steps: Tensor) -> Tensor:
        start = self.start[name]
        return cast_to_storage(start.float() + self.step[name] * steps, start.dtype)


@dataclass(frozen=True, slots=True)
class Goal:
    """What tuning goes by: samples to train on and to judge by, the held-out loss at the start, and where to stop."""

    train: list[int]
    held_out: list[int]
    start: float
    floor: float


@dataclass(kw_only=True)
class SignRound(Step):
    """Tunes the knobs of all layers of a block together, against the block's float output.

    offset_share: how much of the rounding offsets found before to start from. Half way to nearest rounding, more
    weights lie near the middle between two codes and can still change. published: as in the paper, all samples are
    trained on, the best state is that of the step with the least loss on its own batch, and it is kept in any case.
    lr: step size, default 1 / iters, so that the linearly decaying steps add up to half a code.
    minmax_lr: step size of the range factors, default lr, or a sixteenth of it where they were searched: such a range
    is near its best already, and a step of lr would shift the outer codes. adam: AdamW in place of the sign.
    schedule: factor on the rates by the share of steps done. patience: if above 0, stop so many steps after the best.
    trim_below: in blocks with a layer of at most that many bits, a thousandth of the outputs is left out of the loss
    that is trained on, those furthest off (SignRoundV2, arXiv:2512.04746). norm_bias: norms and biases are tuned too.
    """

    iters: int = 200
    lr: float | None = None
    minmax_lr: float | None = None
    batch_size: int = 8
    gradient_accumulate_steps: int = 1
    minmax: bool = True
    adam: bool = False
    momentum: float = 0.0
    best_state: bool = True
    offset_share: float = 0.5
    published: bool = False
    schedule: Callable[[float], float] = field(default=lambda done: 1 - done)
    patience: int = -1
    trim_below: int = 0
    norm_bias: bool = False
    seed: int = 42
    needs: Needs = field(default=Needs.FORWARD, init=False)
    requires: Needs = field(default=Needs.FORWARD, init=False)

    def block(
        self, block: Block, plan: Plan, knobs: dict[str, Knobs], report: BlockReport
    ) -> dict[str, Knobs]:
        """The best of tuned, incoming and neutral knobs on the held-out samples."""
        specs = specs_of(block, plan)
        if not specs or not block.samples:  # what cannot be run keeps what it came with
            return knobs
        train, held_out = self._split_samples(block.samples)
        candidates: dict[str, dict[str, Knobs]] = {"plain": dict(block.tied)}
        if any(own is not block.tied.get(name) for name, own in knobs.items()):  # else no step found anything
            candidates[report.kept] = knobs
        for name, candidate in candidates.items():
            report.losses[name] = loss_on(block, held_out, fakes_of(block, plan, candidate), self.batch_size)
        start = min(report.losses, key=lambda name: report.losses[name])
        floor = -math.inf if self.published else self._floor(block, held_out)
        if report.losses[start] <= floor:
            report.kept, report.saved, report.why = start, self.iters, AS_GOOD_AS_EXACT
            return candidates[start]
        goal = Goal(train, held_out, report.losses[start], floor)
        state = [
            self._batch(block, names, specs[names[0]], candidates[start]) for names in _alike(block, specs)
        ]
        vectors = self._vectors(block)
        report.losses["tuned"], report.iterations, report.why = self._tune(
            block, specs, [*state, vectors], goal
        )
        report.saved = self.iters - report.iterations
        best = {name: own for batch in state for name, own in batch.best().items()}
        candidates["tuned"] = {name: {**candidates[start].get(name, NEUTRAL), **best[name]} for name in specs}
        report.kept = "tuned" if self.published else min(report.losses, key=lambda name: report.losses[name])
        if report.kept == "tuned":
            block.rewritten = {**block.rewritten, **vectors.best()}
        return candidates[report.kept]

    def _floor(self, block: Block, rows: list[int]) -> float:
        """The loss at which an output is as good as exact: that of storing it in bfloat16, with 8 significant bits.

        Never for a block that is judged by predictions, whose loss has no such scale.
        """
        if block.predict(rows[:1], block.target(rows[:1])) is not None:
            return -math.inf
        squares = [block.target([row]).square().mean().item() for row in rows]
        return BFLOAT16_NOISE * sum(squares) / len(squares)

    def _tune(
        self, block: Block, specs: Mapping[str, TensorSpec], state: Sequence[Batch | Vectors], goal: Goal
    ) -> tuple[float, int, str]:
        """(least held-out loss, steps taken, why they were fewer than `iters`); the best values are left in `state`."""
        trainables = [t for part in state for t in part.tuned.values()]
        best_loss, update = goal.start, self._optimizer(trainables)
        if self.published or not self.best_state:
            best_loss = math.inf
        draws = _draws(goal.train, self.batch_size * self.gradient_accumulate_steps, self._generator(block))
        checks, best_step, step, why = self._checks(), 0, 0, ""
        trim = TRIMMED if min(spec.bits for spec in specs.values()) <= self.trim_below else 0.0
        for step in range(1, self.iters + 1):
            loss = self._accumulate(block, state, next(draws), trim)
            before = best_loss
            if self.published and self.best_state:
                best_loss = _keep(trainables, loss.item(), best_loss)
            update(self.schedule((step - 1) / self.iters))
            if step in checks:
                with torch.no_grad():
                    held = loss_on(block, goal.held_out, _fakes(state), self.batch_size)
                best_loss = _keep(trainables, held, best_loss)
            best_step = step if best_loss < before else best_step
            if best_loss <= goal.floor:
                why = AS_GOOD_AS_EXACT
            elif self.best_state and 0 < self.patience <= step - best_step:
                why = f"no better for {self.patience} steps"
            if why:
                break
        if not math.isfinite(best_loss):
            raise AutoRoundError(
                f"{block.name}: the loss is {best_loss}; the block's output is not finite on this data"
            )
        return best_loss, step, why

    def _checks(self) -> set[int]:
        """The steps after which the held-out loss is measured: the last one, and regular ones before it."""
        if self.published and self.best_state:
            return set()
        if not self.best_state:
            return {self.iters}
        return set(range(self.iters, 0, -max(CHECK_STEPS, self.iters // CHECKS)))

    def _batch(
        self, block: Block, names: tuple[str, ...], spec: TensorSpec, start: Mapping[str, Knobs]
    ) -> Batch:
        rows = [len(block.weights[name]) for name in names]
        own = [start.get(name, NEUTRAL) for name in names]
        fixed = {key: own[0][key] for key in own[0]}
        weight = block.weights[names[0]]
        if len(names) > 1:
            weight = torch.cat([block.weights[name] for name in names])
            shared = set.intersection(*(set(knobs) for knobs in own))
            # Knobs have an entry per group, so they stack as the rows do.
            fixed = {key: torch.cat([knobs[key] for knobs in own]) for key in shared}
        return Batch(
            names, rows, codec_of(spec).tuner(weight, spec, fixed), self._trainables(spec, weight, fixed)
        )

    def _vectors(self, block: Block) -> Vectors:
        """Norms and biases, each value free to move by half a step of a 4-bit grid over its tensor."""
        found = Vectors({}, {}, {})
        for name, vector in block.vectors.items() if self.norm_bias else ():
            start = vector.float()
            found.start[name] = vector
            found.step[name] = (start.amax().clamp(min=0) - start.amin().clamp(max=0)) / VECTOR_STEPS
            zero = torch.zeros_like(start)
            found.tuned[name] = Trainable(
                zero.clone().requires_grad_(), zero, -0.5, 0.5, self.lr or 1 / self.iters, zero.clone()
            )
        return found

    def _trainables(self, spec: TensorSpec, weight: Tensor, start: Knobs) -> dict[str, Trainable]:
        rate = self.lr or 1 / self.iters
        if self.lr is None and self.iters >= MANY_ITERS and spec.bits <= FEW_BITS:
            rate *= 2
        codec, found = codec_of(spec), {}
        for name, knob in codec.knobs(spec, (weight.shape[0], weight.shape[1])).items():
            if not knob.per_value and not self.minmax:
                continue
            # A range that was searched may also grow; one that spans all values of its group only shrinks.
            searched = bool(start) and codec.holds_grid(spec) and not knob.per_value
            own = rate if knob.per_value else self.minmax_lr or (rate * RANGE_SHARE if searched else rate)
            first = start.get(
                name, torch.full(knob.shape, knob.neutral, dtype=torch.float32, device=weight.device)
            )
            if knob.per_value:
                # Not in place: the incoming knobs are a candidate of their own.
                first = first * self.offset_share
            most = 2 * knob.neutral - knob.low if searched else knob.high
            # Bounds move with the start: an offset may go half a code either way from where it begins.
            below, above = knob.low - knob.neutral, most - knob.neutral
            found[name] = Trainable(first.clone().requires_grad_(), first, below, above, own, first.clone())
        return found

    def _accumulate(
        self, block: Block, state: Sequence[Batch | Vectors], rows: list[int], trim: float
    ) -> Tensor:
        """The loss over the samples `rows`, (); its gradients are added up in micro-batches."""
        total = torch.zeros((), dtype=torch.float32)
        for start in range(0, len(rows), self.batch_size):
            part = rows[start : start + self.batch_size]
            share = len(part) / len(
                rows
            )  # so that micro-batches of any size add up to the mean over the step
            loss = block_loss(block, part, _fakes(state), trim) * share
            (loss * LOSS_FACTOR).backward()
            total = total.to(loss.device) + loss.detach()
        return total

    def _optimizer(self, trainables: list[Trainable]) -> Callable[[float], None]:
        """A function that takes one step with the rates times its argument and clears the gradients."""
        if self.adam:
            groups = [
                {"params": [t.value], "lr": t.rate, "rate": t.rate, "weight_decay": 0.0} for t in trainables
            ]
            adam = torch.optim.AdamW(groups)

            def adam_step(decay: float) -> None:
                for group in adam.param_groups:
                    group["lr"] = group["rate"] * decay
                adam.step()
                adam.zero_grad()
                _clamp(trainables)

            return adam_step
        # Nothing to hold without momentum: the buffer of the rounding knob alone is as large as the weights.
        buffers = [torch.zeros_like(t.value) for t in trainables] if self.momentum else []

        @torch.no_grad()
        def sign_step(decay: float) -> None:
            for index, t in enumerate(trainables):
                grad = t.value.grad
                if grad is None:  # of starved experts, whose weights are detached
                    continue
                if buffers:
                    grad = buffers[index].mul_(self.momentum).add_(grad)
                t.value.sub_(grad.sign(), alpha=t.rate * decay)  # Eq. 3: V <- V - lr * sign(dL/dV)
                t.value.grad = None  # freed, not zeroed
            _clamp(trainables)

        return sign_step

    def _split_samples(self, count: int) -> tuple[list[int], list[int]]:
        """(training, held out) sample numbers. A single sample serves as both."""
        held = max(1, min(HELD_OUT_MOST, count // HELD_OUT_SHARE))
        train = list(range(count if self.published else count - held)) or list(range(count))
        return train, list(range(count - held, count))

    def _generator(self, block: Block) -> torch.Generator:
        # The block's name goes into the seed, so that a resumed run draws the same samples. One 32-bit number of both:
        # torch ignores the upper half of a seed on the CPU.
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {block.name}".encode()))


def _draws(rows: list[int], size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Endless batches of distinct samples; every sample is used before any is used again."""
    size = min(size, len(rows))  # a batch never holds a sample twice
    ring: list[int] = []
    while True:
        if len(ring) < size:
            ring += [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
        yield ring[:size]
        ring = ring[size:]


def _alike(block: Block, specs: Mapping[str, TensorSpec]) -> list[tuple[str, ...]]:
    """The layers of `block` in batches; those whose rows are not independent of one another are alone."""
    found: dict[object, list[str]] = {}
    for name, spec in specs.items():
        # Same spec and width: stacked, they are one product and one kernel where each alone would be small.
        apart = codec_of(spec).holds_grid(spec)
        found.setdefault((spec, block.weights[name].shape[1]) if apart else name, []).append(name)
    return [tuple(names) for names in found.values()]


def _by_layer(tensor: Tensor, rows: list[int]) -> tuple[Tensor, ...]:
    per_row = len(tensor) // sum(rows) if len(rows) > 1 else 1
    return tensor.split([count * per_row for count in rows]) if len(rows) > 1 else (tensor,)


def _fakes(state: Sequence[Batch | Vectors]) -> dict[str, Tensor]:
    return {name: weight for part in state for name, weight in part.fakes().items()}


@torch.no_grad()
def _keep(trainables: list[Trainable], loss: float, best_loss: float) -> float:
    """The lower of the two losses; when it is `loss`, the present values become the best ones."""
    if loss >= best_loss:
        return best_loss
    for t in trainables:
        t.best.copy_(t.value)  # in place: nothing is allocated while tuning
    return loss


@torch.no_grad()
def _clamp(trainables: list[Trainable]) -> None:
    for t in trainables:
        # The bounds of every value are made anew: kept, they would be as large as the weights, twice.
        t.value.clamp_(t.start + t.below, t.start + t.above)
