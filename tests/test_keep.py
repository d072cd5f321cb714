"""From one quantized form to another: grids that the new type can hold are kept, and the rest is said."""

from pathlib import Path

import gguf
import pytest
import torch

from auto_round import AutoRound
from auto_round.codecs.base import codec_of, codecs
from auto_round.codecs.blocks import BlockCodec
from auto_round.core.scheme import TensorSpec
from auto_round.sources import plain
from auto_round.steps.keep import AGAIN, EXACT, KEPT, even_lines, kept
from tests import models

SHAPE = (8, 256)


def weight(shape=SHAPE, seed=0):
    """Random weights with an outlier in every row."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05
    w[:, 5] *= 4
    return w


def spec_of(type_):
    """A spec by a short name: q4_0, or bits, group and symmetry as in 4/128 and 4/128a."""
    if isinstance(codecs().get(type_), BlockCodec):
        return codecs()[type_].spec()
    bits, _, group = type_.partition("/")
    return TensorSpec(bits=int(bits), group=int(group.rstrip("a")), sym=not group.endswith("a"))


def converted(before, after, w=None):
    """(what a weight was before, what it becomes, what that comes to)."""
    stored = codec_of(spec_of(before)).quantize(weight() if w is None else w, spec_of(before))
    exact, spec = codec_of(stored.spec).dequantize(stored), spec_of(after)
    knobs, outcome = kept(exact.bfloat16(), stored, spec, {})  # a model in memory has it rounded to bfloat16
    codec = codec_of(spec)
    return exact, codec.dequantize(codec.quantize(exact, spec, knobs or {})), outcome


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("4/128", "q4_0"),
        ("4/32", "q4_0"),
        ("4/-1", "q4_0"),
        ("4/128", "q4_1"),
        ("2/64", "q4_0"),
        ("3/32", "q5_0"),
        ("7/32", "q8_0"),
        ("q4_0", "4/32"),
        ("q5_0", "5/32"),
        ("q8_0", "8/32"),
        ("q4_0", "q5_0"),
        ("4/128", "8/32"),
        ("4/128a", "4/32a"),
    ],
)
def test_a_grid_that_fits_is_kept_bit_for_bit(before, after):
    exact, again, outcome = converted(before, after)
    assert outcome == EXACT and torch.equal(exact, again)


@pytest.mark.parametrize(
    ("before", "after"), [("4/32a", "q4_1"), ("4/128a", "q4_1"), ("5/32a", "q5_1"), ("q6_k", "6/16")]
)
def test_offsets_and_steps_that_float16_rounds_are_kept_nearly(before, after):
    exact, again, outcome = converted(before, after)
    assert outcome == KEPT
    steps, _ = even_lines(codec_of(spec_of(before)).quantize(weight(), spec_of(before)), 16)
    assert ((again - exact).abs().reshape(-1, 16) <= 0.02 * steps.abs()).all()


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        ("8/32", "q8_0", "its extreme weights have the code -128, which q8_0 leaves out"),
        ("4/128a", "q4_0", "no offsets"),
        ("4/128", "q4_k", "scales are products there"),
        ("q4_k", "4/32", "offsets"),
        ("4/32", "4/128", "four groups have scales of their own"),
        ("4/128", "3/128", "fewer codes"),
        ("q8_0", "q4_0", "fewer codes"),
    ],
)
def test_a_grid_that_does_not_fit_is_not_kept(before, after, why):
    _, _, outcome = converted(before, after)
    assert outcome == AGAIN, why


def test_small_groups_that_are_alike_become_a_large_one_again():
    first = codec_of(spec_of("4/128")).quantize(weight(), spec_of("4/128"))
    exact = codec_of(first.spec).dequantize(first)
    knobs, _ = kept(exact, first, spec_of("q4_0"), {})
    small = codec_of(spec_of("q4_0")).quantize(exact, spec_of("q4_0"), knobs)
    knobs, outcome = kept(exact, small, spec_of("4/128"), {})
    assert outcome == EXACT and torch.equal(knobs["scale"].half(), first.params["scale"])


@pytest.mark.parametrize("name", [name for name in codecs() if name not in ("int", "q4_0")])
@pytest.mark.parametrize("after", ["q4_0", "q8_0", "8/32a"])
def test_what_is_called_kept_is_kept_whatever_the_type(name, after):
    codec = codecs()[name]
    spec = next(scheme.weight for scheme in codec.presets.values() if scheme.weight is not None)
    stored = codec.quantize(weight(), spec)
    exact, target = codec.dequantize(stored), spec_of(after)
    knobs, outcome = kept(exact, stored, target, {})
    if outcome == AGAIN:
        assert knobs is None
        return
    again = codec_of(target).dequantize(codec_of(target).quantize(exact, target, knobs))
    assert (
        torch.equal(again, exact)
        if outcome == EXACT
        else (again - exact).abs().max() < 0.02 * exact.abs().max()
    )


# ---------------------------------------------------------------------------------------------------- whole models


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama in bfloat16 with rows of 256."""
    folder = tmp_path_factory.mktemp("keep") / "m"
    models.tiny("llama", folder, dtype=torch.bfloat16, hidden_size=256, intermediate_size=256)
    return folder


