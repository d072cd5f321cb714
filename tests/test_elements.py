"""Data types of small floats: encodings against ml_dtypes and torch, definitions in plain Python, stored layouts."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from auto_round.codecs.base import codec_of, encode, fake, fake_inputs, presets
from auto_round.codecs.elements import ElementCodec
from auto_round.core import minifloat
from auto_round.core.element_layouts import read_elements, write_elements
from auto_round.core.errors import FormatError, SchemeError
from auto_round.core.groups import merge, split
from auto_round.core.scheme import Scheme, TensorSpec

ELEMENTS = {
    "E2M1": ml_dtypes.float4_e2m1fn,
    "E2M3": ml_dtypes.float6_e2m3fn,
    "E3M2": ml_dtypes.float6_e3m2fn,
    "E4M3": ml_dtypes.float8_e4m3fn,
    "E5M2": ml_dtypes.float8_e5m2,
}
SPECS = {
    f"{name}.{part}": spec
    for name, scheme in presets().items()
    for part, spec in (("weight", scheme.weight), ("act", scheme.act))
    if spec is not None and isinstance(codec_of(spec), ElementCodec)
}
SPECS |= {
    "e5m2": TensorSpec(dtype="fp", bits=8, group=-1, variant="e5m2"),
    "mx e5m2": TensorSpec(dtype="mx_fp", bits=8, group=32, scale_dtype="e8m0", variant="e5m2_rceil"),
    "mx e3m2": TensorSpec(dtype="mx_fp", bits=6, group=32, scale_dtype="e8m0", variant="e3m2"),
    "fp groups": TensorSpec(dtype="fp", bits=8, group=40, scale_dtype="float16"),
    "nv rows": TensorSpec(dtype="nv_fp", bits=4, group=-1, scale_dtype="e4m3"),
}
SPECS = {name: spec for name, spec in SPECS.items() if spec.dynamic}
SHAPES = [(32, 64), (1, 96), (33, 100), (130, 260)]
EVERY = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def gaussian(rows, columns, seed=0):
    """A reproducible random weight."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def codes_of(element):
    """Every code, uint8, and its value; those without a finite value left out."""
    values = torch.tensor(element.values())
    codes = torch.arange(len(values)).to(torch.uint8)
    return codes[values.isfinite()], values[values.isfinite()]


# ---------------------------------------------------------------------------------------------------------- elements


@pytest.mark.parametrize("name", ELEMENTS)
def test_every_code_means_what_ml_dtypes_says(name):
    codes, values = codes_of(getattr(minifloat, name))
    theirs = codes.numpy().view(ELEMENTS[name]).astype(np.float32)
    assert np.array_equal(values.numpy(), theirs) and np.array_equal(
        np.signbit(values.numpy()), np.signbit(theirs)
    )


@pytest.mark.parametrize(("name", "dtype"), [("E4M3", torch.float8_e4m3fn), ("E5M2", torch.float8_e5m2)])
def test_float8_codes_are_those_of_torch(name, dtype):
    element = getattr(minifloat, name)
    stored = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    ours = torch.tensor(element.values())
    assert torch.equal(ours[stored.isfinite()], stored[stored.isfinite()])
    assert not ours[~stored.isfinite()].isfinite().any()


@pytest.mark.parametrize("name", [*ELEMENTS, "UE5M3", "INT4"])
def test_codes_survive_being_decoded_and_encoded(name):
    element = getattr(minifloat, name)
    codes, values = codes_of(element)
    assert torch.equal(element.encode(values), codes) and torch.equal(element.decode(codes), values)
    assert torch.equal(element.near(values), values)
    assert values.max() == element.top and values[values > 0].min() == element.smallest


