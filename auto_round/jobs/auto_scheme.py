"""Which scheme each layer gets within a budget of bits: what a choice costs the model's predictions, and a knapsack.

To second order, the KL divergence from the original's predictions is half the squared error of a layer's outputs times
their Fisher information: the squared gradient of log-probabilities of tokens that the model draws itself (Amari,
Natural gradient works efficiently in learning, 1998). Outputs count one by one, for rows are rounded independently.
One pass forward and one backward serve all options.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from auto_round.codecs.base import codec_of, fake_inputs, stored_inputs
from auto_round.core.allocation import Option, allocate
from auto_round.core.errors import PlanError
from auto_round.core.scheme import FLOAT_BITS, Scheme, TensorSpec
from auto_round.core.selection import matches
from auto_round.jobs.quantize import Pass, quantize_block
from auto_round.sources.base import Block
from auto_round.sources.blocks import LiveSource

NSAMPLES, SEQLEN = 16, 256
"""Upstream's numbers; the divergence of single layers is within a fifth of the measured one with so many."""
NEAR = 1e-3  # bits per weight by which a budget may miss what is possible, since people write 4.16 for 4.1563


@dataclass(frozen=True, slots=True)
class Candidates:
    """What there is to choose. schemes: by label. layers: layer -> (O, I). groups: of layers that must agree.

    codes_only: whether bits are those of codes, without scales. taken, counted: bits and weights of layers whose scheme
    is fixed, which count too.
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

    loss: KL divergence in nats per token before tuning, that of every layer alone added up.
    alone: label -> (bits, loss) with all layers alike. measured: what it was chosen by, for `at`.
    """

    chosen: Mapping[str, Scheme]
    base: str
    bits: float
    loss: float
    alone: Mapping[str, tuple[float, float]]
    counts: Mapping[str, int]
    measured: Sensitivities

    def at(self, avg_bits: float) -> Mix:
        """The choice for another budget; nothing is measured again. Raises PlanError for one that is not possible."""
        return self.measured.choose(avg_bits)

    def flat(self) -> dict[str, dict[str, object]]:
        """Layer -> flat settings, as `layer_config` takes them."""
        return {layer: scheme.to_flat() for layer, scheme in self.chosen.items()}

    def __str__(self) -> str:
        parts = ", ".join(f"{count} layers {label}" for label, count in self.counts.items())
        others = (f"{label} {bits:.2f} bits {loss:.3g}" for label, (bits, loss) in self.alone.items())
        return (
            f"{self.bits:.3f} bits per weight: {parts}; the layers' KL before tuning adds up to {self.loss:.3g} "
            f"(all alike: {', '.join(others)})"
        )


class Sensitivities:
    """Loss of every layer under every scheme, in nats per token."""

    def __init__(self, candidates: Candidates) -> None:
        self.candidates = candidates
        self.losses: dict[str, dict[str, float]] = {
            layer: dict.fromkeys(candidates.schemes, 0.0) for layer in candidates.layers
        }
        self._seen: set[str] = set()

    def measure(self, source: LiveSource, passes: Mapping[str, Pass], tokens: int, seed: int) -> None:
        """Go through the model backwards. passes: label -> how weights get that scheme. tokens: those that count."""
        for block, samples in source.backwards(self.candidates.layers, seed):
            layers = [layer for layer in block.weights if layer in self.candidates.layers]
            if not layers:
                continue
            errors = {label: _errors(block, layers, each) for label, each in passes.items()}
            for products in samples:
                met = ((layer, x, gradient) for layer in layers for x, gradient in products.get(layer, ()))
                for layer, x, gradient in met:
                    if (gradient.shape[1], x.shape[1]) != self.candidates.layers[layer]:
                        continue  # a matrix that its model reads in pieces, as DeepSeek-V4 does
                    self._seen.add(layer)
                    own = {label: of_label[layer] for label, of_label in errors.items() if of_label}
                    self._add(layer, block.weights[layer], own, x, gradient / (2 * tokens) ** 0.5)
        self._pool()

    def _add(
        self, layer: str, weight: Tensor, errors: Mapping[str, Tensor], x: Tensor, gradient: Tensor
    ) -> None:
        """What `layer` loses for inputs `x` (N, I); errors: label -> what is added to its `weight`."""
        for label, error in errors.items():
            act = self.candidates.schemes[label].act
            self.losses[layer][label] += _lost(weight, error, act, x, gradient)

    def _pool(self) -> None:
        """Give layers whose products were not seen, experts without tokens above all, what others lose per weight."""
        if not self._seen:
            return
        for group in self.candidates.groups:
            known = [layer for layer in group if layer in self._seen] or list(self._seen)
            weights = sum(map(self.candidates.weights_of, known))
            for layer in (layer for layer in group if layer not in self._seen):
                share = self.candidates.weights_of(layer) / weights
                for label in self.candidates.schemes:
                    self.losses[layer][label] = share * sum(self.losses[other][label] for other in known)

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
            floats = there.schemes[label].weight is None
            return -1 if floats else sum(map(there.weights_of, of_label[label]))

        def told(picks: Sequence[int]) -> tuple[float, float]:
            picked = [group[at] for group, at in zip(options, picks, strict=True)]
            return (there.taken + sum(o.cost for o in picked)) / weights, sum(o.loss for o in picked)

        bits, loss = told(found)
        return Mix(
            chosen={layer: there.schemes[label] for label, layers in of_label.items() for layer in layers},
            base=max(labels, key=size), bits=bits, loss=loss,
            alone={label: told([at] * len(options)) for at, label in enumerate(labels)},
            counts={label: len(layers) for label, layers in of_label.items()}, measured=self,
        )  # fmt: skip

    def _option(self, group: Sequence[str], label: str) -> Option:
        scheme = self.candidates.schemes[label]
        return Option(
            self.candidates.bits(group, scheme),
            sum(self.losses[layer][label] for layer in group),
        )


def _errors(block: Block, layers: Sequence[str], each: Pass) -> dict[str, Tensor]:
    """Layer -> what quantizing adds to its weight (O, I), in bfloat16; of those that the scheme quantizes."""
    part = replace(each, plan=each.plan.only(layers, each.plan.fused))
    if not part.plan.quantized():
        return {}
    made, _ = quantize_block(block, part)
    return {layer: (made[layer].float() - block.weights[layer].float()).bfloat16() for layer in layers}


def _lost(weight: Tensor, error: Tensor, act: TensorSpec | None, x: Tensor, gradient: Tensor) -> float:
    """Squared error of outputs times their gradients (N, O), summed, when `error` is added to `weight` (O, I).

    act: how the inputs `x` (N, I) are quantized.
    """
    if act is None:
        return float((x @ error.float().T * gradient).square().sum())
    seen = fake_inputs(x, act, stored_inputs(act, *torch.aminmax(x)))
    # Errors of inputs are in all outputs at once, so that they count by the gradients of inputs.
    of_inputs = (seen - x) * (gradient @ weight.float())
    return float(of_inputs.square().sum() + (seen @ error.float().T * gradient).square().sum())


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
