"""Fused experts as separate layers: their checkpoint names, views into the 3-D tensors, and back again.

transformers 5 keeps all experts of a block in a few 3-D tensors. Servers read one matrix per expert, and every
matrix is quantized for itself; so each one is a layer here, known by the name that it has in checkpoints.
"""

from __future__ import annotations

import threading
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.core.quantized import Quantized
from auto_round.models import quirks
from auto_round.models.checkpoint import Place, StateDict, TensorInfo, TensorStore, View, names_match

ENDS = ("", "_bias")
"""What follows a projection's name in the names of fused tensors: nothing for its weights."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Where one expert's matrix, or its bias, lies in a fused tensor.

    tensor: name of the fused tensor, (E, parts * O, I), transposed (E, I, parts * O). part: which of the `parts`
    matrices that share it; they follow one another, or alternate row by row when interleaved.
    """

    tensor: str
    expert: int
    part: int = 0
    parts: int = 1
    interleaved: bool = False
    transposed: bool = False

    def of(self, fused: Tensor) -> Tensor:
        """The matrix (O, I) or bias (O,) as a view of the whole tensor."""
        return self.of_expert(fused[self.expert])

    def of_expert(self, own: Tensor) -> Tensor:
        """The same from this expert's part of the tensor."""
        rows = own.t() if self.transposed and own.ndim == 2 else own
        if self.interleaved and self.parts > 1:
            return rows[self.part :: self.parts]
        size = rows.shape[0] // self.parts
        return rows[self.part * size : (self.part + 1) * size]


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """One module of fused experts. path: of the module. saved: the same in checkpoints; whole: they store it fused.

    names: what servers call the projections, in the order gate, up, down; without a gate: up, down.
    """

    path: str
    count: int
    saved: str
    names: tuple[str, ...]
    whole: bool
    transposed: bool
    interleaved: bool
    biased: bool

    @property
    def gated(self) -> bool:
        """Whether the first fused tensor holds gate and up."""
        return len(self.names) == 3

    @property
    def tensors(self) -> tuple[str, str]:
        """Names of the fused tensors within the module: before and after the activation."""
        return ("gate_up_proj" if self.gated else "up_proj", "down_proj")

    def pieces(self) -> Iterator[tuple[str, Piece]]:
        """(layer name in checkpoints, its matrix), expert by expert."""
        first, last = self.tensors
        for expert in range(self.count):
            for part, name in enumerate(self.names):
                inner = part < len(self.names) - 1
                yield (
                    f"{self.saved}.{expert}.{name}",
                    Piece(
                        f"{self.path}.{first if inner else last}",
                        expert,
                        part if inner else 0,
                        len(self.names) - 1 if inner else 1,
                        self.interleaved,
                        self.transposed,
                    ),
                )

    def parts(self) -> tuple[tuple[str, int], ...]:
        """Each fused tensor, with the number of matrices that every expert has in it."""
        return tuple(zip(self.tensors, (len(self.names) - 1, 1), strict=True))

    def module_name(self, layer: str) -> str:
        """Where `layer` is found in the module tree once the experts are modules of their own."""
        return f"{self.path}.{layer.removeprefix(f'{self.saved}.')}"


class SavedNames:
    """How transformers spells the names of a model's tensors in checkpoints."""

    def __init__(self, model: nn.Module) -> None:
        self._converters: list[Any] = []
        self._renamings: list[Any] = []
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import PrefixChange, WeightConverter
        except ImportError:  # transformers < 5: module names and checkpoint names are the same
            return
        rules = get_model_conversion_mapping(model, add_legacy=False)
        # A change of prefix tells how one checkpoint was loaded, not how the architecture is stored.
        back = [rule.reverse_transform() for rule in reversed(rules) if not isinstance(rule, PrefixChange)]
        self._converters = [rule for rule in back if isinstance(rule, WeightConverter)]
        self._renamings = [rule for rule in back if not isinstance(rule, WeightConverter)]

    def of(self, tensor: str) -> tuple[str, ...]:
        """Name in checkpoints of the module tree's `tensor`; one with `*` for each matrix when it is split there."""
        names = (tensor,)
        for rule in self._converters:
            renamed, matched = rule.rename_source_key(tensor)
            if matched is not None:
                first = rule.target_patterns[0]
                names = tuple(renamed.replace(first, target) for target in rule.target_patterns)
                break
        return tuple(self.renamed(name) for name in names)

    def shares(self, tensor: str) -> bool:
        """Whether checkpoints hold the module tree's `tensor` together with others in one."""
        return any(
            len(rule.source_patterns) > 1 and rule.rename_source_key(tensor)[1] is not None
            for rule in self._converters
        )

    def joined(self, tensor: str) -> tuple[tuple[str, ...], int] | None:
        """(stored names, axis) of what is joined to the module tree's `tensor`; None where nothing is."""
        for rule in self._converters:
            if rule.rename_source_key(tensor)[1] is None:
                continue
            names, operations = self.of(tensor), rule.operations
            # Back into a checkpoint it is cut: convolutions over queries, keys and values in Kimi Linear.
            cut = len(operations) == 1 and type(operations[0]).__name__ == "Chunk" and len(names) > 1
            return (names, operations[0].dim) if cut and not any("*" in name for name in names) else None
        return None

    def renamed(self, name: str) -> str:
        """The same for a tensor that is not split."""
        for rule in self._renamings:
            name = rule.rename_source_key(name)[0]
        return name