@pytest.mark.parametrize("name", ELEMENTS)
def test_rounding_is_that_of_ml_dtypes(name):
    element = getattr(minifloat, name)
    _, values = codes_of(element)
    middles = (values[:-1] + values[1:]) / 2  # ties, and just beside them
    spread = torch.randn(5000, generator=torch.Generator().manual_seed(1)).mul(3).exp()
    x = torch.cat([values, middles, middles * 1.0001, middles * 0.9999, spread, -spread])
    x = x[x.abs() <= element.top]
    theirs = x.numpy().astype(ELEMENTS[name]).astype(np.float32)
    assert np.array_equal(element.near(x).numpy(), theirs)


def test_what_is_too_large_becomes_the_largest():
    for name in [*ELEMENTS, "INT4"]:
        element = getattr(minifloat, name)
        assert element.near(torch.tensor([1e30, -1e30])).tolist() == [element.top, -element.top]


def test_unsigned_scales_round_with_the_carry():
    # 1.9999 at E5M3 rounds up into the next binade: mantissa 7 + 1 carries.
    assert minifloat.UE5M3.near(torch.tensor([1.9999, 0.0, -3.0])).tolist() == [2.0, 0.0, 0.0]


def test_e8m0_bytes_are_those_of_ml_dtypes():
    bytes_ = np.arange(255, dtype=np.uint8)
    theirs = torch.from_numpy(bytes_.view(ml_dtypes.float8_e8m0fnu).astype(np.float32))
    ours = minifloat.e8m0_value(torch.from_numpy(bytes_))
    assert torch.equal(ours, theirs)
    assert torch.equal(minifloat.e8m0_byte(theirs), torch.from_numpy(bytes_))


# -------------------------------------------------------------------------------------------------------- definitions


def nearest(x, values):
    """The nearest of `values`, an even code winning a tie; plain Python."""
    return min(range(len(values)), key=lambda code: (abs(values[code] - abs(x)), code % 2))


def slow_mx(group, values, *, up):
    """One MX group: power of two of the largest value, then the nearest element."""
    largest, top = max(abs(x) for x in group), values[-1]
    if largest == 0:
        return [0.0] * len(group)
    exponent = (
        math.ceil(math.log2(largest / top))
        if up
        else math.floor(math.log2(largest)) - math.floor(math.log2(top))
    )
    scale = 2.0**exponent
    return [math.copysign(values[nearest(x / scale, values)] * scale, x) for x in group]


@pytest.mark.parametrize(
    ("name", "element", "up"),
    [
        ("MXFP4", "E2M1", 0),
        ("MXFP4_RCEIL", "E2M1", 1),
        ("MXFP8", "E4M3", 0),
        ("MXFP6", "E2M3", 0),
        ("MXINT4", "INT4", 0),
    ],
)
def test_mx_is_its_definition(name, element, up):
    values = [v for v in getattr(minifloat, element).values() if v >= 0 and math.copysign(1, v) > 0]
    spec = presets()[name].act if up else presets()[name].weight
    w = gaussian(3, 64, seed=4)
    expected = [[x for k in (0, 32) for x in slow_mx(row[k : k + 32], values, up=up)] for row in w.tolist()]
    assert torch.equal(fake(w, spec), torch.tensor(expected))


