"""Models on the hub: files of them on this machine, and what can go wrong on the way as one kind of error."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from auto_round.core.errors import ModelError
from auto_round.core.settings import settings
from auto_round.models.gguf_file import SPLIT

logger = logging.getLogger("auto_round")


@contextmanager
def asking(model: str) -> Iterator[None]:
    """Errors of the hub's client and of the network, for `model`, as ModelError."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    failures: tuple[type[Exception], ...] = (HfHubHTTPError, HFValidationError, OSError, *_broken_lines())
    try:
        yield
    except failures as error:
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"model {model!r}: no folder of that name, and the hub did not give it ({first_line}). "
            "Check the name and the network"
        ) from error


def _broken_lines() -> tuple[type[Exception], ...]:
    """What the library that the hub's client is built on raises when a connection breaks off."""
    # Its errors are no OSErrors, other than those of the library before it; which one it is changed twice already.
    modules = [module for name in ("httpx", "httpx2") if (module := sys.modules.get(name)) is not None]
    return tuple(module.HTTPError for module in modules)


def is_id(model: str) -> bool:
    """Whether `model` may mean owner/name on a hub: a mistyped folder should not go over the network."""
    return model.count("/") == 1 and not model.startswith((".", "/", "~"))


def serves(model: str, platform: str) -> bool:
    """Whether `model` is to be had from the Hugging Face hub: no folder of this machine, and no other hub's."""
    elsewhere = _is_modelscope(platform) or Path(model).exists()
    return is_id(model) and platform == "hf" and not elsewhere


def _is_modelscope(platform: str) -> bool:
    return platform == "model_scope" or settings().use_modelscope


def download(
    model: str, *, platform: str, revision: str | None, only: str | None = None, weights: bool = True
) -> Path:
    """A snapshot of the hub model, without its weights if so said, or of the files of it that match `only`."""
    unread = ["*.bin", "*.gguf", "*.h5", "original/*"]
    wanted: dict[str, Any] = {"ignore_patterns": unread if weights else [*unread, "*.safetensors"]}
    if only is not None:
        wanted = {"allow_patterns": [only]}
    if _is_modelscope(platform):
        try:
            from modelscope import snapshot_download as modelscope_download
        except ImportError as error:
            raise ModelError(f"model {model!r} from ModelScope needs: pip install modelscope") from error
        return Path(modelscope_download(model, revision=revision, **({} if only is None else wanted)))
    if platform != "hf":
        raise ModelError(f"platform {platform!r} is unknown; use 'hf' or 'model_scope'")
    from huggingface_hub import snapshot_download

    logger.info("fetching %s from the hub", model)
    with asking(model):
        return Path(snapshot_download(model, revision=revision, **wanted))


def download_file(model: str, *, platform: str, revision: str | None) -> Path:
    """The GGUF file owner/name/file.gguf of the hub, with the other parts of its model."""
    owner, name, inside = model.split("/", 2)
    every = SPLIT.sub(r"-*-of-\2.gguf", inside)
    path = download(f"{owner}/{name}", platform=platform, revision=revision, only=every) / inside
    if not path.is_file():
        raise ModelError(f"model {model!r}: {owner}/{name} on the hub has no file {inside}. Check the name")
    return path
