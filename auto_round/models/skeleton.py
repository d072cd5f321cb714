"""Models whose weights come and go: the module tree on the meta device, filled part by part from the checkpoint.

`Resident` is the same for a model that is in memory as a whole, so that those who run blocks need not know which it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from auto_round.core.errors import ModelError
from auto_round.models.anatomy import ties
from auto_round.models.checkpoint import TensorStore, names_match
from auto_round.models.experts import ENDS, Experts, Piece, SavedNames

LOW_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """names: tensor of the tree -> stored name. pieces: fused tensor -> where each stored matrix goes in it.

    joins: tensor -> stored names and the axis along which they are joined. full: beginnings of the names of tensors
    that stay in float32 whatever the dtype of the model.
    """

    store: TensorStore
    names: Mapping[str, str]
    pieces: Mapping[str, Mapping[str, Piece]] = field(default_factory=dict)
    joins: Mapping[str, tuple[tuple[str, ...], int]] = field(default_factory=dict)
    full: Callable[[str], bool] = lambda name: False

    def claimed(self) -> set[str]:
        """The stored tensors that are some tensor of the tree, or a part of one."""
        parts = (name for names, _ in self.joins.values() for name in names)
        return {*self.names.values(), *parts, *(name for own in self.pieces.values() for name in own)}

    def check(self, tree: nn.Module) -> None:
        """Raise ModelError naming a stored tensor that has another shape than in `tree`."""
        for name, like in tree.state_dict().items():
            if self.names.get(name) in self.store.infos:
                self._check(self.names[name], self.store.infos[self.names[name]].shape, like)

    def _check(self, stored: str, shape: tuple[int, ...], like: Tensor) -> None:
        if shape != tuple(like.shape):
            raise ModelError(
                f"{stored}: shape {shape} in the checkpoint, {tuple(like.shape)} in the model's configuration"
            )

    def read(self, name: str, like: Tensor) -> Tensor:
        """The tensor `name` of the tree, in the dtype of `like`."""
        dtype = torch.float32 if self.full(name) and like.dtype in LOW_DTYPES else like.dtype
        if name not in self.pieces:
            if name in self.joins:
                names, axis = self.joins[name]
                stored, tensor = ", ".join(names), torch.cat([self.store.get(n) for n in names], axis)
            else:
                stored, tensor = self.names[name], self.store.get(self.names[name])
            self._check(stored, tuple(tensor.shape), like)
            return tensor.to(dtype)
        # One expert after the other into its place, so that the checkpoint's matrices are never all in memory twice.
        fused = torch.empty(like.shape, dtype=dtype)
        for stored, piece in self.pieces[name].items():
            piece.of(fused).copy_(self.store.get(stored))
        return fused


def locate(
    tree: nn.Module,
    store: TensorStore,
    experts: Iterable[Experts],
    known: Mapping[str, str],
    spelled: SavedNames,
) -> tuple[Located, list[str]]:
    """Where the tensors of `tree` are in `store`, and those that are not there, by name.

    known: stored names that are found already. spelled: how checkpoints spell names.
    """
    prefix, names, missing = str(tree.base_model_prefix), dict(known), []
    saved = spelled.renamed
    experts = list(experts)
    pieces = _pieces(experts, store, prefix, saved)
    counts = {f"{m.path}.{t}{e}": m.count * n for m in experts for t, n in m.parts() for e in ENDS}
    optional = [re.compile(p) for p in getattr(tree, "_keys_to_ignore_on_load_missing", None) or ()]
    for name in tree.state_dict():
        if name in names or len(pieces.get(name, ())) == counts.get(name, -1):
            continue
        match = names_match([name], store.infos, prefix, saved)
        if match is not None:
            names.update(match)
        elif not any(pattern.search(name) for pattern in optional):
            missing.append(name)
    # Of two tied tensors, biases for example, a checkpoint holds one.
    pairs = ties(tree)
    names.update({name: names[pairs[name]] for name in missing if pairs.get(name) in names})
    joins = {}
    for name in missing:
        parts, axis = spelled.joined(name) or ((), 0)
        match = names_match(parts, store.infos, prefix)
        if match:
            joins[name] = tuple(match.values()), axis
    missing = [name for name in missing if name not in names and name not in joins]
    return Located(store=store, names=names, pieces=pieces, joins=joins, full=_kept_full(tree)), missing


def _pieces(
    experts: Iterable[Experts], store: TensorStore, prefix: str, saved: Callable[[str], str]
) -> dict[str, dict[str, Piece]]:
    found: dict[str, dict[str, Piece]] = {}
    for module in experts:
        for layer, piece in module.pieces():
            for end, last in zip(ENDS, (".weight", ".bias"), strict=True):
                match = names_match([f"{layer}{last}"], store.infos, prefix, saved)
                if match is not None:
                    found.setdefault(f"{piece.tensor}{end}", {})[match[f"{layer}{last}"]] = piece
    return found


def _kept_full(tree: nn.Module) -> Callable[[str], bool]:
    """transformers keeps some modules in float32: routers' corrections, certain norms."""
    always = set(getattr(tree, "_keep_in_fp32_modules_strict", None) or ())
    half = set(getattr(tree, "_keep_in_fp32_modules", None) or ())
    words = always | (half if next(tree.parameters()).dtype == torch.float16 else set())
    return lambda name: any(re.search(rf"(^|\.){word}(\.|$)", name) for word in words)


