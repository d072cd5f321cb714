"""Streaming: the bytes of the in-memory run with any number of workers, resumption, and faults that name the file."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import cache

import pytest
import torch
from models import loaded, logits, tiny
from safetensors.torch import load_file, save_file

from auto_round import AutoRound
from auto_round.core.errors import ModelError, OutputError, PlanError
from auto_round.jobs import export
from auto_round.jobs.workers import in_threads
from auto_round.models.shards import ShardWriter
from auto_round.models.stored import lacking

SMALL = {"group_size": 32, "iters": 0, "disable_opt_rtn": True}
MODELS = ("llama", "qwen3-moe", "gpt2", "gpt-oss")


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """Name -> folder of a tiny model, made once."""

    @cache
    def make(name):
        folder = tmp_path_factory.mktemp(name)
        tiny(name, folder, dtype=torch.bfloat16)
        return folder

    return make


def run(model, out, **options):
    """Quantize `model` into `out`; name -> bytes of every file."""
    AutoRound(model, **{**SMALL, **options}).quantize_and_save(out)
    return files_of(out)


def files_of(folder):
    """Name -> bytes of every file."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def tensors_of(folder):
    """All tensors of a checkpoint."""
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


@pytest.mark.parametrize(
    "options", [{}, {"sym": False}, {"disable_opt_rtn": False, "model_free": True}], ids=str
)
@pytest.mark.parametrize("name", ["gpt2", "qwen3-moe"])
def test_the_number_of_workers_changes_no_byte(name, options, folder_of, tmp_path):
    one = run(folder_of(name), tmp_path / "1", workers=1, max_shard_size="60KB", **options)
    for workers in (2, 4):
        assert (
            run(folder_of(name), tmp_path / str(workers), workers=workers, max_shard_size="60KB", **options)
            == one
        )
    assert len([file for file in one if file.endswith(".safetensors")]) > 1


@pytest.mark.parametrize("name", MODELS)
def test_streamed_bytes_are_those_of_the_live_model(name, folder_of, tmp_path):
    streamed = run(folder_of(name), tmp_path / "a", quant_lm_head=True)
    live = run(folder_of(name), tmp_path / "b", quant_lm_head=True, disable_model_free=True)
    assert {file for file in live if file != "config.json"} == {
        file for file in streamed if file != "config.json"
    }
    for file in streamed:
        if file.endswith(".json"):
            assert json.loads(streamed[file]) == json.loads(live[file]), file
        else:
            assert streamed[file] == live[file], file


def test_nvfp4_experts_share_their_global_scale_when_streamed(folder_of, tmp_path):
    options = {"scheme": "NVFP4", "group_size": None, "act_bits": 16, "format": "fake"}
    one = run(folder_of("qwen3-moe"), tmp_path / "1", workers=1, **options)
    assert run(folder_of("qwen3-moe"), tmp_path / "4", workers=4, **options) == one


class Stop(Exception):
    """What a test interrupts a run with."""


def stop_after(monkeypatch, count):
    """Make the writing of checkpoints fail after `count` layers."""
    add, seen = export.CheckpointWriter.add, []

    def counting(self, name, q):
        if len(seen) >= count:
            raise Stop
        add(self, name, q)
        seen.append(name)

    monkeypatch.setattr(export.CheckpointWriter, "add", counting)
    return seen


@pytest.mark.parametrize("workers", [1, 3])
def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(workers, folder_of, tmp_path, monkeypatch):
    expected = run(folder_of("qwen3-moe"), tmp_path / "whole")
    with monkeypatch.context() as patch:
        first = stop_after(patch, 9)
        with pytest.raises(Stop):
            run(folder_of("qwen3-moe"), tmp_path / "out", workers=workers)
    assert not (tmp_path / "out" / "config.json").exists()
    ledger = next((tmp_path / "out").glob(".*/ledger.jsonl"))
    with ledger.open("a") as file:
        file.write('{"layer": "cut off by the cra')
    with monkeypatch.context() as patch:
        second = stop_after(patch, 1000)
        assert run(folder_of("qwen3-moe"), tmp_path / "out", workers=workers, resume=True) == expected
    assert 9 <= len(first) < 9 + workers and not set(first) & set(second)


