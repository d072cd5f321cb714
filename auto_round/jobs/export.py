"""Writing a checkpoint while it is being quantized: planned from shapes, filled layer by layer, read back, then moved
into place. A folder is complete or it is not there."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from auto_round.core.errors import FormatError, OutputError, VerificationError
from auto_round.core.plan import Plan
from auto_round.core.quantized import Quantized
from auto_round.core.scheme import TensorSpec
from auto_round.formats.base import Format, Provenance
from auto_round.jobs import folders
from auto_round.jobs.accounts import Written, digest
from auto_round.jobs.layout import Layout
from auto_round.jobs.ledger import LEDGER, Ledger
from auto_round.jobs.verify import inspect
from auto_round.models.checkpoint import Checkpoint
from auto_round.models.shards import ShardWriter, checksum
from auto_round.models.subject import Subject

logger = logging.getLogger("auto_round")
STAGING = ".auto_round_partial"
SAMPLED = 16


class CheckpointWriter(AbstractContextManager["CheckpointWriter"]):
    """One checkpoint in one format. Leaving the context without error finishes, verifies and publishes it."""

    def __init__(
        self,
        folder: Path,
        fmt: Format,
        subject: Subject,
        plan: Plan,
        provenance: Provenance,
        *,
        max_shard_bytes: int,
        ledger: Ledger | None = None,
        more: Mapping[str, Tensor] | None = None,
    ) -> None:
        """more: tensors about keys and values, and about rotations, written as they are.

        ledger: layers arrive from several workers and are entered there as they are written; a run that fails
        then keeps them. Their codes are compared by samples: one of `SAMPLED`, and one of every kind."""
        self.folder, self.format, self.subject, self.plan, self.provenance = (
            folder,
            fmt,
            subject,
            plan,
            provenance,
        )
        self._staging = folder / STAGING
        self._digests: dict[str, tuple[TensorSpec, tuple[int, int], str]] = {}
        self._written: dict[str, dict[str, int]] = {}
        self._rewritten: dict[str, int] = {}
        self._ledger, self._kinds, self._copied = ledger, set[object](), set[str]()
        self._more = dict(more or {})
        self.layout = Layout(fmt, subject, plan, self._more)
        self._shards = ShardWriter(self._staging, self.layout.infos, max_shard_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files."""
        return self._shards.nbytes

    def file_bytes(self) -> int:
        """Exact size of the weight files to be, before anything is written."""
        return self.nbytes

    def __enter__(self) -> CheckpointWriter:
        source = self.subject.files.folder
        if source is not None and self.folder.resolve() == source.resolve():
            raise FormatError(f"output folder {self.folder} is the model itself; choose another --output_dir")
        self._made = folders.missing(self.folder)
        earlier = None
        if self._ledger is not None:
            files = {shard.file: shard.size for shard in self._shards.shards}
            self._ledger.about(format=self.format.name, files=files)
            # Before anything is removed: a changed setting must not cost the layers of the earlier run.
            earlier = self._ledger.earlier(self._staging)
        try:
            if earlier is None:
                shutil.rmtree(self._staging, ignore_errors=True)
            self._staging.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
            if free < self.nbytes and not earlier:  # an earlier run has reserved its room already
                raise OutputError(
                    f"output folder {self.folder}: needs {self.nbytes:,} bytes, {free:,} are free"
                )
            self._shards.__enter__()
            if self._ledger is not None:
                self._ledger.begin(self._staging, self._intact(earlier or {}))
        except OSError as error:
            self._remove()
            raise OutputError(f"output folder {self.folder} cannot be written: {error}") from error
        except OutputError:
            self._remove()
            raise
        return self

    @property
    def finished(self) -> Collection[str]:
        """Layers that are written, by this run or an earlier one."""
        return self._written.keys()

    def _intact(self, earlier: Mapping[str, dict[str, int]]) -> Mapping[str, dict[str, int]]:
        """Those layers of an earlier run whose bytes are in their places."""
        if not earlier:
            return {}
        stored = Checkpoint(self._staging)
        for layer, tensors in earlier.items():
            if layer in self.plan and all(checksum(stored.look(full)) == tensors[full] for full in tensors):
                self._written[layer] = tensors
                self._shards.written(tensors)
        logger.info("going on after %d finished layers found in %s", len(self._written), self._staging)
        return self._written

    def add(self, name: str, q: Quantized) -> None:
        """Write the tensors of layer `name` in their places."""
        prefix = self.subject.stored_name(name)
        sums = {}
        for suffix, tensor in self.format.write(q).items():
            full = f"{prefix}.{suffix}"
            tensor = self.layout.as_stored(name, suffix, tensor).to(self.layout.planned(full).dtype)
            try:
                self._put(full, tensor)
            except OSError as error:
                raise OutputError(f"output folder {self.folder} cannot be written: {error}") from error
            sums[full] = checksum(tensor)
        self._written[name] = sums
        if self._is_sample(q):
            self._digests[name] = (q.spec, q.shape, digest(q.tensors()))
        # A matrix inside a fused tensor is only in memory until that is complete, so it does not count yet.
        if self._ledger is not None and all(full in self._shards.infos for full in sums):
            self._ledger.add(name, sums)

    def rewrite(self, name: str, tensor: Tensor) -> None:
        """Write a tensor that is not quantized but has changed."""
        stored = self.subject.stored_tensor(name)
        tensor = tensor.to(self.layout.planned(stored).dtype)
        try:
            self._shards.put(stored, tensor)
        except OSError as error:
            raise OutputError(f"output folder {self.folder} cannot be written: {error}") from error
        self._copied.add(stored)
        self._rewritten[stored] = checksum(tensor)

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Inside, `add` and `copy` fill files that another process has laid out and will publish."""
        if not self._staging.is_dir():
            raise OutputError(
                f"{self._staging} is not there on {platform.node()}: a run on several machines needs an output "
                "folder that all of them see under the same path"
            )
        with self._shards.attached():
            yield

    def written_of(self, layers: Collection[str], copied: Collection[str]) -> Written:
        """The account of `layers` and `copied`, for the process that publishes the files."""
        digests = {name: self._digests[name] for name in layers if name in self._digests}
        return Written({name: self._written[name] for name in layers}, digests, tuple(copied))

    def absorb(self, work: Written) -> None:
        """Another process has put this in its places."""
        for name, sums in work.sums.items():
            self._written[name] = sums
            self._shards.written(self.layout.stored_in(full) for full in sums)
            if self._ledger is not None and all(full in self._shards.infos for full in sums):
                self._ledger.add(name, sums)
        self._digests.update(work.digests)
        self._copied.update(work.copied)
        self._shards.written(work.copied)

    def files_of(self, name: str) -> set[str]:
        """The files that the layer `name`, or the tensor of that name that stays as it is, goes to."""
        return {self._shards.file_of(tensor) for tensor in self.layout.holders_of(name)}

    def _is_sample(self, q: Quantized) -> bool:
        kind, known = (q.spec, q.shape), len(self._kinds)
        self._kinds.add(kind)
        # Hashing all codes would slow a stream down; the bytes in the file are checked for every layer.
        return self._ledger is None or len(self._kinds) > known or len(self._written) % SAMPLED == 0

    def to_copy(self) -> list[str]:
        """Tensors that stay as they are."""
        return [name for name in self.layout.account.copied if name not in self._copied]

    def copy(self, name: str) -> None:
        """Copy a tensor that stays as it is to its place."""
        place = self.subject.files.store.place(name)
        try:
            if place is None:
                self._shards.put(name, self.subject.files.store.get(name))
            else:
                self._shards.copy(name, place)
        except OSError as error:
            raise OutputError(f"output folder {self.folder} cannot be written: {error}") from error
        self._copied.add(name)

    def _put(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, or put it into the fused one that it belongs to, which is written when it is complete."""
        if name in self._shards.infos:
            self._shards.put(name, tensor)
            return
        assert self.layout.fused is not None, "only experts lie inside other tensors"
        complete = self.layout.fused.put(name, tensor)
        if complete is not None:
            self._shards.put(*complete)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as cleanup:
            cleanup.callback(self._leave)
            try:
                if kind is None:
                    for name in self.to_copy():
                        self.copy(name)
                    for name, tensor in self._more.items():
                        self._shards.put(name, tensor)
                self._shards.__exit__(kind, error, trace)
                if self._ledger is not None:
                    self._ledger.close()
                if kind is None:
                    self._write_side_files()
                    # While the files are still hidden: a bad one is never seen under its final name.
                    self._verify()
                    (self._staging / LEDGER).unlink(missing_ok=True)  # the checkpoint has no use for it
                    self._publish()
                    self._inspect()
            except OSError as failure:
                raise OutputError(f"output folder {self.folder} cannot be written: {failure}") from failure

    def _leave(self) -> None:
        """Remove the staging folder, unless a failed run left layers in it that the next one can use."""
        if self._ledger is None or not self._ledger.count or not (self._staging / LEDGER).is_file():
            self._remove()
            return
        self._ledger.close()
        logger.warning(
            "not finished: %d layers are done and kept in %s; the same call with resume=True (--resume) goes on",
            self._ledger.count,
            self._staging,
        )

    def _remove(self) -> None:
        shutil.rmtree(self._staging, ignore_errors=True)
        folders.remove_empty(self._made)

    def _write_side_files(self) -> None:
        files = self.subject.files
        for path in files.side_files:
            shutil.copyfile(path, self._staging / path.name)
        for saver in files.savers:
            saver.save_pretrained(str(self._staging))
        config = self.config()
        (self._staging / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
        described = config.get(self.format.config_key)
        if described is not None:
            (self._staging / "quantization_config.json").write_text(json.dumps(described, indent=2) + "\n")

    def config(self) -> dict[str, Any]:
        """config.json: that of the model, with what the written tensors are."""
        provenance = replace(self.provenance, float_tensors=self.layout.float_matrices())
        config = self.format.describe(self.subject.files.config, self.written_plan(), provenance)
        if any(self.subject.unties(layer) for layer in self.plan.quantized()):
            # Else readers would load the head from the embedding and leave its codes unread.
            config["tie_word_embeddings"] = False
        return config

    def written_plan(self) -> Plan:
        """The plan as the files have it: what was not written counts as floating point."""
        missing = {name: None for name in self.plan.quantized() if name not in self._written}
        return self.plan.override(missing, "not written")

    def _verify(self) -> None:
        """Read every quantized layer back and compare it, bit for bit, with what was handed in."""
        stored = Checkpoint(self._staging)
        for full, whole in self._rewritten.items():
            if checksum(stored.look(full)) != whole:
                raise VerificationError(
                    f"{full} in {self.folder} reads back differently; the disk may be faulty"
                )
        for name, sums in self._written.items():
            tensors = {full: self.layout.read_back(stored, full) for full in sums}
            for full, tensor in tensors.items():
                if checksum(tensor) != sums[full]:
                    raise VerificationError(
                        f"{full} in {self.folder} reads back differently; the disk may be faulty"
                    )
            if self.format.holds_codes and name in self._digests:
                spec, shape, expected = self._digests[name]
                prefix = f"{self.subject.stored_name(name)}."
                by_suffix = {full.removeprefix(prefix): tensor for full, tensor in tensors.items()}
                if digest(self.format.read(by_suffix, spec, shape).tensors()) != expected:
                    raise VerificationError(
                        f"{name}: format {self.format.name} reads back other codes than were written"
                    )

    def _publish(self) -> None:
        """Move the files into place, config.json last: a folder without it is no checkpoint."""
        # Those of an earlier checkpoint first: a crash in between must not leave a mixture that loads.
        for stale in ("config.json", "quantization_config.json", "model.safetensors.index.json"):
            (self.folder / stale).unlink(missing_ok=True)
        for path in self.folder.glob("model*.safetensors"):  # other numbers of shards have other names
            path.unlink()
        for path in sorted(self._staging.iterdir(), key=lambda p: (p.name == "config.json", p.name)):
            os.replace(path, self.folder / path.name)

    def _inspect(self) -> None:
        """Warn of what a server would refuse; the user may have wanted it so."""
        layers, names = self.subject.anatomy.layers, self.subject.names
        known = [n for n, layer in layers.items() if n in self._written or layer.tensor in names]
        prefix = {name: self.subject.stored_name(name) for name in known}
        for finding in inspect(self.folder, self.subject.anatomy, prefix):
            logger.warning("%s", finding)
