"""What a checkpoint consists of, read off the names and shapes of its tensors and config.json alone.

For architectures that transformers does not know, and for streaming, where building the module tree would cost more
than the work itself. Where both can be had, this gives the same layers as `models.anatomy`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from auto_round.core.errors import ModelError
from auto_round.models import load, quirks
from auto_round.models.anatomy import Anatomy, Layer
from auto_round.models.checkpoint import TensorInfo, natural
from auto_round.models.experts import Experts, split_store
from auto_round.models.load import ModelFiles
from auto_round.models.subject import Subject

logger = logging.getLogger("auto_round")
WEIGHT = ".weight"
SIBLINGS = 3  # blocks from which on the one that differs is the odd one


def streamed_subject(
    files: ModelFiles, *, blocks: Any, trust_remote_code: bool, embedding: bool = False
) -> Subject | None:
    """The model of `files`, a folder, by its names, or None when these do not tell all and transformers knows better.

    blocks: narrows the anatomy (`to_quant_block_names`). embedding: whether that table counts as a layer.
    Raises ModelError when the names show no list of blocks.
    """
    assert files.folder is not None, "only folders are streamed"
    # Building the tree takes seconds, so it is asked only where names alone would not do.
    if not tells_all(files.store.infos, files.config) and load.knows(
        files.folder, trust_remote_code=trust_remote_code
    ):
        return None
    return stored_subject(files, blocks=blocks, embedding=embedding)


def stored_subject(files: ModelFiles, *, blocks: Any = None, embedding: bool = False) -> Subject:
    """The model of `files` by its names. Raises ModelError when they show no list of blocks."""
    experts = tuple(fused_experts(files.store.infos, files.config))
    store = split_store(files.store, experts, "", whole=True)
    body = anatomy_of_names(store.infos, files.config, experts).narrowed(blocks)
    if embedding:
        table = _embedding(store.infos, files.config).removesuffix(WEIGHT)
        rows, columns = store.infos[f"{table}{WEIGHT}"].shape
        layer = Layer(table, (rows, columns), False, None)
        body = replace(body, layers={table: layer, **body.layers}, embedding=table)
    for reason, count in Counter(body.left.values()).items():
        logger.info("%d tensors stay as they are: %s", count, reason)
    names = {layer.tensor: layer.tensor for layer in body.layers.values()}
    if body.tied and body.head is not None:
        # A tied head has no tensor: its values are read from the embedding.
        names[f"{body.head}{WEIGHT}"] = _embedding(store.infos, files.config)
    return Subject(anatomy=body, files=replace(files, store=store), names=names)


def tells_all(infos: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> bool:
    """Whether the names are those of the module tree, as they are when nothing renames them while loading.

    Not so for checkpoints of a base model ("h.0" for "transformer.h.0"), for models with towers, for heads that
    transformers calls otherwise, and for experts in modules of other names ("input_linear" of Granite).
    """
    prefixes = {found.rpartition(".")[0] for name in infos if (found := block_of(name))}
    renamed = "text_config" in config or f"embed_out{WEIGHT}" in infos
    # A convolution has a side of 1: its channels are apart.
    stacked = any(
        name.endswith(WEIGHT) and len(info.shape) == 3 and 1 not in info.shape and block_of(name)
        for name, info in infos.items()
    )
    # Inkling 2 drops ".weight" from the names of some layers.
    nameless = any(
        len(info.shape) == 2 and info.dtype.is_floating_point and name.endswith("_proj") and block_of(name)
        for name, info in infos.items()
    )
    odd = renamed or stacked or nameless
    return bool(prefixes) and all("." in prefix for prefix in prefixes) and not odd


def anatomy_of_names(
    infos: Mapping[str, TensorInfo], config: Mapping[str, Any], experts: tuple[Experts, ...] = ()
) -> Anatomy:
    """The anatomy of a checkpoint with the tensors `infos`. Raises ModelError when it shows no list of blocks."""
    text = config.get("text_config") or config
    layers: dict[str, Layer] = {}
    left: dict[str, str] = {}
    lists: dict[str, dict[str, None]] = {}
    kind = str(config.get("model_type"))
    transposed = quirks.TRANSPOSED_ENDINGS.get(kind, ())
    pieces = {layer: piece for module in experts for layer, piece in module.pieces()}
    for tensor in sorted(infos, key=natural):
        name = tensor.removesuffix(WEIGHT)
        block = block_of(tensor)
        reason = _reason(tensor, infos[tensor], block, text) or quirks.left_alone(name, kind)
        if reason is not None:
            left[tensor] = reason
            continue
        if block is not None:
            lists.setdefault(block.rpartition(".")[0], {})[block] = None
        rows, columns = infos[tensor].shape
        turned = name.endswith(transposed) if transposed else False
        shape = (columns, rows) if turned else (rows, columns)
        layers[name] = Layer(name, shape, turned, block, pieces.get(name))
    if not lists:
        raise ModelError(
            "the checkpoint has no list of blocks (tensors such as model.layers.0.mlp.up_proj.weight); "
            "is it a language model?"
        )
    head, tied = _head(layers, infos, text, config)
    if head is not None and tied:
        rows, columns = infos[_embedding(infos, config)].shape
        layers[head] = Layer(head, (rows, columns), False, None)
    return Anatomy(
        layers=layers,
        block_lists=tuple(tuple(blocks) for blocks in lists.values()),
        head=head,
        tied=tied,
        experts=experts,
        left=left,
        routers=tuple(
            name.removesuffix(WEIGHT)
            for name in left
            if block_of(name) and name.removesuffix(WEIGHT).endswith(quirks.ROUTER_ENDINGS)
        ),
    )


def block_of(tensor: str) -> str | None:
    """The block of a tensor: "model.layers.3" of "model.layers.3.mlp.up_proj.weight", up to the first number."""
    parts = tensor.split(".")
    # The first number: later ones count experts inside a block. A matrix of a list ("projections.0.weight") is none.
    at = next((i for i, part in enumerate(parts) if part.isdigit() and 0 < i < len(parts) - 2), None)
    return None if at is None else ".".join(parts[: at + 1])


def lacking(infos: Iterable[str]) -> str | None:
    """The tensor or block that seems to be missing among the tensors `infos`, since all others have it, or None."""
    lists: dict[str, dict[int, set[str]]] = {}
    for tensor in infos:
        block = block_of(tensor)
        if block is not None:
            path, _, number = block.rpartition(".")
            lists.setdefault(path, {}).setdefault(int(number), set()).add(tensor.removeprefix(f"{block}."))
    for path, blocks in lists.items():
        gaps = set(range(max(blocks))) - blocks.keys()
        if gaps:
            return f"{path}.{min(gaps)}"
        owners = Counter(name for names in blocks.values() for name in names)
        for index, names in blocks.items():
            # A block with something of its own is of another kind: a dense one before mixtures of experts, for example.
            if len(blocks) < SIBLINGS or any(owners[name] == 1 for name in names):
                continue
            absent = sorted(name for name in owners.keys() - names if owners[name] == len(blocks) - 1)
            if absent:
                return f"{path}.{index}.{absent[0]}"
    return None


def _reason(tensor: str, info: TensorInfo, block: str | None, text: Mapping[str, Any]) -> str | None:
    """Why `tensor` is no layer, or None."""
    name, shape = tensor.removesuffix(WEIGHT), info.shape
    if not tensor.endswith(WEIGHT) or len(shape) != 2 or not info.dtype.is_floating_point:
        if len(shape) > 2 and ".experts." in tensor:
            return f"a {len(shape)}-dimensional tensor of experts whose layout is not known"
        return "no matrix: a norm, a bias, a table or a convolution"
    place = block or name
    if any(word in place for word in quirks.NON_TEXT_WORDS):
        return "it belongs to a vision or audio tower"
    if quirks.PREDICTION.search(name):
        return "it predicts several tokens at once (MTP), which readers keep in floating point"
    if block is not None and _number(block) >= _blocks_in_config(text):
        return f"block {_number(block)} is beyond num_hidden_layers: it predicts several tokens at once (MTP)"
    if any(word in name.rpartition(".")[2] for word in quirks.EMBEDDINGS) and not name.endswith(quirks.HEADS):
        return "a table of embeddings"
    # A matrix of scales per head is no matrix to multiply by.
    if block is not None and "norm" in name.rpartition(".")[2]:
        return "a norm"
    return None


def _number(block: str) -> int:
    return int(block.rpartition(".")[2])


def _blocks_in_config(text: Mapping[str, Any]) -> float:
    """Number of decoder layers; infinite when the configuration does not say."""
    for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
        if isinstance(text.get(key), int) and not isinstance(text.get(key), bool):
            return int(text[key])
    return float("inf")


def _embeddings(infos: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Iterator[str]:
    """Tables of the size of the vocabulary, input embeddings first."""
    text = config.get("text_config") or config
    for tensor, info in infos.items():
        last = tensor.removesuffix(WEIGHT).rpartition(".")[2]
        if block_of(tensor) is not None or len(info.shape) != 2 or last in quirks.HEADS:
            continue
        if info.shape[0] == text.get("vocab_size") or last in ("embed_tokens", "wte", "embed_in"):
            yield tensor


def _embedding(infos: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> str:
    found = next(_embeddings(infos, config), None)
    if found is None:
        raise ModelError("the checkpoint has no embedding table that the output head could be tied to")
    return found


def _head(
    layers: Mapping[str, Layer],
    infos: Mapping[str, TensorInfo],
    text: Mapping[str, Any],
    config: Mapping[str, Any],
) -> tuple[str | None, bool]:
    """Name of the output head, and whether it is the embedding table."""
    stored = next(
        (n for n, layer in layers.items() if layer.block is None and n.endswith(quirks.HEADS)), None
    )
    said = text.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    if stored is not None:
        # CPMAnt says tied, though its embedding has more rows and no head could be it.
        alike = any(infos[name].shape == layers[stored].shape for name in _embeddings(infos, config))
        return stored, bool(said) and alike
    # A configuration that does not say means tied: that is the default in transformers.
    if said is False or next(_embeddings(infos, config), None) is None:
        return None, False
    return quirks.HEADS[0], True


def fused_experts(infos: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Iterator[Experts]:
    """Modules whose experts lie in two 3-D tensors, `gate_up_proj` (or `up_proj`) and `down_proj`."""
    text = config.get("text_config") or config
    hidden = text.get("hidden_size")
    for tensor in sorted(infos, key=natural):
        path, _, last = tensor.rpartition(".")
        if last != "down_proj" or len(infos[tensor].shape) != 3:
            continue
        first = next((n for n in ("gate_up_proj", "up_proj") if f"{path}.{n}" in infos), None)
        # Gate and up in two tensors: shared experts of Inkling, which no reader takes apart.
        apart = first == "up_proj" and f"{path}.gate_proj" in infos
        if first is None or apart or any(word in path for word in quirks.NON_TEXT_WORDS):
            continue
        count, a, b = infos[tensor].shape
        parts = 2 if first == "gate_up_proj" else 1
        # down is (E, H, I), or (E, I, H) when stored transposed; the first tensor decides where H = I.
        turned = (a, b) != (hidden, b) if a != b else infos[f"{path}.{first}"].shape[1] != parts * a
        yield Experts(
            path=path,
            count=count,
            saved=path,
            names=("gate_proj", "up_proj", "down_proj") if parts == 2 else ("up_proj", "down_proj"),
            whole=True,
            transposed=turned,
            interleaved=str(config.get("model_type")) in quirks.INTERLEAVED_EXPERTS,
            biased=f"{path}.{first}_bias" in infos,
        )
