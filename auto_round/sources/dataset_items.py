"""Samples as they are stored, from files, folders, hubs and objects: strings, dicts, chat messages, token ids."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from auto_round.core.errors import DataError, nearest
from auto_round.core.settings import settings
from auto_round.sources.dataset_names import KNOWN, Known, known
from auto_round.sources.dataset_spec import Part

logger = logging.getLogger("auto_round")

SUFFIXES = (".json", ".jsonl", ".txt", ".parquet")
MISSING = object()  # None may be an item


def alternating(sources: Iterable[Iterable[Any]]) -> Iterator[Any]:
    """One item of each source in turn, until all are used up."""
    rounds = zip_longest(*sources, fillvalue=MISSING)
    return (item for item in chain.from_iterable(rounds) if item is not MISSING)


def items_of(part: Part, *, platform: str, seed: int) -> Iterable[Any]:
    """The items of a named data set: of a local file or folder, else of a hub. Raises DataError when it is nowhere."""
    path = Path(part.name).expanduser()
    if path.exists():
        return _local(path, part)
    if part.name.startswith((".", "/", "~")) or path.suffix in SUFFIXES:
        raise DataError(f"dataset {part.name!r}: no such file")
    return _remote(part, platform=platform, seed=seed)


def _local(path: Path, part: Part) -> Iterable[Any]:
    if path.is_file():
        return _file(path, part)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():  # made by save_to_disk
        from datasets import load_from_disk

        return columns_or_rows(load_from_disk(str(path)), part.split)
    files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    if not files:
        raise DataError(f"dataset {str(path)!r}: the folder has no {', '.join(SUFFIXES)} file")
    return alternating(_file(file, part) for file in files)


def _file(path: Path, part: Part) -> Iterator[Any]:
    try:
        if path.suffix == ".parquet":
            yield from _parquet(path)
        elif path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                yield from (json.loads(line) for line in lines if line.strip())
        elif path.suffix == ".json":
            found = json.loads(path.read_text(encoding="utf-8"))
            yield from found.values() if isinstance(found, dict) else found
        elif path.suffix == ".txt":
            content = path.read_text(encoding="utf-8")
            yield from [content] if part.concat else re.split(r"\n\s*\n", content)
        else:
            raise DataError(
                f"dataset {str(path)!r}: kind {path.suffix!r} is not known; use {', '.join(SUFFIXES)}"
            )
    # TypeError: valid JSON that is neither a list nor an object.
    except (json.JSONDecodeError, UnicodeDecodeError, OSError, TypeError) as error:
        raise DataError(f"dataset {str(path)!r} cannot be read: {error}") from error


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"dataset {str(path)!r} cannot be read: {error}") from error


def _remote(part: Part, *, platform: str, seed: int) -> Iterator[Any]:
    """Items of a data set of the hub, or of ModelScope; several splits and variants in turn."""
    found = known(part.name) or Known(names=(part.name,), language="", hub=part.name, modelscope=part.name)
    from_modelscope = platform == "model_scope" or settings().use_modelscope or found.hub is None
    where = found.modelscope if from_modelscope else found.hub
    if where is None:
        raise DataError(f"dataset {part.name!r} is not on ModelScope; use one of {_named(modelscope=True)}")
    load = _load_from_modelscope if from_modelscope else _load_from_hub
    logger.info("fetching the data set %s from %s", where, "ModelScope" if from_modelscope else "the hub")
    sources = [
        load(where, config, split, found.large, part)
        for config in found.configs
        for split in part.split or found.splits
    ]
    # The order of a streamed data set is its own: shuffling it would download more than is used.
    ordered = [
        source.shuffle(seed=seed) if hasattr(source, "shuffle") and not found.large else source
        for source in sources
    ]
    return (_selected(item, found.columns, part.name) for item in alternating(ordered))


def _load_from_hub(where: str, config: str | None, split: str, large: bool, part: Part) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(where, config, split=split, streaming=large)
    except (OSError, ValueError, RuntimeError) as error:
        raise _nowhere(part, "the hub", error) from error


def _load_from_modelscope(where: str, config: str | None, split: str, large: bool, part: Part) -> Any:
    try:
        from modelscope.msdatasets import MsDataset
    except ImportError as error:
        raise DataError(
            f"dataset {part.name!r} comes from ModelScope, which needs: pip install modelscope"
        ) from error
    try:
        return MsDataset.load(where, subset_name=config, split=split, use_streaming=large)
    except (OSError, ValueError, RuntimeError) as error:
        raise _nowhere(part, "ModelScope", error) from error


def _nowhere(part: Part, where: str, error: Exception) -> DataError:
    close = nearest(part.name, [name for one in KNOWN for name in one.names])
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return DataError(
        f"dataset {part.name!r}: no local file, and not to be had from {where} ({first}).{close} Give a local file of "
        f"{', '.join(SUFFIXES)} with --dataset, or --dataset self for text written by the model itself. "
        f"Known: {_named()}"
    )


def _named(*, modelscope: bool = False) -> str:
    return ", ".join(one.names[0] for one in KNOWN if one.modelscope or not modelscope)


def _selected(item: Any, columns: tuple[str, ...], name: str) -> Any:
    """What the data set's `columns` hold: a text, chat messages, or the whole item when nothing is said."""
    if not columns or not isinstance(item, Mapping):
        return item
    lacking = [column for column in columns if column not in item]
    if lacking:
        raise DataError(f"dataset {name!r}: no column {lacking[0]!r} any more; it has {', '.join(item)}")
    if len(columns) == 1:
        return item[columns[0]]
    return {key: item[key] for key in columns}


def columns_or_rows(data: Any, splits: tuple[str, ...] = ()) -> Iterable[Any]:
    """The items of an object: those of its splits, columns or values in turn when it is a mapping, else its own.

    A mapping with input_ids is one item.
    """
    if not isinstance(data, Mapping):
        return data
    if "input_ids" in data:
        return [data]
    missing = [split for split in splits if split not in data]
    if missing:
        raise DataError(f"dataset: no split {missing[0]!r}; it has {', '.join(data)}")
    return alternating(data[key] for key in (splits or data))