def floats(folder):
    """Tensor of a file -> what it stands for, with the rows of queries and keys in llama.cpp's order."""
    (path,) = Path(folder).glob("*.gguf")
    return {
        t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type))
        for t in gguf.GGUFReader(path).tensors
    }


@pytest.mark.parametrize("fmt", ["auto_round", "auto_gptq", "auto_round:auto_awq"])
@pytest.mark.parametrize("data", [False, True])
def test_a_folder_of_four_bits_becomes_q4_0_without_loss(llama, tmp_path, caplog, fmt, data):
    caplog.set_level("INFO", "auto_round")
    options = {"iters": 0, "model_free": True}
    AutoRound(llama, format=fmt, **options).quantize_and_save(tmp_path / "w4")
    if data:
        options = {"iters": 0, "dataset": models.samples(2, 16), "seqlen": 16, "nsamples": 2}
    AutoRound(tmp_path / "w4", format="gguf:q4_0", **options).quantize_and_save(tmp_path / "g")
    found, store = floats(tmp_path / "g"), plain.open_folder(tmp_path / "w4").store
    for block in range(models.BLOCKS):
        for place, name in {
            "attn_v": "self_attn.v_proj",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
        }.items():
            q = store.quantized(f"model.layers.{block}.{name}.weight")
            assert torch.equal(found[f"blk.{block}.{place}.weight"], codec_of(q.spec).dequantize(q)), name
    assert "14 layers from" in caplog.text and EXACT in caplog.text
    assert AGAIN not in caplog.text.replace("what cannot keep its grid is rounded a second time", "")


def test_a_type_that_does_not_fit_is_a_warning_that_names_both(llama, tmp_path, caplog):
    options = {"iters": 0, "model_free": True}
    AutoRound(llama, scheme="W8A16", **options).quantize_and_save(tmp_path / "w8")
    caplog.clear()
    AutoRound(tmp_path / "w8", format="gguf:q8_0", **options).quantize_and_save(tmp_path / "g")
    (said,) = [r.message for r in caplog.records if "14 layers" in r.message]
    assert "8" in said and "q8_0" in said and AGAIN in said


def test_a_file_of_llama_cpp_becomes_a_folder_without_loss_and_back(llama, tmp_path):
    options = {"iters": 0, "model_free": True}
    AutoRound(llama, format="gguf:q4_0", **options).quantize_and_save(tmp_path / "g")
    (path,) = (tmp_path / "g").glob("*.gguf")
    AutoRound(path, scheme="W4A16G32", **options).quantize_and_save(tmp_path / "w4")
    AutoRound(tmp_path / "w4", format="gguf:q4_0", **options).quantize_and_save(tmp_path / "again")
    first, second = floats(tmp_path / "g"), floats(tmp_path / "again")
    inside = [name for name in first if name.startswith("blk.") and "norm" not in name]
    assert len(inside) == 14
    assert all(torch.equal(first[name], second[name]) for name in inside)
