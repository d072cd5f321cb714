"""Gradients of what a model predicts, for weights and inputs of the layers of one block and one sample at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from auto_round.sources.activations import changed_inputs
from auto_round.sources.expert_inputs import changed_expert_inputs
from auto_round.sources.live_block import LiveBlock


@dataclass(frozen=True, slots=True)
class Gradients:
    """Of one sample. weights: layer -> (O, I) float32. inputs: layer -> pairs (inputs (..., I), their gradient).

    The gradient of an input is what goes through that layer alone, also where several layers get the same tensor.
    """

    weights: Mapping[str, Tensor]
    inputs: Mapping[str, Sequence[tuple[Tensor, Tensor]]] = field(default_factory=dict)


class GradientBlock(LiveBlock):
    """A block as it is, for gradients and nothing else: its output is not kept."""

    def gradients(
        self, row: int, above: Tensor, layers: Sequence[str], *, inputs: bool
    ) -> tuple[Gradients, Tensor]:
        """(those of `layers`, that of the hidden states that arrive here) when that of the output is `above` (1, T, H).

        inputs: whether those of the layers' inputs are wanted too.
        """
        states = self._chain.plain[[row]].to(self._execution.device).requires_grad_()
        names = {self._layers[layer].parameter for layer in layers}
        leaves = {name: self._parameter(name).detach().requires_grad_() for name in names}
        with torch.enable_grad(), self._watched(layers if inputs else ()) as seen:
            out = self.differentiable(row, states, leaves)
        pairs = [(layer, x) for layer, tensors in seen.items() for x in tensors]
        sought = [states, *leaves.values(), *(x for _, x in pairs)]
        # None: an expert that no token went to.
        found = torch.autograd.grad(out, sought, above.to(out.device), allow_unused=True)
        of_weights = dict(zip(leaves, found[1:], strict=False))
        weights = {}
        for layer in layers:
            gradient = of_weights[self._layers[layer].parameter]
            if gradient is not None:
                weights[layer] = self._layers[layer].matrix(gradient)
        of_inputs: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for (layer, x), gradient in zip(pairs, found[1 + len(leaves) :], strict=True):
            if gradient is not None:
                of_inputs.setdefault(layer, []).append((x.detach(), gradient))
        arrived = torch.zeros_like(states) if found[0] is None else found[0]
        return Gradients(weights, of_inputs), arrived.float()

    @contextmanager
    def _watched(self, layers: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
        """Layer -> what it gets while the context lasts, each an alias of its own to be differentiated by."""
        seen: dict[str, list[Tensor]] = {}

        def note(layer: str, x: Tensor) -> Tensor:
            seen.setdefault(layer, []).append(x.view_as(x))
            return seen[layer][-1]

        plain = [layer for layer in layers if self._layers[layer].piece is None]
        with ExitStack() as stack:
            stack.enter_context(changed_inputs({layer: self._submodule(layer) for layer in plain}, note))
            for experts in self._experts if layers else ():
                module = self._submodule(experts.path)
                stack.enter_context(changed_expert_inputs(module, experts, note))
            yield seen


def predicted(logits: Tensor, valid: Tensor | None, generator: torch.Generator) -> Tensor:
    """Minus the log-probability of tokens drawn from the predictions `logits` (1, T, V) themselves, summed.

    The mean of its squared gradient is the Fisher information: the curvature of the KL divergence (nats) from these
    predictions. valid: (1, T) tokens that count.
    """
    logp = logits.float().log_softmax(-1)[0]
    drawn = torch.multinomial(logp.detach().cpu().exp(), 1, generator=generator).to(logp.device)
    lost = -logp.gather(1, drawn)[:, 0]
    return (lost if valid is None else lost[valid[0]]).sum()


Visit = tuple[Mapping[str, Tensor], Iterator[Gradients]]
Predictor = Callable[[Sequence[int], Tensor], Tensor]
