"""Models on a hub: a small server in the test plays it, and breaks off in the middle of a file if it is told to."""

import gc
import json
import os
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants as hub
import pytest
import torch
from models import tiny, tokenizer

from auto_round import AutoRound
from auto_round.core.errors import ModelError
from auto_round.models.checkpoint import Checkpoint
from auto_round.models.hub_shards import KEPT, open_shards

SMALL = {"group_size": 32, "model_free": True, "workers": 1}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves the files of `folder` as owner/name; of `broken`, the first `failures` answers end halfway."""

    daemon_threads = True

    def __init__(self, folder, broken="", failures=0):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.broken, self.failures, self.asked = broken, failures, []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, address):
        """Clients that give up are part of the test."""


class Answer(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Nothing."""

    def do_HEAD(self):
        """About a file."""
        self.send(self.path)

    def do_GET(self):
        """A file or its list."""
        self.send(self.path, body=True)

    def send(self, path, *, body=False):
        """Answer with what is at `path`."""
        name = path.partition("?")[0].rpartition("/")[2]
        part = "" if (self.headers.get("Range") or "-").endswith("-") else ", header"
        self.server.asked.append((self.command, name + part))
        if path.startswith("/api/"):
            listed = [{"rfilename": file} for file in self.server.files]
            if "/tree/" in path:
                listed = [
                    {"type": "file", "path": file, "size": len(data), "oid": file}
                    for file, data in self.server.files.items()
                ]
                content = json.dumps(listed).encode()
            else:
                content = json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": listed}).encode()
            return self.reply(200, content, {"Content-Type": "application/json"}, body=body)
        if name not in self.server.files:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"}, body=body)
        content, headers = self.server.files[name], {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}
        begin, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        begin, whole = int(begin or 0), len(content)
        if last:
            content = content[: int(last) + 1]
        if begin or last:
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{whole}"
        cut = body and name == self.server.broken and self.server.failures > 0
        self.server.failures -= cut
        return self.reply(206 if begin or last else 200, content[begin:], headers, body=body, cut=cut)

    def reply(self, status, content, headers, *, body, cut=False):
        """Send it, or, `cut`, half of it."""
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), "Accept-Ranges": "bytes", **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model."""
    found = tmp_path_factory.mktemp("hub") / "m"
    tiny("llama", found, dtype=torch.bfloat16)
    return found


@pytest.fixture
def serve(folder, tmp_path, monkeypatch):
    """A function that starts a hub, which the libraries then talk to with an empty cache."""

    def start(*broken, files=folder):
        server = Hub(files, *broken)
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(hub, "ENDPOINT", address)
        template = hub.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", address)
        monkeypatch.setattr(hub, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
        return server

    return start


def written(folder):
    """Name -> bytes."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("failures", [0, 1])
def test_a_download_that_breaks_off_is_gone_on_with(failures, folder, serve, tmp_path):
    AutoRound(folder, **SMALL).quantize_and_save(tmp_path / "local")
    server = serve("model.safetensors", failures)
    AutoRound("owner/name", **SMALL).quantize_and_save(tmp_path / "out")
    assert written(tmp_path / "out") == written(tmp_path / "local")
    assert server.asked.count(("GET", "model.safetensors")) == 1 + failures


