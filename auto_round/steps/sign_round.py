"""SignRound: signed gradient descent on rounding offsets and range factors (arXiv:2309.05516, Eq. 3 and Algorithm 1).

Two repairs of the published procedure: the best state is chosen on samples that are held out from training, not on each
step's own random batch; and what is kept is the best of tuned, searched and plain rounding on those samples, so that a
block is never worse than optimised RTN.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from auto_round.codecs.base import codec_of
from auto_round.core.errors import AutoRoundError
from auto_round.core.plan import Plan
from auto_round.core.quantized import NEUTRAL, Knob, Knobs
from auto_round.core.scheme import TensorSpec
from auto_round.sources.base import Block, Needs
from auto_round.steps.base import BlockReport, Step, fakes_of, loss_on, output_loss, specs_of

HELD_OUT_SHARE, HELD_OUT_MOST = 8, 16  # an eighth of the samples, at most 16
CHECKS, CHECK_STEPS = (
    20,
    5,
)  # the held-out loss is measured that often while tuning, at least so many steps apart
LOSS_FACTOR = 1000.0  # keeps small gradients out of underflow; their sign is all that counts
MANY_ITERS, FEW_BITS = 1000, 3  # from that many iterations on, layers of few bits learn at twice the rate


@dataclass(slots=True)
class Trainable:
    """One tuned tensor with its bounds and learning rate."""

    value: Tensor
    knob: Knob
    rate: float


@dataclass(kw_only=True)
class SignRound(Step):
    """Tunes the knobs of all layers of a block together, against the block's float output.

    lr: step size, default 1 / iters, so that the linearly decaying steps add up to half a code.
    minmax_lr: step size of the range factors, default lr. adam: AdamW instead of the sign of the gradient.
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
    seed: int = 42
    needs: Needs = field(default=Needs.FORWARD, init=False)
    requires: Needs = field(default=Needs.FORWARD, init=False)

    def block(
        self, block: Block, plan: Plan, knobs: dict[str, Knobs], report: BlockReport
    ) -> dict[str, Knobs]:
        """The best of tuned, incoming (searched) and neutral knobs on the held-out samples."""
        specs = specs_of(block, plan)
        if not specs or not block.samples:  # what cannot be run keeps what it came with
            return knobs
        train, held_out = _split_samples(block.samples)
        candidates: dict[str, dict[str, Knobs]] = {"plain": dict(block.tied)}
        if any(own is not block.tied.get(name) for name, own in knobs.items()):
            candidates["searched"] = knobs
        for name, candidate in candidates.items():
            report.losses[name] = loss_on(block, held_out, fakes_of(block, plan, candidate), self.batch_size)
        start = min(report.losses, key=lambda name: report.losses[name])
        candidates["tuned"], report.losses["tuned"] = self._tune(
            block, specs, candidates[start], (train, held_out)
        )
        report.kept = min(report.losses, key=lambda name: report.losses[name])
        report.iterations = self.iters
        return candidates[report.kept]

    def _tune(
        self,
        block: Block,
        specs: Mapping[str, TensorSpec],
        start: Mapping[str, Knobs],
        samples: tuple[list[int], list[int]],
    ) -> tuple[dict[str, Knobs], float]:
        """(knobs, held-out loss) after `iters` sign steps from `start`."""
        train, held_out = samples
        tuners = {n: codec_of(s).tuner(block.weights[n], s, start.get(n, NEUTRAL)) for n, s in specs.items()}
        trainables = {n: self._trainables(s, block.weights[n]) for n, s in specs.items()}
        best, best_loss = _snapshot(trainables), math.inf
        update = self._optimizer([t for tensors in trainables.values() for t in tensors.values()])
        batches = _batches(train, self.batch_size * self.gradient_accumulate_steps, self._generator(block))
        for step in range(self.iters + 1):
            if self.best_state and (step % max(CHECK_STEPS, self.iters // CHECKS) == 0 or step == self.iters):
                loss = self._held_out_loss(block, tuners, trainables, held_out)
                if loss < best_loss:
                    best, best_loss = _snapshot(trainables), loss
            if step < self.iters:
                self._accumulate(block, tuners, trainables, next(batches))
                update(1 - step / self.iters)
        if not self.best_state:
            best, best_loss = _snapshot(trainables), self._held_out_loss(block, tuners, trainables, held_out)
        if not math.isfinite(best_loss):
            raise AutoRoundError(
                f"{block.name}: the loss is {best_loss}; the block's output is not finite on this data"
            )
        return {name: {**start.get(name, NEUTRAL), **best[name]} for name in specs}, best_loss

    def _trainables(self, spec: TensorSpec, weight: Tensor) -> dict[str, Trainable]:
        rate = self.lr or 1 / self.iters
        if self.lr is None and self.iters >= MANY_ITERS and spec.bits <= FEW_BITS:
            rate *= 2
        found = {}
        for name, knob in codec_of(spec).knobs(spec, (weight.shape[0], weight.shape[1])).items():
            if knob.per_value or self.minmax:
                own = rate if knob.per_value else (self.minmax_lr or rate)
                value = torch.full(knob.shape, knob.neutral, device=weight.device, requires_grad=True)
                found[name] = Trainable(value, knob, own)
        return found

    def _accumulate(
        self,
        block: Block,
        tuners: Mapping[str, Callable[[Knobs], Tensor]],
        trainables: Mapping[str, dict[str, Trainable]],
        rows: list[int],
    ) -> None:
        """Gradients of the loss over the samples `rows`, in micro-batches."""
        for start in range(0, len(rows), self.batch_size):
            part = rows[start : start + self.batch_size]
            out = block.run(part, _fakes(tuners, trainables))
            share = len(part) / len(rows)
            (output_loss(out, block.target(part), block.valid(part)) * (LOSS_FACTOR * share)).backward()

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
        buffers = [torch.zeros_like(t.value) for t in trainables] if self.momentum else []

        @torch.no_grad()
        def sign_step(decay: float) -> None:
            for index, t in enumerate(trainables):
                grad = t.value.grad
                if grad is None:
                    continue
                if buffers:
                    grad = buffers[index].mul_(self.momentum).add_(grad)
                t.value.sub_(grad.sign(), alpha=t.rate * decay)  # Eq. 3: V <- V - lr * sign(dL/dV)
                t.value.grad = None
            _clamp(trainables)

        return sign_step

    def _held_out_loss(
        self,
        block: Block,
        tuners: Mapping[str, Callable[[Knobs], Tensor]],
        trainables: Mapping[str, dict[str, Trainable]],
        rows: list[int],
    ) -> float:
        with torch.no_grad():
            return loss_on(block, rows, _fakes(tuners, trainables), self.batch_size)

    def _generator(self, block: Block) -> torch.Generator:
        # The block's name goes into the seed, so that a resumed run draws the same samples. One 32-bit number of both:
        # torch ignores the upper half of a seed on the CPU.
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {block.name}".encode()))


def _split_samples(count: int) -> tuple[list[int], list[int]]:
    """(training, held out) sample numbers. A single sample serves as both."""
    held = max(1, min(HELD_OUT_MOST, count // HELD_OUT_SHARE))
    train = list(range(count - held)) or list(range(count))
    return train, list(range(count - held, count))


def _batches(rows: list[int], size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Endless batches of distinct samples; every sample is used before any is used again."""
    size = min(size, len(rows))
    ring: list[int] = []
    while True:
        if len(ring) < size:
            ring += [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
        yield ring[:size]
        ring = ring[size:]


def _fakes(
    tuners: Mapping[str, Callable[[Knobs], Tensor]], trainables: Mapping[str, dict[str, Trainable]]
) -> dict[str, Tensor]:
    return {name: tuner({k: t.value for k, t in trainables[name].items()}) for name, tuner in tuners.items()}


def _snapshot(trainables: Mapping[str, dict[str, Trainable]]) -> dict[str, dict[str, Tensor]]:
    return {
        name: {k: t.value.detach().clone() for k, t in tensors.items()}
        for name, tensors in trainables.items()
    }


@torch.no_grad()
def _clamp(trainables: list[Trainable]) -> None:
    for t in trainables:
        t.value.clamp_(t.knob.low, t.knob.high)
