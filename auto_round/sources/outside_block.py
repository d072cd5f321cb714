"""A layer after the blocks, such as the head, as a block of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from auto_round.codecs.base import fake_inputs
from auto_round.core.errors import ModelError
from auto_round.core.quantized import Knobs
from auto_round.core.scheme import TensorSpec
from auto_round.models.anatomy import Layer
from auto_round.sources.activations import InputGrid, Limits
from auto_round.sources.base import Block
from auto_round.sources.live_block import Chain, Execution


class OutsideBlock(Block):
    """One layer after the blocks, lm_head for instance. Its target is computed when asked for: it is large."""

    def __init__(
        self,
        layer: Layer,
        module: nn.Module,
        execution: Execution,
        inputs: Chain | None,
        valid: Tensor | None = None,
        *,
        shared: bool = False,
    ) -> None:
        self._shared = shared  # an embedding, whose weight may be the head's too
        self.name, self._layer, self._module, self._execution = layer.name, layer, module, execution
        self._inputs, self._valid = inputs, valid
        self._grid: InputGrid | None = None
        weight = module.get_parameter("weight").detach().to(execution.device)
        self.weights = {layer.name: weight.t() if layer.transposed else weight}
        # Without samples, steps that run a block leave it alone and those that go by statistics do not.
        self.samples = 0 if inputs is None or not execution.tune_outside else inputs.plain.shape[0]

    def importance(self, layer: str) -> Tensor | None:
        """Sum of squares of each input channel over all samples."""
        if self._inputs is None:
            return None
        squares = [x.square().sum(0) for x in self._inputs.plain.tokens(self._valid)]
        return torch.stack(squares).sum(0).to(self._execution.device)

    def valid(self, rows: Sequence[int]) -> Tensor | None:
        """Tokens that are no padding."""
        return None if self._valid is None else self._valid[list(rows)].to(self._execution.device)

    def target(self, rows: Sequence[int]) -> Tensor:
        """Output of the original layer."""
        return self._apply(self._chain.plain[list(rows)], self.weights[self.name])

    def run(self, rows: Sequence[int], weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """From the quantized chain's hidden states."""
        x = self._chain.quantized[list(rows)].to(self._execution.device)
        if weights and self._grid is not None:
            x = fake_inputs(x, self._grid.spec, self._grid.fixed)
        return self._apply(x, (weights or self.weights)[self.name])

    def input_limits(self, layer: str, percentile: float = 100.0) -> tuple[Tensor, Tensor] | None:
        """Of the float chain."""
        if self._inputs is None:
            return None
        limits = Limits()
        for x in self._inputs.plain.tokens(self._valid):
            limits.add(x)
        return limits.within(percentile)

    def quantize_inputs(self, acts: Mapping[str, tuple[TensorSpec, Knobs]]) -> None:
        """While the layer runs."""
        super().quantize_inputs(acts)
        self._grid = next((InputGrid(*act) for act in acts.values()), None)

    @property
    def _chain(self) -> Chain:
        if self._inputs is None:
            raise ModelError(f"{self.name}: no inputs were captured, so it cannot be run")
        return self._inputs

    def _apply(self, hidden: Tensor, weight: Tensor) -> Tensor:
        x = hidden.to(self._execution.device)
        with self._execution.autocast():
            # No bias: it is the same on both sides of a loss.
            return nn.functional.linear(x, weight.float()).float()

    @torch.no_grad()
    def settle(self, replaced: Mapping[str, Tensor]) -> None:
        """Give the module the weight `replaced`; a head's tie to the embedding is cut, not followed."""
        for weight in replaced.values():
            old = self._module.get_parameter("weight")
            new = (weight.t() if self._layer.transposed else weight).to(old.device, old.dtype)
            if self._shared:
                old.data = new.contiguous()
            else:
                self._module.weight = nn.Parameter(new.contiguous(), requires_grad=False)
