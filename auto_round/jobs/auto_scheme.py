"""Which scheme each layer gets within a budget of bits: what a choice costs the model's predictions, and a knapsack.

To second order, the KL divergence from the original's predictions is half the squared error of each weight times its
Fisher information, the mean square of the gradient of log-probabilities of tokens that the model draws itself
(Amari, Natural gradient works efficiently in learning, 1998; its diagonal: LeCun et al., Optimal Brain Damage, 1990).
One pass forward and one backward serve all options.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from auto_round.codecs.base import codec_of, fake, fake_inputs, stored_inputs
from auto_round.core.allocation import Option, allocate
from auto_round.core.errors import PlanError
from auto_round.core.quantized import NEUTRAL
from auto_round.core.scheme import FLOAT_BITS, Scheme, TensorSpec
from auto_round.core.selection import matches
from auto_round.sources.blocks import LiveSource
from auto_round.sources.gradients import Gradients

NSAMPLES, SEQLEN = 16, 256
"""Upstream's numbers; the divergence of single layers is within a fifth of the measured one with so many."""
NEAR = 1e-3  # bits per weight by which a budget may miss what is possible, since people write 4.16 for 4.1563


@dataclass(frozen=True, slots=True)
class Candidates:
    """What there is to choose. labels: of `schemes`. layers: layer -> (O, I). groups: layers that must agree.

    taken, counted: bits and weights of layers whose scheme is fixed, which count too.
    """

    schemes: Mapping[str, Scheme]
    layers: Mapping[str, tuple[int, int]]
    groups: Sequence[Sequence[str]]
    codes_only: bool = False
    taken: int = 0
    counted: int = 0

    def bits(self, layers: Iterable[str], scheme: Scheme) -> int:
        """Bits that `layers` take."""
        return sum(stored_bits(scheme, self.layers[layer], codes_only=self.codes_only) for layer in layers)

    def check(self, avg_bits: float) -> tuple[int, int]:
        """(Least, most) bits of all choices. Raises PlanError when an average of `avg_bits` is not between."""
        costs = [[self.bits(group, scheme) for scheme in self.schemes.values()] for group in self.groups]
        least, most = (self.taken + sum(map(end, costs)) for end in (min, max))
        low, high = least / self.weights(), most / self.weights()
        if not low - NEAR <= avg_bits <= high + NEAR:
            raise PlanError(
                f"avg_bits {avg_bits:g} is not possible with {', '.join(self.schemes)}: these take {low:.3f} to "
                f"{high:.3f} bits per weight, scales {'not ' if self.codes_only else ''}included"
            )
        return least, most

    def weights_of(self, layer: str) -> int:
        """Those of `layer`."""
        rows, columns = self.layers[layer]
        return rows * columns

    def weights(self) -> int:
        """Those that the average is over."""
        return self.counted + sum(map(self.weights_of, self.layers))


@dataclass(frozen=True, slots=True)
class Mix:
    """What was chosen. base: label of the scheme that most weights have. bits: on average. counts: label -> layers.

    loss: predicted KL divergence in nats per token, when rounded. alone: label -> (bits, loss) with all layers alike.
    """

    chosen: Mapping[str, Scheme]
    base: str
    bits: float
    loss: float
    alone: Mapping[str, tuple[float, float]]
    counts: Mapping[str, int]

    def __str__(self) -> str:
        parts = ", ".join(f"{count} layers {label}" for label, count in self.counts.items())
        others = (f"{label} {bits:.2f} bits {loss:.3g}" for label, (bits, loss) in self.alone.items())
        return (
            f"{self.bits:.3f} bits per weight: {parts}; predicted KL before tuning {self.loss:.3g} "
            f"(all layers alike: {', '.join(others)})"
        )