def find_experts(model: nn.Module) -> list[Experts]:
    """The fused experts of a live model or a skeleton, in model order."""
    modules = [(path, module) for path, module in model.named_modules() if _is_fused(module)]
    saved = SavedNames(model) if modules else None
    return [_experts(path, module, saved) for path, module in modules if saved is not None]


def _is_fused(module: nn.Module) -> bool:
    tensors = module._parameters
    stacked = all(
        isinstance(tensors.get(name), nn.Parameter) and tensors[name].ndim == 3  # type: ignore[union-attr]
        for name in ("gate_up_proj" if "gate_up_proj" in tensors else "up_proj", "down_proj")
    )
    return stacked and (hasattr(module, "is_transposed") or type(module).__name__ in quirks.FUSED_EXPERTS)


def _experts(path: str, module: nn.Module, saved: SavedNames) -> Experts:
    said = quirks.FUSED_EXPERTS.get(type(module).__name__)
    transposed, interleaved = said or (module.is_transposed, not module.is_concatenated)
    gated = "gate_up_proj" in module._parameters
    first = "gate_up_proj" if gated else "up_proj"
    names = (*saved.of(f"{path}.{first}"), *saved.of(f"{path}.down_proj"))
    split = all(".*." in name for name in names) and len(names) == 2 + gated
    if split:
        place = names[0].split(".*.")[0]
        last = tuple(name.split(".*.")[1].removesuffix(".weight") for name in names)
    else:
        parents = {name.removesuffix(".weight").rpartition(".")[0] for name in names}
        # Modules of their own in the checkpoint (`input_linear`, `output_linear`): a name under one cannot mean both.
        apart = any(name.endswith(".weight") for name in names)
        place = path if apart or len(parents) > 1 else parents.pop()
        last = ("gate_proj", "up_proj", "down_proj") if gated else ("up_proj", "down_proj")
    return Experts(
        path=path,
        count=module._parameters["down_proj"].shape[0],  # type: ignore[union-attr]
        saved=place,
        names=last,
        whole=not split,
        transposed=bool(transposed),
        interleaved=bool(interleaved),
        biased=f"{first}_bias" in module._parameters,
    )


def fuse(pieces: Mapping[Piece, Tensor], original: Tensor) -> Tensor:
    """The fused tensor with the matrices `pieces` in their places and the rest of `original`; differentiable."""
    own: dict[int, dict[int, Tensor]] = {}
    like = next(iter(pieces))
    for piece, matrix in pieces.items():
        own.setdefault(piece.expert, {})[piece.part] = matrix.to(original.dtype)
    rows = []
    for expert in range(original.shape[0]):
        parts = [
            own.get(expert, {}).get(part, replace(like, part=part).of_expert(original[expert]))
            for part in range(like.parts)
        ]
        # Interleaved: row 0 of gate, row 0 of up, row 1 of gate, and so on.
        joined = torch.stack(parts, 1).flatten(0, 1) if like.interleaved else torch.cat(parts)
        rows.append(joined.t() if like.transposed else joined)
    return torch.stack(rows)


