"""A GGUF file as a model folder: config.json and tokenizer from its header, and its tensors by their usual names."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.core.errors import ModelError
from auto_round.models import quirks
from auto_round.models.experts import SavedNames, find_experts
from auto_round.models.gguf_config import Header, config_of
from auto_round.models.gguf_file import GgufFile, GgufStore, Shown, floats, parts_of
from auto_round.models.gguf_metadata import block_count, language_config
from auto_round.models.gguf_names import (
    ARCHITECTURES,
    Architecture,
    Names,
    adds_one,
    architecture_of,
    row_order,
)
from auto_round.models.gguf_vocabulary import write_tokenizer

logger = logging.getLogger("auto_round")
FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that say something about the configuration and are none of the model's."""


def unpack(path: Path, into: Path) -> Path:
    """A folder in `into`, named after the file, with its configuration, its tokenizer and links to its parts.

    Raises ModelError for a file that is damaged, incomplete, or of an architecture that is not known.
    """
    parts = parts_of(path)
    file = GgufFile(parts)
    # Known by the model's name, not the file's, which has size and type in it too.
    named = re.sub(r"[^\w.-]+", "-", str(file.values.get("general.name") or "")).strip(".-")
    folder = into / (named or path.name.removesuffix(".gguf"))
    folder.mkdir()
    try:
        config = config_of(_header(file))
        config["dtype"] = str(_dtype(file, ARCHITECTURES[config["architectures"][0]])).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        if any(value is not None for value in generation.values()):
            (folder / "generation_config.json").write_text(json.dumps(generation, indent=1))
        write_tokenizer(file.values, folder)
        _write_card(file.values, folder)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        raise ModelError(
            f"{path}: its header cannot be understood ({error}); is the file damaged?"
        ) from error
    for part in parts:
        os.symlink(part.resolve(), folder / part.name)  # links: a copy would double gigabytes
    return folder


def _write_card(values: Mapping[str, Any], folder: Path) -> None:
    """A model card with what the header says of licence and origin, for the files that are made of this one."""
    said = {
        "license": values.get("general.license"),
        "license_name": values.get("general.license.name"),
        "license_link": values.get("general.license.link"),
        "base_model": str(values.get("general.base_model.0.repo_url") or "").removeprefix(
            "https://huggingface.co/"
        ),
        "tags": values.get("general.tags"),
        "language": values.get("general.languages"),
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in said.items() if value]  # JSON is YAML
    if lines:
        (folder / "README.md").write_text("\n".join(["---", *lines, "---", ""]))


def _header(file: GgufFile) -> Header:
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    factors = {
        name: floats(file.tensors[name], file.tensors[name].read(0, 1)).reshape(-1)
        for name in FACTORS
        if name in file.tensors
    }
    return Header(file.values, shapes, factors)


def _dtype(file: GgufFile, architecture: Architecture) -> torch.dtype:
    """The dtype of the model that the file was made of, as far as it can be told."""
    vectors = {
        name: floats(tensor, tensor.read(0, 1)) - (1.0 if adds_one(architecture, name) else 0.0)
        for name, tensor in file.tensors.items()
        if len(tensor.shape) == 1 and tensor.type == "f32" and name not in FACTORS
    }
    kinds = {tensor.type for tensor in file.tensors.values()}
    return dtype_of(kinds, vectors, inexact=architecture.norms_plus_one)


def dtype_of(kinds: set[str], vectors: Mapping[str, Tensor], *, inexact: bool) -> torch.dtype:
    """The dtype that the model had before: that of its matrices, or where these are quantized, of its vectors.

    kinds: types in the file. vectors: norms and biases, float32 in the file. inexact: something was added to norms, at
    the cost of their last bits.
    """
    if "bf16" in kinds:
        return torch.bfloat16
    if "f16" in kinds:
        return torch.float16
    # Vectors are float32 in every file; those that bfloat16 could hold exactly were in it once.
    if kinds != {"f32"}:
        near = 2.0**-23 if inexact else 0.0
        for dtype in (torch.bfloat16, torch.float16):
            if all(bool(((v - v.to(dtype).float()).abs() <= near).all()) for v in vectors.values()):
                return dtype
    return torch.float32


