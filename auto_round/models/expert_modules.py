"""Experts as modules of their own: how a loaded checkpoint with one quantized matrix per expert computes.

While a model is on the meta device its fused experts become one linear layer per matrix, at the place that checkpoints
name, so that each can be replaced by a kernel like any other layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.models.experts import ENDS, Experts, Piece


def activated(module: Any, before: Tensor, *, gated: bool) -> Tensor:
    """What the down projections of the fused `module` get, given the output (N, O) of the ones before."""
    if not gated:
        return module.act_fn(before)
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(before)
    gate, up = before.chunk(2, dim=-1)
    return up * module.act_fn(gate)


Linear = Callable[[str, Tensor], Tensor]
"""Layer name and inputs (N, I) -> outputs (N, O)."""


def expert_output(fused: nn.Module, experts: Experts, expert: int, tokens: Tensor, linear: Linear) -> Tensor:
    """What one expert makes of `tokens` (N, H) when its layers are computed by `linear`; (N, H)."""
    *before, down = (f"{experts.saved}.{expert}.{name}" for name in experts.names)
    parts = [linear(name, tokens) for name in before]
    joined = torch.stack(parts, -1).flatten(-2) if experts.interleaved else torch.cat(parts, -1)
    return linear(down, activated(fused, joined, gated=experts.gated))


def routed(
    experts: Experts, run: Callable[[int, Tensor], Tensor], hidden: Tensor, *routing: Tensor
) -> Tensor:
    """Weighted sum over the chosen experts, (T, H). run: expert and its tokens (N, H) -> its output (N, H).

    routing: indices and weights of the chosen experts, (T, K) each. Without it, as Llama 4 calls its experts, hidden
    (E * T, H) holds every expert's own tokens one after the other, and so does the result.
    """
    if not routing:
        return torch.cat([run(expert, tokens) for expert, tokens in enumerate(hidden.chunk(experts.count))])
    index, weights = routing
    out = torch.zeros_like(hidden)
    for expert in index.unique().tolist():  # only those that got a token
        token, slot = torch.where(index == expert)
        # What is sent beyond the last expert stays as it is: the zero experts of LongCat.
        own = run(expert, hidden[token]) if expert < experts.count else hidden[token]
        result = own * weights[token, slot, None]
        out.index_add_(0, token, result.to(out.dtype))
    return out


class SeparateExperts(nn.Module):
    """Takes the place of a module of fused experts and computes the same from one layer per matrix."""

    def __init__(self, fused: nn.Module, experts: Experts, layers: Mapping[str, nn.Module]) -> None:
        """layers: layer name of `experts.pieces()` -> module."""
        super().__init__()
        self.experts = experts
        self._fused = [fused]  # in a list: it computes activations, and is no part of this module
        for expert in range(experts.count):
            own = {name: layers[f"{experts.saved}.{expert}.{name}"] for name in experts.names}
            self.add_module(str(expert), nn.ModuleDict(own))

    def forward(self, hidden_states: Tensor, *routing: Tensor) -> Tensor:
        """See `routed`."""
        return routed(self.experts, self._run, hidden_states, *routing)

    def _run(self, expert: int, tokens: Tensor) -> Tensor:
        return expert_output(self._fused[0], self.experts, expert, tokens, self._linear)

    def _linear(self, layer: str, x: Tensor) -> Tensor:
        return self.get_submodule(layer.removeprefix(f"{self.experts.saved}."))(x)


class ExpertsElsewhere(nn.Module):
    """Stands where a model calls its experts when checkpoints keep them under another name."""

    def __init__(self, experts: SeparateExperts) -> None:
        super().__init__()
        self._experts = [experts]  # in a list: they are registered under the checkpoint's name

    def forward(self, *args: Tensor) -> Tensor:
        """That of the experts."""
        return self._experts[0](*args)


def separate(model: nn.Module, experts: Experts) -> None:
    """Replace one module of fused experts of `model`, a skeleton on the meta device, by linear layers."""
    fused = model.get_submodule(experts.path)
    layers = {name: _linear(fused, piece, biased=experts.biased) for name, piece in experts.pieces()}
    for tensor in experts.tensors:
        for end in ENDS:
            fused._parameters.pop(f"{tensor}{end}", None)
    module = SeparateExperts(fused, experts, layers)
    if experts.saved != experts.path:
        _place(model, experts.path, ExpertsElsewhere(module))
    _place(model, experts.saved, module)


def _linear(fused: nn.Module, piece: Piece, *, biased: bool) -> nn.Linear:
    parameter = fused.get_parameter(piece.tensor.rpartition(".")[2])
    rows, columns = piece.of_expert(torch.empty(parameter.shape[1:], device="meta")).shape
    return nn.Linear(columns, rows, bias=biased, device="meta", dtype=parameter.dtype)


def _place(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`, making empty modules on the way where there are none."""
    *above, last = path.split(".")
    for name in above:
        if name not in model._modules:
            model.add_module(name, nn.Module())
        model = model.get_submodule(name)
    model.add_module(last, module)