def check_missing(missing: Iterable[str], located: Located, tree: nn.Module) -> None:
    """Raise ModelError for a tensor of `tree` that is `missing`, unless it may be stored under a name of its own."""
    claimed = located.claimed()
    others = {tuple(info.shape) for name, info in located.store.infos.items() if name not in claimed}
    tensors = tree.state_dict()
    for name in missing:
        if tuple(tensors[name].shape) not in others:
            raise ModelError(
                f"{name} is missing from the checkpoint, and no other tensor in it can be meant. "
                "Download it again, or mend config.json if it describes another model"
            )


def filled(tree: nn.Module, located: Located) -> nn.Module:
    """`tree`, until now on the meta device, with all its weights."""
    Skeleton(tree, located, ()).fill("")
    tree.tie_weights()  # type: ignore[operator]
    return tree


class Resident:
    """A model in memory: nothing has to be brought in, and what is put into it stays."""

    keeps = True

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def fill(self, path: str) -> None:
        """The part at `path` is there already."""

    def fill_outside(self, without: str | None) -> None:
        """What is outside the blocks is there already."""

    def drop(self, path: str = "") -> None:
        """The part at `path` stays."""


class Skeleton:
    """A model on the meta device whose parts are read from a checkpoint when they are needed.

    located: where each tensor of the tree is stored. blocks: paths of the blocks. Buffers that no checkpoint holds
    (rotary frequencies) have their values from the start.
    """

    keeps = False

    def __init__(self, model: nn.Module, located: Located, blocks: tuple[str, ...]) -> None:
        self.model, self._located, self._blocks = model, located, blocks
        # Kept to be put back by `drop`: what is filled in between costs memory only as long as it is used.
        self._empty = dict(model.state_dict(keep_vars=True))

    def fill(self, path: str) -> None:
        """Read the tensors of the part at `path`."""
        for name in self._under(path):
            self._put(name, self._located.read(name, self._empty[name]))

    def fill_outside(self, without: str | None) -> None:
        """Read what is outside the blocks, the part at `without` excepted."""
        inside = tuple(f"{block}." for block in self._blocks)
        for name in self._empty:
            if not name.startswith(inside) and not (without and name.startswith(f"{without}.")):
                self._put(name, self._located.read(name, self._empty[name]))

    def drop(self, path: str = "") -> None:
        """Forget the weights of the part at `path`, or all of them."""
        for name in self._under(path):
            self._put(name, self._empty[name])

    def _under(self, path: str) -> Iterator[str]:
        return (name for name in self._empty if not path or name.startswith(f"{path}."))

    def _put(self, name: str, tensor: Tensor) -> None:
        parent, _, last = name.rpartition(".")
        module = self.model.get_submodule(parent)
        if last in module._parameters:
            value = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
            module._parameters[last] = value
        else:
            module._buffers[last] = tensor
