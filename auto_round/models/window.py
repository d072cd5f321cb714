"""Consecutive blocks as one: run one after the other, so that they can be tuned together (option `nblocks`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from auto_round.models.capture import Call, Calls


def windows(blocks: Sequence[str], count: int) -> Iterator[tuple[str, ...]]:
    """`blocks` in order, `count` together; the last window has what is left."""
    for start in range(0, len(blocks), count):
        yield tuple(blocks[start : start + count])


def window_name(members: Sequence[str]) -> str:
    """ "model.layers.0-1" for two blocks; a block alone keeps its name."""
    return members[0] if len(members) == 1 else f"{members[0]}-{members[-1].rpartition('.')[2]}"


def window_prefix(members: Sequence[str]) -> str:
    """What the names of the parameters start with, as seen from outside; the rest is their name inside the module."""
    return members[0] if len(members) == 1 else members[0].rpartition(".")[0]


class Chained(nn.Module):
    """Blocks that are run in turn, under the last parts of their names: "0", "1"."""

    def __init__(self, members: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, module in members.items():
            self.add_module(name.rpartition(".")[2], module)

    def forward(self, hidden: Tensor, calls: Sequence[Call]) -> Tensor:
        """The last one's hidden states; `calls` has the other arguments of each."""
        for module, call in zip(self.children(), calls, strict=True):
            hidden = call.run(module, hidden)
        return hidden


class CallsInTurn:
    """The calls of several blocks as the arguments of one `Chained`."""

    def __init__(self, members: Sequence[Calls]) -> None:
        self._members = tuple(members)

    def batch(self, rows: Sequence[int], device: torch.device | str) -> Call:
        """For the samples `rows` together."""
        first = self._members[0].batch(rows, device)
        others = (calls.batch(rows, device, first.board) for calls in self._members[1:])
        return Call(((first, *others),), {}, by_keyword=False, board=first.board)
