"""From the user's words to a plan: schemes, `layer_config`, ignored layers, the head, and what the user is told."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import samples, tiny

from auto_round import AutoRound, QuantizationScheme
from auto_round.codecs.base import preset, presets
from auto_round.core.errors import AutoRoundError, PlanError, SchemeError
from auto_round.core.scheme import FLOAT, Scheme, TensorSpec
from auto_round.core.selection import (
    Selection,
    ignored,
    make_plan,
    matches,
    parse_ignore,
    parse_layer_config,
)
from auto_round.formats.base import parse_formats

PARTS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
NAMES = [f"model.layers.{i}.{part}" for i in (0, 1, 10) for part in PARTS]
SHAPES = {**dict.fromkeys(NAMES, (64, 64)), "lm_head": (128, 64)}
FUSED = [frozenset(f"model.layers.{i}.self_attn.{part}_proj" for part in "qkv") for i in (0, 1, 10)]
W4 = Scheme(weight=TensorSpec(bits=4, group=32))


def plan_of(layer_config=None, ignore=None, base=W4):
    """The plan of a made-up model of three blocks."""
    selection = Selection(
        base=base, layer_config=parse_layer_config(layer_config), ignore_layers=parse_ignore(ignore)
    )
    return make_plan(SHAPES, selection, preset, default=NAMES, fused=FUSED)


def bits_of(plan):
    """Layer -> bits, 16 for floating point."""
    return {name: flat["bits"] for name, flat in plan.flat().items()}


def changed(plan):
    """The layers whose scheme is not the base one."""
    return [name for name in plan if plan[name] != W4]


# ---------------------------------------------------------------------------------------------------- layer_config

SPELLINGS = [
    '{"k_proj": {"bits": 8, "sym": false}}',
    "{k_proj:{bits:8,sym:False}}",
    "{k_proj: {bits: 8, sym: false}}",
    "{'k_proj': {'bits': 8, 'sym': False}}",
    {"k_proj": {"bits": 8, "sym": False}},
]


@pytest.mark.parametrize("text", SPELLINGS, ids=str)
def test_every_spelling_of_a_layer_config_means_the_same(text):
    assert parse_layer_config(text) == {"k_proj": {"bits": 8, "sym": False}}
    assert changed(plan_of(text)) == [name for name in NAMES if name.endswith("k_proj")]


def test_the_guides_example_reads_as_two_layers():
    assert parse_layer_config("{k_proj:{bits:8},v_proj:{bits:8}}") == {
        "k_proj": {"bits": 8},
        "v_proj": {"bits": 8},
    }
    assert parse_layer_config("{lm_head:W8A16,.*mlp.*:{bits:2,group_size:-1}}") == {
        "lm_head": "W8A16",
        ".*mlp.*": {"bits": 2, "group_size": -1},
    }


words = st.text("abcdefghij_.*", min_size=1, max_size=8).filter(lambda word: word.strip(".*"))
values = st.integers(2, 8) | st.booleans() | st.just("int")
configs = st.dictionaries(
    words, st.dictionaries(st.sampled_from(["bits", "sym", "data_type"]), values, min_size=1)
)


@given(configs)
def test_unquoted_text_reads_as_the_json_it_stands_for(config):
    unquoted = json.dumps(config).replace('"', "")
    assert parse_layer_config(unquoted) == config == parse_layer_config(json.dumps(config))


@pytest.mark.parametrize("text", ["{k_proj:{bits:8}", "k_proj", "[1, 2]", "{k_proj bits 8}"])
def test_an_unreadable_layer_config_is_quoted_with_the_right_spelling(text):
    with pytest.raises(PlanError) as caught:
        parse_layer_config(text)
    assert text in str(caught.value) and "{k_proj:{bits:8}}" in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("model.layers.1.mlp.up_proj", 1),
        ("k_proj", 3),
        ("self_attn", 9),
        ("layers.1.", 6),
        ("model.layers.*k_proj", 3),
        ("*.k_proj", 3),
        (".*k_proj", 3),
        (r"layers\.1\..*(k|v)_proj", 2),
        ("^model.layers.0", 6),
        ("k_proj$", 3),
        ("layers.[01].mlp", 6),
        ("no_such_thing", 0),
    ],
)
def test_a_key_means_the_names_it_contains_or_matches(pattern, count):
    assert sum(matches(pattern, name) for name in NAMES) == count
    assert len(changed(plan_of({pattern: {"bits": 8}}))) == count


@pytest.mark.parametrize("key", ["(", "k_proj[", "a{2,1}"])
def test_a_broken_expression_is_an_error_that_quotes_it(key):
    with pytest.raises(PlanError) as caught:
        plan_of({key: {"bits": 8}})
    assert key in str(caught.value) and "regular expression" in str(caught.value)


def test_a_full_name_wins_over_patterns_wherever_it_stands():
    exact = {"model.layers.0.self_attn.k_proj": {"bits": 2}}
    for config in ({**exact, "k_proj": {"bits": 8}}, {"k_proj": {"bits": 8}, **exact}):
        bits = bits_of(plan_of(config))
        assert bits["model.layers.0.self_attn.k_proj"] == 2 and bits["model.layers.1.self_attn.k_proj"] == 8


def test_a_later_pattern_wins_over_an_earlier_one():
    bits = bits_of(plan_of({"self_attn": {"bits": 8}, "k_proj": {"bits": 2}}))
    assert (bits["model.layers.0.self_attn.k_proj"], bits["model.layers.0.self_attn.v_proj"]) == (2, 8)


def test_what_a_setting_leaves_out_comes_from_the_base_scheme():
    plan = plan_of({"k_proj": {"bits": 8}})
    assert plan["model.layers.0.self_attn.k_proj"].weight == TensorSpec(bits=8, group=32)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("W8A16", TensorSpec(bits=8, group=128)),
        ("w2a16g64", TensorSpec(bits=2, group=64)),
        (QuantizationScheme(bits=3, group_size=-1, sym=False), TensorSpec(bits=3, group=-1, sym=False)),
        (Scheme(weight=TensorSpec(bits=5)), TensorSpec(bits=5)),
        ({"scheme": "W8A16"}, TensorSpec(bits=8, group=128)),
        ({"scheme": "W8A16", "group_size": 32}, TensorSpec(bits=8, group=32)),
        ({"bits": 8, "fixed_by_user": True}, TensorSpec(bits=8, group=32)),
        ("BF16", None),
        ({"bits": 16}, None),
        ({"data_type": "float"}, None),
        ({"bits": 4, "act_bits": 16}, TensorSpec(bits=4, group=32)),
    ],
    ids=str,
)
def test_a_layer_may_be_given_a_preset_an_object_or_settings(value, expected):
    assert plan_of({"k_proj": value})["model.layers.0.self_attn.k_proj"].weight == expected


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        ({"bit": 8}, SchemeError, ["'bit'", "Did you mean 'bits'"]),
        ({"bits": "eight"}, SchemeError, ["bits", "eight", "whole number"]),
        ({"group_size": -2}, SchemeError, ["group_size -2", "-1 (one per row)"]),
        ({"sym": "yes"}, SchemeError, ["sym", "'yes'", "true or false"]),
        ("W4A61", SchemeError, ["'W4A61'", "Did you mean 'W4A16'"]),
        ({"group_size": [128, 128, 4]}, SchemeError, ["group_size", "[128, 128, 4]", "[128, 128]"]),
        ({"group_size": [0, 128]}, SchemeError, ["group_size", "[0, 128]", "positive"]),
        ({"act_dynamic": False}, SchemeError, ["act_dynamic=False", "act_bits"]),
        ({"bits": 16, "act_bits": 8}, SchemeError, ["act_bits=8", "bits 16"]),
        ({"data_type": "mx_fp4", "bits": 8}, SchemeError, ["'mx_fp4'", "4 bits", "bits=8"]),
        (8, PlanError, ["'k_proj'", "got 8"]),
    ],
    ids=str,
)
def test_a_wrong_setting_is_an_error_that_names_it(value, error, words):
    with pytest.raises(error) as caught:
        plan_of({"k_proj": value})
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("value", [{"bit": 8}, "W4A61", {"bits": "eight"}, {"act_bits": "eight"}], ids=str)
def test_a_wrong_setting_is_an_error_that_names_the_layer(value):
    with pytest.raises(SchemeError, match="layer_config 'k_proj'"):
        plan_of({"k_proj": value})


def test_a_key_that_matches_nothing_is_noted_with_the_nearest_name():
    (note,) = plan_of({"model.layers.0.self_attn.k_porj": {"bits": 8}}).notes
    assert "'model.layers.0.self_attn.k_porj' matches no layer" in note
    assert "Did you mean 'model.layers.0.self_attn.k_proj'" in note


def test_patterns_leave_the_head_alone_and_its_name_adds_it():
    assert "lm_head" not in plan_of({".*": {"bits": 8}})
    assert plan_of({"lm_head": {"bits": 8}})["lm_head"].weight == TensorSpec(bits=8, group=32)


# --------------------------------------------------------------------------------------------------- ignore_layers


@pytest.mark.parametrize(
    ("entry", "name", "means"),
    [
        ("layers.1", "model.layers.1.mlp.up_proj", True),
        ("layers.1", "model.layers.10.mlp.up_proj", False),
        ("layers.1", "model.layers.21.mlp.up_proj", False),
        ("model.layers.1", "model.layers.1.mlp.up_proj", True),
        ("mlp", "model.layers.1.mlp.up_proj", True),
        ("up_proj", "model.layers.1.mlp.up_proj", True),
        ("lm_head", "model.layers.1.mlp.up_proj", False),
        ("experts.1", "model.layers.1.experts.1", True),
        ("fc1", "model.layers.0.fc1", True),
        ("fc1", "model.layers.0.fc10", False),
    ],
)
def test_an_entry_that_ends_in_a_number_means_that_number_only(entry, name, means):
    assert ignored(entry, name) is means


@pytest.mark.parametrize(
    "text", ["mlp,layers.1", " mlp , layers.1 ", ["mlp", "layers.1"], ("mlp", "layers.1")], ids=str
)
def test_ignored_layers_stay_in_floating_point_with_the_reason(text):
    plan = plan_of(ignore=text)
    assert all(plan[name] == (FLOAT if "mlp" in name or "layers.1." in name else W4) for name in plan)
    assert plan.why["model.layers.0.mlp.up_proj"] == "ignore_layers 'mlp'"
    assert plan.why["model.layers.1.self_attn.q_proj"] == "ignore_layers 'layers.1'"


@pytest.mark.parametrize("nothing", [None, "", [], " , "])
def test_no_ignored_layer_is_none(nothing):
    assert changed(plan_of(ignore=nothing)) == []


def test_ignoring_wins_over_layer_config():
    plan = plan_of({"k_proj": {"bits": 8}}, ignore="layers.0")
    assert plan["model.layers.0.self_attn.k_proj"] == FLOAT
    assert plan["model.layers.1.self_attn.k_proj"].weight.bits == 8
    assert plan.why["model.layers.0.self_attn.k_proj"] == "ignore_layers 'layers.0'"


def test_an_ignored_layer_that_does_not_exist_is_noted_with_the_nearest_name():
    (note,) = plan_of(ignore="model.layers.0.mlp.dwon_proj").notes
    assert "dwon_proj' matches no layer" in note and "Did you mean 'model.layers.0.mlp.down_proj'" in note


# -------------------------------------------------------------------------------------------------- what is reported


def test_every_departure_from_the_base_scheme_has_a_reason():
    plan = plan_of({"k_proj": {"bits": 8}, "lm_head": "W8A16"}, ignore="layers.10")
    assert set(plan.why) >= set(changed(plan))
    assert plan.why["lm_head"] == "layer_config 'lm_head'" and plan.why[NAMES[1]] == "layer_config 'k_proj'"


def test_mixed_fused_sets_are_found():
    plan = plan_of({"layers.0.self_attn.k_proj": {"bits": 8}, "layers.1.self_attn": {"bits": 8}})
    assert plan.mixed_fused_sets() == [tuple(f"model.layers.0.self_attn.{part}_proj" for part in "qkv")]


def test_a_plan_is_never_changed():
    plan = plan_of()
    other = plan.override({NAMES[0]: None}, "a test").noted("a remark")
    assert plan[NAMES[0]] == W4 and plan.notes == () and not plan.why
    assert other[NAMES[0]] == FLOAT and other.notes == ("a remark",)
    with pytest.raises(TypeError):
        plan.why["x"] = "y"
    with pytest.raises(PlanError, match="'no_such_layer' is not in the plan"):
        plan.override({"no_such_layer": None}, "a test")


# -------------------------------------------------------------------------------------------------- through the API


@pytest.fixture(scope="module")
def model():
    """A Llama of two blocks, never changed by planning."""
    return tiny("llama")


def planned(model, **options):
    """The plan that `AutoRound` makes."""
    formats = parse_formats(options.pop("format", "auto_round"))
    return AutoRound(model, dataset=samples(2), **{"group_size": 32, **options}).make_plan(formats)


@pytest.mark.parametrize("name", [n for n in presets() if n[1:2] in "2348"])
def test_every_preset_gives_the_plan_of_its_dict_and_its_object(model, name):
    flat = presets()[name].to_flat()
    plans = [
        AutoRound(model, scheme=scheme).make_plan(parse_formats("auto_round"))
        for scheme in (name, name.lower(), flat, QuantizationScheme(**flat), presets()[name])
    ]
    assert all(dict(plan) == dict(plans[0]) for plan in plans)
    assert {plans[0][layer] for layer in plans[0].quantized()} == {presets()[name]}


@pytest.mark.parametrize(
    ("options", "spec"),
    [
        ({"scheme": "W4A16", "bits": 2}, TensorSpec(bits=2, group=128)),
        ({"scheme": "W2A16G64", "sym": False}, TensorSpec(bits=2, group=64, sym=False)),
        ({"scheme": "W8A16", "group_size": -1}, TensorSpec(bits=8, group=-1)),
        ({"scheme": {"bits": 3}, "group_size": 32}, TensorSpec(bits=3, group=32)),
        (
            {"bits": 4, "group_size": 64, "sym": True, "data_type": "int", "act_bits": 16},
            TensorSpec(group=64),
        ),
    ],
    ids=str,
)
def test_single_settings_go_on_top_of_the_scheme(model, options, spec):
    plan = AutoRound(model, **options).make_plan(parse_formats("auto_round"))
    assert {scheme.weight for scheme in plan.values()} == {spec}


def test_only_blocks_are_quantized_by_default(model):
    assert planned(model).quantized() == [n for n in planned(model) if n.startswith("model.layers.")]


@pytest.mark.parametrize(
    "options", [{"quant_lm_head": True}, {"layer_config": {"lm_head": {"bits": 4}}}], ids=str
)
def test_the_head_is_quantized_when_asked_for(model, options):
    assert planned(model, **options)["lm_head"].weight == TensorSpec(bits=4, group=32)


def test_the_head_can_have_bits_of_its_own(model):
    plan = planned(model, quant_lm_head=True, layer_config={"lm_head": {"bits": 8}})
    assert plan["lm_head"].weight.bits == 8


def test_an_ignored_head_stays_in_floating_point(model):
    assert planned(model, quant_lm_head=True, ignore_layers="lm_head")["lm_head"] == FLOAT


def test_fp_layers_is_another_name_of_ignore_layers(model):
    assert dict(planned(model, fp_layers="mlp")) == dict(planned(model, ignore_layers="mlp"))


def test_mixed_fused_sets_are_noted_before_the_work(model):
    notes = planned(model, layer_config={"k_proj": {"bits": 8}, "up_proj": {"bits": 2}}).notes
    attention, mlp = [note for note in notes if "servers merge these layers" in note]
    words = ("self_attn (2 times)", "q_proj: int4", "k_proj: int8", "v_proj: int4")
    assert all(word in attention for word in words) and "gate_proj: int4" in mlp and "up_proj: int2" in mlp


def test_layers_that_are_all_changed_together_are_not_mixed(model):
    assert not planned(model, layer_config={"self_attn": {"bits": 8}}).notes


def test_a_layer_that_cannot_be_divided_stays_in_floating_point_with_its_reason():
    plan = planned(tiny("llama", intermediate_size=80))
    assert plan["model.layers.0.mlp.down_proj"] == FLOAT
    assert "64 x 80 is not divisible by 32" in plan.why["model.layers.0.mlp.down_proj"]


@pytest.mark.parametrize("blocks", ["model.layers.1", ["model.layers.1"], [["model.layers.1"]]], ids=str)
def test_only_the_named_blocks_are_quantized(model, blocks):
    names = planned(model, to_quant_block_names=blocks).quantized()
    assert names and all(name.startswith("model.layers.1.") for name in names)


def test_a_block_that_does_not_exist_is_an_error_that_lists_the_blocks(model):
    with pytest.raises(PlanError) as caught:
        planned(model, to_quant_block_names="decoder.blocks")
    assert "'decoder.blocks'" in str(caught.value) and "model.layers" in str(caught.value)


def test_ignoring_everything_is_an_error_that_says_why(model):
    with pytest.raises(PlanError, match="ignore_layers 'layers'"):
        planned(model, ignore_layers="layers")


def test_a_scheme_that_leaves_everything_alone_quantizes_what_layer_config_names(model):
    plan = planned(model, scheme="BF16", group_size=None, layer_config={"k_proj": "W4A16"})
    assert plan.quantized() == [f"model.layers.{i}.self_attn.k_proj" for i in range(2)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scheme": "W4A17"}, ["'W4A17'", "Did you mean", "W4A16"]),
        ({"bits": 9}, ["9", "2 to 8"]),
        ({"bits": 1}, ["1", "2 to 8"]),
        ({"data_type": "itn"}, ["'itn'", "Did you mean 'int'"]),
        ({"group_size": "big"}, ["group_size", "'big'", "whole number"]),
        ({"scale_dtype": "fp17"}, ["scale_dtype", "fp17", "fp16"]),
    ],
    ids=str,
)
def test_a_wrong_base_scheme_is_an_error_at_once(model, options, words):
    with pytest.raises(AutoRoundError) as caught:
        AutoRound(model, **options)
    assert all(word in str(caught.value) for word in words), caught.value


def test_the_returned_layer_config_can_be_given_back(model):
    _, layer_config = AutoRound(
        tiny("llama"),
        iters=0,
        disable_opt_rtn=True,
        group_size=32,
        layer_config={"k_proj": {"bits": 8}},
        ignore_layers="mlp",
    ).quantize()
    assert dict(planned(model, layer_config=layer_config)) == dict(
        planned(model, layer_config={"k_proj": {"bits": 8}}, ignore_layers="mlp")
    )


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_that_do_not_exist_are_an_error_that_names_a_layer(model, bits):
    with pytest.raises(SchemeError) as caught:
        planned(model, layer_config={"k_proj": {"bits": bits}})
    assert (
        "k_proj" in str(caught.value) and f"got {bits}" in str(caught.value) and "2 to 8" in str(caught.value)
    )