class ExpertStore(View):
    """A store whose fused expert tensors are shown as one tensor per matrix, under the names of the layers."""

    def __init__(self, raw: TensorStore, pieces: Mapping[str, Piece], whole: bool) -> None:
        """pieces: name -> where it lies in `raw`. whole: experts that are left alone are written fused."""
        self.raw, self.pieces, self._whole = raw, pieces, whole
        self._members: dict[str, list[str]] = {}
        for name, piece in pieces.items():
            self._members.setdefault(piece.tensor, []).append(name)
        infos = {}
        for name, info in raw.infos.items():
            if name not in self._members:
                infos[name] = info
            for member in self._members.get(name, ()):
                infos[member] = _piece_info(pieces[member], info)
        self.infos = infos

    def over(self, raw: TensorStore) -> ExpertStore:
        """The same view of another store."""
        return ExpertStore(raw, self.pieces, self._whole)

    def get(self, name: str) -> Tensor:
        """The tensor called `name`; also a whole fused one."""
        if name not in self.pieces:
            return self.raw.get(name)
        piece = self.pieces[name]
        # One expert's part is read, not all.
        return piece.of_expert(self.raw.row(piece.tensor, piece.expert)).contiguous()

    def look(self, name: str, row: int | None = None) -> Tensor:
        """As `get`, and without its copy."""
        if name not in self.pieces:
            return self.raw.look(name, row)
        piece = self.pieces[name]
        found = piece.of_expert(self.raw.look(piece.tensor, piece.expert))
        return found if row is None else found[row]

    def quantized(self, name: str) -> Quantized | None:
        """That of a tensor which is no piece of another."""
        return None if name in self.pieces else self.raw.quantized(name)

    def place(self, name: str) -> Place | None:
        """That of a tensor which is no piece of another."""
        return None if name in self.pieces else self.raw.place(name)

    def shards(self, name: str) -> tuple[int, ...]:
        """Those of the tensor that it is a piece of."""
        return self.raw.shards(self.pieces[name].tensor if name in self.pieces else name)

    def announce(self, name: str) -> None:
        """A piece does not lie in one place: only whole tensors are announced."""
        if name not in self.pieces:
            self.raw.announce(name)

    def joined(self, infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """`infos` of a checkpoint to be, with the experts fused again in modules where every matrix is still plain."""
        found = dict(infos)
        if not self._whole:
            return found
        changed = {
            piece.tensor.rpartition(".")[0]
            for name, piece in self.pieces.items()
            if infos.get(name) != self.infos[name]
        }
        for tensor, members in self._members.items():
            if tensor.rpartition(".")[0] not in changed:
                for member in members:
                    del found[member]
                found[tensor] = self.raw.infos[tensor]
        return found


class FusedTensors(Container[str]):
    """Fused tensors of a checkpoint to be, filled with plain matrices as they come. Threads may fill them."""

    def __init__(self, store: ExpertStore, pieces: Iterable[str]) -> None:
        """pieces: names of the matrices yet to come; what else a tensor holds stays as `store` has it."""
        self._store, self._lock = store, threading.Lock()
        self._missing: dict[str, set[str]] = {}
        self._begun: dict[str, Tensor] = {}
        for name in pieces:
            self._missing.setdefault(store.pieces[name].tensor, set()).add(name)

    def __contains__(self, tensor: object) -> bool:
        return tensor in self._missing

    def put(self, name: str, matrix: Tensor) -> tuple[str, Tensor] | None:
        """Put in the matrix `name`. Returns name and values of its tensor when that is complete, and forgets it."""
        piece = self._store.pieces[name]
        with self._lock:
            if piece.tensor not in self._begun:
                # From the source, whose matrices stay where none comes; it may be a live model's own, hence the clone.
                self._begun[piece.tensor] = self._store.get(piece.tensor).clone()
            piece.of(self._begun[piece.tensor]).copy_(matrix)
            self._missing[piece.tensor].discard(name)
            if self._missing[piece.tensor]:
                return None
            return piece.tensor, self._begun.pop(piece.tensor)


def _piece_info(piece: Piece, info: TensorInfo) -> TensorInfo:
    own = piece.of_expert(torch.empty(info.shape[1:], device="meta"))
    return TensorInfo(info.dtype, tuple(own.shape))


def split_store(raw: TensorStore, experts: Iterable[Experts], prefix: str, *, whole: bool) -> TensorStore:
    """`raw` with those of its tensors split that hold fused experts; `raw` itself when it has none.

    prefix: of the base model, which the stored names may have or lack. whole: see `ExpertStore`.
    """
    pieces: dict[str, Piece] = {}
    for module in experts:
        stored = names_match([f"{module.path}.{tensor}" for tensor in module.tensors], raw.infos, prefix)
        if stored is None:
            continue
        place = _placed(module, stored[f"{module.path}.down_proj"].rpartition(".")[0])
        for layer, piece in module.pieces():
            name = f"{place}{layer.removeprefix(module.saved)}"
            at = replace(piece, tensor=stored[piece.tensor])
            pieces[f"{name}.weight"] = at
            if module.biased:
                pieces[f"{name}.bias"] = replace(at, tensor=f"{at.tensor}_bias")
    return ExpertStore(raw, pieces, whole) if pieces else raw


def _placed(module: Experts, stored: str) -> str:
    """Where a checkpoint keeps separate experts whose fused tensors are found in `stored`: its prefix applies."""
    if module.path.endswith(stored):
        return module.saved.removeprefix(module.path.removesuffix(stored))
    return stored.removesuffix(module.path) + module.saved


def live_store(model: nn.Module) -> TensorStore:
    """The tensors of a live model under the names that they have in checkpoints."""
    experts, saved = find_experts(model), SavedNames(model)
    fused = {
        f"{module.path}.{tensor}{end}" for module in experts for tensor in module.tensors for end in ENDS
    }
    tensors = {
        name if name in fused else saved.renamed(name): tensor for name, tensor in model.state_dict().items()
    }
    return split_store(StateDict(tensors), experts, "", whole=all(module.whole for module in experts))