def test_nvfp4_is_its_definition():
    w, values = gaussian(2, 32, seed=5), [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    total = np.float32(448 * 6) / w.abs().max().numpy()
    expected = torch.zeros_like(w)
    for row in range(2):
        for start in (0, 16):
            group = w[row, start : start + 16].numpy()
            stored = (
                (np.abs(group).max() / np.float32(6) * total)
                .astype(ml_dtypes.float8_e4m3fn)
                .astype(np.float32)
            )
            scale = stored / total
            codes = [nearest(float(x / scale), values) for x in group]
            expected[row, start : start + 16] = torch.tensor(
                [math.copysign(values[c], x) for c, x in zip(codes, group)]
            )
            expected[row, start : start + 16] *= float(scale)
    assert torch.equal(fake(w, presets()["NVFP4"].weight), expected)


@pytest.mark.parametrize(
    ("name", "shape"), [("FP8_STATIC", (5, 64)), ("FPW8A16", (5, 64)), ("FP8_BLOCK", (200, 300))]
)
def test_fp8_is_its_definition(name, shape):
    w, group = gaussian(*shape, seed=6), presets()[name].weight.group
    rows, columns = {-1: (1, shape[1]), 0: shape}.get(group, group)
    expected = torch.zeros_like(w)
    for i in range(0, shape[0], rows):
        for j in range(0, shape[1], columns):
            block = w[i : i + rows, j : j + columns]
            scale = (block.abs().max() / 448).bfloat16().float()
            stored = (block / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            expected[i : i + rows, j : j + columns] = stored.float() * scale
    assert torch.equal(fake(w, presets()[name].weight), expected)


# --------------------------------------------------------------------------------------------------------- properties


@EVERY
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_tuner_computes_what_will_be_stored(spec, shape):
    w, codec = gaussian(*shape, seed=3).bfloat16(), codec_of(spec)
    generator = torch.Generator().manual_seed(1)
    knobs = {
        n: k.low + (k.high - k.low) * torch.rand(k.shape, generator=generator)
        for n, k in codec.knobs(spec, shape).items()
    }
    stored = codec.dequantize(codec.quantize(w, spec, knobs))
    assert torch.equal(codec.tuner(w, spec, {})(knobs), stored)
    assert torch.equal(codec.dequantize(encode(w, spec, knobs)), stored)


@EVERY
def test_neutral_knobs_change_nothing(spec):
    w, codec = gaussian(33, 100), codec_of(spec)
    neutral = {name: torch.full(k.shape, k.neutral) for name, k in codec.knobs(spec, (33, 100)).items()}
    assert codec.quantize(w, spec, neutral).equals(codec.quantize(w, spec))


@EVERY
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantizing_a_quantized_weight_again_with_its_grid_changes_nothing(spec, shape):
    codec = codec_of(spec)
    q = codec.quantize(gaussian(*shape), spec)
    assert codec.quantize(codec.dequantize(q), spec, q.params).equals(q)


@EVERY
@pytest.mark.parametrize("magnitude", [1e-44, 1e-38, 1e-12, 1.0, 1e4, 1e30])
def test_every_magnitude_stays_finite_and_no_search_is_worse(spec, magnitude):
    w, codec = gaussian(16, 64, seed=9) * magnitude, codec_of(spec)
    importance = torch.rand(64, generator=torch.Generator().manual_seed(2))
    if spec.scale_dtype == "float16" and magnitude == 1e30:
        return  # a scale out of float16 stops the job by name: tests/test_hostile.py
    for weights in (None, importance):
        error = {}
        for name, knobs in {"plain": {}, "searched": codec.search(w, spec, weights)}.items():
            out = fake(w, spec, knobs)
            assert out.isfinite().all()
            error[name] = (
                (out / magnitude - w / magnitude).square() * (1 if weights is None else weights)
            ).sum()
        assert error["searched"] <= error["plain"] * (1 + 1e-5)


@EVERY
def test_the_gram_matrix_lowers_the_output_error(spec):
    w, generator = gaussian(16, 100, seed=9), torch.Generator().manual_seed(3)
    x = torch.randn(400, 100, generator=generator) @ torch.randn(100, 100, generator=generator) + 1
    gram, error = x.t() @ x, {}
    for name, importance in {"diagonal": gram.diagonal(), "gram": gram}.items():
        difference = fake(w, spec, codec_of(spec).search(w, spec, importance)) - w
        error[name] = ((difference @ gram) * difference).sum()
    assert error["gram"] <= error["diagonal"] * (1 + 1e-5)


@EVERY
def test_zero_groups_stay_zero_among_others(spec):
    w = gaussian(32, 64)
    w[:, :32] = 0
    assert torch.equal(fake(w, spec)[:, :32], torch.zeros(32, 32))
    assert torch.equal(fake(torch.zeros(32, 64), spec), torch.zeros(32, 64))


@EVERY
def test_the_meta_device_tells_what_will_be_made(spec):
    for shape in SHAPES:
        real, planned = (
            codec_of(spec).quantize(w, spec).tensors()
            for w in (gaussian(*shape), torch.empty(shape, device="meta"))
        )
        assert {k: (t.dtype, t.shape) for k, t in real.items()} == {
            k: (t.dtype, t.shape) for k, t in planned.items()
        }


@EVERY
def test_the_backward_is_that_of_the_straight_through_definition(spec):
    shape, codec = (6, 64), codec_of(spec)
    w = gaussian(*shape, seed=spec.bits)
    generator = torch.Generator().manual_seed(5)
    knobs = {
        n: torch.full(k.shape, k.neutral) + 0.2 * torch.randn(k.shape, generator=generator)
        for n, k in codec.knobs(spec, shape).items()
    }
    upstream = torch.randn(shape, generator=generator)
    leaves = {name: value.clone().requires_grad_() for name, value in knobs.items()}
    (codec.tuner(w, spec, {})(leaves) * upstream).sum().backward()
    expected = {name: value.clone().requires_grad_() for name, value in knobs.items()}
    (straight_through_fake(w, spec, expected) * upstream).sum().backward()
    for name in knobs:
        torch.testing.assert_close(leaves[name].grad, expected[name].grad, rtol=1e-4, atol=1e-6)


def straight_through_fake(w, spec, knobs):
    """Autograd through scale * clamp(w / scale + step * offset), every rounding passed through."""
    codec, groups = codec_of(spec), split(w, spec.group)
    element = codec.element(spec)
    scale = codec.multiplier(codec.grid(groups.abs().amax(1, keepdim=True), spec, knobs))
    x = groups / scale
    wanted = x + element.step(x.detach()) * knobs["round"]  # offsets count in steps at the value itself
    rounded = element.rounded(x.detach(), knobs["round"].detach())
    value = (wanted + (rounded - wanted).detach()).clamp(-element.top, element.top)
    return merge(value * scale, (w.shape[0], w.shape[1]), spec.group)


@EVERY
def test_any_move_can_be_written_as_offsets(spec):
    codec, shape = codec_of(spec), (16, 80)
    if not codec.holds_grid(spec):
        return
    w, moved = gaussian(*shape), gaussian(*shape, seed=7)
    q = codec.quantize(w, spec)
    grid, groups = codec.load(q.params, spec), split(w, spec.group)
    change = split(moved, spec.group) - groups
    knobs = {**codec.store(grid, spec), **codec.offsets(change, spec, grid, groups)}
    wanted = merge(
        codec.snap(groups + codec.change(knobs, spec, grid, groups), spec, grid), shape, spec.group
    )
    assert torch.equal(fake(w, spec, knobs), wanted)
    assert (
        wanted - merge(codec.snap(groups + change, spec, grid), shape, spec.group)
    ).count_nonzero() < 3  # ties
    assert torch.equal(codec.storable(grid["scale"], spec), grid["scale"])


# ------------------------------------------------------------------------------------------------------------- shared


def test_a_fused_set_shares_its_global_scale():
    spec = presets()["NVFP4"].weight
    small, large = gaussian(8, 32), gaussian(8, 32, seed=1) * 10
    shared = codec_of(spec).tie([small, large], spec)
    for w, knobs in zip((small, large), shared):
        q = codec_of(spec).quantize(w, spec, knobs)
        assert q.params["global_scale"] == 448 * 6 / large.abs().max()
        assert ((fake(w, spec, knobs) - w).norm() / w.norm()) < 0.15
    assert codec_of(spec).tie([large, small], spec)[0]["global_scale"][0] == shared[0]["global_scale"][0]


@pytest.mark.parametrize("name", ["MXFP4", "MXFP8", "FP8_STATIC", "NVFP4_E5M3", "INT8"])
def test_other_types_tie_nothing(name):
    spec = presets()[name].weight
    assert codec_of(spec).tie([gaussian(4, 32)], spec) == [{}]


# ------------------------------------------------------------------------------------------------------------- inputs


def test_inputs_are_quantized_per_token_and_gradients_pass():
    act = presets()["INT8"].act
    x = (
        (gaussian(6, 64) * torch.tensor([1.0, 100, 1e-3, 1, 1, 1]).unsqueeze(1))
        .reshape(2, 3, 64)
        .requires_grad_()
    )
    out = fake_inputs(x, act, {})
    assert ((out - x).norm(dim=-1) / x.norm(dim=-1)).max() < 0.01
    out.square().sum().backward()
    assert torch.equal(x.grad, 2 * out.detach())


@pytest.mark.parametrize(("name", "key"), [("FP8_STATIC", "scale"), ("NVFP4", "global_scale")])
def test_a_calibrated_range_is_stored_and_used(name, key):
    act = presets()[name].act
    stored = codec_of(act).input_range(torch.tensor(-3.0), torch.tensor(2.0), act)
    assert set(stored) == {key} and stored[key].shape == (1,)
    assert stored[key].item() == pytest.approx(3 / 448 if key == "scale" else 448 * 6 / 3, rel=4e-3)
    x = gaussian(4, 32) * 20
    assert ((fake_inputs(x, act, stored) - x).norm() / x.norm()) < 0.2


@pytest.mark.parametrize("sym", [True, False])
def test_static_integer_inputs_cover_their_range(sym):
    act = TensorSpec(bits=8, group=0, sym=sym, dynamic=False)
    stored = codec_of(act).input_range(torch.tensor(-1.0), torch.tensor(3.0), act)
    x = torch.linspace(-1, 3, 101).reshape(1, -1)
    assert (fake_inputs(x, act, stored) - x).abs().max() <= stored["scale"].float() * 0.51


def test_input_ranges_survive_zeros():
    for name in ("FP8_STATIC", "NVFP4"):
        act = presets()[name].act
        zero = torch.tensor(0.0)
        assert (
            fake_inputs(torch.zeros(2, 32), act, codec_of(act).input_range(zero, zero, act)).isfinite().all()
        )


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": "mx_fp", "bits": 5, "scale_dtype": "e8m0"}, ["mx_fp", "4", "6", "8", "got 5"]),
        ({"dtype": "mx_fp", "sym": False, "scale_dtype": "e8m0"}, ["symmetric"]),
        ({"dtype": "mx_fp", "group": 0, "scale_dtype": "e8m0"}, ["group_size 32"]),
        ({"dtype": "mx_fp"}, ["powers of two", "float16"]),
        ({"dtype": "mx_int", "scale_dtype": "e8m0", "dynamic": False}, ["act_dynamic"]),
        ({"dtype": "nv_fp", "bits": 8, "scale_dtype": "e4m3"}, ["4 bits"]),
        ({"dtype": "nv_fp", "scale_dtype": "e4m3", "dynamic": False}, ["nv_fp4_with_static_gs"]),
        ({"dtype": "fp", "bits": 4}, ["8 bits"]),
        ({"dtype": "fp", "bits": 8, "variant": "e3m4"}, ["e4m3", "'e3m4'"]),
        ({"dtype": "fp", "bits": 8, "dynamic": False, "group": -1}, ["act_group_size 0"]),
        ({"bits": 8, "dynamic": False, "group": -1}, ["act_group_size 0"]),
        ({"bits": 8, "group": (128, 128)}, ["128 x 128", "fp"]),
    ],
    ids=str,
)
def test_what_a_data_type_cannot_do_is_said(change, words):
    with pytest.raises(SchemeError) as caught:
        codec_of(TensorSpec(**change))
    assert all(word in str(caught.value) for word in words), caught.value