def test_a_download_that_always_breaks_off_names_the_model_and_writes_nothing(serve, tmp_path):
    server = serve("model.safetensors", 1000)
    with pytest.raises(ModelError, match=r"owner/name.*the hub did not give it"):
        AutoRound("owner/name", **SMALL).quantize_and_save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    server.failures = 0  # the line is mended: the same call succeeds, with what had arrived
    AutoRound("owner/name", **SMALL).quantize_and_save(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A model of many shards; some layers that must share a grid lie in two of them."""
    found = tmp_path_factory.mktemp("hub") / "name"  # as on the hub: a GGUF file says it
    model = tiny("llama", dtype=torch.bfloat16, num_hidden_layers=4)
    model.save_pretrained(found, max_shard_size="60kB")
    tokenizer().save_pretrained(found)
    assert len(list(found.glob("*.safetensors"))) > 4
    return found


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scheme": "NVFP4", "act_bits": 16, "group_size": 16},
        {"format": "auto_round,llm_compressor"},
        {"format": "gguf:q4_0", "group_size": None},
    ],
    ids=str,
)
def test_shards_of_a_streamed_model_come_one_after_the_other_and_go(
    workers, options, sharded, serve, tmp_path
):
    settings = {**SMALL, "workers": workers, **options}
    AutoRound(sharded, **settings).quantize_and_save(tmp_path / "local")
    server, most = serve(files=sharded), 0
    job = AutoRound("owner/name", **settings)

    class Watch:
        def started(self, plan, blocks):
            pass

        def finished(self, result):
            nonlocal most
            most = max(most, len(shards_in(tmp_path / "cache")))

    job.observers.append(Watch())
    job.quantize_and_save(tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "local")
    shards = [path.name for path in sharded.glob("*.safetensors")]
    assert [server.asked.count(("GET", name)) for name in shards] == [1] * len(shards)
    assert 0 < most <= KEPT
    del job
    gc.collect()
    assert not shards_in(tmp_path / "cache")


def test_a_shard_that_always_breaks_off_names_the_model_and_the_same_call_goes_on(sharded, serve, tmp_path):
    AutoRound(sharded, **SMALL).quantize_and_save(tmp_path / "local")
    broken = sorted(path.name for path in sharded.glob("*.safetensors"))[2]
    server = serve(broken, 1000, files=sharded)
    with pytest.raises(ModelError, match=r"owner/name.*the hub did not give it"):
        AutoRound("owner/name", **SMALL).quantize_and_save(tmp_path / "out")
    server.failures = 0
    AutoRound("owner/name", **SMALL, resume=True).quantize_and_save(tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "local")


@pytest.fixture
def opened(sharded, serve, tmp_path):
    """(the shards of a hub model, its hub, and a function from shard numbers to one tensor's name in each)."""
    server = serve(files=sharded)
    shards = open_shards("owner/name")
    first = {shards.shards(name)[0]: name for name in shards.infos}
    return shards, server, lambda *numbers: [first[number] for number in numbers]


def fetched(server):
    """How often shards were asked for as a whole."""
    return sum(verb == "GET" and name.endswith(".safetensors") for verb, name in server.asked)


def test_a_shard_goes_when_it_was_read_as_often_as_expected_and_not_before(opened, tmp_path):
    shards, server, named = opened
    shards.expect(Counter({0: 2}))
    for name in named(0, 1, 2, 3, 4):  # more than are kept: the first is still expected
        shards.get(name)
    shards.done([0])
    shards.get(*named(0))
    assert fetched(server) == 5
    shards.done([0])
    assert len(shards_in(tmp_path / "cache")) == KEPT - 1
    shards.get(*named(0))
    assert fetched(server) == 6


def test_announcing_fetches_ahead_only_where_there_is_room(opened):
    shards, server, named = opened
    shards.expect(Counter(dict.fromkeys(range(6), 1)))
    for name in named(*range(6)):
        shards.announce(name)
    for name in named(*range(KEPT)):
        shards.get(name)
    assert fetched(server) == KEPT
    shards.done([0])
    shards.announce(*named(KEPT))
    shards.get(*named(KEPT))
    assert fetched(server) == KEPT + 1


def test_tensors_of_shards_are_those_of_the_local_model(opened, sharded):
    shards, _, _ = opened
    local = Checkpoint(sharded)
    assert shards.infos.keys() == local.infos.keys()
    assert all(torch.equal(shards.get(name), local.get(name)) for name in local.infos)


def test_headers_are_enough_to_plan_a_model_on_the_hub(sharded, serve):
    server = serve(files=sharded)
    outline = AutoRound("owner/name", **SMALL).outline("auto_round", rehearse=False)
    local = AutoRound(sharded, **SMALL).outline("auto_round", rehearse=False)
    assert (outline.plans, outline.sizes) == (local.plans, local.sizes)
    assert not [name for verb, name in server.asked if verb == "GET" and name.endswith(".safetensors")]


def shards_in(cache):
    """Names of the shards in it. Folders may go meanwhile, which `rglob` does not bear."""
    names = [name for _, _, found in os.walk(cache) for name in found]
    return [name for name in names if name.startswith("model-") and name.endswith(".safetensors")]


def tree(folder):
    """Path in the folder -> bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
