"""Writing a GGUF file while the model is being quantized: planned from shapes, filled in any order, read back, then
moved into place. The header is made by the `gguf` package; the file is complete or it is not there."""

from __future__ import annotations

import hashlib
import os
import shutil
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from auto_round.codecs.base import codec_of
from auto_round.codecs.blocks import BlockCodec
from auto_round.core.errors import FormatError, ModelError, OutputError, VerificationError
from auto_round.core.plan import Plan
from auto_round.core.quantized import Quantized
from auto_round.formats.base import Format, Provenance
from auto_round.jobs import folders
from auto_round.jobs.gguf_header import add, header_values, making_of, model_name, size_label, write_origin
from auto_round.models.gguf_file import header_of
from auto_round.models.gguf_metadata import (
    block_count,
    computed_tensors,
    language_config,
)
from auto_round.models.gguf_names import (
    Names,
    adds_one,
    architecture_of,
    is_other_tower,
    row_order,
)
from auto_round.models.shards import raw_bytes
from auto_round.models.subject import Subject

STAGING = ".auto_round_gguf_partial"
FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
KEPT_PRECISE = ("ffn_gate_inp", "ffn_gate_inp_shexp", "position_embd", "token_types")
"""Small matrices that llama.cpp wants in float32."""


@dataclass(slots=True)
class Target:
    """One tensor of the file. shape: as torch has it. members: stored name -> expert it is, or None."""

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int
    members: dict[str, int | None] = field(default_factory=dict)

    def part(self, stored: str) -> tuple[int, int]:
        """(offset, bytes) of a member inside the tensor."""
        expert = self.members[stored]
        size = self.nbytes if expert is None else self.nbytes // self.shape[0]
        return (expert or 0) * size, size


