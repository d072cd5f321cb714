"""What each expert of a block gets to see: its tokens, and the second moments of its layers' inputs.

A router sends few tokens to some experts. Their own inputs then say little, so a *starved* expert gets the statistics
of all tokens of the block, as if every one had been sent to it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.codecs.base import fake_inputs
from auto_round.models.anatomy import experts_of
from auto_round.models.capture import replaced_forwards
from auto_round.models.expert_modules import expert_output, routed
from auto_round.models.experts import Experts, Piece
from auto_round.sources.activations import InputGrid, Limits
from auto_round.sources.moments import Moments

logger = logging.getLogger("auto_round")

NAMED_MOST = 20  # starved experts in one message; the report has them all
STARVED = 64
"""An expert with fewer tokens is starved: a Gram matrix of fewer inputs is mostly chance."""
GRAM_BYTES = 2**30
"""Gram matrices of all experts of a block take no more than that; the next best statistic is used where they would."""


class ExpertInputs:
    """The statistics of one module of fused experts. Use `watching` while its block runs."""

    def __init__(self, module: nn.Module, experts: Experts, valid: Callable[[], Tensor | None]) -> None:
        """valid: which tokens of the present batch count, (B, T) bool, or None for all."""
        self.module, self.experts, self._valid = module, experts, valid
        self.tokens = [0] * experts.count
        self._pieces = dict(experts.pieces())
        self._sums: dict[tuple[str, int], Moments] = {}
        self._limits: dict[tuple[str, int], Limits] = {}

    @property
    def starved(self) -> dict[int, int]:
        """Expert -> its tokens, for those with fewer than `STARVED`."""
        return {expert: count for expert, count in enumerate(self.tokens) if count < STARVED}

    def starved_layers(self) -> set[str]:
        """The layers of the starved experts."""
        starved = self.starved
        return {name for name, piece in self.experts.pieces() if piece.expert in starved}

    @contextmanager
    def watching(self, *, starved_only: bool = False) -> Iterator[None]:
        """Gather while the module runs; `starved_only` sends every token to the starved experts instead."""
        starved = list(self.starved) if starved_only else []
        for expert in starved:
            self._sums.pop(("in", expert), None)  # its few tokens are among all those that follow
            self._sums.pop(("out", expert), None)

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, *routing = (*args, *kwargs.values())
            # In float32: a sum of squares in bfloat16 stops growing once it is 256 times its terms.
            with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
                if starved_only:
                    self._add_all(hidden, routing, starved)
                else:
                    self._add_routed(hidden, routing)
            # The instance's own is this function now.
            return type(self.module).forward(self.module, *args, **kwargs)

        with replaced_forwards([self.module], [forward]):
            yield

    def _add_routed(self, hidden: Tensor, routing: list[Tensor]) -> None:
        for expert, tokens in enumerate(self._tokens_of(hidden, routing)):
            self.tokens[expert] += len(tokens)
            if len(tokens):
                self._add(expert, tokens.float())

    def _add_all(self, hidden: Tensor, routing: list[Tensor], starved: list[int]) -> None:
        every = self._counting(hidden) if routing else torch.cat(list(self._tokens_of(hidden, routing)))
        for expert in starved:
            self._add(expert, every.float())

    def _tokens_of(self, hidden: Tensor, routing: list[Tensor]) -> Iterator[Tensor]:
        """What each expert gets, (N, H); see `SeparateExperts.forward` for the two ways to call experts."""
        if routing:
            counting = self._mask(len(hidden), hidden.device)
            for expert in range(self.experts.count):
                yield hidden[(routing[0] == expert).any(-1) & counting]
            return
        for own in hidden.chunk(self.experts.count):
            # Llama 4 hands every expert all tokens, those of others multiplied by a score of zero.
            yield own[(own != 0).any(-1) & self._mask(len(own), own.device)]

    def _mask(self, count: int, device: torch.device) -> Tensor:
        valid = self._valid()
        if valid is None or valid.numel() != count:
            return torch.ones(count, dtype=torch.bool, device=device)
        return valid.reshape(-1).to(device)

    def _counting(self, hidden: Tensor) -> Tensor:
        return hidden[self._mask(len(hidden), hidden.device)]

    def _add(self, expert: int, tokens: Tensor) -> None:
        """Add `tokens` (N, H) and what becomes of them before the down projection to the sums of `expert`."""
        down = f".{self.experts.names[-1]}"

        def linear(layer: str, x: Tensor) -> Tensor:
            if layer.endswith(down):
                self._accumulate(("out", expert), x)
                return x
            return matrix_product(self.module, self._pieces[layer], x)

        self._accumulate(("in", expert), tokens)
        expert_output(self.module, self.experts, expert, tokens, linear)

    def _accumulate(self, key: tuple[str, int], x: Tensor) -> None:
        width = x.shape[1]
        whole = self.experts.count * width * width * x.element_size() <= GRAM_BYTES
        if key not in self._sums:
            self._sums[key] = Moments(width, whole=whole, like=x)
        self._limits.setdefault(key, Limits()).add(x)
        self._sums[key].add(x)

    def moments(self) -> dict[str, Moments]:
        """Layer -> second moments of its inputs."""
        return {name: self._sums[self._key(piece)] for name, piece in self._pieces.items()}

    def limits(self) -> dict[str, Limits]:
        """Layer -> smallest and largest of its inputs."""
        return {name: self._limits[self._key(piece)] for name, piece in self._pieces.items()}

    def _key(self, piece: Piece) -> tuple[str, int]:
        return "out" if piece.tensor.endswith(f".{self.experts.tensors[1]}") else "in", piece.expert


def matrix_product(module: nn.Module, piece: Piece, x: Tensor) -> Tensor:
    """`x` (N, I) times the matrix `piece` of the fused `module`, plus its bias; (N, O)."""
    tensor = piece.tensor.rpartition(".")[2]
    bias = module._parameters.get(f"{tensor}_bias")
    weight = piece.of(getattr(module, tensor)).to(x.dtype)  # in a functional call it is no parameter
    return nn.functional.linear(x, weight, None if bias is None else piece.of(bias).to(x.dtype))


@contextmanager
def quantized_expert_inputs(
    module: nn.Module, experts: Experts, grids: Mapping[str, InputGrid]
) -> Iterator[None]:
    """While the context lasts, the layers of `experts` get their inputs as `grids` (layer -> grid) leave them."""
    mine = {name: grids[name] for name, _ in experts.pieces() if name in grids}

    def quantized(layer: str, x: Tensor, piece: Piece) -> Tensor:
        grid = mine.get(layer)
        return matrix_product(module, piece, x if grid is None else fake_inputs(x, grid.spec, grid.fixed))

    with own_products(module, experts, quantized) if mine else nullcontext():
        yield


@contextmanager
def own_products(
    module: nn.Module, experts: Experts, product: Callable[[str, Tensor, Piece], Tensor]
) -> Iterator[None]:
    """While the context lasts, layers of `experts` put out what `product` makes of (layer, input, piece)."""
    pieces = dict(experts.pieces())

    def linear(layer: str, x: Tensor) -> Tensor:
        return product(layer, x, pieces[layer])

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        hidden, *routing = (*args, *kwargs.values())
        return routed(experts, lambda e, x: expert_output(module, experts, e, x, linear), hidden, *routing)

    with replaced_forwards([module], [forward]):
        yield


@contextmanager
def counted_inputs(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, int]]:
    """Layer -> the inputs (rows) that its module gets while the context lasts."""
    counts = dict.fromkeys(modules, 0)

    def count(layer: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            counts[layer] += args[0].numel() // args[0].shape[-1]

        return add

    handles = [module.register_forward_pre_hook(count(layer)) for layer, module in modules.items()]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


class BlockExperts:
    """All experts of one block: fused ones, and those that are modules of their own."""

    def __init__(
        self,
        module: Callable[[str], nn.Module],
        fused: Iterable[Experts],
        layers: Iterable[str],
        valid: Callable[[], Tensor | None],
    ) -> None:
        """module: gives the module of a name. layers: those that are modules. valid: see `ExpertInputs`."""
        self._fused = [ExpertInputs(module(experts.path), experts, valid) for experts in fused]
        self._separate = {name: module(name) for name in layers if experts_of(name)}
        self._counts: dict[str, int] = {}

    @contextmanager
    def watching(self, *, starved_only: bool = False) -> Iterator[None]:
        """Gather while the block runs; see `ExpertInputs.watching`."""
        with ExitStack() as stack:
            for watched in self._fused:
                stack.enter_context(watched.watching(starved_only=starved_only))
            if not starved_only:
                self._counts = stack.enter_context(counted_inputs(self._separate))
            yield

    @property
    def tokens(self) -> dict[str, int]:
        """Expert -> its tokens."""
        fused = {f"{w.experts.saved}.{expert}": n for w in self._fused for expert, n in enumerate(w.tokens)}
        return {**{name.rpartition(".")[0]: count for name, count in self._counts.items()}, **fused}

    @property
    def fed(self) -> frozenset[str]:
        """Layers of starved experts that another pass can send every token to."""
        return frozenset(name for watched in self._fused for name in watched.starved_layers())

    @property
    def blind(self) -> frozenset[str]:
        """Layers of starved experts that keep to what their weights tell."""
        return frozenset(name for name, count in self._counts.items() if count < STARVED)

    def moments(self) -> dict[str, Moments]:
        """Layer of fused experts -> second moments of its inputs."""
        return {name: found for watched in self._fused for name, found in watched.moments().items()}

    def limits(self) -> dict[str, Limits]:
        """Layer of fused experts -> smallest and largest of its inputs."""
        return {name: found for watched in self._fused for name, found in watched.limits().items()}


def tell_starved(tokens: Mapping[str, int]) -> None:
    """Name the starved among the experts whose `tokens` were counted, in one warning."""
    named = [f"{name} ({count} tokens)" for name, count in tokens.items() if count < STARVED]
    if named:
        more = f" and {len(named) - NAMED_MOST} more" if len(named) > NAMED_MOST else ""
        logger.warning(
            "%d experts got fewer than %d calibration tokens: %s%s. They are not tuned, and calibrated on all "
            "tokens of their block, or on their weights when they are modules of their own; more or more varied "
            "samples reach them",
            len(named), STARVED, ", ".join(named[:NAMED_MOST]), more,
        )  # fmt: skip
