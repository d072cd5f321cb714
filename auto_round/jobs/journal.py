"""The journal of a run: every finished block is on disk before the next one starts, so that a killed run can go on.

A block becomes a folder of two files, the codes and parameters of its layers and what is known about them, written
under a temporary name and renamed. Resuming hands the finished blocks to the writers again and moves the source past
them: what reaches an unfinished block is recomputed from the float weights and the stored codes, so no activations
are stored, and the files of a resumed run are those of an uninterrupted one, byte for byte.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from auto_round.codecs.base import codec_of
from auto_round.core.errors import OutputError, PlanError
from auto_round.core.plan import Plan
from auto_round.core.quantized import INPUT, Quantized, inputs_among
from auto_round.jobs import folders
from auto_round.jobs.manifest import differences
from auto_round.jobs.quantize import BlockResult, Observer, Writer
from auto_round.models.checkpoint import DTYPE_NAMES, DTYPES
from auto_round.models.shards import raw_bytes
from auto_round.sources.base import Block, Needs, Source
from auto_round.steps.base import BlockReport

logger = logging.getLogger("auto_round")
JOURNAL = ".auto_round_journal"
MANIFEST, TENSORS, INDEX, UNFINISHED = "manifest.json", "tensors.bin", "block.json", "unfinished"


class Journal(AbstractContextManager["Journal"]):
    """A writer and an observer: `add` stores a layer, `finished` makes its block count.

    Leaving the context without error removes it: the run is over. Otherwise it stays, and how to go on is logged.
    """

    def __init__(self, output: Path, plan: Plan) -> None:
        self.folder, self.plan = output / JOURNAL, plan
        self.done: dict[str, Path] = {}
        self._made, self._begun = folders.missing(self.folder), False
        self._file: BinaryIO | None = None
        self._layers: dict[str, list[dict[str, Any]]] = {}
        self._vectors: list[dict[str, Any]] = []

    def begin(self, manifest: Mapping[str, Any], *, resume: bool) -> None:
        """Start, or go on with what an earlier run finished.

        manifest: everything that the outcome depends on (`jobs.manifest`). Raises PlanError naming what has changed
        since the earlier run, OutputError when nothing can be written.
        """
        stored = self.folder / MANIFEST
        stale = self.folder.exists() and not (resume and stored.is_file())
        if resume and stored.is_file():
            changed = differences(json.loads(stored.read_text()), json.loads(json.dumps(manifest)))
            if changed:
                raise PlanError(
                    f"{self.folder}: these blocks were made by another run; {'; '.join(changed)}. Give the earlier "
                    "settings to go on with it, or leave out resume (--resume) to start again"
                )
        elif stale:
            finished = len(list(self.folder.glob("*/" + INDEX)))
            if finished:
                logger.warning(
                    "starting again: %d blocks that an earlier run left in %s are dropped; "
                    "resume=True (--resume) would have gone on from them",
                    finished,
                    self.folder,
                )
        try:
            if stale:
                shutil.rmtree(self.folder)
            self._open(manifest)
        except OSError as error:
            raise OutputError(f"journal {self.folder} cannot be written: {error}") from error

    def _open(self, manifest: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._begun = True
        for block in sorted(path for path in self.folder.iterdir() if path.is_dir()):
            self._recognise(block)
        temporary = self.folder / f"{MANIFEST}.{UNFINISHED}"
        temporary.write_text(json.dumps(manifest, indent=1) + "\n")
        # Whole or not at all: a torn manifest would refuse to resume.
        os.replace(temporary, self.folder / MANIFEST)
        if self.done:
            logger.info("going on after %d finished blocks found in %s", len(self.done), self.folder)

    def _recognise(self, block: Path) -> None:
        """Count the folder `block` as done, or remove it when it is unfinished, half removed or damaged."""
        # The index is written last, so a block without one was being written when the run ended.
        if not (block / INDEX).is_file() or not (block / TENSORS).is_file() or block.name == UNFINISHED:
            shutil.rmtree(block)
        elif folders.digest(block / TENSORS) != json.loads((block / INDEX).read_text())["digest"]:
            # Synced and renamed, yet other bytes: the disk. One block is cheaper to repeat than to trust.
            logger.warning("%s is damaged: %s is quantized again", block, block.name)
            shutil.rmtree(block)
        else:
            self.done[block.name] = block

    def add(self, name: str, q: Quantized) -> None:
        """Store one layer of the block at hand; it does not count before `finished`."""
        self._layers[name] = self._store(q.tensors())

    def rewrite(self, name: str, tensor: Tensor) -> None:
        """Store a changed tensor that is not quantized."""
        self._vectors += self._store({name: tensor})

    def _store(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        try:
            if self._file is None:
                (self.folder / UNFINISHED).mkdir()
                self._file = (self.folder / UNFINISHED / TENSORS).open("wb")
            return [_put(self._file, key, t) for key, t in tensors.items()]
        except OSError as error:
            raise OutputError(f"journal {self.folder} cannot be written: {error}") from error

    def started(self, plan: Plan, blocks: int) -> None:
        """Nothing to do."""

    def finished(self, result: BlockResult) -> None:
        """Make the block count: sync its files and rename their folder. A block of `done` is there already."""
        if result.name in self.done or not self._layers:  # replayed, or without a quantized layer
            return
        assert self._file is not None, "layers were added"
        unfinished, final = self.folder / UNFINISHED, self.folder / result.name
        try:
            # On disk before its name says that it counts.
            self._close(sync=True)
            about = {
                **asdict(result),
                "digest": folders.digest(unfinished / TENSORS),
                "tensors": self._layers,
            }
            about["vectors"] = self._vectors
            with (unfinished / INDEX).open("w") as file:
                json.dump(about, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, final)
            folders.sync(self.folder)
        except OSError as error:
            raise OutputError(f"journal {self.folder} cannot be written: {error}") from error
        self.done[result.name] = final
        self._layers, self._vectors = {}, []

    def _close(self, *, sync: bool) -> None:
        if self._file is not None:
            self._file.flush()
            if sync:
                os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def read(self, block: str) -> tuple[dict[str, Quantized], dict[str, Tensor], BlockResult]:
        """The layers of a finished block, its other changed tensors, and what its observers were told."""
        about = json.loads((self.done[block] / INDEX).read_text())
        layers = {}
        with (self.done[block] / TENSORS).open("rb") as file:
            for name, parts in about["tensors"].items():
                spec = self.plan[name].weight
                assert spec is not None, f"{name} was quantized"
                tensors = {part["key"]: _take(file, part) for part in parts}
                codes, inputs = tensors.pop("codes"), inputs_among(tensors)
                params = {key: value for key, value in tensors.items() if not key.startswith(INPUT)}
                layers[name] = Quantized(spec, self.plan.shapes[name], codes, params, inputs)
            vectors = {part["key"]: _take(file, part) for part in about["vectors"]}
        report = BlockReport(**about["report"])
        told = {field.name: about[field.name] for field in fields(BlockResult)}
        return layers, vectors, BlockResult(**{**told, "report": report})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(sync=False)
        if not self._begun:  # what an earlier run left is not touched
            folders.remove_empty(self._made)
            return
        if kind is None or not self.done:  # finished, or nothing that would be worth keeping
            shutil.rmtree(self.folder, ignore_errors=True)
            folders.remove_empty(self._made)
            return
        shutil.rmtree(self.folder / UNFINISHED, ignore_errors=True)
        logger.warning(
            "not finished: %d blocks are done and kept in %s; the same call with resume=True (--resume) goes on",
            len(self.done),
            self.folder,
        )


class Resumed(Source):
    """A source that is past the blocks of a journal: they go to writers and observers as they were stored."""

    def __init__(
        self, source: Source, journal: Journal, writers: Sequence[Writer], observers: Sequence[Observer]
    ) -> None:
        self.source, self.journal, self.writers, self.observers = source, journal, writers, observers
        self.can_run = source.can_run

    def blocks(self, needs: Needs, wanted: Iterable[str], finished: Collection[str] = ()) -> Iterator[Block]:
        """The blocks that are still to be done."""
        finished = {*finished, *self.journal.done}
        for block in self.source.blocks(needs, wanted, finished):
            if block.name in finished:
                self._replay(block)
            else:
                yield block
            del block  # before the next one is read

    def _replay(self, block: Block) -> None:
        layers, replaced, result = self.journal.read(block.name)
        for name, tensor in replaced.items():
            for writer in self.writers:
                writer.rewrite(name, tensor)
        for name, q in layers.items():
            for writer in self.writers:
                writer.add(name, q)
            replaced[name] = codec_of(q.spec).dequantize(q)  # from the codes, bit for bit as in the first run
        acts = {name: (self.journal.plan[name].act, q.inputs) for name, q in layers.items()}
        # Before the chain moves on: the first run, too, ran the quantized block with quantized inputs.
        block.quantize_inputs({name: (act, fixed) for name, (act, fixed) in acts.items() if act is not None})
        self.source.done(block, replaced)
        for observer in self.observers:
            observer.finished(result)

    def done(self, block: Block, replaced: Mapping[str, Tensor]) -> None:
        """As the source does it."""
        self.source.done(block, replaced)


def earlier_steps(output: Path) -> int | None:
    """Sign steps per block of the unfinished run in the folder `output`; None when there is none."""
    stored = output / JOURNAL / MANIFEST
    if not stored.is_file():
        return None
    steps = json.loads(stored.read_text())["recipe"].values()
    return int(next((step["iters"] for step in steps if "iters" in step), 0))


def _put(file: BinaryIO, key: str, tensor: Tensor) -> dict[str, Any]:
    """Append `tensor`, its values two or four to a byte when they are that small; how to read it back."""
    width = _width(tensor)
    about = {
        "key": key,
        "dtype": DTYPE_NAMES[tensor.dtype],
        "shape": list(tensor.shape),
        "width": width,
        "at": file.tell(),
    }
    file.write(raw_bytes(_narrow(tensor, width)))
    return about


def _take(file: BinaryIO, about: Mapping[str, Any]) -> Tensor:
    dtype, shape = DTYPES[about["dtype"]], tuple(about["shape"])
    count = torch.Size(shape).numel()
    size = -(-count * about["width"] // 8)
    file.seek(about["at"])
    raw = torch.frombuffer(bytearray(file.read(size)), dtype=torch.uint8) if size else torch.empty(0).byte()
    if about["width"] == 8 * dtype.itemsize:
        return raw.view(dtype).reshape(shape)
    shifts = torch.arange(0, 8, about["width"], dtype=torch.uint8)
    return (raw.unsqueeze(1) >> shifts & (1 << about["width"]) - 1).flatten()[:count].reshape(shape)


def _width(tensor: Tensor) -> int:
    """Bits per value that the file needs: 2 or 4 for small codes, else those of the dtype."""
    if tensor.dtype != torch.uint8 or not tensor.numel():
        return 8 * tensor.dtype.itemsize
    # By value and not by bits of the spec: the file need not know which data type it holds.
    largest = int(tensor.max())
    return next(bits for bits in (2, 4, 8) if largest < 1 << bits)


def _narrow(tensor: Tensor, width: int) -> Tensor:
    if width == 8 * tensor.dtype.itemsize:
        return tensor
    flat, per_byte = tensor.cpu().flatten(), 8 // width
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % per_byte)).view(-1, per_byte)
    # 4 bits: 3, 10 become 03, A0, added up to A3.
    shifted = padded << torch.arange(0, 8, width, dtype=torch.uint8)
    return shifted.sum(1, dtype=torch.uint8)
