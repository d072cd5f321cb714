"""Quantized sources: what is streamed from them is what is streamed from the plain weights that they stand for."""

import json

import pytest
import torch
from models import samples, tiny
from safetensors.torch import load_file
from stored_sources import in_fp8, in_mxfp4, is_matrix, rewritten

from auto_round import AutoRound
from auto_round.core.errors import ModelError
from auto_round.sources.plain import open_folder

RTN = {"group_size": 32, "iters": 0, "disable_opt_rtn": True}


def streamed(folder, out, **options):
    """Tensors of the result of streaming `folder` to four bits."""
    AutoRound(folder, **{**RTN, **options}).quantize_and_save(out)
    assert "fp8" not in (out / "config.json").read_text()
    return {n: t for path in sorted(out.glob("*.safetensors")) for n, t in load_file(path).items()}


def assert_same(found, expected):
    """Bit for bit the same tensors."""
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("kind", ["block", "row", "tensor"])
def test_fp8_sources_are_read_as_the_weights_that_they_stand_for(kind, tmp_path):
    tiny("llama", tmp_path / "m", dtype=torch.bfloat16)
    size = 32
    config = {"quant_method": "fp8", "weight_block_size": [size, size]}
    source = rewritten(
        tmp_path / "m", tmp_path / "fp8", lambda tensors: in_fp8(tensors, kind, size)[0], config
    )
    plain = rewritten(tmp_path / "m", tmp_path / "plain", lambda tensors: in_fp8(tensors, kind, size)[1])
    assert_same(streamed(source, tmp_path / "a"), streamed(plain, tmp_path / "b"))


def test_a_missing_partner_is_named(tmp_path):
    tiny("llama", tmp_path / "m", dtype=torch.bfloat16)

    def change(tensors):
        return {n: w.to(torch.float8_e4m3fn) if is_matrix(n) else w for n, w in tensors.items()}

    source = rewritten(tmp_path / "m", tmp_path / "fp8", change, {"quant_method": "fp8"})
    with pytest.raises(ModelError, match=r"down_proj.weight is FP8, but none of weight_scale_inv"):
        streamed(source, tmp_path / "out")


def test_mxfp4_experts_are_read_as_the_weights_that_they_stand_for(tmp_path):
    tiny("gpt-oss", tmp_path / "m", dtype=torch.bfloat16)
    config = {"quant_method": "mxfp4"}
    source = rewritten(tmp_path / "m", tmp_path / "mxfp4", lambda tensors: in_mxfp4(tensors)[0], config)
    plain = rewritten(tmp_path / "m", tmp_path / "plain", lambda tensors: in_mxfp4(tensors)[1])
    assert_same(streamed(source, tmp_path / "a"), streamed(plain, tmp_path / "b"))


@pytest.mark.parametrize(
    "fmt, options",
    [
        ("auto_round", {}),
        ("auto_round", {"sym": False, "bits": 2}),
        ("auto_gptq", {"bits": 8}),
        ("auto_awq", {"sym": False}),
        ("llm_compressor", {}),
        ("llm_compressor", {"scheme": "NVFP4", "act_bits": 16, "group_size": None}),
    ],
    ids=str,
)
def test_packed_sources_are_read_as_their_dequantized_weights_with_a_warning(fmt, options, tmp_path, caplog):
    tiny("llama", tmp_path / "m", dtype=torch.bfloat16)
    for name in (fmt, "fake"):
        AutoRound(tmp_path / "m", **{**RTN, **options}).quantize_and_save(tmp_path / name, format=name)
    caplog.clear()
    bits = 2  # symmetric: too few levels for the grid of any source here
    found = streamed(tmp_path / fmt, tmp_path / "a", bits=bits)
    assert "a second time, which costs accuracy" in caplog.text and "14 layers from" in caplog.text
    expected = streamed(tmp_path / "fake", tmp_path / "b", bits=bits)
    codes = [name for name in expected if name.endswith("qweight")]
    # A format may ask for another float dtype, in which the dequantized weights are then rounded.
    differing = [n for n in codes if not torch.equal(found[n], expected[n])]
    dtype = json.loads((tmp_path / fmt / "config.json").read_text())["dtype"]
    assert found.keys() == expected.keys() and (not differing or dtype != "bfloat16")


def test_quantized_sources_can_be_tuned_block_by_block(tmp_path):
    tiny("llama", tmp_path / "m", dtype=torch.bfloat16)
    for name in ("auto_round", "fake"):
        AutoRound(tmp_path / "m", **{**RTN, "bits": 8}).quantize_and_save(tmp_path / name, format=name)
    results = []
    for name in ("auto_round", "fake"):
        job = AutoRound(
            tmp_path / name, dataset=samples(4), group_size=32, iters=2, nsamples=4, seqlen=32, batch_size=2
        )
        job.quantize_and_save(tmp_path / f"{name}-out")
        results.append(load_file(tmp_path / f"{name}-out" / "model.safetensors"))
    assert_same(*results)


def test_a_plain_folder_is_opened_as_it_is(tmp_path):
    model = tiny("llama", tmp_path / "m")
    files = open_folder(tmp_path / "m")
    assert set(files.store.infos) == set(model.state_dict())
