"""A model made ready for a job: its anatomy, its files, and which stored tensor belongs to which layer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from auto_round.core.errors import ModelError
from auto_round.core.hadamard import Rotation
from auto_round.core.plan import Plan
from auto_round.core.quantized import Quantized
from auto_round.models import load
from auto_round.models.anatomy import Anatomy, Layer, anatomy, ties
from auto_round.models.checkpoint import StateDict, names_match
from auto_round.models.experts import SavedNames, live_store, split_store
from auto_round.models.load import ModelFiles
from auto_round.models.skeleton import Located, check_missing, locate
from auto_round.models.turning import Change, turned_store

logger = logging.getLogger("auto_round")


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model as the writers see it. names: tensor name in the module tree -> name in `files.store`.

    tree: the live model, or its skeleton on the meta device; None when only names were looked at. located: where a
    checkpoint holds each tensor of the tree; None when it cannot be read part by part.
    """

    anatomy: Anatomy
    files: ModelFiles
    names: Mapping[str, str]
    tree: nn.Module | None = None
    located: Located | None = None

    def stored_name(self, layer: str) -> str:
        """Prefix of the tensors of `layer` in the checkpoint."""
        tensor = self.anatomy.layers[layer].tensor
        if self.unties(layer):  # its own name, as the embedding's tensor stays what it is
            return layer
        return self.names[tensor].removesuffix(".weight")

    def quantized(self, layer: str) -> Quantized | None:
        """The weight of `layer` as it is stored, where that is quantized and of its shape; None otherwise."""
        about = self.anatomy.layers[layer]
        stored = None if self.unties(layer) else self.names.get(about.tensor)
        found = None if stored is None else self.files.store.quantized(stored)
        return found if found is not None and found.shape == about.shape else None

    def stored_tensor(self, tensor: str) -> str:
        """Name in the checkpoint of a tensor of the module tree that is no layer's weight."""
        assert self.tree is not None, "what is tuned has a module tree"
        saved = SavedNames(self.tree).renamed
        found = names_match([tensor], self.files.store.infos, str(self.tree.base_model_prefix), saved)
        if found is None:
            raise ModelError(f"{tensor}: not found in the checkpoint, so its tuned values cannot be written")
        return found[tensor]

    def turned(self, turns: Mapping[str, Rotation]) -> Subject:
        """With the weights of the layers in `turns` as they are once their inputs are turned."""
        changes: dict[str, list[Change]] = {}
        for name, rotation in turns.items():
            across = self.anatomy.layers[name].transposed
            changes[self.names[self.anatomy.layers[name].tensor]] = [rotation.down if across else rotation]
        told = repr({name: rotation.told() for name, rotation in turns.items()})
        store = turned_store(self.files.store, changes, told)
        located = self.located and replace(self.located, store=store)
        return replace(self, files=replace(self.files, store=store), located=located)

    def unties(self, layer: str) -> bool:
        """Whether quantizing `layer` cuts its tie to the embedding, whose tensor then stays."""
        return layer == self.anatomy.head and self.anatomy.tied


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a model comes from: a folder, or a live model when there is none.

    load_live: called only when the weights of the folder are not safetensors, or have names nobody knows.
    opener: how the files of a folder of safetensors are opened. fuse: what is done to weights, and to the tree, before
    anything else looks at them.
    """

    folder: Path | None
    model: nn.Module | None = None
    load_live: Callable[[], nn.Module]
    tokenizer: Any = None
    trust_remote_code: bool = False
    dtype: str = "auto"
    opener: Callable[[Path], ModelFiles] = load.open_folder
    fuse: Callable[[ModelFiles, nn.Module], ModelFiles] = lambda files, tree: files

    def opened(self) -> tuple[ModelFiles, nn.Module]:
        """Its files and its module tree, which has no weights where the folder is of safetensors."""
        folder, model = self.folder, self.model
        if folder is None:
            assert model is not None, "a model or a folder is given"
            return load.of_live_model(model, self.tokenizer), model
        config = load.read_config(folder)
        if load.has_weights(folder):
            if model is None:
                model = load.skeleton(folder, trust_remote_code=self.trust_remote_code, dtype=self.dtype)
            return self.opener(folder), model
        tree = self.load_live()
        files = load.of_live_model(tree, None)
        return replace(files, config=config, side_files=load.side_files(folder), savers=()), tree


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """Which layers may be quantized, so that their tensors must be in the checkpoint.

    blocks: narrows the anatomy (`to_quant_block_names`). named, head: layers outside the blocks. embedding: whether the
    input embedding counts as a layer.
    """

    blocks: Any = None
    named: Collection[str] = ()
    head: bool = False
    embedding: bool = False


IN_BLOCKS = Candidates()


def open_subject(origin: Origin, candidates: Candidates = IN_BLOCKS) -> Subject:
    """Find layers and files of a model. Raises ModelError for a tensor that is missing or of another shape."""
    files, tree = origin.opened()
    files = origin.fuse(files, tree)
    body = anatomy(tree).narrowed(candidates.blocks)
    if candidates.embedding:
        body = body.with_embedding(tree)
    # A tied head is not looked for under its own name: checkpoints leave it out.
    own = [layer for layer in body.layers.values() if layer.name != body.head or not body.tied]
    wanted = {*candidates.named, *([body.head] if candidates.head else [])}
    prefix, saved = str(tree.base_model_prefix), SavedNames(tree).renamed
    if files.folder is not None:
        files = replace(files, store=split_store(files.store, body.experts, prefix, whole=True))
    needed = [layer.tensor for layer in own if layer.block is not None or layer.name in wanted]
    names = names_match(needed, files.store.infos, prefix, saved)
    if names is None:
        # A checkpoint of other names than transformers knows; those of the live model are always consistent.
        logger.info("tensor names of the checkpoint differ from the model's; writing the model's own names")
        files = replace(files, store=live_store(origin.load_live()))
        names = names_match(needed, files.store.infos, prefix, saved)
        assert names is not None, "a live model has the tensors of its own layers"
    for layer in own:  # one that stays float needs no name
        names.update(names_match([layer.tensor], files.store.infos, prefix, saved) or {})
    if body.tied and body.head is not None:
        names[body.layers[body.head].tensor] = _embedding_tensor(tree, files, prefix)
    located = _located(tree, body, files, names) if next(tree.parameters()).is_meta else None
    return Subject(anatomy=body, files=files, names=names, tree=tree, located=located)


def check_streamed(files: ModelFiles, *, trust_remote_code: bool) -> bool:
    """Whether the checkpoint holds every layer under one name. Raises ModelError when it lacks a tensor of the
    architecture, also one that would only be copied, or has a matrix of another shape."""
    assert files.folder is not None, "only folders are streamed"
    try:
        tree = load.skeleton(files.folder, trust_remote_code=trust_remote_code)
    except ModelError:
        return True  # not an architecture of transformers: nobody knows what is missing
    body, prefix, spelled = anatomy(tree), str(tree.base_model_prefix), SavedNames(tree)
    files = replace(files, store=split_store(files.store, body.experts, prefix, whole=True))
    inside = [layer.tensor for layer in body.layers.values() if layer.block is not None]
    if any(spelled.shares(tensor) for tensor in inside):
        return False  # HRM: one stored tensor for queries, keys and values
    # No tensor is expected for it.
    tied = {body.layers[body.head].tensor: ""} if body.tied and body.head else {}
    _located(tree, body, files, tied)
    for layer in body.layers.values():
        for stored in (names_match([layer.tensor], files.store.infos, prefix) or {}).values():
            _check_shape(files, stored, layer)
    return True


def _check_shape(files: ModelFiles, stored: str, layer: Layer) -> None:
    """Raise ModelError when the tensor `stored` has another shape than the model says."""
    expected = layer.shape[::-1] if layer.transposed else layer.shape
    found = files.store.infos[stored].shape
    if found != expected:
        raise ModelError(
            f"{stored}: shape {found} in the checkpoint, {expected} in the model's configuration"
        )


def _located(tree: nn.Module, body: Anatomy, files: ModelFiles, names: Mapping[str, str]) -> Located | None:
    """Where the checkpoint holds each tensor of the skeleton `tree`. Raises ModelError for one that is missing."""
    if files.folder is None or isinstance(files.store, StateDict):
        return None
    located, missing = locate(tree, files.store, body.experts, names, SavedNames(tree))
    check_missing(missing, located, tree)
    if missing:
        logger.warning("%s: the checkpoint has no tensor of that name; it may have another", missing[0])
    return None if missing else located


def _embedding_tensor(tree: nn.Module, files: ModelFiles, prefix: str) -> str:
    """Name in the checkpoint of the input embedding."""
    embedding = tree.get_input_embeddings()  # type: ignore[operator]
    name = next(name for name, module in tree.named_modules() if module is embedding)
    tensor, saved = f"{name}.weight", SavedNames(tree).renamed
    # Of tables that share their values a checkpoint holds one: ProphetNet's decoder has that of the whole model, and
    # what CamemBERT keeps is the head's.
    pairs = ties(tree)
    for spelling in (
        tensor,
        pairs.get(tensor, tensor),
        *(name for name, other in pairs.items() if other == tensor),
    ):
        matched = names_match([spelling], files.store.infos, prefix, saved)
        if matched is not None:
            return matched[spelling]
    raise ModelError(f"{tensor}: the tied embedding is not in the checkpoint")


def check_sources(subject: Subject, plan: Plan) -> None:
    """Raise ModelError when a layer's weight in the checkpoint has another shape than the model says."""
    for name in plan.quantized():
        layer = subject.anatomy.layers[name]
        stored = subject.names.get(layer.tensor)
        if stored is None:
            raise ModelError(f"{layer.tensor}: not found in the checkpoint")
        _check_shape(subject.files, stored, layer)
