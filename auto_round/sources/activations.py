"""Quantized layer inputs inside a block: the range of each layer, and fake quantization while the block runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.codecs.base import fake_inputs
from auto_round.core.quantized import Knobs
from auto_round.core.scheme import TensorSpec

SAMPLED = 8192  # inputs of each batch that percentiles go by


@dataclass(frozen=True, slots=True)
class InputGrid:
    """How a layer's inputs are quantized. fixed: what was calibrated, empty when all is found at run time."""

    spec: TensorSpec
    fixed: Knobs


@dataclass(slots=True)
class Limits:
    """Smallest and largest input of one layer so far, 0-dim float32, None before the first.

    sampled: whether a sample of all is kept too, which percentiles below 100 need.
    """

    low: Tensor | None = None
    high: Tensor | None = None
    sampled: bool = True
    sample: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor) -> None:
        """Widen the limits to hold `x`; an empty one, of an expert without tokens, changes nothing."""
        if x.numel():
            low, high = torch.aminmax(x)
            self.low = low if self.low is None else torch.minimum(self.low, low)
            self.high = high if self.high is None else torch.maximum(self.high, high)
            if self.sampled:
                flat = x.flatten()
                self.sample.append(
                    flat[:: -(-flat.numel() // SAMPLED)].clone()
                )  # a view would keep all of `x`

    def within(self, percentile: float) -> tuple[Tensor, Tensor] | None:
        """Limits that hold `percentile` per cent of the inputs, as much outside on either side; None without inputs."""
        if self.low is None or self.high is None:
            return None
        if percentile >= 100:
            return self.low, self.high
        values = torch.cat(self.sample).sort().values
        outside = round(len(values) * (100 - percentile) / 200)  # half of it on either side
        return values[outside], values[len(values) - 1 - outside]


@contextmanager
def quantized_inputs(modules: Mapping[str, nn.Module], grids: Mapping[str, InputGrid]) -> Iterator[None]:
    """While the context lasts, `modules` (layer -> module) get their inputs as `grids` leave them.

    Layers that share an input one after the other, q, k and v for instance, share the work.
    """
    last: list[tuple[Tensor, InputGrid, Tensor]] = []

    def hook(grid: InputGrid) -> Any:
        def replaced(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0]
            # By identity, which costs nothing: transformers hands q, k and v the very same tensor.
            if not (last and last[0][0] is x and _same(last[0][1], grid)):
                last[:] = [(x, grid, fake_inputs(x, grid.spec, grid.fixed))]
            return (last[0][2], *args[1:])

        return replaced

    handles = [modules[name].register_forward_pre_hook(hook(grid)) for name, grid in grids.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _same(a: InputGrid, b: InputGrid) -> bool:
    if a.spec != b.spec or a.fixed.keys() != b.fixed.keys():
        return False
    return all(a.fixed[key] is b.fixed[key] or torch.equal(a.fixed[key], b.fixed[key]) for key in a.fixed)
