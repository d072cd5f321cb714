"""Checkpoint shards as blocks of weights without any forward: nothing but one block's tensors is in memory."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

from torch import Tensor

from auto_round.models.anatomy import Anatomy
from auto_round.models.checkpoint import TensorStore
from auto_round.sources.base import Block, Needs, Source


class StoredBlock(Block):
    """The matrices of one block, read from the checkpoint when the block is made."""

    def __init__(self, name: str, weights: Mapping[str, Tensor]) -> None:
        self.name, self.weights = name, weights


class TensorSource(Source):
    """Blocks read from a `TensorStore`. names: tensor name of the module tree -> name in the store."""

    can_run = False

    def __init__(self, anatomy: Anatomy, store: TensorStore, names: Mapping[str, str]) -> None:
        self.anatomy, self.store, self.names = anatomy, store, names

    def blocks(self, needs: Needs, wanted: Iterable[str], finished: Collection[str] = ()) -> Iterator[Block]:
        """In model order; `needs` beyond weights cannot be served and is left to the steps to do without."""
        names = set(wanted)
        members: dict[str, list[str]] = {}
        outside: list[str] = []
        for name, layer in self.anatomy.layers.items():
            if name in names:
                (outside if layer.block is None else members.setdefault(layer.block, [])).append(name)
        for blocks in self.anatomy.block_lists:
            for block in blocks:
                yield self._read(block, [] if block in finished else members.get(block, []))
        for name in outside:
            yield self._read(name, [] if name in finished else [name])

    def _read(self, block: str, layers: list[str]) -> StoredBlock:
        weights = {}
        for name in layers:
            layer = self.anatomy.layers[name]
            tensor = self.store.get(self.names[layer.tensor])
            weights[name] = tensor.t() if layer.transposed else tensor
        return StoredBlock(block, weights)