class Sensitivities:
    """Loss of every layer under every scheme, in nats per token."""

    def __init__(self, candidates: Candidates, *, searched: bool) -> None:
        """searched: whether ranges will be searched, or weights plainly rounded."""
        self.candidates, self._searched = candidates, searched
        self.losses: dict[str, dict[str, float]] = {
            layer: dict.fromkeys(candidates.schemes, 0.0) for layer in candidates.layers
        }

    def measure(self, source: LiveSource, tokens: int, seed: int) -> None:
        """Go through the model backwards. tokens: those that count."""
        inputs = any(scheme.act is not None for scheme in self.candidates.schemes.values())
        for weights, samples in source.backwards(self.candidates.layers, seed, inputs=inputs):
            squares: dict[str, Tensor] = {}
            for found in samples:
                for layer, gradient in found.weights.items():
                    # One sample at a time: the square of a sum over samples would be another thing.
                    total = squares.setdefault(layer, torch.zeros_like(gradient))
                    total.addcmul_(gradient, gradient)
                self._add_inputs(found, tokens)
            for layer, square in squares.items():
                self._add_weights(layer, weights[layer].float(), square / tokens)

    def _add_inputs(self, found: Gradients, tokens: int) -> None:
        for label, scheme in self.candidates.schemes.items():
            for layer, pairs in found.inputs.items() if scheme.act is not None else ():
                assert scheme.act is not None, "looked at above"
                for x, gradient in pairs:
                    fixed = stored_inputs(scheme.act, *torch.aminmax(x.float()))
                    error = fake_inputs(x, scheme.act, fixed).float() - x.float()
                    lost = (error * gradient.float()).square().sum()
                    self.losses[layer][label] += lost.item() / (2 * tokens)

    def _add_weights(self, layer: str, weight: Tensor, information: Tensor) -> None:
        for label, scheme in self.candidates.schemes.items():
            spec = scheme.weight
            if spec is None:
                continue
            knobs = NEUTRAL
            if self._searched:
                knobs = codec_of(spec).search(weight, spec, information.mean(0))
            error = fake(weight, spec, knobs) - weight
            self.losses[layer][label] += (information * error.square()).sum().item() / 2

    def choose(self, avg_bits: float) -> Mix:
        """The choice of least predicted loss. Raises what `Candidates.check` raises."""
        there, labels, weights = self.candidates, list(self.candidates.schemes), self.candidates.weights()
        options = [[self._option(group, label) for label in labels] for group in there.groups]
        least, most = there.check(avg_bits)
        budget = min(max(round(avg_bits * weights), least), most)
        found = allocate(options, budget - there.taken)
        of_label: dict[str, list[str]] = {label: [] for label in labels}
        for group, at in zip(there.groups, found, strict=True):
            of_label[labels[at]] += group

        def size(label: str) -> int:
            return (
                sum(map(there.weights_of, of_label[label])) if there.schemes[label].weight is not None else -1
            )

        def told(picks: Sequence[int]) -> tuple[float, float]:
            picked = [group[at] for group, at in zip(options, picks, strict=True)]
            return (there.taken + sum(o.cost for o in picked)) / weights, sum(o.loss for o in picked)

        bits, loss = told(found)
        return Mix(
            chosen={layer: there.schemes[label] for label, layers in of_label.items() for layer in layers},
            base=max(labels, key=size), bits=bits, loss=loss,
            alone={label: told([at] * len(options)) for at, label in enumerate(labels)},
            counts={label: len(layers) for label, layers in of_label.items()},
        )  # fmt: skip

    def _option(self, group: Sequence[str], label: str) -> Option:
        scheme = self.candidates.schemes[label]
        return Option(
            self.candidates.bits(group, scheme),
            sum(self.losses[layer][label] for layer in group),
        )


def stored_bits(scheme: Scheme, shape: tuple[int, int], *, codes_only: bool = False) -> int:
    """Bits of a matrix of `shape` (O, I) with everything that is stored for it, or of its codes alone."""
    count, spec = shape[0] * shape[1], scheme.weight
    if spec is None:
        return FLOAT_BITS * count
    return round(count * (spec.bits if codes_only else _cost(spec, shape)))


@cache
def _cost(spec: TensorSpec, shape: tuple[int, int]) -> float:
    return codec_of(spec).cost(spec, shape)


def agreeing(
    layers: Mapping[str, str | None], fused: Iterable[Iterable[str]], shared: Iterable[Iterable[str]]
) -> list[list[str]]:
    """`layers` (layer -> its block) in groups that must have the same scheme, in model order.

    fused: sets of layers. shared: sets of patterns, each of which joins what it matches inside one block.
    """
    joined = {layer: layer for layer in layers}

    def first(layer: str) -> str:
        while joined[layer] != layer:
            layer = joined[layer]
        return layer

    sets = [[layer for layer in members if layer in joined] for members in fused]
    for patterns in map(tuple, shared):
        blocks: dict[str | None, list[str]] = {}
        for layer, block in layers.items():
            if any(matches(pattern, layer) for pattern in patterns):
                blocks.setdefault(block, []).append(layer)
        sets += blocks.values()
    for members in sets:
        for layer in members[1:]:
            joined[first(layer)] = first(members[0])
    groups: dict[str, list[str]] = {}
    for layer in layers:
        groups.setdefault(first(layer), []).append(layer)
    return list(groups.values())
