"""Gradients of what a model predicts for the outputs of the layers of one block, one sample at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from auto_round.models.experts import Experts, Piece
from auto_round.sources.base import Block
from auto_round.sources.expert_inputs import matrix_product, own_products
from auto_round.sources.live_block import LiveBlock

Products = Mapping[str, Sequence[tuple[Tensor, Tensor]]]
"""Layer -> pairs of its inputs (N, I) and the gradient of its outputs for them (N, O), float32; of one sample."""
Visit = tuple[Block, Iterator[Products]]
Predictor = Callable[[Sequence[int], Tensor], Tensor]
Note = Callable[[str, Tensor, Tensor], Tensor]


class GradientBlock(LiveBlock):
    """A block as it is, through which gradients go back."""

    def products(self, row: int, above: Tensor) -> tuple[Products, Tensor]:
        """(Products of its layers, gradient of the hidden states that arrive) when that of the output is `above`."""
        states = self._chain.plain[[row]].to(self._execution.device).requires_grad_()
        plain = {n: self._submodule(n) for n, layer in self._layers.items() if layer.piece is None}
        fused = [(self._submodule(experts.path), experts) for experts in self._experts]
        with torch.enable_grad(), watched(plain, fused) as seen:
            out = self.differentiable(row, states)
        return gradients(out, states, seen, above.to(out.device))


def gradients(
    out: Tensor, states: Tensor, seen: Mapping[str, list[tuple[Tensor, Tensor]]], above: Tensor | None = None
) -> tuple[Products, Tensor]:
    """(Products, gradient of `states`) when that of `out` is `above`; seen: what `watched` saw on the way."""
    # Some models compute a part without gradients; None is that of an output that nobody used.
    pairs = [(layer, x, y) for layer, met in seen.items() for x, y in met if y.requires_grad]
    found = torch.autograd.grad(out, [states, *(y for _, _, y in pairs)], above, allow_unused=True)
    products: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for (layer, x, _), gradient in zip(pairs, found[1:], strict=True):
        if gradient is not None:
            flat = (x.flatten(0, -2).float(), gradient.flatten(0, -2).float())
            products.setdefault(layer, []).append(flat)
    return products, torch.zeros_like(states) if found[0] is None else found[0].float()


@contextmanager
def watched(
    modules: Mapping[str, nn.Module], fused: Iterable[tuple[nn.Module, Experts]] = ()
) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """Layer -> its inputs and outputs while the context lasts; each output an alias of its own to be differentiated by.

    modules: layer -> module. fused: modules of experts, whose products are made one by one meanwhile.
    """
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def note(layer: str, x: Tensor, y: Tensor) -> Tensor:
        alias = y.view_as(y)
        seen.setdefault(layer, []).append((x.detach(), alias))
        return alias

    with ExitStack() as stack:
        for layer, module in modules.items():
            handle = module.register_forward_hook(_noting(layer, note))
            stack.callback(handle.remove)
        for module, experts in fused:
            stack.enter_context(own_products(module, experts, _noted_product(module, note)))
        yield seen


def _noting(layer: str, note: Note) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    return lambda _module, args, out: note(layer, args[0], out)


def _noted_product(module: nn.Module, note: Note) -> Callable[[str, Tensor, Piece], Tensor]:
    return lambda layer, x, piece: note(layer, x, matrix_product(module, piece, x))


def surprise(logits: Tensor, valid: Tensor | None, generator: torch.Generator) -> Tensor:
    """Minus the log-probability of tokens drawn from the predictions `logits` (1, T, V) themselves, summed.

    The mean square of its gradient is the Fisher information: the curvature of the KL divergence (nats) from these
    predictions. valid: (1, T) tokens that count.
    """
    logp = logits.float().log_softmax(-1)[0]
    drawn = torch.multinomial(logp.detach().cpu().exp(), 1, generator=generator).to(logp.device)
    lost = -logp.gather(1, drawn)[:, 0]
    return (lost if valid is None else lost[valid[0].to(lost.device)]).sum()
