"""GGUF files: what the header says of origin and making, hostile tokenizers and disks, and passes that are shared."""

import errno
import json
import shutil
import struct
from collections import Counter
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from auto_round import AutoRound
from auto_round.core.errors import DataError, ModelError, OutputError
from auto_round.formats.base import Provenance
from auto_round.jobs import gguf_export
from auto_round.jobs.gguf_export import GgufWriter
from auto_round.jobs.gguf_header import making_of, model_name
from auto_round.models.checkpoint import Checkpoint
from auto_round.models.imatrix import Origin, origin_of, read_imatrix, write_imatrix
from auto_round.models.load import ModelFiles
from auto_round.version import __version__
from tests import models

CARD = """---
license: apache-2.0
base_model: somebody/big-model
tags:
- text-generation
language: [en, de]
---
# A model
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama whose rows are multiples of 256, with a model card."""
    folder = tmp_path_factory.mktemp("source") / "Tiny-Llama"
    models.tiny("llama", folder, hidden_size=256, intermediate_size=256)
    (folder / "README.md").write_text(CARD)
    return folder


def made(source, out, **options):
    """(path, keys and values) of the file made from `source` without data."""
    settings = {"format": "gguf:q4_0", "iters": 0, "model_free": True, **options}
    _, folder = AutoRound(source, **settings).quantize_and_save(out)
    path = min(Path(folder).glob("*.gguf"))
    return path, {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def nothing_left(folder):
    """Whether a failed job left no trace."""
    return not folder.exists() or not any(folder.iterdir())


def copied(llama, tmp_path):
    """A copy of the model, to be spoilt."""
    return Path(shutil.copytree(llama, tmp_path / "m"))


# --------------------------------------------------------------------------------------------------- what is said


def test_the_header_says_where_the_model_comes_from_as_llama_cpp_does(llama, tmp_path):
    path, found = made(llama, tmp_path)
    assert path.name == "Tiny-Llama-984K-Q4_0.gguf"
    assert found["general.name"] == "Tiny-Llama" and found["general.type"] == "model"
    assert found["general.license"] == "apache-2.0" and found["general.languages"] == ["en", "de"]
    assert found["general.base_model.count"] == 1 and found["general.tags"] == ["text-generation"]
    assert found["general.base_model.0.repo_url"] == "https://huggingface.co/somebody/big-model"
    assert found["general.quantization_version"] == 2 and found["general.file_type"] == 2
    assert found["general.quantized_by"] == f"auto-round {__version__}"
    assert not [key for key in found if key.startswith("quantize.imatrix")]  # weights alone counted


def test_licence_and_origin_survive_from_file_to_file(llama, tmp_path):
    path, _ = made(llama, tmp_path / "a", format="gguf:bf16")
    again, found = made(path, tmp_path / "b")
    assert again.name == "Tiny-Llama-984K-Q4_0.gguf"
    assert found["general.license"] == "apache-2.0"
    assert found["general.base_model.0.repo_url"] == "https://huggingface.co/somebody/big-model"


def test_a_model_in_the_cache_of_the_hub_is_called_like_its_repository(llama, tmp_path):
    folder = tmp_path / "models--owner--Great-Model" / "snapshots" / "0123456789abcdef"
    shutil.copytree(llama, folder)
    path, found = made(folder, tmp_path / "out")
    assert path.name.startswith("Great-Model-984K") and found["general.name"] == "Great-Model"
    assert "0123456789abcdef" not in str(found.get("general.basename"))
    assert model_name(ModelFiles(store=None, config={"_name_or_path": "a/b"})) == "b"


def test_calibration_data_is_named_as_the_origin_of_importance(llama, tmp_path):
    lines = [{"text": " ".join(models.SENTENCES)}] * 3
    (tmp_path / "own.json").write_text(json.dumps(lines))
    data = {"dataset": str(tmp_path / "own.json"), "seqlen": 32, "nsamples": 2, "model_free": False}
    _, found = made(llama, tmp_path / "out", **data)
    assert found["quantize.imatrix.dataset"] == str(tmp_path / "own.json")
    assert found["quantize.imatrix.chunks_count"] == 2
    assert found["quantize.imatrix.entries_count"] == 16  # two blocks of seven, embedding and head


@pytest.mark.parametrize("name", ["i.gguf", "i.imatrix"])
def test_an_importance_file_is_named_with_what_it_says_of_itself(llama, tmp_path, name):
    means = {"blk.0.attn_q.weight": torch.rand(256), "output.weight": torch.rand(256)}
    write_imatrix(tmp_path / name, means, Origin(4, 128, 512, ("wiki.txt",)))
    read = read_imatrix(tmp_path / name)
    assert all(torch.allclose(read[key], means[key]) for key in means) and read.keys() == means.keys()
    _, found = made(llama, tmp_path / "out", imatrix=str(tmp_path / name), model_free=False, nsamples=0)
    said = {key.rpartition(".")[2]: v for key, v in found.items() if key.startswith("quantize.imatrix")}
    assert said == {"file": name, "dataset": "wiki.txt", "chunks_count": 4, "entries_count": 2}


def test_older_importance_files_without_an_end_have_no_origin(tmp_path):
    entry = struct.pack("<i", 1) + b"a" + struct.pack("<ii", 2, 4) + np.ones(4, np.float32).tobytes()
    (tmp_path / "i.dat").write_bytes(struct.pack("<i", 1) + entry)
    assert origin_of(tmp_path / "i.dat") == {}


def test_a_truncated_importance_file_is_an_error(llama, tmp_path):
    write_imatrix(tmp_path / "i.imatrix", {"a": torch.rand(64)}, Origin(1, 8, 8))
    content = (tmp_path / "i.imatrix").read_bytes()
    for size in (5, 20, 100):
        (tmp_path / "cut").write_bytes(content[:size])
        with pytest.raises(DataError, match="imatrix"):
            read_imatrix(tmp_path / "cut")


def test_settings_of_tuning_are_our_own_keys():
    about = Provenance(version="1", blocks=(), tuning={"iters": 2}, importance={"file": "f"})
    assert making_of(about, 15) == {
        "general.quantization_version": 2, "general.file_type": 15, "quantize.imatrix.file": "f", "auto_round.iters": 2,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------- what goes wrong


def test_rows_without_a_token_are_padding_in_the_file(llama, tmp_path):
    folder = copied(llama, tmp_path)
    described = json.loads((folder / "tokenizer.json").read_text())
    vocabulary, merges = described["model"]["vocab"], described["model"]["merges"]
    last = max(vocabulary, key=vocabulary.get)
    del vocabulary[last]
    described["model"]["merges"] = [
        m for m in merges if "".join(m if isinstance(m, list) else m.split()) != last
    ]
    (folder / "tokenizer.json").write_text(json.dumps(described))
    _, found = made(folder, tmp_path / "out")
    assert found["tokenizer.ggml.tokens"][-1] == "[PAD383]" and found["tokenizer.ggml.token_type"][-1] == 5
    assert len(found["tokenizer.ggml.tokens"]) == 384 == found["llama.vocab_size"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "no tokenizer"),
        ("[]", "no tokenizer"),
        ("{}", "no tokenizer"),
        ('{"model": {"type": "WordPiece", "vocab": {"a": 0}}}', "kind 'WordPiece' has no counterpart"),
        ('{"model": {"type": "BPE", "vocab": {"a": "x"}, "merges": []}}', "no tokenizer"),
        ('{"model": {"type": "BPE", "vocab": {"a": -3}, "merges": []}}', "no tokenizer"),
    ],
)
def test_a_damaged_tokenizer_is_named_before_any_work(llama, tmp_path, content, words):
    folder = copied(llama, tmp_path)
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=words) as caught:
        made(folder, tmp_path / "out")
    assert "tokenizer.json" in str(caught.value) and nothing_left(tmp_path / "out")