class GgufWriter(AbstractContextManager["GgufWriter"]):
    """One model in one GGUF file. Leaving the context without error finishes, verifies and publishes it."""

    def __init__(
        self,
        folder: Path,
        fmt: Format,
        subject: Subject,
        plan: Plan,
        provenance: Provenance,
        *,
        max_shard_bytes: int = 0,
    ) -> None:
        self.folder, self.format, self.subject, self.plan, self.provenance = (
            folder,
            fmt,
            subject,
            plan,
            provenance,
        )
        self.dropped: dict[str, str] = {}
        self._staging = folder / STAGING
        self._config = language_config(subject.files.config)
        self._architecture = architecture_of(self._config)
        self._names = Names(self._architecture, block_count(self._config))
        self._layers = {f"{subject.stored_name(layer)}.weight": layer for layer in plan}
        # GPT-2's Conv1D: quantized layers come as (O, I) already, those that are copied do not.
        self._transposed = {stored for stored, layer in self._layers.items() if self._is_transposed(layer)}
        self._target_of: dict[str, Target] = {}
        self._targets = self._planned()
        self._extra = computed_tensors(self._architecture, self._config)
        for name, tensor in self._extra.items():
            self._targets[name] = Target(name, "F32", tuple(tensor.shape), tensor.numel() * 4, {name: None})
            self._target_of[name] = self._targets[name]
        self._max_shard_bytes = max_shard_bytes
        self._places: dict[str, tuple[BinaryIO, int]] = {}
        self._hashes: dict[str, str] = {}
        self._files: list[BinaryIO] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(target.nbytes for target in self._targets.values())

    def file_bytes(self) -> int:
        """Exact size of the files to be: headers are made in a hidden folder, the tensors only counted."""
        self._staging.mkdir(parents=True)
        try:
            return sum(size for _, size in self._headers())
        finally:
            for file in self._files:
                file.close()
            self._files.clear()
            self._places.clear()

    def _is_transposed(self, layer: str) -> bool:
        return self.subject.anatomy.layers[layer].transposed

    def _planned(self) -> dict[str, Target]:
        """Every tensor of the file by name, from the shapes of the checkpoint and the plan."""
        targets: dict[str, Target] = {}
        infos = self.subject.files.store.infos
        head = self.subject.anatomy.head
        for stored in dict.fromkeys([*infos, *self._layers]):
            if is_other_tower(stored):
                self.dropped[stored] = "a vision or audio part"
                continue
            layer = self._layers.get(stored)
            if layer is None and self.subject.anatomy.tied and stored == f"{head}.weight":
                self.dropped[stored] = "tied to the embedding"
                continue
            place = self._names.place(stored)
            if place is None:
                self.dropped[stored] = "a buffer"
                continue
            shape = self.plan.shapes[layer] if layer is not None else infos[stored].shape
            type_, nbytes = self._type(stored, layer, place.name, shape)
            target = targets.setdefault(place.name, Target(place.name, type_, shape, 0))
            if target.type != type_:
                raise FormatError(
                    f"{stored}: llama.cpp keeps all experts of a block in one tensor, so they need one type, "
                    f"got {type_} beside {target.type}. Give them the same in layer_config"
                )
            target.members[stored] = place.expert
            target.nbytes += nbytes
            self._target_of[stored] = target
        for target in targets.values():
            self._stack(target)
        return targets

    def _stack(self, target: Target) -> None:
        experts = [expert for expert in target.members.values() if expert is not None]
        if experts:
            if sorted(experts) != list(range(len(experts))):
                raise ModelError(f"{min(target.members)}: some of the experts of its block are missing")
            target.shape = (len(experts), *target.shape)
        elif len(target.members) > 1:
            raise ModelError(f"{', '.join(target.members)}: both would be {target.name} in the file")

    def _type(self, stored: str, layer: str | None, place: str, shape: tuple[int, ...]) -> tuple[str, int]:
        """(type in the file, bytes) of one tensor of the checkpoint."""
        count = 1
        for size in shape:
            count *= size
        spec = None if layer is None else self.plan[layer].weight
        if spec is not None:
            codec = codec_of(spec)
            assert isinstance(codec, BlockCodec), f"{spec} was refused"
            return codec.name.upper(), count // codec.block * codec.nbytes
        # Vectors take next to no room, and llama.cpp multiplies and adds them in float32.
        precise = len(shape) < 2 or place.split(".")[-2] in KEPT_PRECISE or 1 in shape
        name = self.format.name.rpartition(":")[2].upper()
        if precise:
            type_ = "F32"
        elif name in ("F16", "BF16"):
            type_ = name
        else:
            dtype = self.subject.files.store.infos[stored].dtype
            type_ = FLOATS.get(dtype, "F32")
        return type_, count * (4 if type_ == "F32" else 2)

    def __enter__(self) -> GgufWriter:
        try:
            self._made = folders.missing(self.folder)
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging.mkdir(parents=True)
            self._open()
        except OSError as error:
            self._remove()
            raise OutputError(f"output folder {self.folder} cannot be written: {error}") from error
        except (OutputError, ModelError, FormatError):
            self._remove()
            raise
        return self

    def _open(self) -> None:
        """Headers of all files, room for the tensors, and where each one goes."""
        free = shutil.disk_usage(self._staging).free
        if free < self.nbytes:
            raise OutputError(f"output folder {self.folder}: needs {self.nbytes:,} bytes, {free:,} are free")
        for file, size in self._headers():
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk shows now, not after hours

    def _headers(self) -> list[tuple[BinaryIO, int]]:
        """Every file with its header written, and the size that it will have; sets where each tensor goes."""
        import gguf

        sizes: list[tuple[BinaryIO, int]] = []
        split = self._max_shard_bytes if 0 < self._max_shard_bytes < self.nbytes else 0  # 0: one file
        path = self._staging / self.file_name()
        writer = gguf.GGUFWriter(path, self._architecture.name, split_max_size=split)
        write_origin(writer, self.subject.files, self._shapes(), self.provenance.version)
        for key, value in self._values().items():
            add(writer, key, value)
        for target in self._targets.values():
            self._add_info(writer, target)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None, "the header has been written"
        for file, tensors in zip(writer.fout, writer.tensors):
            # As the package itself would place them: readers find a tensor by its offset in the header.
            position = writer.ggml_pad(file.tell(), writer.data_alignment)
            for name, info in tensors.items():
                self._places[name] = (file, position)
                position += writer.ggml_pad(info.nbytes, writer.data_alignment)
            self._files.append(file)
            sizes.append((file, position))
        return sizes

    @staticmethod
    def _add_info(writer: Any, target: Target) -> None:
        import gguf

        kind = gguf.GGMLQuantizationType[target.type]
        writer.add_tensor_info(target.name, target.shape, np.dtype(np.float32), target.nbytes, raw_dtype=kind)

    def file_name(self) -> str:
        """Name, number of parameters, type."""
        kind = self.format.name.rpartition(":")[2].upper()
        return f"{model_name(self.subject.files)}-{size_label(self._shapes())}-{kind}.gguf"

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: target.shape for name, target in self._targets.items()}

    def _values(self) -> dict[str, Any]:
        """Everything the header says about the model and how the file was made."""
        made = making_of(self.provenance, self.format.file_type)  # type: ignore[attr-defined]
        shapes = self._shapes()
        return {**made, **header_values(self._architecture, self._config, shapes, self._tokenizer_folder())}

    def _tokenizer_folder(self) -> Path:
        files = self.subject.files
        if files.folder is not None:
            return files.folder
        folder = self._staging / "tokenizer"
        for saver in files.savers:
            saver.save_pretrained(str(folder))
        folder.mkdir(exist_ok=True)
        return folder

    def add(self, name: str, q: Quantized) -> None:
        """Write the rows of layer `name` in their place."""
        stored = f"{self.subject.stored_name(name)}.weight"
        self._put(stored, self._ordered(stored, self.format.write(q)["weight"]))

    def rewrite(self, name: str, tensor: Tensor) -> None:
        """Use `tensor` in the place of the one in the checkpoint when that is copied."""
        self._extra[self.subject.stored_tensor(name)] = tensor

    def _ordered(self, stored: str, rows: Tensor) -> Tensor:
        order = row_order(self._architecture, self._target_of[stored].name, rows.shape[0], self._config)
        return rows if order is None else rows[order]

    def _put(self, stored: str, data: Tensor) -> None:
        target = self._target_of[stored]
        start, size = target.part(stored)
        content = raw_bytes(data)
        assert len(content) == size, f"{stored}: planned {size} bytes, got {len(content)}"
        file, position = self._places[target.name]
        try:
            file.seek(position + start)
            file.write(content)
        except OSError as error:
            raise OutputError(f"output folder {self.folder} cannot be written: {error}") from error
        self._hashes[stored] = hashlib.blake2b(content, digest_size=16).hexdigest()

    def to_copy(self) -> list[str]:
        """Tensors of the checkpoint that are not quantized and not written yet."""
        floats = set(self.subject.files.store.infos).difference(
            f"{self.subject.stored_name(layer)}.weight" for layer in self.plan.quantized()
        )
        return [stored for stored in self._target_of if stored in floats and stored not in self._hashes]

    def copy(self, stored: str) -> None:
        """Write a tensor of the checkpoint that is not quantized, in the float type of the file."""
        target = self._target_of[stored]
        tensor = self._extra[stored] if stored in self._extra else self.subject.files.store.get(stored)
        if stored in self._transposed:
            tensor = tensor.t()
        if adds_one(self._architecture, target.name):
            tensor = tensor.float() + 1  # Gemma multiplies by 1 + weight, llama.cpp by the weight
        dtype = next(dtype for dtype, name in FLOATS.items() if name == target.type)
        self._put(stored, self._ordered(stored, tensor.to(dtype)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as cleanup:
            cleanup.callback(self._remove)
            if kind is not None:
                return
            try:
                self._finish()
            except OSError as failure:
                raise OutputError(f"output folder {self.folder} cannot be written: {failure}") from failure

    def _finish(self) -> None:
        """Copy what was not quantized, and publish files that were synced and read back."""
        for stored in self._target_of:
            if stored not in self._hashes:
                self.copy(stored)
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        self._verify()
        self._publish()

    def _verify(self) -> None:
        """Open the files as any reader would and compare every tensor with what was handed in."""
        places: dict[str, tuple[Path, int]] = {}
        for path in sorted(self._staging.glob("*.gguf")):
            places |= {tensor.name: (path, int(tensor.data_offset)) for tensor in header_of(path).tensors}
        for stored, expected in self._hashes.items():
            target = self._target_of[stored]
            (path, offset), (start, size) = places[target.name], target.part(stored)
            if folders.digest(path, offset + start, size) != expected:
                raise VerificationError(
                    f"{target.name} in {self.folder} reads back differently; the disk may be faulty"
                )

    def _publish(self) -> None:
        paths = sorted(self._staging.glob("*.gguf"))
        for path in paths:
            if (self.folder / path.name).is_dir():
                raise OutputError(f"{self.folder / path.name} is a folder; choose another --output_dir")
        for path in paths:
            os.replace(path, self.folder / path.name)

    def _remove(self) -> None:
        for file in self._files:
            file.close()
        shutil.rmtree(self._staging, ignore_errors=True)
        folders.remove_empty(self._made)