def open_store(paths: list[Path], config: Mapping[str, Any], tree: nn.Module) -> GgufStore:
    """The tensors of a file under the names of a checkpoint of `tree`, the model's skeleton.

    Raises ModelError for a tensor that is missing, of another shape, or that the architecture does not have.
    """
    file = GgufFile(paths)
    full = language_config(config)
    architecture = architecture_of(full)
    names = Names(architecture, block_count(full))
    said = config.get("dtype") or config.get("torch_dtype") or _dtype(file, architecture)
    dtype = getattr(torch, str(said).removeprefix("torch."))
    found: dict[str, Shown] = {}
    used = set(FACTORS)
    for name, shape in _tensors_of(tree):
        place = None if _is_tied_head(name, full) else names.place(name)
        if place is None:
            continue
        if place.name not in file.tensors:
            raise ModelError(f"{paths[0]}: {place.name} is missing ({name}); copy or download the file again")
        used.add(place.name)
        stored = file.tensors[place.name]
        turned = name.removesuffix(".weight").endswith(
            quirks.TRANSPOSED_ENDINGS.get(full["model_type"], ("\n",))
        )
        shown = Shown(
            stored,
            shape,
            expert=place.expert,
            order=row_order(architecture, place.name, _rows(shape, turned), full),
            plus=1.0 if adds_one(architecture, place.name) else 0.0,
            transposed=turned and len(shape) == 2,
        )
        found[name] = _checked(shown, name, paths[0])
    left = sorted(set(file.tensors) - used)
    if left:
        raise ModelError(
            f"{paths[0]}: {left[0]} and {len(left) - 1} other tensors are none of {type(tree).__name__}'s. "
            "Use the original model"
        )
    _warn(file, paths[0])
    return GgufStore(file, found, dtype)


def _is_tied_head(name: str, config: Mapping[str, Any]) -> bool:
    return bool(config.get("tie_word_embeddings")) and name.removesuffix(".weight") in quirks.HEADS


def _rows(shape: tuple[int, ...], turned: bool) -> int:
    return shape[-1] if turned else shape[0]


def _checked(shown: Shown, name: str, path: Path) -> Shown:
    """`shown`, of the shape that the model wants. Raises ModelError when the file has another one."""
    own = shown.stored.shape if shown.expert is None else shown.stored.shape[1:]
    if shown.expert is not None and shown.expert >= shown.stored.shape[0]:
        raise ModelError(f"{path}: {name} is missing, there are {shown.stored.shape[0]} experts in the file")
    wanted = shown.shape[::-1] if shown.transposed else shown.shape  # the file has (O, I) throughout
    # Some writers leave a dimension of 1 out.
    if own != wanted and [n for n in own if n > 1] != [n for n in wanted if n > 1]:
        raise ModelError(
            f"{path}: {name} has the shape {own} in the file, {wanted} by its header; it is damaged"
        )
    if math.prod(own[:-1]) == 1 and shown.order is not None and len(own) > 1:
        return replace(shown, order=None)
    return shown


def _tensors_of(tree: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name in a checkpoint, shape) of every tensor of the skeleton `tree`, stacked experts one by one."""
    saved, stacked = SavedNames(tree), {}
    tensors = tree.state_dict()
    for module in find_experts(tree):
        for layer, piece in module.pieces():
            own = piece.of(tensors[piece.tensor])
            stacked[piece.tensor] = piece
            yield f"{layer}.weight", tuple(own.shape)
    for name, tensor in tensors.items():
        if name not in stacked:
            yield saved.renamed(name), tuple(tensor.shape)


def _warn(file: GgufFile, path: Path) -> None:
    types = ", ".join(f"{count} of {type_.upper()}" for type_, count in sorted(file.quantized().items()))
    if types:
        logger.warning(
            "%s is quantized already (tensors: %s); what cannot keep its grid is rounded a second time, which costs "
            "accuracy: the original model is better",
            path.name,
            types,
        )