@pytest.mark.parametrize(
    ("part", "content", "words"),
    [
        (
            "pre_tokenizer",
            {"type": "Sequence", "pretokenizers": [{"type": "ByTheMoon"}]},
            "pre_tokenizer 'ByTheMoon'",
        ),
        ("normalizer", {"type": "Later"}, "has no normalizer 'Later'"),
        ("post_processor", {"type": "Odd"}, "has no post_processor 'Odd'"),
        ("decoder", {"type": "Odd"}, "has no decoder 'Odd'"),
        ("decoder", {"type": "WordPiece"}, "refuses it"),
    ],
)
def test_parts_of_a_tokenizer_that_nobody_knows_are_named_before_any_work(
    llama, tmp_path, part, content, words
):
    folder = copied(llama, tmp_path)
    described = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**described, part: content}))
    with pytest.raises(ModelError, match=words) as caught:
        made(folder, tmp_path / "out")
    assert "tokenizer.json" in str(caught.value) and nothing_left(tmp_path / "out")


def test_a_damaged_model_card_is_named(llama, tmp_path):
    folder = copied(llama, tmp_path)
    (folder / "README.md").write_text("---\nlicense: [unclosed\n---\n")
    with pytest.raises(ModelError, match=r"README\.md: the model card's front matter cannot be read"):
        made(folder, tmp_path / "out")
    assert nothing_left(tmp_path / "out")


def test_a_width_that_the_configuration_contradicts_is_named(llama, tmp_path):
    folder = copied(llama, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 128, "head_dim": 64}))
    with pytest.raises(ModelError, match="128"):
        made(folder, tmp_path / "out")
    assert nothing_left(tmp_path / "out")