def test_bytes_that_did_not_reach_the_disk_are_made_again(folder_of, tmp_path, monkeypatch):
    expected = run(folder_of("llama"), tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Stop):
        first = stop_after(patch, 5)
        run(folder_of("llama"), tmp_path / "out", workers=1)
    shard = next((tmp_path / "out").glob(".*/*.safetensors"))
    header = load_header(shard)
    begin, _ = header[f"{first[0]}.qweight"]["data_offsets"]
    with shard.open("r+b") as file:
        file.seek(8 + int.from_bytes(shard.read_bytes()[:8], "little") + begin)
        file.write(b"\0" * 16)
    with monkeypatch.context() as patch:
        second = stop_after(patch, 1000)
        assert run(folder_of("llama"), tmp_path / "out", resume=True) == expected
    assert first[0] in second and not set(first[1:]) & set(second)


def load_header(path):
    """The header of a safetensors file."""
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def test_going_on_with_other_settings_is_refused_and_starting_again_is_not(folder_of, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, 5)
        run(folder_of("llama"), tmp_path / "out")
    with pytest.raises(PlanError, match=r"made by another run.*bits"):
        run(folder_of("llama"), tmp_path / "out", bits=8, resume=True)
    assert run(folder_of("llama"), tmp_path / "out", bits=8) == run(
        folder_of("llama"), tmp_path / "b", bits=8
    )


def test_a_disk_that_fills_up_is_named_and_the_run_can_go_on(folder_of, tmp_path, monkeypatch):
    expected = run(folder_of("llama"), tmp_path / "whole")
    put, count = ShardWriter.put, iter(range(1000))

    def full(self, name, tensor):
        if next(count) > 12:
            raise OSError(28, "No space left on device")
        put(self, name, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "put", full)
        with pytest.raises(OutputError, match=r"out.*No space left"):
            run(folder_of("llama"), tmp_path / "out")
    assert run(folder_of("llama"), tmp_path / "out", resume=True) == expected


