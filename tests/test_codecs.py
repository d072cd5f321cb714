"""Codecs: what is tuned is what is stored, independent oracles, gradients, hostile numbers."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round.codecs.base import codec_of, codecs, encode, fake, preset, presets
from auto_round.core.errors import SchemeError
from auto_round.core.scheme import TensorSpec

SPECS = [
    TensorSpec(bits=bits, group=group, sym=sym)
    for bits, group, sym in itertools.product(range(2, 9), (32, 128, 40, -1, 0), (True, False))
]
SHAPES = [(48, 96), (1, 256), (32, 100)]


def gaussian(rows, columns, seed=0, dtype=torch.float32):
    """A reproducible random weight."""
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


def slow_fake(w, spec):
    """The definition, one group at a time in Python floats."""
    rows = []
    size = w.shape[1] if spec.group in (-1,) or spec.group > w.shape[1] else spec.group
    for row in w.float().tolist():
        out = []
        for start in range(0, len(row), size):
            out += slow_group(row[start : start + size], spec)
        rows.append(out)
    return torch.tensor(rows)


def half(x):
    """x rounded to float16 and back."""
    return torch.tensor(x, dtype=torch.float32).half().float().item()


def f32(x):
    """x rounded to float32."""
    return torch.tensor(x, dtype=torch.float32).item()


def slow_group(values, spec):
    """One group of the integer codec."""
    low, high, top = min(*values, 0.0), max(*values, 0.0), 2**spec.bits - 1
    if spec.sym:
        middle = 2 ** (spec.bits - 1)
        scale, zero = half(-(low if -low > high else high) / middle), middle
    else:
        scale = half(f32(f32(high - low) / top)) or 2.0**-24
        zero = round(f32(-low / scale))
        if zero < 1:  # a zero point of 0 is not stored: the range is moved down by one step
            low = f32(-high / (top - 1))
            scale = half(f32(f32(high - low) / top)) or 2.0**-24
            zero = max(1, round(f32(-low / scale)))
    codes = [min(max(round(f32(v / scale)) + zero, 0), top) for v in values]
    return [f32(scale * (code - zero)) for code in codes]


@pytest.mark.parametrize("spec", [s for s in SPECS if s.group != 0], ids=str)
def test_the_integer_codec_is_its_definition(spec):
    w = gaussian(4, 96, seed=spec.bits)
    assert torch.equal(fake(w, spec), slow_fake(w, spec))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("kind", ["positive", "negative", "zero", "constant", "mixed"])
def test_zero_points_are_never_zero(bits, kind):
    w = gaussian(4, 64, seed=bits)
    w = {"positive": w.abs(), "negative": -w.abs(), "zero": w * 0, "constant": w * 0 + 0.3, "mixed": w}[kind]
    spec = TensorSpec(bits=bits, group=32, sym=False)
    for knobs in ({}, codec_of(spec).search(w, spec)):
        q = codec_of(spec).quantize(w, spec, knobs)
        assert q.params["zero"].min() >= 1 and q.params["zero"].max() <= 2**bits - 1
    assert torch.equal(fake(w, spec), slow_fake(w, spec))


@pytest.mark.parametrize(("spec", "shape"), list(itertools.product(SPECS, SHAPES)), ids=str)
def test_the_tuner_computes_what_will_be_stored(spec, shape):
    w = gaussian(*shape, seed=3, dtype=torch.bfloat16)
    codec = codec_of(spec)
    generator = torch.Generator().manual_seed(1)
    knobs = {
        name: knob.low + (knob.high - knob.low) * torch.rand(knob.shape, generator=generator)
        for name, knob in codec.knobs(spec, shape).items()
    }
    stored = codec.dequantize(codec.quantize(w, spec, knobs))
    assert torch.equal(codec.tuner(w, spec, {})(knobs), stored)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_neutral_knobs_change_nothing(spec):
    w = gaussian(32, 96)
    codec = codec_of(spec)
    neutral = {name: torch.full(k.shape, k.neutral) for name, k in codec.knobs(spec, (32, 96)).items()}
    assert codec.quantize(w, spec, neutral).equals(codec.quantize(w, spec))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_quantizing_a_quantized_weight_again_with_its_grid_changes_nothing(spec):
    w = gaussian(32, 96)
    codec = codec_of(spec)
    q = codec.quantize(w, spec)
    assert codec.quantize(codec.dequantize(q), spec, q.params).equals(q)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_hand_written_backward_is_that_of_the_straight_through_definition(bits, sym):
    spec, shape = TensorSpec(bits=bits, group=16, sym=sym), (6, 32)
    w = gaussian(*shape, seed=bits)
    codec = codec_of(spec)
    knobs = {n: torch.full(k.shape, k.neutral) for n, k in codec.knobs(spec, shape).items()}
    knobs["round"] += 0.3 * torch.randn(knobs["round"].shape, generator=torch.Generator().manual_seed(5))
    for name in ("low", "high"):
        knobs[name] -= 0.4 * torch.rand(knobs[name].shape, generator=torch.Generator().manual_seed(6))
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    ours = gradients(lambda k: codec.tuner(w, spec, {})(k), knobs, upstream)
    definition = gradients(lambda k: straight_through_fake(w, spec, k), knobs, upstream)
    for name in knobs:
        torch.testing.assert_close(ours[name], definition[name], rtol=1e-4, atol=1e-5)


def gradients(function, knobs, upstream):
    """Gradient of sum(function(knobs) * upstream) in each knob."""
    leaves = {name: value.clone().requires_grad_() for name, value in knobs.items()}
    (function(leaves) * upstream).sum().backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("bits", [2, 4])
def test_the_backward_knows_ranges_that_were_moved_off_zero(bits):
    spec, shape = TensorSpec(bits=bits, group=16, sym=False), (4, 32)
    w = gaussian(*shape, seed=bits).abs()
    codec = codec_of(spec)
    knobs = {n: torch.full(k.shape, k.neutral) * 0.9 for n, k in codec.knobs(spec, shape).items()}
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    ours = gradients(lambda k: codec.tuner(w, spec, {})(k), knobs, upstream)
    definition = gradients(lambda k: straight_through_fake(w, spec, k), knobs, upstream)
    for name in knobs:
        torch.testing.assert_close(ours[name], definition[name], rtol=1e-4, atol=1e-5)


def straight_through_fake(w, spec, knobs):
    """The published definition with plain autograd: every rounding passes gradients through."""

    def through(x, y):
        return x + (y - x).detach()

    g = w.reshape(-1, spec.group)
    low = g.amin(1, keepdim=True).clamp(max=0) * knobs["low"]
    high = g.amax(1, keepdim=True).clamp(min=0) * knobs["high"]
    top, middle = 2**spec.bits - 1, 2 ** (spec.bits - 1)
    if spec.sym:
        scale = -torch.where(-low > high, low, high) / middle
        scale, zero = through(scale, scale.half().float()), float(middle)
    else:
        plain = ((high - low) / top).half().float()
        low = torch.where((-low / plain).round() < 1, -high / (top - 1), low)
        scale = (high - low) / top
        scale = through(scale, scale.half().float())
        zero = through(-low / scale, (-low / scale).round())
    x = g / scale + knobs["round"]
    codes = (through(x, x.round()) + zero).clamp(0, top)
    return ((codes - zero) * scale).reshape(w.shape)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_search_is_never_worse_than_plain_rounding(spec):
    w, importance = gaussian(16, 96, seed=9), torch.rand(96, generator=torch.Generator().manual_seed(2))
    for weights in (None, importance):
        error = {}
        for name, knobs in {"plain": {}, "searched": codec_of(spec).search(w, spec, weights)}.items():
            error[name] = ((fake(w, spec, knobs) - w).square() * (1 if weights is None else weights)).sum()
        assert error["searched"] <= error["plain"] * (1 + 1e-6)


def test_a_search_follows_the_importance():
    spec = TensorSpec(bits=2, group=64)
    w = gaussian(8, 64, seed=4)
    importance = torch.ones(64)
    importance[:4] = 1000.0
    weighted, even = (fake(w, spec, codec_of(spec).search(w, spec, x)) for x in (importance, None))
    assert (weighted - w)[:, :4].square().sum() < 0.5 * (even - w)[:, :4].square().sum()


@pytest.mark.parametrize("spec", [s for s in SPECS if s.group != 0], ids=str)
def test_the_gram_matrix_lowers_the_output_error(spec):
    w = gaussian(16, 100, seed=9)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(400, 100, generator=generator) @ torch.randn(100, 100, generator=generator) + 1
    gram = x.t() @ x
    error = {}
    for name, importance in {"diagonal": gram.diagonal(), "gram": gram}.items():
        difference = fake(w, spec, codec_of(spec).search(w, spec, importance)) - w
        error[name] = ((difference @ gram) * difference).sum()
    assert error["gram"] <= error["diagonal"] * (1 + 1e-5)


@pytest.mark.parametrize("sym", [True, False])
@given(magnitude=st.integers(-2, 4), seed=st.integers(0, 1000))
@settings(max_examples=25)
def test_the_error_is_at_most_one_step_at_every_magnitude(sym, magnitude, seed):
    spec = TensorSpec(bits=4, group=32, sym=sym)
    w = gaussian(4, 64, seed) * 10.0**magnitude
    q = codec_of(spec).quantize(w, spec)
    step = q.params["scale"].float().abs().reshape(4, 2).repeat_interleave(32, 1)
    assert ((fake(w, spec) - w).abs() <= step * 1.01).all()


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("magnitude", [1e-12, 1e-7, 1e-5])
def test_weights_too_small_for_normal_scales_stay_small(spec, magnitude):
    w = gaussian(4, 96) * magnitude
    assert fake(w, spec).abs().max() <= 1.5 * w.abs().max() + 2.0**-23


def test_zero_groups_stay_zero():
    for spec in SPECS:
        assert torch.equal(fake(torch.zeros(32, 96), spec), torch.zeros(32, 96))


def test_the_largest_value_of_a_symmetric_group_is_exact():
    w = torch.tensor([[0.5, -0.25, 0.125, 0.0]])
    assert fake(w, TensorSpec(bits=4, group=-1))[0, 0] == 0.5


@pytest.mark.parametrize("name", sorted(presets()))
def test_every_preset_is_found_in_any_case(name):
    assert preset(name.lower()) == presets()[name]


def test_unknown_names_offer_the_nearest():
    with pytest.raises(SchemeError, match="W4A16"):
        preset("W4A61")
    with pytest.raises(SchemeError, match="2 to 8 bits, got 9"):
        codec_of(TensorSpec(bits=9))


def test_the_cost_counts_scales_and_zero_points():
    sym, asym = TensorSpec(bits=4, group=128), TensorSpec(bits=4, group=128, sym=False)
    assert codecs()["int"].cost(sym, (256, 256)) == 4 + 16 / 128
    assert codecs()["int"].cost(asym, (256, 256)) == 4 + 24 / 128


@pytest.mark.parametrize("spec", [s for s in SPECS if codec_of(s).row_unit(s)], ids=str)
def test_rows_quantized_a_few_at_a_time_get_the_codes_of_the_whole_matrix(spec, monkeypatch):
    w = torch.randn(70, 96, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    codec = codec_of(spec)
    knobs = codec.search(w.float(), spec)
    whole = [codec.quantize(w, spec), codec.quantize(w, spec, knobs)]
    monkeypatch.setattr("auto_round.codecs.base.CHUNK", 16 * 96)
    assert encode(w, spec).equals(whole[0]) and encode(w, spec, knobs).equals(whole[1])