def test_a_disk_that_fills_up_half_way_leaves_nothing(llama, tmp_path, monkeypatch):
    headers, writes = GgufWriter._headers, Counter()

    class Full:
        """A file on a disk that has room for five tensors."""

        def __init__(self, file):
            self.file = file

        def seek(self, at):
            return self.file.seek(at)

        def write(self, data):
            writes["all"] += 1
            if writes["all"] > 5:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

    def opened(self):
        sizes = headers(self)
        self._places = {name: (Full(file), at) for name, (file, at) in self._places.items()}
        return sizes

    monkeypatch.setattr(GgufWriter, "_headers", opened)
    with pytest.raises(OutputError, match="No space left on device"):
        made(llama, tmp_path / "out")
    assert nothing_left(tmp_path / "out")


def test_a_disk_without_room_for_the_file_is_an_error_before_any_work(llama, tmp_path, monkeypatch):
    def full(file, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf_export.os, "posix_fallocate", full)
    with pytest.raises(OutputError, match="No space left on device"):
        made(llama, tmp_path / "out")
    assert nothing_left(tmp_path / "out")


def test_a_folder_in_the_place_of_the_file_is_an_error(llama, tmp_path):
    (tmp_path / "out" / "Tiny-Llama-984K-Q4_0.gguf").mkdir(parents=True)
    with pytest.raises(OutputError, match="is a folder"):
        made(llama, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["Tiny-Llama-984K-Q4_0.gguf"]


def test_an_interrupted_run_leaves_the_old_file_alone(llama, tmp_path, monkeypatch):
    path, _ = made(llama, tmp_path)
    before = path.read_bytes()
    monkeypatch.setattr(gguf_export, "raw_bytes", lambda tensor: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        made(llama, tmp_path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".auto_round_journal")] == [path.name]


# --------------------------------------------------------------------------------------------------- shared passes


def forwards(llama, out, fmt, **options):
    """How often blocks are run for the types `fmt`, samples by samples."""
    model, seen = models.loaded(llama), Counter()
    for block in model.model.layers:
        block.register_forward_hook(lambda *_: seen.update(["block"]))
    settings = {"dataset": models.samples(4), "seqlen": 32, "nsamples": 4, "batch_size": 2, **options}
    AutoRound(model, models.tokenizer(), format=fmt, **settings).quantize_and_save(out)
    return seen["block"]


def test_several_types_run_the_model_as_often_as_one(llama, tmp_path):
    one = forwards(llama, tmp_path / "one", "gguf:q4_0", iters=0)
    three = forwards(llama, tmp_path / "three", "gguf:q4_0,gguf:q8_0,gguf:q2_k_s", iters=0)
    assert one > 0 and three == one
    assert len(list((tmp_path / "three").glob("*/*.gguf"))) == 3


def test_several_types_read_every_weight_once(llama, tmp_path, monkeypatch):
    reads, get = Counter(), Checkpoint.get

    def counted(self, name):
        reads[name] += 1
        return get(self, name)

    monkeypatch.setattr(Checkpoint, "get", counted)
    made(llama, tmp_path / "out", format=["gguf:q4_0", "gguf:q8_0", "gguf:q2_k_s", "auto_round"][0])
    alone = dict(reads)
    reads.clear()
    settings = {"iters": 0, "model_free": True, "workers": 2}
    AutoRound(llama, format="gguf:q4_0,gguf:q8_0,gguf:q2_k_s,auto_round", **settings).quantize_and_save(
        tmp_path / "several"
    )
    matrices = [name for name in alone if ".layers." in name and name.endswith("proj.weight")]
    assert len(matrices) == 14 and all(reads[name] == alone[name] == 1 for name in matrices)


def test_types_made_together_are_those_made_alone(llama, tmp_path):
    settings = {"iters": 0, "model_free": True}
    AutoRound(llama, format="gguf:q2_k_s,gguf:f16,gguf:q8_0", **settings).quantize_and_save(tmp_path / "all")
    for type_ in ("q2_k_s", "f16", "q8_0"):
        path, _ = made(llama, tmp_path / type_, format=f"gguf:{type_}")
        (together,) = (tmp_path / "all" / f"gguf-{type_.replace('_', '-')}").glob("*.gguf")
        assert together.read_bytes() == path.read_bytes()


def test_split_files_say_how_many_they_are(llama, tmp_path):
    _, found = made(llama, tmp_path, split_size="300KB")
    count = len(list(tmp_path.glob("*.gguf")))
    assert found["split.count"] == count > 1 and found["split.no"] == 0
    parts = [[int(t.n_bytes) for t in gguf.GGUFReader(path).tensors] for path in tmp_path.glob("*.gguf")]
    whole = gguf.GGUFReader(made(llama, tmp_path / "whole")[0]).tensors
    assert sum(map(sum, parts)) == sum(int(t.n_bytes) for t in whole)
    assert all(sum(part) <= 300_000 or len(part) == 1 for part in parts)