# ------------------------------------------------------------------------------------------------------------- layouts

STORED = [n for n in SPECS if SPECS[n].group in (32, 16, -1, 0, (128, 128))]


@pytest.mark.parametrize("name", STORED)
def test_layouts_give_back_what_they_were_given(name):
    spec = SPECS[name]
    for shape in [(32, 64), (1, 96), (130, 256)]:
        q = codec_of(spec).quantize(gaussian(*shape), spec)
        assert read_elements(write_elements(q), spec, shape).equals(q)


def hex_of(tensor):
    """The bytes of a tensor as text."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes().hex()


def test_mxfp4_bytes_are_golden():
    w = (
        torch.tensor(
            [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0, 0.0] * 2
        )
        / 8
    )
    tensors = write_elements(
        codec_of(presets()["MXFP4"].weight).quantize(w.reshape(1, 32), presets()["MXFP4"].weight)
    )
    assert hex_of(tensors["weight_packed"]) == "1032547" + "6a9cbed0f" + "1032547" + "6a9cbed0f"
    assert tensors["weight_scale"].tolist() == [[127 - 3]]


def test_mxint4_nibbles_are_sign_and_magnitude():
    w = torch.tensor([1.75, -0.25, 0.5, -1.75] * 8).reshape(1, 32)
    tensors = write_elements(codec_of(presets()["MXINT4"].weight).quantize(w, presets()["MXINT4"].weight))
    assert hex_of(tensors["weight_packed"]) == "97f2" * 8 and tensors["weight_scale"].tolist() == [[127]]


def test_mxfp6_bytes_are_a_stream_of_six_bits():
    w = torch.tensor([7.5, 0.125, -7.5, 1.0] * 8).reshape(1, 32)
    tensors = write_elements(codec_of(presets()["MXFP6"].weight).quantize(w, presets()["MXFP6"].weight))
    # codes 31, 1, 63, 8: bits 011111 000001 111111 001000, least significant first
    assert hex_of(tensors["weight_packed"]) == "5ff023" * 8


def test_nvfp4_bytes_are_golden():
    w = torch.tensor([6.0, -3.0, 0.5, 0.0] * 4 + [3.0, -1.5, 0.25, 0.0] * 4).reshape(1, 32)
    tensors = write_elements(codec_of(presets()["NVFP4"].weight).quantize(w, presets()["NVFP4"].weight))
    assert hex_of(tensors["weight_packed"]) == "d701" * 8
    assert hex_of(tensors["weight_scale"]) == "7e76"  # 448, 224 in E4M3
    assert tensors["weight_global_scale"].tolist() == [448.0]


def test_fp8_bytes_are_golden():
    w = torch.tensor([[448.0, -1.0], [0.5, 0.0]])
    tensors = write_elements(codec_of(presets()["FPW8A16"].weight).quantize(w, presets()["FPW8A16"].weight))
    assert hex_of(tensors["weight"]) == "7eb83000" and tensors["weight_scale"].tolist() == [[1.0]]


def test_a_missing_or_short_tensor_is_named():
    spec = presets()["NVFP4"].weight
    tensors = write_elements(codec_of(spec).quantize(gaussian(8, 32), spec))
    for name in tensors:
        with pytest.raises(FormatError, match=name):
            read_elements({k: v for k, v in tensors.items() if k != name}, spec, (8, 32))
    with pytest.raises(FormatError, match="weight_packed"):
        read_elements({**tensors, "weight_packed": tensors["weight_packed"][:4]}, spec, (8, 32))


def test_presets_are_what_the_flat_names_say():
    for name, scheme in presets().items():
        if scheme.weight is not None and isinstance(codec_of(scheme.weight), ElementCodec):
            assert Scheme.from_flat(scheme.to_flat()) == scheme, name
