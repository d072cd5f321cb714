"""Words and numbers from outside: environment, sizes, schemes, options. What is wrong is named, with the remedy."""

import re
from pathlib import Path

import pytest

from auto_round import AutoRound
from auto_round.core.errors import NotYetError, PlanError, SchemeError, nearest
from auto_round.core.scheme import FLAT_NAMES, FLOAT, QuantizationScheme, Scheme, TensorSpec
from auto_round.core.settings import settings
from auto_round.core.spelling import scale_dtype_of, spelled
from auto_round.models.shards import parse_size
from auto_round.options import AT_LEAST, LATER, Options
from auto_round.recipes import PLANNED, RECIPES, SCHEDULES, algorithm_named, recipe_named, schedule_named


@pytest.fixture
def environment(monkeypatch):
    """A function that sets variables, in an environment that has none of ours."""
    for name in ("AR_LOG_LEVEL", "AR_USE_MODELSCOPE", "AR_CACHE_WEIGHTS_SHARE", "AR_KERNEL_CACHE", "CXX"):
        monkeypatch.delenv(name, raising=False)
    return lambda **variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


def test_an_empty_environment_has_defaults(environment):
    found = settings()
    assert (found.log_level, found.use_modelscope, found.cache_weights_share) == ("INFO", False, 0.25)
    assert found.kernel_cache == Path("~/.cache/auto_round").expanduser()


def test_the_environment_is_read_anew_each_time(environment):
    environment(AR_LOG_LEVEL="debug", AR_CACHE_WEIGHTS_SHARE="1")
    assert (settings().log_level, settings().cache_weights_share) == ("DEBUG", 1.0)
    environment(AR_LOG_LEVEL="ERROR")
    assert settings().log_level == "ERROR"


