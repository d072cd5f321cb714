"""What a GGUF file says beside its tensors: origin of the model, dimensions, tokenizer, and how the file was made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from auto_round.core.errors import ModelError
from auto_round.formats.base import Provenance
from auto_round.models.gguf_metadata import embedding_length, metadata
from auto_round.models.gguf_names import Architecture
from auto_round.models.gguf_tokenizer import vocabulary_metadata
from auto_round.models.load import ModelFiles

EMBEDDING = "token_embd.weight"
VERSION = 2  # of llama.cpp's types; older ones had float32 scales
Shapes = Mapping[str, tuple[int, ...]]


def model_name(files: ModelFiles) -> str:
    """What the model is called: its folder, on the hub its repository, or what a live model says."""
    if files.folder is None:
        return Path(str(files.config.get("_name_or_path") or "")).name or "model"
    folder = files.folder.resolve()
    if folder.parent.name == "snapshots":  # the hub's cache: models--owner--name/snapshots/<commit>
        return folder.parent.parent.name.rpartition("--")[2]
    return folder.name


def size_label(shapes: Shapes) -> str:
    """Number of parameters in llama.cpp's words, such as 8x7B."""
    from gguf.utility import size_label as label

    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    stacks = [shape for name, shape in shapes.items() if "_exps." in name]
    inside = sum(torch.Size(shape).numel() for shape in stacks)
    count = stacks[0][0] if stacks else 0
    return str(label(total, total - inside, inside // count if count else 0, count))


def write_origin(writer: Any, files: ModelFiles, shapes: Shapes, version: str) -> None:
    """Name, size, licence, base models, tags: from the model card in the model's folder, as llama.cpp's converter does.

    Raises ModelError for a card whose front matter cannot be read.
    """
    import gguf
    import yaml

    name, folder = model_name(files), files.folder
    try:
        about = gguf.Metadata.load(None, folder, name, 0)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{folder}/README.md: the model card's front matter cannot be read ({reason}). Mend it, or leave it out"
        ) from error
    if folder is not None and name != folder.name:
        # Guessed from the folder's name, which is a commit.
        about.basename = about.finetune = about.organization = about.version = None
    about.name, about.size_label, about.quantized_by = name, size_label(shapes), f"auto-round {version}"
    writer.add_type("model")
    about.set_gguf_meta_model(writer)


def header_values(
    architecture: Architecture, config: Mapping[str, Any], shapes: Shapes, tokenizer: Path
) -> dict[str, Any]:
    """Key -> value of dimensions and tokenizer. Raises ModelError when they contradict the tensors' shapes."""
    rows, columns = shapes[EMBEDDING]
    if columns != embedding_length(config):
        raise ModelError(
            f"the embedding has {columns} columns, config.json says {embedding_length(config)}; mend config.json if it "
            "describes another model"
        )
    return {**metadata(architecture, config, rows), **vocabulary_metadata(tokenizer, config, rows)}


def making_of(provenance: Provenance, file_type: int) -> dict[str, Any]:
    """Key -> value of how the file was made; those of importance are the ones of llama.cpp's quantizer."""
    return {
        "general.quantization_version": VERSION,
        "general.file_type": file_type,
        **{f"quantize.imatrix.{key}": value for key, value in provenance.importance.items()},
        **{f"auto_round.{key}": value for key, value in provenance.tuning.items()},
    }


def add(writer: Any, key: str, value: Any) -> None:
    """Put one value into the header, in the GGUF type that suits it."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value:
        assert isinstance(value, list), f"{key}: {type(value)}"
        writer.add_array(key, value)
