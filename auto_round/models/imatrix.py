"""Importance files of llama.cpp: the mean square of each input channel of each matrix, measured by its `imatrix` tool.

Both forms are read and written: GGUF (`general.type` "imatrix"; sums and counts per matrix), and the older one.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from auto_round.core.errors import DataError, OutputError
from auto_round.models.gguf_file import header_of
from auto_round.models.gguf_metadata import block_count, language_config
from auto_round.models.gguf_names import Config, Names, architecture_of

ENDINGS = (".gguf", ".dat", ".imatrix")  # the newer form, and two names of the older one
SUMS, COUNTS = ".in_sum2", ".counts"
MOST_NAME, MOST_VALUES = 1 << 10, 1 << 28  # beyond these, a file is no importance file


def origin_of(path: Path) -> dict[str, object]:
    """Where an importance file comes from, as far as it says: "dataset" and "chunks_count"."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":
        fields = {key: entry.contents() for key, entry in header_of(path).fields.items()}
        datasets, chunks = fields.get("imatrix.datasets") or [], fields.get("imatrix.chunk_count")
        found = {"dataset": ",".join(map(str, datasets)), "chunks_count": chunks}
    else:
        found = dict(zip(("chunks_count", "dataset"), _end_of_binary(path)))
    return {key: value for key, value in found.items() if value}


def _end_of_binary(path: Path) -> tuple[object, ...]:
    """(chunks, data set) from behind the entries; older tools wrote nothing there."""
    with path.open("rb") as file:
        for _ in range(_number(file, MOST_VALUES)):
            file.seek(_number(file, MOST_NAME), 1)
            _number(file, MOST_VALUES)
            file.seek(4 * _number(file, MOST_VALUES), 1)
        try:
            return _number(file, MOST_VALUES), file.read(_number(file, MOST_NAME)).decode()
        except struct.error:
            return ()


def read_imatrix(path: Path) -> dict[str, Tensor]:
    """Name in llama.cpp -> mean squares, (I,) or, for stacked experts, (E, I). Raises DataError for anything else."""
    if not path.is_file():
        raise DataError(f"imatrix {path}: no such file")
    with path.open("rb") as file:
        magic = file.read(4)
    try:
        return _read_gguf(path) if magic == b"GGUF" else _read_binary(path)
    except (ValueError, struct.error, KeyError, IndexError) as error:
        raise DataError(
            f"imatrix {path}: neither of llama.cpp's two kinds of importance files ({error})"
        ) from error


def _read_gguf(path: Path) -> dict[str, Tensor]:
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in header_of(path).tensors}
    found = {}
    for name in [name.removesuffix(SUMS) for name in tensors if name.endswith(SUMS)]:
        # Per expert: each has seen a number of tokens of its own.
        counts = tensors[name + COUNTS].reshape(-1, 1)
        means = tensors[name + SUMS].reshape(len(counts), -1) / counts.clamp(min=1)
        found[name] = means[0] if len(means) == 1 else means
    if not found:
        raise ValueError("it has no tensors of sums")
    return found


def _read_binary(path: Path) -> dict[str, Tensor]:
    found = {}
    with path.open("rb") as file:
        for _ in range(_number(file, MOST_VALUES)):
            name = file.read(_number(file, MOST_NAME)).decode()
            calls, count = _number(file, MOST_VALUES), _number(file, MOST_VALUES)
            values = file.read(4 * count)
            if len(values) != 4 * count:
                raise ValueError("it ends too early")
            found[name] = torch.frombuffer(bytearray(values), dtype=torch.float32) / max(1, calls)
    if not found:
        raise ValueError("it has no entries")
    return found


def _number(file: BinaryIO, most: int) -> int:
    (value,) = struct.unpack("<i", file.read(4))
    if not 0 <= value <= most:
        raise ValueError(f"a length of {value}")
    return int(value)


@dataclass(frozen=True, slots=True)
class Origin:
    """What importance was measured on: so many samples of `seqlen` tokens, of which `tokens` are no padding."""

    samples: int
    seqlen: int
    tokens: int
    datasets: tuple[str, ...] = ()