@pytest.mark.parametrize(
    ("word", "on"), [("1", True), ("true", True), ("YES", True), ("0", False), ("no", False)]
)
def test_a_switch_that_is_set_to_no_is_off(environment, word, on):
    environment(AR_USE_MODELSCOPE=word)
    assert settings().use_modelscope is on


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("AR_LOG_LEVEL", "chatty", "INFO"),
        ("AR_CACHE_WEIGHTS_SHARE", "a quarter", "from 0 to 1"),
        ("AR_CACHE_WEIGHTS_SHARE", "25", "from 0 to 1"),
        ("AR_CACHE_WEIGHTS_SHARE", "nan", "from 0 to 1"),
    ],
)
def test_a_variable_that_means_nothing_is_named_with_what_it_may_be(environment, name, value, remedy):
    environment(**{name: value})
    with pytest.raises(PlanError, match=f"(?i){name}='{value}'.*{remedy}"):
        settings()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("500 MB", 500 * 10**6),
        ("1.5kb", 1500),
        ("2TB", 2 * 10**12),
        ("1GiB", 2**30),
        ("512 MiB", 2**29),
        ("100", 100),
        ("7B", 7),
        (12345, 12345),
    ],
)
def test_sizes_are_decimal_unless_they_say_i(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 pounds", "-1GB", "0", "1e9", "5GBB", "five"])
def test_a_size_that_is_none_is_quoted_with_its_option(text):
    with pytest.raises(PlanError, match=f"max_ram '{re.escape(text)}' is not understood; write 5GB"):
        parse_size(text, "max_ram")


@pytest.mark.parametrize("option", ["max_ram", "max_vram"])
def test_a_wrong_limit_is_named_as_the_limit_it_is(option, tmp_path):
    from models import samples, tiny

    job = {"iters": 1, "dataset": samples(2, 8), "seqlen": 8, "nsamples": 2, option: "lots"}
    with pytest.raises(PlanError, match=f"{option} 'lots'"):
        AutoRound(tiny("llama"), **job).quantize_and_save(tmp_path / "out")


# Spellings


@pytest.mark.parametrize(
    ("text", "bits", "variant"),
    [
        ("mx_fp6_e4m3", 6, "e4m3"),
        ("mx_fp8e2m1", 8, "e2m1"),
        ("mx_fp4_e2m3", 4, "e2m3"),
        ("fp8_e2m1", 8, "e2m1"),
    ],
)
def test_an_element_of_other_bits_is_not_taken_for_the_usual_one(text, bits, variant):
    word = spelled(text)
    assert (word.bits, word.variant) == (bits, variant)
    with pytest.raises(SchemeError, match=variant):
        AutoRound("nowhere-at-all", data_type=text, bits=bits, group_size=32)


@pytest.mark.parametrize(("text", "bits"), [("mx_fp_e2m1", 4), ("mx_fp_e2m3", 6), ("fp_e4m3", 8)])
def test_an_element_alone_says_its_bits(text, bits):
    word = spelled(text)
    assert (word.bits, word.variant) == (bits, "")


@pytest.mark.parametrize("dtype", ["int", "fp", "mx_fp", "mx_int", "nv_fp"])
def test_scales_found_at_run_time_are_rounded_only_where_the_type_says_so(dtype):
    stored, at_run_time = scale_dtype_of(dtype), scale_dtype_of(dtype, run_time=True)
    assert at_run_time == ("float32" if stored in ("float16", "bfloat16") else stored)


# Schemes


@pytest.mark.parametrize(
    ("flat", "words"),
    [
        ({"bitz": 4}, "'bitz'.*Did you mean 'bits'"),
        ({"bits": "four"}, "bits must be a whole number, got 'four'"),
        ({"bits": 4.5}, "bits must be a whole number, got 4.5"),
        ({"bits": True}, "bits must be a whole number, got True"),
        ({"bits": "²"}, "bits must be a whole number, got '²'"),
        ({"sym": "no"}, "sym must be true or false, got 'no'"),
        ({"act_dynamic": 1}, "act_dynamic must be true or false, got 1"),
        ({"group_size": -2}, "group_size -2 is not possible"),
        ({"group_size": [128, 0]}, "group_size .* has two positive sides"),
        ({"group_size": [1, 2, 3]}, "group_size .* has two positive sides"),
        ({"scale_dtype": "fp8"}, "scale_dtype 'fp8' is unknown. Known: fp16"),
        ({"data_type": "mx_fp4", "bits": 8}, "'mx_fp4' has 4 bits, but bits=8"),
        ({"bits": 16, "act_bits": 8}, "act_bits=8 with bits 16"),
        ({"act_group_size": 32}, "act_group_size=32, but inputs are not quantized"),
        ({"act_sym": False, "act_dynamic": False}, "act_sym=False, act_dynamic=False, but inputs"),
    ],
)
def test_a_wrong_setting_of_a_scheme_says_what_was_given(flat, words):
    with pytest.raises(SchemeError, match=words):
        Scheme.from_flat(flat)


@pytest.mark.parametrize("name", ["super_bits", "super_group_size"])
def test_settings_of_later_work_are_told_from_unknown_ones(name):
    assert name in FLAT_NAMES
    with pytest.raises(NotYetError, match=f"{name}=8"):
        Scheme.from_flat({name: 8})


def test_what_is_given_as_none_is_not_said():
    base = Scheme.from_flat({"bits": 3, "group_size": 64})
    assert Scheme.from_flat(dict.fromkeys(FLAT_NAMES), base) == base


@pytest.mark.parametrize("group", [128, "128", [128], ("128",)])
def test_a_group_size_may_be_text_or_a_list_of_one(group):
    assert Scheme.from_flat({"group_size": group}).weight.group == 128


@pytest.mark.parametrize("group", ["128,64", "128, 64", "128x64", [128, 64], ("128", "64")])
def test_a_block_has_many_spellings(group):
    assert Scheme.from_flat({"group_size": group}).weight.group == (128, 64)


def test_the_given_scale_dtype_wins_over_that_of_the_data_type():
    spec = Scheme.from_flat({"data_type": "fp8", "scale_dtype": "torch.float32", "group_size": -1}).weight
    assert (spec.dtype, spec.bits, spec.scale_dtype) == ("fp", 8, "float32")


def test_float_bits_make_every_other_setting_idle():
    assert Scheme.from_flat({"bits": 16, "group_size": 32, "sym": False}) == FLOAT
    assert Scheme.from_flat({"data_type": "float"}) == FLOAT
    assert FLOAT.to_flat() == {"bits": 16, "data_type": "float"} and str(FLOAT) == "float"


def test_a_scheme_is_described_in_one_line():
    spec = TensorSpec(dtype="fp", bits=8, group=(128, 64), variant="e5m2", dynamic=False)
    assert str(spec) == "fp8 g128x64 sym e5m2 static"
    assert str(Scheme(weight=TensorSpec(sym=False), act=spec)) == f"int4 g128 asym, inputs {spec}"


def test_the_public_scheme_is_a_mapping_of_its_fields():
    public = QuantizationScheme(bits=2, group_size=64)
    assert public["bits"] == public.get("bits") == 2
    assert {key: public[key] for key in public.keys()}["group_size"] == 64  # noqa: SIM118 - it is no dict
    assert public.get("nothing", "else") == "else"
    assert QuantizationScheme.from_dict({"bits": 2, "group_size": 64}) == public
    with pytest.raises(SchemeError, match=r"'bist' is no setting of a scheme. Did you mean 'bits'"):
        QuantizationScheme.from_dict({"bist": 2})


# Options and recipes


@pytest.mark.parametrize("name", AT_LEAST)
def test_numbers_below_their_least_are_refused_by_name(name):
    least = AT_LEAST[name]
    Options.of({name: least})
    for wrong in (least - 1, True):
        with pytest.raises(PlanError, match=f"{name} must be {least} or more, got {wrong}"):
            Options.of({name: wrong})


@pytest.mark.parametrize("name", LATER)
def test_options_of_later_work_may_be_passed_as_long_as_they_ask_for_nothing(name):
    default = getattr(Options(), name)
    Options.of({name: default})
    Options.of({name: None})
    with pytest.raises(NotYetError, match=name):
        Options.of({name: 2})


@pytest.mark.parametrize(
    ("keyword", "near"), [("itres", "iters"), ("groupsize", "group_size"), ("nsampels", "nsample")]
)
def test_an_unknown_keyword_is_answered_with_the_nearest(keyword, near):
    with pytest.raises(TypeError, match=f"'{keyword}'.*Did you mean '{near}"):
        Options.of({keyword: 1})


@pytest.mark.parametrize("percentile", [49.9, 100.1, -1])
def test_a_percentile_outside_its_range_is_refused(percentile):
    with pytest.raises(PlanError, match=f"act_percentile must be 50 to 100, got {percentile}"):
        Options.of({"act_percentile": percentile})


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_starts_at_one_and_never_rises(name):
    factors = [SCHEDULES[name](done / 100) for done in range(101)]
    assert factors[0] == 1 and factors == sorted(factors, reverse=True) and factors[-1] >= 0


def test_a_schedule_may_be_a_function_and_is_linear_by_default():
    assert schedule_named(abs) is abs
    assert schedule_named(None) is SCHEDULES["linear"]
    with pytest.raises(PlanError, match=r"lr_scheduler 'cosin' is unknown. Did you mean 'cosine'"):
        schedule_named("cosin")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_found_in_any_case_and_with_either_mark(name):
    assert recipe_named(name.upper().replace("_", "-")) is RECIPES[name]


def test_unknown_recipes_and_algorithms_are_answered_with_the_nearest():
    with pytest.raises(PlanError, match=r"recipe 'lite' is unknown. Did you mean 'light'"):
        recipe_named("lite")
    with pytest.raises(PlanError, match=r"algorithm 'signround2' is unknown. Did you mean 'signround'"):
        algorithm_named("signround2")
    for name in PLANNED:
        with pytest.raises(NotYetError, match=f"algorithm '{name.upper()}' is not there yet"):
            algorithm_named(name.upper())


@pytest.mark.parametrize("recipe", ["default", "best", "light"])
def test_what_is_said_wins_over_the_recipe_and_zero_is_something_said(recipe):
    numbers = Options.of({"recipe": recipe, "nsamples": 0, "iters": 0}).numbers()
    assert (numbers.nsamples, numbers.iters) == (0, 0)
    assert numbers.seqlen == RECIPES[recipe].seqlen


def test_the_nearest_word_ignores_case_and_stays_silent_when_nothing_is_near():
    assert nearest("w4a61", ["W4A16", "W8A16"]) == " Did you mean 'W4A16'?"
    assert nearest("w4a61", ["W4A16", "W8A16"], count=2).count("'") == 4
    assert nearest("zebra", ["W4A16"]) == ""
