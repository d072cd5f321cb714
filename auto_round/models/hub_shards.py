"""A sharded model on the hub as a store of tensors: headers are read where they are, and a shard is on this machine
only from when one of its tensors is announced or read until some others were."""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from auto_round.core.errors import ModelError
from auto_round.models import hub
from auto_round.models.checkpoint import INDEX, Checkpoint, TensorStore, indexed_shards, infos_of, natural

logger = logging.getLogger("auto_round")
KEPT = 3
"""Shards on this machine at a time, unless what is under way needs more: two that a set of layers may lie in, and
the next one on its way."""
HEADERS_AT_ONCE = 8


def open_shards(model: str, *, revision: str | None = None) -> HubShards | None:
    """The shards of the hub model `model`, with its other files downloaded; None when it is better fetched as a whole.

    That is when it has a single weight file, or all of them are on this machine already. Raises ModelError when the
    hub has no such model or a shard's header is damaged.
    """
    folder = hub.download(model, platform="hf", revision=revision, weights=False)
    if not (folder / INDEX).is_file():
        return None
    shards = indexed_shards(folder / INDEX)
    if all((folder / name).is_file() for name in shards):
        return None
    return HubShards(model, folder, shards)


class HubShards(TensorStore):
    """Tensors of the hub model `model`, whose small files are in `folder`, a snapshot named after its commit.

    Reading them in the order of `order` downloads every shard once. Threads may share it.
    """

    def __init__(self, model: str, folder: Path, shards: Mapping[str, set[str]]) -> None:
        self.model, self.folder, self._shards = model, folder, sorted(shards, key=natural)
        with ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:
            headers = dict(zip(self._shards, pool.map(self._header, self._shards), strict=True))
        where, infos = dict[str, str](), dict[str, Any]()
        for shard, header in headers.items():
            found = infos_of(header, shards[shard], infos, folder / shard)
            infos.update(found)
            where.update(dict.fromkeys(found, shard))
        self.infos = {name: infos[name] for name in sorted(infos, key=natural)}
        self._where = where
        # By their names: layers that share something lie in one shard or in neighbours.
        self._number = {shard: number for number, shard in enumerate(self._shards)}
        self._expected = Counter[int]()
        self._here: dict[str, Future[Checkpoint]] = {}
        self._lock, self._line = threading.Lock(), threading.Lock()
        # Beside the hub's own cache: that is where this machine has room for models.
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._scratch = Path(tempfile.mkdtemp(prefix="auto_round_", dir=folder.parent))
        weakref.finalize(self, shutil.rmtree, self._scratch, ignore_errors=True)
        logger.info(
            "%s: its %d shards are downloaded one after the other and removed when they are done",
            model,
            len(self._shards),
        )

    def get(self, name: str) -> Tensor:
        """The tensor called `name`."""
        return self._shard(name).get(name)

    def row(self, name: str, index: int) -> Tensor:
        """One entry of the first dimension."""
        return self._shard(name).row(name, index)

    def look(self, name: str, row: int | None = None) -> Tensor:
        """As `get` and `row`, mapped."""
        return self._shard(name).look(name, row)

    def announce(self, name: str) -> None:
        """Begin to download the shard of the tensor called `name`, if there is room."""
        shard = self._where[name]
        with self._lock:
            if shard in self._here or not self._make_room():
                return
        self._wanted(shard)

    def shards(self, name: str) -> tuple[int, ...]:
        """The number of its shard."""
        return (self._number[self._where[name]],)

    def expect(self, shards: Counter[int]) -> None:
        """Each shard stays here, once fetched, until it was `done` as often as it is counted."""
        with self._lock:
            self._expected = Counter(shards)

    def done(self, shards: Iterable[int]) -> None:
        """What was read for the last time goes at once."""
        with self._lock:
            for shard in shards:
                self._expected[shard] -= 1
                if self._expected[shard] == 0:
                    self._drop(self._shards[shard])

    def fingerprint(self) -> str:
        """From the name and the commit, which stand for the values, and the tensors' names and shapes."""
        state = hashlib.blake2b(f"{self.model} {self.folder.name}".encode(), digest_size=16)
        for name, info in self.infos.items():
            state.update(f"{name} {info.dtype} {info.shape}".encode())
        return state.hexdigest()

    def _shard(self, name: str) -> Checkpoint:
        return self._wanted(self._where[name]).result()

    def _wanted(self, shard: str) -> Future[Checkpoint]:
        """The open shard, or one on its way."""
        with self._lock:
            if shard in self._here:
                self._here[shard] = self._here.pop(shard)  # last in line
                return self._here[shard]
            self._make_room()
            future = self._here[shard] = Future[Checkpoint]()
        # A daemon: a run that is stopped does not wait for gigabytes.
        threading.Thread(target=self._fetch, args=(shard, future), daemon=True).start()
        return future

    def _make_room(self) -> bool:
        """Whether one more is within `KEPT`, once those have gone that nobody expects to read, the oldest first."""
        spare = [shard for shard in self._here if self._expected[self._number[shard]] <= 0]
        for shard in spare[: max(0, len(self._here) + 1 - KEPT)]:
            self._drop(shard)
        return len(self._here) < KEPT

    def _drop(self, shard: str) -> None:
        if shard in self._here:
            self._here.pop(shard).add_done_callback(_remove)

    def _fetch(self, shard: str, future: Future[Checkpoint]) -> None:
        from huggingface_hub import hf_hub_download

        try:
            with self._line, hub.asking(self.model):  # one at a time: the first one asked for is needed first
                place = Path(tempfile.mkdtemp(dir=self._scratch))
                hf_hub_download(self.model, shard, revision=self.folder.name, local_dir=place)
                # In the line: what has to go is gone before the next comes.
                future.set_result(Checkpoint(place))
        except Exception as error:  # whoever waits for the shard raises it
            future.set_exception(error)

    def _header(self, shard: str) -> Mapping[str, Any]:
        """Tensor -> dtype, shape and data_offsets, as the file's header has them."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import SafetensorsParsingError

        try:
            with hub.asking(self.model):
                found = HfApi().parse_safetensors_file_metadata(self.model, shard, revision=self.folder.name)
        except SafetensorsParsingError as error:
            raise ModelError(f"{self.model}: the header of {shard} is damaged ({error})") from error
        return {
            name: {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
            for name, info in found.tensors.items()
        }


def _remove(done: Future[Checkpoint]) -> None:
    """Delete a shard; whoever still reads it has it open."""
    if done.exception() is None:
        shutil.rmtree(done.result().folder, ignore_errors=True)
