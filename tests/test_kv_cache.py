"""Scales for keys and values: measured where the cache sees them, written where servers look."""

import json

import pytest
import torch
from models import loaded, samples, tiny
from safetensors.torch import load_file

from auto_round import AutoRound
from auto_round.core.errors import FormatError
from auto_round.jobs.verify import verify
from auto_round.sources.dataset import Calibration
from auto_round.sources.kv_cache import cache_ranges

E4M3_TOP = 448.0


def oracle(model, ids):
    """Largest keys and values per layer, from the cache that transformers itself fills."""
    with torch.inference_mode():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    return [(layer.keys.abs().amax().item(), layer.values.abs().amax().item()) for layer in cache.layers]


@pytest.mark.parametrize("name", ["llama", "qwen3-tied", "gpt2", "gemma3"])
def test_ranges_are_those_of_the_real_cache(name):
    model, ids = tiny(name), torch.stack(samples(5, 8))
    found = cache_ranges(model, Calibration(ids), batch_size=2)
    for (keys, values), expected in zip(found.values(), oracle(model, ids), strict=True):
        assert (keys.item(), values.item()) == pytest.approx(expected, rel=1e-6)
    assert all(isinstance(model.get_submodule(path), torch.nn.Module) for path in found)


def test_padding_does_not_count():
    model, ids = tiny("llama"), torch.stack(samples(2, 8))
    padded = torch.cat([ids, torch.full((2, 4), 2)], dim=1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(2, 4, dtype=torch.long)], dim=1)
    plain = cache_ranges(model, Calibration(ids), batch_size=2)
    with_padding = cache_ranges(model, Calibration(padded, mask), batch_size=2)
    for path, pair in plain.items():
        assert torch.allclose(torch.stack(pair), torch.stack(with_padding[path]))


def test_scales_are_written_as_servers_read_them(tmp_path):
    model = tiny("llama", tmp_path / "model", hidden_size=128, intermediate_size=128)
    ids = samples(4, 16)
    job = AutoRound(
        str(tmp_path / "model"),
        scheme="FP8_STATIC",
        iters=0,
        dataset=ids,
        seqlen=16,
        nsamples=4,
        static_kv_dtype="fp8",
    )
    _, folder = job.quantize_and_save(tmp_path / "out", format="llm_compressor")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for index, (keys, values) in enumerate(oracle(model, torch.stack(ids))):
        k, v = (tensors[f"model.layers.{index}.self_attn.{kind}_scale"] for kind in "kv")
        assert k.shape == v.shape == (1,) and k.dtype == torch.float32
        assert [k.item(), v.item()] == pytest.approx([keys / E4M3_TOP, values / E4M3_TOP], rel=1e-6)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"] == {
        "dynamic": False, "group_size": None, "num_bits": 8, "strategy": "tensor", "symmetric": True, "type": "float",
    }  # fmt: skip
    assert verify(folder) == []


@pytest.mark.parametrize(("fmt", "dtype"), [("auto_round", "fp8"), ("llm_compressor", "nvfp4")])
def test_a_format_without_a_place_for_them_refuses(tmp_path, fmt, dtype):
    tiny("llama", tmp_path / "model")
    job = AutoRound(
        str(tmp_path / "model"), iters=0, dataset=samples(2), seqlen=32, nsamples=2, static_kv_dtype=dtype
    )
    with pytest.raises(FormatError, match="static_kv_dtype"):
        job.quantize_and_save(tmp_path / "out", format=fmt)
    assert not (tmp_path / "out").exists()
    assert loaded(tmp_path / "model") is not None
