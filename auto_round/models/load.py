"""From a path or a hub id to a local folder or file, a live model, a skeleton without weights, a tokenizer."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from auto_round.core.errors import ModelError, nearest
from auto_round.models import hub, quirks
from auto_round.models.checkpoint import Checkpoint, TensorStore, has_safetensors
from auto_round.models.experts import live_store
from auto_round.models.gguf_file import gguf_files
from auto_round.models.gguf_folder import open_store

logger = logging.getLogger("auto_round")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """Everything of a model that goes into a checkpoint besides its quantized layers.

    store: its tensors. config: the contents of config.json. side_files: files copied as they are. savers: objects with
    `save_pretrained`, for a live model that came without a folder. packed: some of its weights are quantized already.
    """

    store: TensorStore
    config: Mapping[str, Any]
    side_files: tuple[Path, ...] = ()
    savers: tuple[Any, ...] = field(default=())
    folder: Path | None = None
    packed: bool = False


def resolve(model: str, *, platform: str = "hf", revision: str | None = None) -> Path:
    """The local folder of `model`, a path or a hub id, downloaded when need be; of a GGUF model the file, or its first.

    A file on the hub is owner/name/file.gguf. Raises ModelError when there is no such folder, file or hub model, or
    the folder has no config.json.
    """
    if not model.strip():
        raise ModelError(
            "no model given: pass a folder with config.json and safetensors weights, or a hub id"
        )
    folder = Path(model).expanduser()
    if not folder.exists():
        if model.endswith(".gguf") and model.count("/") > 1 and not model.startswith((".", "/", "~")):
            return hub.download_file(model, platform=platform, revision=revision)
        if not hub.is_id(model):
            raise ModelError(
                f"model {model!r}: no such folder.{_siblings(folder)} Give a folder or a hub id such as owner/name"
            )
        folder = hub.download(model, platform=platform, revision=revision)
    if folder.is_file():
        if folder.suffix == ".gguf":
            return folder
        raise ModelError(
            f"model {model!r} is a file; give a .gguf file, or the folder that holds config.json and the weights"
        )
    if not (folder / "config.json").is_file():
        alone = gguf_files(folder)
        if alone:
            return alone[0]
        several = sorted(path.name for path in folder.glob("*.gguf"))
        hint = f"; give the path of one of its GGUF files, such as {several[0]}" if several else ""
        raise ModelError(
            f"model {model!r}: the folder has no config.json, so it is no Hugging Face model{hint}"
        )
    return folder


def _siblings(folder: Path) -> str:
    if not folder.parent.is_dir():
        return ""
    return nearest(folder.name, [path.name for path in folder.parent.iterdir()])


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of config.json. Raises ModelError when it is not JSON."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except json.JSONDecodeError as error:
        raise ModelError(f"{folder / 'config.json'} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{folder / 'config.json'} holds no settings but {config!r:.40}")
    return config


def open_folder(folder: Path, store: TensorStore | None = None) -> ModelFiles:
    """The files of a model folder, weights unread; its tensors are those of `store` when they are elsewhere.

    Raises ModelError for damaged or missing weights.
    """
    config: dict[str, Any] = read_config(folder)
    if store is not None:
        return ModelFiles(store=store, config=config, side_files=side_files(folder), folder=folder)
    if has_safetensors(folder):
        store = Checkpoint(folder)
    elif paths := gguf_files(folder):
        store = open_store(paths, config, skeleton(folder))
    if store is None:
        raise ModelError(f"{folder}: no safetensors weights; convert the model with save_pretrained first")
    return ModelFiles(
        store=store,
        config=config,
        side_files=side_files(folder),
        folder=folder,
        packed=not isinstance(store, Checkpoint),
    )


def has_weights(folder: Path) -> bool:
    """Whether `folder` holds weights that can be read tensor by tensor."""
    return has_safetensors(folder) or bool(gguf_files(folder))


def of_live_model(model: nn.Module, tokenizer: Any) -> ModelFiles:
    """The files of a live model: its state dict, its config, and the objects that save themselves."""
    config = model.config.to_dict()  # type: ignore[union-attr, operator]
    config["architectures"] = [type(model).__name__]  # as saving would do: a live configuration may lack it
    config.pop("_name_or_path", None)  # a path of this machine
    savers = [tokenizer, getattr(model, "generation_config", None)]
    return ModelFiles(
        store=live_store(model), config=config, savers=tuple(s for s in savers if s is not None)
    )


def side_files(folder: Path) -> tuple[Path, ...]:
    """Tokenizer, generation config, chat template, processor and code files of a model folder."""

    def travels(path: Path) -> bool:
        if not path.is_file() or path.name.startswith(".") or path.name in quirks.NEVER_COPIED:
            return False
        return path.suffix in quirks.SIDE_SUFFIXES and not path.name.endswith(".index.json")

    return tuple(sorted(path for path in folder.iterdir() if travels(path)))


def load_model(
    folder: Path, *, trust_remote_code: bool = False, dtype: str | torch.dtype = "auto"
) -> nn.Module:
    """The live model on the CPU, in the dtype of its checkpoint. Raises ModelError when transformers cannot load it."""
    from transformers import AutoModelForCausalLM

    if has_safetensors(folder):
        Checkpoint(folder)  # a damaged shard is named here, with its remedy
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(f"{folder}: transformers cannot load this model: {error}") from error
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would go on with random numbers
        raise ModelError(
            f"{folder}: {missing[0]} is missing from the checkpoint ({len(missing)} such tensors). "
            "Download it again, or mend config.json if it describes another model"
        )
    return model.eval()


def skeleton(
    folder: Path, *, trust_remote_code: bool = False, dtype: str | torch.dtype = "auto"
) -> nn.Module:
    """The module tree with its parameters on the meta device and its buffers in memory.

    dtype: of the parameters; "auto" is that of the checkpoint. Raises ModelError when the architecture is unknown.
    """
    # Here, as elsewhere in this file: importing them takes seconds, and a stream asks for neither.
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        said = _dtype(folder, config) if dtype == "auto" else dtype
        said = getattr(torch, said) if isinstance(said, str) else said
        # Buffers such as rotary frequencies are computed and not stored, so they need real values.
        with init_empty_weights(include_buffers=False):
            tree = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, dtype=said)
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        raise ModelError(f"{folder}: transformers does not know this architecture: {error}") from error
    return tree.eval()


def _dtype(folder: Path, config: Any) -> torch.dtype:
    """The dtype that transformers loads a checkpoint in: that of its configuration, else of its first float tensor."""
    missing = config.dtype is None and has_safetensors(folder)
    infos = Checkpoint(folder).infos.values() if missing else ()
    stored = next((info.dtype for info in infos if info.dtype.is_floating_point), torch.float32)
    return config.dtype or stored


def knows(folder: Path, *, trust_remote_code: bool = False) -> bool:
    """Whether transformers can build the module tree of the model in `folder`."""
    try:
        skeleton(folder, trust_remote_code=trust_remote_code)
    except ModelError:
        return False
    return True


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any | None:
    """The tokenizer of a model folder, or None when it has none."""
    if not any(path.name.startswith(("tokenizer", "vocab", "spiece", "merges")) for path in folder.iterdir()):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}: its tokenizer cannot be loaded: {error}") from error
