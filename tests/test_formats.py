"""Formats: read(write(q)) == q for every format, scheme and shape it accepts; golden bytes."""

import itertools
import json
from dataclasses import replace

import pytest
import torch

from auto_round.codecs.base import codec_of, fake, preset, presets, stored_inputs
from auto_round.core.errors import FormatError
from auto_round.core.plan import Plan
from auto_round.core.quantized import Quantized
from auto_round.core.scheme import Scheme, TensorSpec
from auto_round.formats.base import Provenance, format_named, formats, meta_quantized, parse_formats

SPECS = [
    TensorSpec(bits=bits, group=group, sym=sym)
    for bits, group, sym in itertools.product((2, 3, 4, 5, 6, 8), (32, 48, 128, -1), (True, False))
]
SHAPES = [(32, 96), (96, 256)]
CASES = [
    (name, spec, shape)
    for name, spec, shape in itertools.product(formats(), SPECS, SHAPES)
    if formats()[name].holds_codes and formats()[name].reject(Scheme(weight=spec), shape) is None
]


def quantized(spec, shape, dtype=torch.float32):
    """A random weight and its quantized form."""
    w = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    return w, codec_of(spec).quantize(w, spec)


@pytest.mark.parametrize(("name", "spec", "shape"), CASES, ids=str)
def test_what_is_read_is_what_was_written(name, spec, shape):
    w, q = quantized(spec, shape, torch.bfloat16)
    fmt = format_named(name)
    again = fmt.read(fmt.write(q), spec, shape)
    assert again.equals(q)
    assert torch.equal(codec_of(spec).dequantize(again).to(w.dtype), fake(w, spec))


@pytest.mark.parametrize(("name", "spec", "shape"), [c for c in CASES if c[2] == SHAPES[0]], ids=str)
def test_the_meta_device_tells_what_will_be_written(name, spec, shape):
    fmt = format_named(name)
    real, planned = fmt.write(quantized(spec, shape)[1]), fmt.write(meta_quantized(spec, shape))
    assert {k: (t.dtype, t.shape) for k, t in real.items()} == {
        k: (t.dtype, t.shape) for k, t in planned.items()
    }


def counting(spec):
    """An 8 x 32 matrix with codes 0, 1, 2, ... and simple scales."""
    codes = (torch.arange(256) % (1 << spec.bits)).to(torch.uint8).reshape(8, 32)
    params = {"scale": torch.arange(1, 9).half().reshape(8, 1) / 8}
    if not spec.sym:
        params["zero"] = (torch.arange(8).reshape(8, 1) % (1 << spec.bits)).to(torch.uint8)
    return Quantized(spec=spec, shape=(8, 32), codes=codes, params=params)


