"""What a model consists of, read off the module tree: blocks, quantizable matrices, and how servers fuse them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from auto_round.core.errors import ModelError, PlanError
from auto_round.models import quirks
from auto_round.models.experts import Experts, Piece, SavedNames, find_experts, fuse


@dataclass(frozen=True, slots=True)
class Layer:
    """One quantizable matrix: shape (O, I), whether its tensor is stored (I, O), the block it is in, if any.

    piece: where it lies in a fused tensor of the module tree; `name` is then the name that checkpoints use.
    """

    name: str
    shape: tuple[int, int]
    transposed: bool
    block: str | None
    piece: Piece | None = None

    @property
    def tensor(self) -> str:
        """Name of its weight."""
        return f"{self.name}.weight"

    @property
    def parameter(self) -> str:
        """Name of the parameter of the module tree that holds it, maybe among others."""
        return self.tensor if self.piece is None else self.piece.tensor

    def matrix(self, parameter: Tensor) -> Tensor:
        """Its weight (O, I), a view of `parameter`."""
        if self.piece is not None:
            return self.piece.of(parameter)
        return parameter.t() if self.transposed else parameter  # Conv1D of GPT-2 stores (I, O)


@dataclass(frozen=True, slots=True, kw_only=True)
class Anatomy:
    """Blocks in order, one inner tuple per block list; layers in model order; the output head.

    experts: the modules of fused experts. routers: matrices in blocks that choose among experts, never quantized.
    """

    layers: Mapping[str, Layer]
    block_lists: tuple[tuple[str, ...], ...]
    head: str | None
    tied: bool
    experts: tuple[Experts, ...] = ()
    routers: tuple[str, ...] = ()
    embedding: str | None = None
    notes: tuple[str, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)
    """Tensors that are never quantized, with the reason, as far as names tell."""

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Names of the block lists ("model.layers"), as checkpoint configurations state them."""
        return tuple(blocks[0].rsplit(".", 1)[0] for blocks in self.block_lists)

    def with_embedding(self, model: nn.Module) -> Anatomy:
        """With the input embedding of `model` as a layer, outside the blocks: for files that quantize it too."""
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        name = next(name for name, module in model.named_modules() if module is embedding)
        layer = Layer(name, (embedding.weight.shape[0], embedding.weight.shape[1]), False, None)
        # First, as it is in the model.
        return replace(self, layers={name: layer, **self.layers}, embedding=name)

    def in_order(self) -> tuple[str, ...]:
        """Names of all blocks."""
        return tuple(block for blocks in self.block_lists for block in blocks)

    def in_blocks(self) -> list[str]:
        """Names of the layers inside blocks: those quantized by default."""
        return [name for name, layer in self.layers.items() if layer.block is not None]

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Layer -> (O, I)."""
        return {name: layer.shape for name, layer in self.layers.items()}

    def fused(self) -> tuple[frozenset[str], ...]:
        """Sets of layers that servers merge."""
        of_experts: dict[str, list[str]] = {}
        for name in self.layers:
            place = experts_of(name)
            if place is not None:
                of_experts.setdefault(place, []).append(name)
        found = [frozenset(names) for names in of_experts.values()]
        for names in quirks.FUSED_NAMES:
            anchor = sorted(names)[0]  # one of them speaks for the set, so that it is found once
            for name in self.layers:
                if experts_of(name) is not None:
                    continue
                parent, _, last = name.rpartition(".")
                group = frozenset(
                    f"{parent}.{other}" for other in names if f"{parent}.{other}" in self.layers
                )
                if last == anchor and len(group) > 1:
                    found.append(group)
        return tuple(found)

    def narrowed(self, wanted: str | list[str] | None) -> Anatomy:
        """Only the blocks that `to_quant_block_names` means: a comma string of parts of names, or a list of names.

        Raises PlanError when it means none.
        """
        if not wanted:
            return self
        if isinstance(wanted, str):
            parts = [part.strip() for part in wanted.split(",") if part.strip()]
        else:
            parts = [
                str(name)
                for entry in wanted
                for name in (entry if isinstance(entry, (list, tuple)) else [entry])
            ]
        lists = [
            tuple(b for b in blocks if any(_means(part, b) for part in parts)) for blocks in self.block_lists
        ]
        kept = {block for blocks in lists for block in blocks}
        if not kept:
            raise PlanError(
                f"to_quant_block_names {wanted!r} means no block. Blocks: {', '.join(self.prefixes)}.<number>"
            )
        layers = {
            # Still a layer, but outside the blocks: layer_config may name it, the base scheme does not reach it.
            name: layer if layer.block in kept else replace(layer, block=None)
            for name, layer in self.layers.items()
        }
        return replace(self, layers=layers)


def _means(part: str, block: str) -> bool:
    # The dot keeps layers.1 from meaning layers.10; a word without a number means the whole list.
    return f"{block}.".startswith(f"{part.rstrip('.')}.") or part.rstrip(".") in block.rsplit(".", 1)[0]


def parameters_for(
    layers: Mapping[str, Layer], weights: Mapping[str, Tensor], original: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """Parameter name -> its value once the layers have `weights` (O, I); differentiable.

    original: the parameter of a name, for those matrices of a fused one that keep their values.
    """
    found: dict[str, Tensor] = {}
    pieces: dict[str, dict[Piece, Tensor]] = {}
    for name, weight in weights.items():
        layer = layers[name]
        if layer.piece is not None:
            pieces.setdefault(layer.parameter, {})[layer.piece] = weight
        else:
            found[layer.parameter] = weight.t() if layer.transposed else weight
    # All matrices of a fused tensor at once: rebuilding it for each would copy it E times.
    found.update({name: fuse(own, original(name)) for name, own in pieces.items()})
    return found


def experts_of(layer: str) -> str | None:
    """Where the experts are that `layer` is one of ("model.layers.0.mlp.experts"), or None."""
    found = re.match(r"(.*\.experts)\.\d+\.", layer)
    return found[1] if found else None


def is_matrix(module: nn.Module) -> bool:
    """Whether `module` is a layer that can be quantized."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is the layer of GPT-2 that stores its weight transposed."""
    # Where there is such a module, transformers is loaded; without one, loading it would take a stream seconds.
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(O, I) of a quantizable layer."""
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (columns, rows) if is_conv1d(module) else (rows, columns)


def block_lists(model: nn.Module) -> list[tuple[str, ...]]:
    """Names of the blocks of each list of blocks: the first `ModuleList` with matrices on every path."""

    def search(module: nn.Module, path: str) -> Iterator[tuple[str, ...]]:
        for name, child in module.named_children():
            inner = f"{path}.{name}" if path else name
            if isinstance(child, nn.ModuleList):
                # A list of single matrices, as Gemma 3n has beside its blocks, is none of blocks.
                if any(is_matrix(m) for block in child for m in block.modules() if m is not block):
                    # No search inside: a list in a block, such as its experts, belongs to the block.
                    yield tuple(f"{inner}.{index}" for index in range(len(child)))
            else:
                yield from search(child, inner)

    text = [blocks for blocks in search(model, "") if not any(w in blocks[0] for w in quirks.NON_TEXT_WORDS)]
    return text


def anatomy(model: nn.Module) -> Anatomy:
    """The anatomy of a live model or of a skeleton on the meta device. Raises ModelError when it has no blocks."""
    lists = block_lists(model)
    if not lists:
        raise ModelError(
            f"{type(model).__name__}: found no list of blocks with linear layers; is it a language model?"
        )
    owner = {block: block for blocks in lists for block in blocks}
    layers: dict[str, Layer] = {}
    kind = str(getattr(getattr(model, "config", None), "model_type", ""))
    head, shared = _head_name(model), shared_matrices(model)
    experts = {module.path: module for module in find_experts(model)}
    for name, module in model.named_modules():
        block = next((owner[prefix] for prefix in _prefixes(name) if prefix in owner), None)
        if name in experts and block is not None:
            layers.update(_expert_layers(experts[name], module, block))
        if not is_matrix(module):
            continue
        # Other towers have no blocks here (`block_lists`), so their matrices are known by their names.
        if (
            name in shared
            or quirks.left_alone(name, kind)
            or (block is None and any(w in name for w in quirks.NON_TEXT_WORDS))
        ):
            continue
        layers[name] = Layer(name, shape_of(module), is_conv1d(module), block)
    return Anatomy(
        layers=layers,
        block_lists=tuple(lists),
        head=head,
        tied=_is_tied(model, head),
        experts=tuple(
            module for module in experts.values() if any(p in owner for p in _prefixes(module.path))
        ),
        routers=tuple(_routers(model, owner)),
        notes=tuple(_notes(model, owner, layers.values())),
    )


def _routers(model: nn.Module, blocks: Mapping[str, str]) -> Iterator[str]:
    """Names in checkpoints of the matrices that choose among experts."""
    saved = SavedNames(model)
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        inside = any(prefix in blocks for prefix in _prefixes(name))
        if inside and name.endswith(quirks.ROUTER_ENDINGS) and weight is not None and weight.ndim == 2:
            yield saved.renamed(f"{name}.weight").removesuffix(".weight")


def _expert_layers(experts: Experts, module: nn.Module, block: str) -> dict[str, Layer]:
    found = {}
    for name, piece in experts.pieces():
        parameter = module.get_parameter(piece.tensor.rpartition(".")[2])
        own = torch.empty(parameter.shape[1:], device="meta")  # only the shape counts
        rows, columns = piece.of_expert(own).shape
        found[name] = Layer(name, (rows, columns), False, block, piece)
    return found


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts)))  # shortest first, without the name


def _head_name(model: nn.Module) -> str | None:
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    return next((name for name, module in model.named_modules() if head is not None and module is head), None)


def hidden_width(model: nn.Module) -> int:
    """Values per token between blocks: what the configuration says, else the width of the embedding."""
    said = getattr(model.config.get_text_config(), "hidden_size", None)  # type: ignore[operator, union-attr]
    # BLT has one for each of its parts, and none for the whole.
    return int(said or model.get_input_embeddings().weight.shape[1])  # type: ignore[operator]


def ties(model: nn.Module) -> Mapping[str, str]:
    """Tensor -> the one whose values it shares, as transformers >= 5 tells it; other versions tell nothing."""
    return getattr(model, "all_tied_weights_keys", None) or {}


def shared_matrices(model: nn.Module) -> frozenset[str]:
    """Layers that are the same weight as another layer: those of a part that several blocks have in common."""
    matrices = {name for name, module in model.named_modules() if is_matrix(module)}
    pairs = ((a.removesuffix(".weight"), b.removesuffix(".weight")) for a, b in ties(model).items())
    return frozenset(name for pair in pairs if matrices.issuperset(pair) for name in pair)


def _is_tied(model: nn.Module, head: str | None) -> bool:
    config = getattr(model, "config", None)
    if head is None or config is None:
        return False
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    if embedding is not None and model.get_submodule(head).weight is embedding.weight:
        return True
    if getattr(model, "all_tied_weights_keys", None) is not None:
        return f"{head}.weight" in ties(model)  # CPMAnt says tied in its configuration, and is not
    return bool(config.get_text_config().tie_word_embeddings)


def _notes(model: nn.Module, blocks: Mapping[str, str], layers: Iterable[Layer]) -> Iterator[str]:
    known = {layer.parameter for layer in layers}
    stacked = [
        name
        for name, p in model.named_parameters()
        # A convolution has a side of 1: its channels are apart.
        if p.ndim == 3
        and 1 not in p.shape
        and name not in known
        and any(x in blocks for x in _prefixes(name))
    ]
    if stacked:
        yield (
            f"{len(stacked)} three-dimensional tensors such as {stacked[0]} stay in floating point: "
            f"how {type(model.get_submodule(stacked[0].rpartition('.')[0])).__name__} uses them is not known"
        )