def test_a_corrupt_source_shard_is_named_before_anything_is_written(folder_of, tmp_path):
    source = shutil.copytree(folder_of("llama"), tmp_path / "source")
    with (source / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(ModelError, match=r"model\.safetensors: truncated or damaged"):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_architecture_that_nobody_knows_is_quantized_and_nothing_is_dropped(tmp_path):
    make = torch.Generator().manual_seed(0)
    tensors = {
        "trunk.embed.weight": torch.randn(96, 64, generator=make),
        "trunk.cells.0.mixer.query.weight": torch.randn(64, 64, generator=make),
        "trunk.cells.0.mixer.A_log": torch.randn(64, 16, generator=make),
        "trunk.cells.0.moe.router.weight": torch.randn(32, 64, generator=make),
        "trunk.cells.0.moe.experts.gate_up_proj": torch.randn(2, 64, 64, generator=make),
        "trunk.cells.0.moe.experts.down_proj": torch.randn(2, 64, 32, generator=make),
        "lm_head.weight": torch.randn(96, 64, generator=make),
    }
    source = tmp_path / "source"
    source.mkdir()
    save_file(tensors, source / "model.safetensors")
    config = {"model_type": "nobody", "hidden_size": 64, "num_hidden_layers": 1, "tie_word_embeddings": False}
    (source / "config.json").write_text(json.dumps(config))
    run(source, tmp_path / "out", model_free=True)
    written = tensors_of(tmp_path / "out")
    kept = [
        "trunk.embed.weight",
        "trunk.cells.0.mixer.A_log",
        "trunk.cells.0.moe.router.weight",
        "lm_head.weight",
    ]
    assert all(torch.equal(written[name], tensors[name]) for name in kept)
    layers = {name.removesuffix(".qweight") for name in written if name.endswith(".qweight")}
    experts = [
        f"trunk.cells.0.moe.experts.{i}.{part}_proj" for i in (0, 1) for part in ("gate", "up", "down")
    ]
    assert layers == {"trunk.cells.0.mixer.query", *experts}
    assert len(written) == len(kept) + 3 * len(layers)


def test_a_streamed_mixture_of_experts_loads_in_stock_transformers(folder_of, tmp_path):
    run(folder_of("qwen3-moe"), tmp_path / "int", bits=8)
    run(folder_of("qwen3-moe"), tmp_path / "fake", bits=8, format="fake")
    torch.testing.assert_close(
        logits(loaded(tmp_path / "int")), logits(loaded(tmp_path / "fake")), atol=0.05, rtol=0
    )


def test_the_first_error_of_a_worker_is_raised_and_no_more_work_is_taken():
    taken = []

    def work(item):
        taken.append(item)
        if item == 3:
            raise Stop
        return item

    with pytest.raises(Stop):
        list(in_threads(work, range(1000), workers=2))
    assert len(taken) < 10


def hollow(folder, *, blocks, experts, hidden=7168, inner=2048, vocabulary=163840):
    """A checkpoint of an unknown architecture with true headers and files full of holes; its number of parameters."""
    config = {
        "model_type": "nobody",
        "hidden_size": hidden,
        "num_hidden_layers": blocks,
        "vocab_size": vocabulary,
    }
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    attention = {"q_a": (1536, hidden), "q_b": (12288, 1536), "kv": (576, hidden), "out": (hidden, 8192)}
    expert = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    index, total = {}, 0
    for block in range(blocks):
        path, header, position = f"model.layers.{block}", {}, 0
        shapes = {f"{path}.self_attn.{part}_proj": shape for part, shape in attention.items()}
        shapes |= {f"{path}.mlp.experts.{e}.{part}": s for e in range(experts) for part, s in expert.items()}
        if block == 0:
            shapes |= dict.fromkeys(("model.embed_tokens", "lm_head"), (vocabulary, hidden))
        for name, (rows, columns) in shapes.items():
            offsets = [position, position := position + 2 * rows * columns]
            header[f"{name}.weight"] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": offsets}
        text = json.dumps(header).encode()
        file = f"model-{block + 1:05}-of-{blocks:05}.safetensors"
        with (folder / file).open("wb") as handle:
            handle.write(len(text).to_bytes(8, "little") + text)
            handle.truncate(8 + len(text) + position)
        index.update(dict.fromkeys(header, file))
        total += position // 2
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return total


PLANNING = """
import json, resource, sys, time
from auto_round import AutoRound
begin, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
outline = AutoRound(sys.argv[1], model_free=True).outline("auto_round", rehearse=False)
used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
print(json.dumps([time.process_time() - begin, used, len(outline.plan), outline.sizes["auto_round"]]))
"""


@pytest.mark.slow
def test_a_trillion_parameters_are_planned_from_headers_in_seconds_and_bounded_memory(tmp_path):
    count = hollow(tmp_path, blocks=61, experts=384)
    assert count > 1e12
    done = subprocess.run(
        [sys.executable, "-c", PLANNING, tmp_path], check=True, capture_output=True, text=True
    )
    seconds, used, layers, nbytes = json.loads(done.stdout.splitlines()[-1])
    print(done.stdout)
    assert layers > 61 * 3 * 384
    assert 0.5 < nbytes / count < 0.54  # 4 bits, and a scale and a zero point for 128 weights
    assert seconds < 120 and used < 2e9


BLOCKS = ("input_layernorm.weight", "mlp.up_proj.weight", "self_attn.q_norm.weight")


def names(blocks, *, without=(), extra=()):
    """Tensors of `blocks` blocks."""
    every = [f"model.layers.{i}.{name}" for i in range(blocks) for name in BLOCKS]
    return [name for name in [*every, *extra, "lm_head.weight"] if name not in without]


def test_what_every_other_block_has_is_missed():
    norm, expert = "model.layers.1.self_attn.q_norm.weight", "model.layers.2.mlp.experts.3.up_proj.weight"
    experts = [expert.replace(".2.", f".{i}.", 1) for i in range(4)]
    assert lacking(names(4)) is None
    assert lacking(names(4, without=[norm])) == norm
    assert lacking(names(4, extra=experts, without=[expert])) == expert
    whole = [name for name in names(4) if name.startswith("model.layers.2.")]
    assert lacking(names(4, without=whole)) == "model.layers.2"


def test_blocks_of_several_kinds_are_not_taken_for_damaged_ones():
    # One dense block before mixtures, a block that predicts more tokens, and norms in every other block.
    dense = [f"model.layers.{i}.mlp.experts.0.up_proj.weight" for i in (1, 2, 3)]
    assert lacking(names(4, extra=["model.layers.0.mlp.gate_proj.weight", *dense])) is None
    assert lacking(names(4, extra=["model.layers.3.eh_proj.weight"])) is None
    assert lacking(names(4, without=[f"model.layers.{i}.self_attn.q_norm.weight" for i in (0, 2)])) is None
    assert lacking(names(2, without=["model.layers.0.self_attn.q_norm.weight"])) is None


@pytest.mark.parametrize("known", [True, False])
def test_model_free_notices_a_missing_norm(known, tmp_path, caplog):
    tiny("llama", tmp_path / "m", dtype=torch.bfloat16, num_hidden_layers=3)
    norm = "model.layers.1.post_attention_layernorm.weight"
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    del tensors[norm]
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    if known:
        with pytest.raises(ModelError, match=f"{norm} is missing"):
            run(tmp_path / "m", tmp_path / "out", model_free=True)
        assert not (tmp_path / "out").exists()
        return
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "model_type": "nobody"}))
    run(tmp_path / "m", tmp_path / "out", model_free=True)
    assert f"{norm} is not in the checkpoint, though every other block has one" in caplog.text


