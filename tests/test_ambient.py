"""Results do not depend on what the program around us has set in torch: its default dtype and random numbers."""

import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from models import samples, tiny
from safetensors.torch import load_file

from auto_round import AutoRound
from auto_round.codecs.base import codec_of, codecs, encode, presets
from auto_round.core import native
from auto_round.core.minifloat import E4M3, _values
from auto_round.sources.rows import FileRows, MemoryRows

SPECS = {
    (spec.dtype, spec.bits, spec.variant, spec.scale_dtype): spec
    for scheme in presets().values()
    if (spec := scheme.weight) is not None
}


@contextmanager
def default_dtype(dtype):
    """torch makes floats of `dtype` where nothing is said, as many scripts ask for."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def gaussian(rows, columns, seed):
    """float32 whatever the default."""
    return torch.randn(rows, columns, dtype=torch.float32, generator=torch.Generator().manual_seed(seed))


def searched(spec, importance):
    """What a search and its codes make of one small matrix."""
    w = gaussian(8, 256, seed=0)
    q = encode(w, spec, codec_of(spec).search(w, spec, importance))
    return {**q.tensors(), "fake": codec_of(spec).dequantize(q)}


@pytest.mark.parametrize("with_data", [False, True])
@pytest.mark.parametrize("spec", SPECS.values(), ids=str)
def test_a_search_does_not_depend_on_the_default_dtype(spec, with_data):
    x = gaussian(300, 256, seed=1)
    importance = x.t() @ x if with_data else None
    expected = searched(spec, importance)
    with default_dtype(torch.bfloat16):
        found = searched(spec, importance)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", [name for name in codecs() if name.startswith("q")])
def test_the_search_in_torch_does_not_depend_on_it_either(name, monkeypatch):
    monkeypatch.setattr("auto_round.codecs.blocks.library", lambda source: None)
    spec = codecs()[name].spec()
    expected = searched(spec, None)
    with default_dtype(torch.float16):
        found = searched(spec, None)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_compiled_searches_leave_the_smallest_numbers_alone():
    code = (
        "import torch; from auto_round.codecs import blocks; from auto_round.core import native; "
        "native.library(blocks.KERNELS); print((torch.tensor([1e-40]) * 1.0).item() > 0)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "True"


def test_a_table_of_values_made_under_another_default_is_float32():
    _values.cache_clear()
    with default_dtype(torch.float16):
        assert E4M3.decode(torch.tensor([126], dtype=torch.uint8)).dtype == torch.float32
    _values.cache_clear()


@pytest.mark.parametrize("make", [lambda: MemoryRows((3, 2, 4)), lambda: FileRows((3, 2, 4), None)])
def test_hidden_states_are_float32(make):
    states = gaussian(3, 8, seed=2).reshape(3, 2, 4)
    with default_dtype(torch.bfloat16):
        rows = make()
        rows[[0, 1, 2]] = states
        assert torch.equal(rows[[2, 0]], states[[2, 0]])


def written(folder, out):
    """The tensors of a tuned checkpoint."""
    options = {"group_size": 32, "iters": 2, "nsamples": 4, "seqlen": 8, "batch_size": 2, "amp": False}
    AutoRound(folder, dataset=samples(4, 8), **options).quantize_and_save(out)
    return load_file(out / "model.safetensors")


def test_tuning_gives_the_same_bytes_under_another_default_dtype_and_seed(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "model")
    expected = written(tmp_path / "model", tmp_path / "a")
    torch.manual_seed(12345)
    with default_dtype(torch.bfloat16):
        found = written(tmp_path / "model", tmp_path / "b")
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_tuning_leaves_the_callers_random_numbers_alone(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "model")
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    written(tmp_path / "model", tmp_path / "out")
    assert torch.equal(torch.rand(3), expected)


def test_a_failed_compilation_is_no_failure(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("AR_KERNEL_CACHE", str(tmp_path))
    broken = tmp_path / "broken.c"
    broken.write_text("int f( {")
    with caplog.at_level("INFO", logger="auto_round"):
        assert native.library(broken) is None
    assert "runs in torch" in caplog.text
    assert not list(tmp_path.glob("*.so"))