def hex_of(tensor):
    """The bytes of a tensor as text."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes().hex()


GOLDEN = {
    ("auto_round:auto_gptq", 4, True): ("10325476" * 8 + "98badcfe" * 8, "77777777"),
    ("auto_round:gptqmodel", 4, False): ("10325476" * 8 + "98badcfe" * 8, "10325476"),
    ("auto_round:auto_gptq", 4, False): ("10325476" * 8 + "98badcfe" * 8, "0f214365"),
    ("auto_round:auto_gptq", 8, True): ("0001020320212223404142436061626380818283", "7f" * 8),
}


@pytest.mark.parametrize("key", GOLDEN, ids=str)
def test_the_first_words_of_a_gptq_layer_are_the_golden_bytes(key):
    name, bits, sym = key
    spec = TensorSpec(bits=bits, group=-1, sym=sym)
    tensors = format_named(name).write(counting(spec))
    codes, zeros = GOLDEN[key]
    assert hex_of(tensors["qweight"]).startswith(codes)
    assert hex_of(tensors["qzeros"]).startswith(zeros)
    assert hex_of(tensors["scales"]) == "0030003400360038003900 3a003b003c".replace(" ", "")


def test_three_bit_codes_straddle_words_as_in_gptq():
    spec = TensorSpec(bits=3, group=-1)
    codes = (torch.arange(32, dtype=torch.uint8) % 8).expand(32, 32).contiguous()
    q = Quantized(spec=spec, shape=(32, 32), codes=codes, params={"scale": torch.ones(32, 1).half()})
    # ten codes, then the low two bits of the eleventh; its high bit opens the next word
    assert (
        hex_of(format_named("auto_round:auto_gptq").write(q)["qweight"][:, 0]) == "88c6fa88c6fa88c6fa88c6fa"
    )


def test_awq_words_hold_columns_in_the_order_0_2_4_6_1_3_5_7():
    spec = TensorSpec(bits=4, group=-1, sym=False)
    q = counting(spec)
    columns = (
        torch.arange(8, dtype=torch.uint8).reshape(8, 1).expand(8, 32).contiguous()
    )  # row r holds code r
    q = Quantized(spec=spec, shape=q.shape, codes=columns, params=q.params)
    tensors = format_named("auto_awq").write(q)
    # nibbles, lowest first: 0 2 4 6 1 3 5 7
    assert hex_of(tensors["qweight"]) == "20643175" * 32
    assert hex_of(tensors["qzeros"]) == "20643175"


def test_gptq_layers_have_a_group_index_and_auto_round_ones_do_not():
    q = quantized(TensorSpec(bits=4, group=32), (32, 96))[1]
    assert format_named("auto_gptq").write(q)["g_idx"].tolist() == [i // 32 for i in range(96)]
    assert set(format_named("auto_round:auto_gptq").write(q)) == {"qweight", "qzeros", "scales"}


def plan_of(base, **layers):
    """A plan of two blocks with q, k and down, some of them with schemes of their own."""
    names = [f"model.layers.{i}.{part}" for i in range(2) for part in ("q_proj", "k_proj", "down_proj")]
    schemes = {name: layers.get(name.rsplit(".", 1)[1], base) for name in names}
    return Plan(schemes, shapes=dict.fromkeys(names, (64, 64)), base=base)


PROVENANCE = Provenance(version="9.9", blocks=("model.layers",), float_layers=("lm_head",))
W4, W8, ASYM4, ASYM2 = (
    Scheme(weight=TensorSpec(bits=b, sym=s)) for b, s in ((4, True), (8, True), (4, False), (2, False))
)


@pytest.mark.parametrize(
    ("base", "layers", "packing"),
    [
        (W4, {}, "auto_round:auto_gptq"),
        (W4, {"k_proj": W8}, "auto_round:auto_gptq"),
        (ASYM4, {}, "auto_round:auto_awq"),
        (ASYM2, {}, "auto_round"),
        (ASYM4, {"k_proj": W8}, "auto_round"),
    ],
    ids=str,
)
def test_auto_round_chooses_the_packing_that_readers_expect(base, layers, packing):
    plan = plan_of(base, **layers)
    config = format_named("auto_round").resolve(plan).config(plan, PROVENANCE)
    assert config["packing_format"] == packing
    assert config["quant_method"] == "auto-round" and config["block_name_to_quantize"] == "model.layers"


def test_extra_config_holds_only_what_departs():
    plan = plan_of(W4, k_proj=W8, down_proj=Scheme(weight=None))
    config = format_named("auto_round:auto_gptq").config(plan, PROVENANCE)
    assert config["extra_config"]["model.layers.0.k_proj"] == {"bits": 8}
    assert config["extra_config"]["model.layers.1.down_proj"] == {"bits": 16, "data_type": "float"}
    assert "model.layers.0.q_proj" not in config["extra_config"]


def test_a_gptq_config_names_mixed_and_float_layers():
    plan = plan_of(W4, k_proj=W8, down_proj=Scheme(weight=None))
    config = format_named("auto_gptq").config(plan, PROVENANCE)
    assert config["dynamic"] == {
        r"+:.*\.k_proj$": {"bits": 8, "group_size": 128, "sym": True},
        r"-:.*\.down_proj$": {},
    }
    assert config["modules_in_block_to_quantize"] == [["k_proj", "q_proj"]]
    assert config["quant_method"] == "gptq" and config["desc_act"] is False and config["lm_head"] is False


def test_an_awq_config_names_what_stays_in_floating_point():
    plan = plan_of(ASYM4, k_proj=Scheme(weight=None))
    config = format_named("auto_awq").config(plan, PROVENANCE)
    assert config["modules_to_not_convert"] == ["lm_head", "model.layers.0.k_proj", "model.layers.1.k_proj"]
    assert config["zero_point"] is True and config["version"] == "gemm"


def test_a_layer_that_a_format_cannot_divide_stays_in_floating_point_with_its_reason():
    plan = Plan({"a": W4, "b": W4}, shapes={"a": (64, 64), "b": (50, 64)}, base=W4)
    checked = format_named("auto_round").check(plan)
    assert checked.quantized() == ["a"]
    assert "50 x 64 is not divisible by 32" in checked.why["b"]


@pytest.mark.parametrize(
    ("name", "spec", "words"),
    [
        ("auto_gptq", TensorSpec(bits=5), "2, 3, 4, 8 bits only, got 5"),
        ("auto_awq", TensorSpec(bits=8), "4 bits only, got 8"),
        ("auto_awq", TensorSpec(bits=4, group=48), "divide the row of 64, got 48"),
        ("auto_gptq", TensorSpec(bits=4, group=0), "group size 0"),
        ("auto_round", TensorSpec(bits=4, scale_dtype="float32"), "float16 scales only"),
        ("mlx", TensorSpec(bits=7), "2, 3, 4, 5, 6, 8 bits only, got 7"),
        ("mlx", TensorSpec(bits=4, group=16), "groups of 32, 64 or 128, got 16"),
        ("mlx", TensorSpec(bits=8, group=32, sym=False, scale_dtype="bfloat16"), "does not survive"),
    ],
    ids=str,
)
def test_a_refusal_names_the_layer_the_value_and_the_remedy(name, spec, words):
    scheme = Scheme(weight=spec)
    plan = Plan({"x.y": scheme}, shapes={"x.y": (64, 64)}, base=scheme)
    with pytest.raises(FormatError) as caught:
        format_named(name).check(plan)
    assert "x.y" in str(caught.value) and words in str(caught.value)


def test_auto_awq_refuses_two_settings_at_once():
    with pytest.raises(FormatError, match="one setting for all"):
        format_named("auto_awq").check(plan_of(ASYM4, k_proj=W4))


def test_format_names_are_checked():
    with pytest.raises(FormatError, match="Did you mean 'auto_gptq'"):
        parse_formats("auto_gtpq")
    with pytest.raises(FormatError, match="twice"):
        parse_formats("auto_awq,auto_awq")
    assert [f.name for f in parse_formats("auto_gptq, auto_awq,auto_round")] == [
        "auto_gptq",
        "auto_awq",
        "auto_round",
    ]


@pytest.mark.parametrize("name", ["auto_gptq", "auto_awq", "auto_round:auto_gptq"])
def test_tensors_of_the_wrong_shape_are_named(name):
    spec, fmt = TensorSpec(bits=4, group=32), format_named(name)
    tensors = fmt.write(quantized(spec, (32, 96))[1])
    tensors["scales"] = tensors["scales"][:1]
    with pytest.raises(FormatError, match="scales has shape"):
        fmt.read(tensors, spec, (32, 96))
    del tensors["scales"]
    with pytest.raises(FormatError, match="scales is missing"):
        fmt.read(tensors, spec, (32, 96))


def bit_stream(row, bits):
    """Codes of one row as bytes, low bits first: written as a plain loop, apart from the code under test."""
    number = sum(int(code) << (bits * k) for k, code in enumerate(row))
    return number.to_bytes(len(row) * bits // 8, "little").hex()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_an_mlx_row_is_a_stream_of_codes_low_bits_first(bits):
    spec = TensorSpec(bits=bits, group=32, sym=False)
    q = counting(spec)
    tensors = format_named("mlx").write(q)
    assert tensors["weight"].dtype == torch.uint32
    assert [hex_of(row) for row in tensors["weight"]] == [bit_stream(row, bits) for row in q.codes]
    assert hex_of(tensors["scales"]) == "00300034003600380039003a003b003c"
    # -scale * zero: 0, -1/4, -3/4, ...
    assert tensors["biases"].flatten().tolist() == [
        -(i + 1) / 8 * (i % (1 << bits)) for i in range(8)
    ]  # exact in float16


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx_arithmetic_gives_our_weight(bits):
    for sym in (True, False):
        spec = TensorSpec(bits=bits, group=32, sym=sym)
        _, q = quantized(spec, (64, 64))
        tensors = format_named("mlx").write(q)
        scale, bias = (tensors[k].float().repeat_interleave(32, 1) for k in ("scales", "biases"))
        theirs = scale * q.codes.reshape(64, 64) + bias
        ours = codec_of(spec).dequantize(q)
        # a symmetric bias is exact; another is rounded once to float16
        assert (theirs - ours).abs().max() <= (1e-8 if sym else bias.abs().max() * 2**-11)


def test_an_mlx_config_gives_every_layer_its_bits_and_the_group_that_is_stored():
    plan = plan_of(W4, k_proj=W8, down_proj=Scheme(weight=None))
    config = format_named("mlx").describe({"rope_parameters": {"rope_theta": 7.0}}, plan, PROVENANCE)
    assert config["quantization"]["model.layers.0.k_proj"] == {"group_size": 64, "bits": 8}  # rows of 64
    assert config["quantization"]["model.layers.1.down_proj"] is False
    assert config["quantization"]["lm_head"] is False
    assert config["quantization"]["mode"] == "affine" and config["rope_theta"] == 7.0
    assert config["quantization_config"] == config["quantization"]
    own = format_named("auto_round:mlx").describe({}, plan, PROVENANCE)
    assert own["quantization_config"]["packing_format"] == "auto_round:mlx"
    assert own["quantization_config"]["extra_config"]["model.layers.0.k_proj"] == {"bits": 8}
    assert own["quantization"] == config["quantization"]


def test_mlx_leaves_rows_without_whole_groups_in_floating_point():
    scheme = Scheme(weight=TensorSpec(bits=4, group=64))
    plan = Plan({"a": scheme, "b": scheme}, shapes={"a": (64, 64), "b": (64, 96)}, base=scheme)
    checked = format_named("mlx").check(plan)
    assert checked.quantized() == ["a"] and "rows of 96 are no whole groups of 64" in checked.why["b"]


def test_an_mlx_bias_that_overflows_is_an_error():
    spec = TensorSpec(bits=8, group=32)
    q = counting(spec)
    big = Quantized(spec=spec, shape=q.shape, codes=q.codes, params={"scale": q.params["scale"] * 1e4})
    with pytest.raises(FormatError, match="bias overflows float16"):
        format_named("mlx").write(big)


# ------------------------------------------------------------------------------------------------- compressed-tensors


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_a_compressed_tensors_row_is_a_stream_of_codes_and_zero_points_run_down_the_rows(bits):
    spec = TensorSpec(bits=bits, group=16, sym=False)
    _, q = quantized(spec, (32, 32))
    tensors = format_named("llm_compressor").write(q)
    codes, zeros = q.codes.reshape(32, 32), q.params["zero"].reshape(32, 2)
    assert tensors["weight_packed"].dtype == tensors["weight_zero_point"].dtype == torch.int32
    assert [hex_of(row) for row in tensors["weight_packed"]] == [bit_stream(row, bits) for row in codes]
    assert [hex_of(c) for c in tensors["weight_zero_point"].t()] == [bit_stream(c, bits) for c in zeros.t()]
    assert tensors["weight_scale"].shape == (32, 2) and tensors["weight_shape"].tolist() == [32, 32]


W8A8 = Scheme(
    weight=TensorSpec(bits=8, group=-1),
    act=TensorSpec(bits=8, group=-1, scale_dtype="float32"),
)


def test_integers_with_quantized_inputs_are_stored_one_per_byte_in_twos_complement():
    plan = plan_of(W8A8)
    fmt = format_named("llm_compressor").resolve(plan)
    q = counting(W8A8.weight)
    tensors = fmt.write(q)
    assert set(tensors) == {"weight", "weight_scale"}
    assert hex_of(tensors["weight"][0, :3]) == "808182" and tensors["weight"].dtype == torch.int8
    assert fmt.read(tensors, W8A8.weight, q.shape).equals(q)
    group = fmt.config(plan, PROVENANCE)["config_groups"]["group_0"]
    assert group["format"] == "int-quantized" and group["weights"]["strategy"] == "channel"
    assert group["input_activations"]["strategy"] == "token" and group["input_activations"]["dynamic"] is True


STORED = {
    "W4A16": (
        "pack-quantized",
        {"weight_packed": "int32 64x32", "weight_scale": "float16 64x2", "weight_shape": "int64 2"},
    ),
    "MXFP4": ("mxfp4-pack-quantized", {"weight_packed": "uint8 64x128", "weight_scale": "uint8 64x8"}),
    "MXFP6": ("mxfp6-pack-quantized", {"weight_packed": "uint8 64x192", "weight_scale": "uint8 64x8"}),
    "MXFP8": ("mxfp8-quantized", {"weight": "float8_e4m3fn 64x256", "weight_scale": "uint8 64x8"}),
    "NVFP4": (
        "nvfp4-pack-quantized",
        {
            "weight_packed": "uint8 64x128",
            "weight_scale": "float8_e4m3fn 64x16",
            "weight_global_scale": "float32 1",
            "input_global_scale": "float32 1",
        },
    ),
    "FPW8A16": ("naive-quantized", {"weight": "float8_e4m3fn 64x256", "weight_scale": "bfloat16 1"}),
    "FP8_STATIC": (
        "float-quantized",
        {"weight": "float8_e4m3fn 64x256", "weight_scale": "bfloat16 64x1", "input_scale": "bfloat16 1"},
    ),
    "FP8_DYNAMIC": ("float-quantized", {"weight": "float8_e4m3fn 64x256", "weight_scale": "bfloat16 64x1"}),
    "FP8_BLOCK": ("float-quantized", {"weight": "float8_e4m3fn 64x256", "weight_scale": "bfloat16 1x2"}),
}


@pytest.mark.parametrize("name", STORED)
def test_compressed_tensors_finds_the_tensors_it_allocates(name):
    scheme, shape = preset(name), (64, 256)
    plan = Plan({"x.y": scheme}, shapes={"x.y": shape}, base=scheme)
    fmt = format_named("llm_compressor").resolve(plan)
    layout, expected = STORED[name]
    written = fmt.write(meta_quantized(scheme.weight, shape, scheme.act))
    assert {
        k: f"{t.dtype} {'x'.join(map(str, t.shape))}".removeprefix("torch.") for k, t in written.items()
    } == expected
    config = fmt.config(plan, PROVENANCE)
    assert config["format"] == layout and config["config_groups"]["group_0"]["format"] == layout
    json.dumps(config)


ACCEPTED = [
    (name, chosen)
    for name, chosen in itertools.product(formats(), presets())
    if formats()[name].holds_codes and formats()[name].reject(preset(chosen), (64, 256)) is None
]


@pytest.mark.parametrize(("name", "chosen"), ACCEPTED)
def test_every_preset_survives_every_format_that_takes_it(name, chosen):
    scheme = preset(chosen)
    if scheme.weight is None:
        return
    plan = Plan({"x.y": scheme}, shapes={"x.y": (64, 256)}, base=scheme)
    fmt = format_named(name).resolve(plan)
    _, q = quantized(scheme.weight, (64, 256))
    q = replace(q, inputs=stored_inputs(scheme.act, torch.tensor(-3.0), torch.tensor(2.0)))
    assert fmt.read(fmt.write(q), scheme.weight, q.shape).equals(q)


def test_layers_that_compressed_tensors_could_not_tell_apart_are_refused():
    plan = plan_of(W8A8, k_proj=Scheme(weight=W8A8.weight))
    with pytest.raises(FormatError, match=r"k_proj.*inputs of all or none"):
        format_named("llm_compressor").resolve(plan)


def test_compressed_tensors_groups_name_the_rare_layers_and_mean_the_others_by_class():
    names = {f"model.layers.0.{part}": W4 for part in ("q_proj", "up_proj")}
    names |= {"model.layers.0.k_proj": W8, "model.layers.0.v_proj": Scheme(weight=None), "lm_head": W4}
    plan = Plan(names, shapes=dict.fromkeys(names, (64, 256)), base=W4)
    written = Provenance(version="9", blocks=("model.layers",), float_tensors=("model.layers.0.gate",))
    config = format_named("llm_compressor").config(plan, written)
    targets = [(g["targets"], g["weights"]["num_bits"]) for g in config["config_groups"].values()]
    assert targets == [(["lm_head"], 4), (["model.layers.0.k_proj"], 8), (["Linear"], 4)]
    assert config["ignore"] == ["model.layers.0.gate", "model.layers.0.v_proj"]
    assert config["format"] == "pack-quantized" and config["quant_method"] == "compressed-tensors"


def test_a_compressed_tensors_group_is_no_larger_than_the_row():
    config = format_named("llm_compressor").config(plan_of(W4), PROVENANCE)  # rows of 64
    assert config["config_groups"]["group_0"]["weights"]["group_size"] == 64


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (Scheme(weight=TensorSpec(bits=4, group=0)), "group size 0"),
        (Scheme(weight=TensorSpec(bits=8, sym=False), act=W8A8.act), "are symmetric"),
        (Scheme(weight=W8A8.weight, act=TensorSpec(bits=8, group=0)), "static scale for the tensor"),
    ],
    ids=str,
)
def test_compressed_tensors_says_what_it_cannot_hold(scheme, words):
    assert words in format_named("llm_compressor").reject(scheme, (64, 128))


def test_fp8_blocks_have_the_names_that_deepseek_gave_them():
    scheme, shape = preset("FP8_BLOCK"), (160, 256)
    plan = Plan(
        {"x.y": scheme, "x.z": Scheme(weight=None)}, shapes=dict.fromkeys(("x.y", "x.z"), shape), base=scheme
    )
    written = format_named("fp8").write(meta_quantized(scheme.weight, shape, scheme.act))
    assert {k: (t.dtype, tuple(t.shape)) for k, t in written.items()} == {
        "weight": (torch.float8_e4m3fn, shape),
        "weight_scale_inv": (torch.bfloat16, (2, 2)),
    }
    config = format_named("fp8").config(plan, PROVENANCE)
    assert config["quant_method"] == "fp8" and config["weight_block_size"] == [128, 128]
    assert config["ignored_layers"] == config["modules_to_not_convert"] == ["lm_head", "x.z"]
    assert "in blocks" in format_named("fp8").reject(preset("FP8_STATIC"), shape)
    with pytest.raises(FormatError, match="one setting for all"):
        other = Scheme(weight=replace(scheme.weight, group=(64, 128)), act=scheme.act)
        format_named("fp8").check(
            Plan({"a": scheme, "b": other}, shapes={"a": shape, "b": shape}, base=scheme)
        )