SLOWLY = """
import sys, time
from auto_round import AutoRound
from auto_round.models.shards import ShardWriter
put = ShardWriter.put
def slowly(self, name, tensor):
    time.sleep(0.01)
    put(self, name, tensor)
ShardWriter.put = slowly
options = dict(group_size=32, model_free=True, workers=2, max_shard_size="60KB", resume=True)
AutoRound(sys.argv[1], **options).quantize_and_save(sys.argv[2])
"""


def killed(model, out, lines, more):
    """Begin or go on with a run in a process of its own, killed `more` seconds after `lines` lines of its ledger.

    Whether there was a process left to kill."""
    process = subprocess.Popen([sys.executable, "-c", SLOWLY, model, out], stderr=subprocess.DEVNULL)
    ledger = out / export.STAGING / "ledger.jsonl"
    while process.poll() is None and (not ledger.is_file() or ledger.read_bytes().count(b"\n") < lines):
        time.sleep(0.002)
    time.sleep(more)
    process.kill()
    return process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_runs_killed_at_any_moment_go_on_to_the_same_bytes(kills, folder_of, tmp_path):
    options = {"model_free": True, "max_shard_size": "60KB"}
    expected = run(folder_of("qwen3-moe"), tmp_path / "whole", **options)
    make, caught = random.Random(kills), 0
    for turn in range(kills):
        # Moments lie all over the run: what is finished is read back first, and counts as lines.
        lines = (turn + make.random()) / kills * 34
        caught += killed(folder_of("qwen3-moe"), tmp_path / "out", int(lines), make.random() / 50)
        assert not (tmp_path / "out" / "config.json").exists() or turn == kills - 1
    assert caught >= kills - 1
    # A kill after the last line may have come too late: then all is there, or was being put in place.
    assert run(folder_of("qwen3-moe"), tmp_path / "out", workers=2, resume=True, **options) == expected
