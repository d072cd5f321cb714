"""Checkpoint shards as blocks of weights without any forward: a weight is read when it is looked at."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from auto_round.models.anatomy import Anatomy
from auto_round.models.checkpoint import TensorStore
from auto_round.sources.base import Block, Needs, Source


class StoredWeights(Mapping[str, Tensor]):
    """Layer -> (O, I), read on access; the one read last is kept, so that one after the other is read once."""

    def __init__(self, source: TensorSource, layers: Sequence[str]) -> None:
        self._source, self._layers = source, dict.fromkeys(layers)
        self._last: tuple[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._layers:
            raise KeyError(name)
        # One matrix at a time: a block of a large model would be gigabytes.
        if self._last is None or self._last[0] != name:
            self._last = None  # free it first
            self._last = name, self._source.read(name)
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


class StoredBlock(Block):
    """Some matrices of a checkpoint, with second moments of their inputs where an importance file has them."""

    def __init__(self, name: str, weights: Mapping[str, Tensor], importance: Mapping[str, Tensor]) -> None:
        self.name, self.weights, self._importance = name, weights, importance

    def importance(self, layer: str) -> Tensor | None:
        """That of the importance file, (I,), or None."""
        return self._importance.get(layer)


class TensorSource(Source):
    """Blocks read from a `TensorStore`. names: tensor name of the module tree -> name in the store.

    importance: layer -> second moment of each input feature (I,), where known.
    """

    can_run = False

    def __init__(
        self,
        anatomy: Anatomy,
        store: TensorStore,
        names: Mapping[str, str],
        importance: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.anatomy, self.store, self.names = anatomy, store, names
        self._importance = importance or {}

    def blocks(self, needs: Needs, wanted: Iterable[str], finished: Collection[str] = ()) -> Iterator[Block]:
        """In model order; `needs` beyond weights cannot be served and is left to the steps to do without."""
        for block, layers in self.members(wanted).items():
            yield self.block(block, [] if block in finished else layers)

    def members(self, wanted: Iterable[str]) -> dict[str, list[str]]:
        """Block -> its layers among `wanted`, in model order; a layer outside the blocks is one of its own."""
        names = set(wanted)
        # Blocks without a wanted layer too: observers count them.
        members: dict[str, list[str]] = {block: [] for blocks in self.anatomy.block_lists for block in blocks}
        for name, layer in self.anatomy.layers.items():
            if name in names:
                members.setdefault(layer.block or name, []).append(name)
        return members

    def block(self, name: str, layers: Sequence[str]) -> StoredBlock:
        """The layers `layers` as a block."""
        return StoredBlock(name, StoredWeights(self, layers), self._importance)

    def read(self, name: str) -> Tensor:
        """The weight of the layer `name`, (O, I)."""
        layer = self.anatomy.layers[name]
        tensor = self.store.look(self.names[layer.tensor])
        return tensor.t() if layer.transposed else tensor

    def shards(self, name: str) -> tuple[int, ...]:
        """Those that the weight of the layer `name` lies in, as `TensorStore.shards`."""
        return self.store.shards(self.names[self.anatomy.layers[name].tensor])

    def announce(self, name: str) -> None:
        """The weight of the layer `name` will soon be read."""
        self.store.announce(self.names[self.anatomy.layers[name].tensor])