def write_imatrix(
    path: Path, means: Mapping[str, Tensor], origin: Origin, counts: Mapping[str, Tensor] | None = None
) -> None:
    """An importance file of mean squares by llama.cpp's names, (I,) or, for stacked experts, (E, I).

    counts: tokens of every expert, (E,), where they did not all see the same. In GGUF for a `path` of that ending, in
    the older form for any other; that one has one count for all experts. Raises OutputError.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        if path.suffix == ".gguf":
            _write_gguf(partial, means, origin, counts or {})
        else:
            _write_binary(partial, means, max(1, origin.samples), ",".join(origin.datasets))
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"imatrix {path} cannot be written: {error}") from error


def _write_gguf(
    path: Path, means: Mapping[str, Tensor], origin: Origin, counts: Mapping[str, Tensor]
) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, arch="")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", list(origin.datasets) or ["unknown"])
    writer.add_uint32("imatrix.chunk_count", max(1, origin.samples))
    writer.add_uint32("imatrix.chunk_size", origin.seqlen)
    for name, values in means.items():
        rows = values.reshape(-1, values.shape[-1]).float()
        seen = counts.get(name, torch.tensor(origin.tokens)).expand(len(rows)).unsqueeze(1)
        # The file has sums; readers divide by the counts.
        writer.add_tensor(name + SUMS, (rows * seen).numpy().astype(np.float32))
        writer.add_tensor(name + COUNTS, seen.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_binary(path: Path, means: Mapping[str, Tensor], chunks: int, datasets: str) -> None:
    """Per entry its name, the number of chunks, the number of values, and sums over chunks of means per chunk."""
    with path.open("wb") as file:
        file.write(struct.pack("<i", len(means)))
        for name, values in means.items():
            flat, text = values.reshape(-1).float() * chunks, name.encode()
            file.write(struct.pack("<i", len(text)) + text + struct.pack("<ii", chunks, flat.numel()))
            file.write(flat.numpy().astype("<f4").tobytes())
        text = datasets.encode()
        file.write(struct.pack("<ii", chunks, len(text)) + text)


def saver(
    path: Path, layers: Iterable[str], config: Config, origin: Origin
) -> Callable[[Mapping[str, Tensor], Mapping[str, int]], None]:
    """A function that writes sums of squares by layer to `path`: see `steps.record.Record`.

    What can be wrong with the file's name or the model is found out here, before any work: raises DataError for an
    ending of no importance file, OutputError for a missing folder, ModelError for a model that llama.cpp does not have.
    """
    if path.suffix not in ENDINGS:
        raise DataError(f"save_imatrix {path}: the name must end in one of {', '.join(ENDINGS)}")
    if not path.parent.is_dir():
        raise OutputError(f"save_imatrix {path}: there is no folder {path.parent}")
    full = language_config(config)
    names = Names(architecture_of(full), block_count(full))
    places = {layer: names.place(f"{layer}.weight") for layer in layers}

    def save(sums: Mapping[str, Tensor], tokens: Mapping[str, int]) -> None:
        stacks: dict[str, dict[int, str]] = {}
        for layer in sums:
            place = places[layer]
            assert place is not None, "a layer is no buffer"
            stacks.setdefault(place.name, {})[place.expert or 0] = layer
        means, counts = {}, {}
        for name, members in stacks.items():
            every = [members.get(expert) for expert in range(max(members) + 1)]
            # llama.cpp takes an expert without any token as one whose inputs are all alike.
            seen = [0 if layer is None else tokens.get(layer, origin.tokens) for layer in every]
            nothing = torch.zeros_like(next(iter(sums[layer] for layer in members.values())))
            rows = [nothing if layer is None else sums[layer] / max(1, n) for layer, n in zip(every, seen)]
            means[name], counts[name] = torch.stack(rows), torch.tensor(seen)
        write_imatrix(
            path, {n: rows[0] if len(rows) == 1 else rows for n, rows in means.items()}, origin, counts
        )

    return save


def importance_of(path: Path, shapes: Mapping[str, tuple[int, int]], config: Config) -> dict[str, Tensor]:
    """Layer -> mean squares (I,), for the layers of `shapes` that the file has. Raises DataError when it has none."""
    full = language_config(config)
    names, stored, found = Names(architecture_of(full), block_count(full)), read_imatrix(path), {}
    for layer, (_, columns) in shapes.items():
        place = names.place(f"{layer}.weight")
        values = None if place is None else stored.get(place.name)
        if values is None or place is None:
            continue
        row = values.reshape(-1, columns)[place.expert or 0] if values.numel() % columns == 0 else values
        if row.shape != (columns,):
            raise DataError(
                f"imatrix {path}: {place.name} has {row.shape[-1]} values, {layer} has {columns} inputs"
            )
        found[layer] = row
    if not found:
        raise DataError(f"imatrix {path}: none of its {len(stored)} tensors belongs to this model")
    return found
