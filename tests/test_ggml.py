"""The block types of ggml: layouts against the gguf package, golden bytes, error of the searches, knobs."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from auto_round.codecs import blocks
from auto_round.codecs.base import codec_of, codecs, fake
from auto_round.codecs.blocks import BlockCodec
from auto_round.core.errors import SchemeError

TYPES = [codec for codec in codecs().values() if isinstance(codec, BlockCodec)]
by_type = pytest.mark.parametrize("codec", TYPES, ids=lambda codec: codec.name)


def weight(rows=24, columns=512, seed=0):
    """Gaussian with a few outliers."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator) * 0.05
    return w * (1 + 4 * (torch.rand(rows, columns, generator=generator) > 0.99))


def importance(columns=512, seed=0):
    """Second moments of inputs that differ by orders of magnitude."""
    return torch.rand(columns, generator=torch.Generator().manual_seed(seed)).pow(4) * 10 + 0.01


def searched(codec, w, weights=None):
    """What the codec's own search makes of `w`."""
    return codec.quantize(w, codec.spec(), codec.search(w, codec.spec(), weights))


def theirs(packed, codec):
    """The floats that the gguf package reads from the bytes of a type."""
    with np.errstate(all="ignore"):
        return torch.from_numpy(quants.dequantize(packed.numpy(), GGMLQuantizationType[codec.name.upper()]))


@by_type
def test_the_gguf_package_reads_the_same_floats(codec):
    for q in (codec.quantize(weight(), codec.spec()), searched(codec, weight(), importance())):
        assert torch.equal(theirs(codec.pack(q), codec), codec.dequantize(q))


@by_type
def test_any_bytes_at_all_are_read_and_written_back(codec):
    bytes_ = np.random.default_rng(0).integers(0, 256, (16, 2 * codec.nbytes), dtype=np.uint8)
    packed = torch.from_numpy(bytes_)
    q = codec.unpack(packed, codec.spec(), (16, 2 * codec.block))
    assert torch.equal(codec.pack(q), packed)
    np.testing.assert_array_equal(codec.dequantize(q).numpy(), theirs(packed, codec).numpy())


@by_type
def test_sizes_are_those_of_the_gguf_package(codec):
    block, nbytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[codec.name.upper()]]
    assert (codec.block, codec.nbytes) == (block, nbytes)
    assert codec.cost(codec.spec(), (8, 256)) == nbytes * 8 / block


GOLDEN = {
    "q4_0": "003c" + "".join(f"{(15 - i) % 16 * 16 + i:02x}" for i in range(16)),
    "q8_0": "003c" + "".join(f"{(i - 16) % 256:02x}" for i in range(32)),
}


def test_a_row_of_integers_gives_the_golden_bytes():
    ramp = torch.arange(16.0) - 8
    for name, row in {"q4_0": torch.cat([ramp, ramp.flip(0)]), "q8_0": torch.arange(32.0) - 16}.items():
        codec = codecs()[name]
        q = codec.quantize(row.unsqueeze(0), codec.spec(), {"scale": torch.ones(1, 1)})
        assert codec.pack(q).numpy().tobytes().hex() == GOLDEN[name]


@by_type
def test_what_is_tuned_is_what_is_stored(codec):
    w, spec = weight(), codec.spec()
    generator = torch.Generator().manual_seed(1)
    for fixed in ({}, codec.search(w, spec, importance())):
        knobs = {
            name: knob.low + (knob.high - knob.low) * torch.rand(knob.shape, generator=generator)
            for name, knob in codec.knobs(spec, tuple(w.shape)).items()
        }
        tuned = codec.tuner(w, spec, fixed)(knobs)
        q = codec.quantize(w, spec, {**fixed, **knobs})
        assert torch.equal(tuned, codec.dequantize(q))
        assert codec.unpack(codec.pack(q), spec, q.shape).equals(q)


@by_type
def test_every_knob_has_a_gradient(codec):
    w, spec = weight(4), codec.spec()
    knobs = {
        name: torch.full(knob.shape, knob.neutral, requires_grad=True)
        for name, knob in codec.knobs(spec, tuple(w.shape)).items()
    }
    fixed = codec.search(w, spec)
    (codec.tuner(w, spec, fixed)(knobs) * torch.randn(4, 512)).sum().backward()
    assert all(bool(knob.grad.abs().sum() > 0) for knob in knobs.values())


@by_type
@pytest.mark.parametrize("weights", [None, importance()], ids=["plain", "weighted"])
def test_a_search_is_better_than_plain_rounding(codec, weights):
    w = weight()
    error = {}
    for name, q in {"plain": codec.quantize(w, codec.spec()), "search": searched(codec, w, weights)}.items():
        squared = (codec.dequantize(q) - w).square()
        error[name] = (squared if weights is None else squared * weights).sum()
    assert error["search"] < 0.96 * error["plain"]


@by_type
def test_the_compiled_search_is_no_worse_than_its_twin_in_torch(codec, monkeypatch):
    w, weights = weight(), importance()
    if blocks.library(blocks.KERNELS) is None:
        pytest.skip("no C compiler")
    compiled = codec.dequantize(searched(codec, w, weights))
    monkeypatch.setattr(blocks, "library", lambda source: None)
    twin = codec.dequantize(searched(codec, w, weights))
    errors = [((found - w).square() * weights).sum() for found in (compiled, twin)]
    assert 0.7 * errors[1] < errors[0] < 1.01 * errors[1]


@by_type
@pytest.mark.parametrize("kind", ["zero", "constant", "positive", "negative", "tiny", "one"])
def test_odd_groups_stay_finite_and_close(codec, kind):
    one = torch.zeros(2, 256)
    one[0, 5] = 0.3
    w = {
        "zero": torch.zeros(2, 256),
        "constant": torch.full((2, 256), 0.3),
        "positive": weight(2, 256).abs(),
        "negative": -weight(2, 256).abs(),
        "tiny": weight(2, 256) * 1e-6,
        "one": one,
    }[kind]
    for q in (codec.quantize(w, codec.spec()), searched(codec, w), searched(codec, w, importance(256))):
        error = (codec.dequantize(q) - w).abs().max()
        assert error <= 0.5 * w.abs().max() + 1e-6


@by_type
def test_a_matrix_larger_than_a_run_of_rows_is_searched_like_its_rows(codec):
    w = weight(160)
    whole = codec.dequantize(searched(codec, w, importance()))
    for i in (0, 127, 159):
        row = codec.dequantize(searched(codec, w[i : i + 1], importance()))[0]
        error, alone = (((x - w[i]).square() * importance()).sum() for x in (whole[i], row))
        torch.testing.assert_close(error, alone, rtol=0.05, atol=0.0)  # sums of another order, other ties


@by_type
def test_meta_tensors_tell_shapes(codec):
    q = codec.quantize(torch.empty(8, 512, device="meta"), codec.spec())
    assert {k: t.dtype for k, t in q.params.items()} == dict(codec.stored)
    assert q.codes.shape == (8 * 512 // codec.group, codec.group)


def test_settings_of_a_block_type_are_fixed_and_rows_must_fit():
    spec = codecs()["q4_k"].spec()
    with pytest.raises(SchemeError, match="q4_k is"):
        fake(weight(), type(spec)(dtype="q4_k", bits=3, group=32, sym=False))
    with pytest.raises(SchemeError, match="no multiple of 256"):
        codec_of(spec).quantize(weight(2, 100), spec)
