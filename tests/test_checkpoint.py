"""Reading and writing weights: positional, shared by threads, and errors that name the file."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

from auto_round.core.errors import ModelError
from auto_round.models.checkpoint import INDEX, Checkpoint, TensorInfo
from auto_round.models.shards import ShardWriter


def tensors():
    """A few dtypes and shapes, an empty and a zero-dimensional tensor among them."""
    make = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(7, 5, generator=make).to(torch.bfloat16),
        "b": torch.randn(3, 4, 6, generator=make),
        "c": torch.arange(11, dtype=torch.uint8),
        "d": torch.tensor(2.5),
        "e": torch.zeros(0, 4),
        "f": torch.randn(4, 4, generator=make).to(torch.float8_e4m3fn),
    }


def shards_of(folder, *parts, index=None):
    """Write `parts` as shards, with an index that says so unless told otherwise."""
    folder.mkdir()
    names = {}
    for i, part in enumerate(parts):
        save_file(part, folder / f"part-{i}.safetensors")
        names.update(dict.fromkeys(part, f"part-{i}.safetensors"))
    (folder / INDEX).write_text(json.dumps({"weight_map": names if index is None else index}))
    return folder


def same(x, y):
    """Bit for bit."""
    return (
        x.dtype == y.dtype
        and x.shape == y.shape
        and bytes(x.view(-1).view(torch.uint8)) == bytes(y.view(-1).view(torch.uint8))
    )


def test_every_dtype_and_shape_is_read_as_it_was_saved(tmp_path):
    expected = tensors()
    store = Checkpoint(shards_of(tmp_path / "m", expected))
    assert list(store.infos) == sorted(expected)
    for name, tensor in expected.items():
        assert same(store.get(name), tensor), name
    assert torch.equal(store.rows("b", 1, 3), expected["b"][1:3])


def test_what_threads_write_in_any_order_is_what_the_library_reads(tmp_path):
    source = tensors()
    store = Checkpoint(shards_of(tmp_path / "m", source))
    infos = {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in source.items()}
    out = tmp_path / "out"
    out.mkdir()
    with ShardWriter(out, infos, 64) as writer, ThreadPoolExecutor(4) as pool:
        copied = {"a", "c", "e"}
        list(pool.map(lambda n: writer.copy(n, store.place(n)), copied))
        list(pool.map(lambda n: writer.put(n, source[n]), source.keys() - copied))
    assert len(list(out.glob("*.safetensors"))) > 1
    read = {name: t for path in out.glob("*.safetensors") for name, t in load_file(path).items()}
    assert read.keys() == source.keys()
    assert all(same(read[name], source[name]) for name in source)


def test_an_index_that_puts_a_tensor_in_the_wrong_shard_is_named(tmp_path):
    folder = shards_of(
        tmp_path / "m",
        {"a": torch.ones(2)},
        {"b": torch.ones(2)},
        index={"a": "part-1.safetensors", "b": "part-1.safetensors"},
    )
    with pytest.raises(ModelError, match=r"tensor a should be in part-1\.safetensors but is not"):
        Checkpoint(folder)


def test_of_a_tensor_in_two_shards_the_index_says_which_counts(tmp_path):
    folder = shards_of(
        tmp_path / "m",
        {"a": torch.zeros(2), "b": torch.ones(1)},
        {"a": torch.ones(2), "c": torch.ones(1)},
        index={"a": "part-0.safetensors", "b": "part-0.safetensors", "c": "part-1.safetensors"},
    )
    assert torch.equal(Checkpoint(folder).get("a"), torch.zeros(2))


def test_a_shard_that_is_cut_off_while_it_is_read_is_an_error_and_no_crash(tmp_path):
    folder = shards_of(tmp_path / "m", {"a": torch.ones(1000)})
    store = Checkpoint(folder)
    with (folder / "part-0.safetensors").open("r+b") as file:
        file.truncate(500)
    with pytest.raises(ModelError, match=r"part-0\.safetensors: ends within tensor a"):
        store.get("a")


def test_a_shard_larger_than_memory_is_opened_and_read_in_part(tmp_path):
    rows = 1 << 19  # half a terabyte, none of it written
    header = {"a": {"dtype": "F32", "shape": [rows, 1 << 18], "data_offsets": [0, rows << 20]}}
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + (rows << 20))
    store = Checkpoint(tmp_path)
    assert store.infos["a"].shape == (rows, 1 << 18)
    assert not store.row("a", rows - 1).any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data_offsets": [4, 20]}, "begins at byte 4"),
        ({"shape": [5]}, "16 bytes for the shape"),
        ({"shape": [-4]}, "has the shape"),
        ({"data_offsets": [0, 12], "shape": [3]}, "describes 12 bytes"),
    ],
)
def test_a_header_that_lies_names_the_file_and_what_is_wrong(change, words, tmp_path):
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **change}
    text = json.dumps({"a": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(ModelError, match=rf"model\.safetensors: .*{words}"):
        Checkpoint(tmp_path)
