"""Bad input: each gives one clear error that says where, what and what to do, and leaves nothing half-written."""

import errno
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from models import loaded, samples, tiny, tokenizer
from safetensors.torch import load_file, save_file

from auto_round import AutoRound, AutoRoundConfig
from auto_round.core.errors import (
    AutoRoundError,
    DataError,
    FormatError,
    ModelError,
    NotYetError,
    PlanError,
    SchemeError,
)
from auto_round.core.patterns import compiled
from auto_round.formats.reading import described
from auto_round.inference.convert_model import convert_hf_model
from auto_round.models.shards import ShardWriter

RTN = {"iters": 0, "disable_opt_rtn": True, "group_size": 32}
TUNED = {"iters": 2, "nsamples": 4, "seqlen": 32, "batch_size": 2, "group_size": 32}
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A Llama folder with nothing wrong."""
    folder = tmp_path_factory.mktemp("hostile") / "model"
    tiny("llama", folder, num_hidden_layers=1)
    return folder


@pytest.fixture
def model(good, tmp_path):
    """A copy of `good` to damage."""
    return shutil.copytree(good, tmp_path / "model")


@pytest.fixture
def sharded(good, tmp_path):
    """A copy of `good` in several shards."""
    loaded(good).save_pretrained(tmp_path / "model", max_shard_size="50KB")
    return tmp_path / "model"


def refused(error, words, call):
    """`call()` raises exactly `error`, whose message has all of `words`."""
    with pytest.raises(AutoRoundError) as caught:
        call()
    assert type(caught.value) is error, repr(caught.value)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


def quantized(model, out, **options):
    """Quantize `model` into `out`."""
    fmt = options.pop("format", "auto_round")
    return AutoRound(model, **{**RTN, **options}).quantize_and_save(out, format=fmt)


def edit(path, change):
    """Change the JSON file `path`."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def edit_weights(path, change):
    """Change the tensors of the safetensors file `path`."""
    tensors = load_file(path)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata={"format": "pt"})


# ---------------------------------------------------------------------------------------------------- missing models


@pytest.mark.parametrize(
    "name", ["./no_such_model", "/no/such/model", "~/no_such_model", "no_such_model", "a/b/c"]
)
def test_a_folder_that_does_not_exist_is_named(name):
    refused(ModelError, [name, "no such folder", "owner/name"], lambda: AutoRound(name))


def test_a_misspelt_folder_is_answered_with_its_neighbour(good):
    refused(ModelError, ["Did you mean 'model'"], lambda: AutoRound(str(good.parent / "modle")))


def test_a_hub_id_without_network_is_named_with_the_remedy():
    refused(ModelError, ["owner/name", "the hub did not give it", "network"], lambda: AutoRound("owner/name"))


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_model_name_is_answered_with_what_to_pass(name):
    refused(ModelError, ["no model given", "config.json"], lambda: AutoRound(name))


def test_a_file_instead_of_a_folder_is_named(good):
    refused(
        ModelError,
        ["config.json", "is a file", "the folder that holds"],
        lambda: AutoRound(good / "config.json"),
    )


def test_a_folder_without_config_is_named(model):
    (model / "config.json").unlink()
    refused(ModelError, [str(model), "no config.json"], lambda: AutoRound(model))


# ---------------------------------------------------------------------------------------------------- damaged models


@pytest.mark.parametrize("text", ["{", "", "not json", '{"a": 1,}'])
def test_a_config_that_is_no_json_is_named(model, tmp_path, text):
    (model / "config.json").write_text(text)
    refused(ModelError, ["config.json", "not valid JSON"], lambda: quantized(model, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["[]", '"llama"', "3"])
def test_a_config_that_is_no_object_is_named(model, tmp_path, text):
    (model / "config.json").write_text(text)
    refused(ModelError, ["config.json"], lambda: quantized(model, tmp_path / "out"))


@pytest.mark.parametrize("config", [{}, {"model_type": "no_such_type"}, {"model_type": "t5"}], ids=str)
def test_an_architecture_that_is_no_language_model_is_named(model, tmp_path, config):
    (model / "config.json").write_text(json.dumps(config))
    refused(ModelError, [], lambda: quantized(model, tmp_path / "out", disable_model_free=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1], ids=str)
@pytest.mark.parametrize("options", [{}, {"disable_model_free": True}], ids=["streamed", "live"])
def test_a_truncated_weight_file_is_named_with_the_remedy(model, tmp_path, keep, options):
    path = model / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    words = ["model.safetensors", "truncated or damaged", "copy or download it again"]
    refused(ModelError, words, lambda: quantized(model, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_a_folder_without_weights_is_named(model, tmp_path):
    (model / "model.safetensors").unlink()
    refused(ModelError, [str(model)], lambda: quantized(model, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_missing_shard_is_named(sharded, tmp_path):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    words = [shard.name, "missing", "download it again"]
    refused(ModelError, words, lambda: quantized(sharded, tmp_path / "out"))


@pytest.mark.parametrize("elsewhere", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_an_index_that_points_outside_the_folder_is_refused(sharded, tmp_path, elsewhere):
    def change(index):
        index["weight_map"][f"{UP}.weight"] = elsewhere

    edit(sharded / "model.safetensors.index.json", change)
    words = ["model.safetensors.index.json", repr(elsewhere)]
    refused(ModelError, words, lambda: quantized(sharded, tmp_path / "out"))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}'])
def test_a_damaged_index_is_named(sharded, tmp_path, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    refused(ModelError, ["model.safetensors.index.json"], lambda: quantized(sharded, tmp_path / "out"))


@pytest.mark.parametrize("options", [{}, {"disable_model_free": True}], ids=["streamed", "live"])
def test_a_weight_of_another_shape_than_the_config_says_is_named(model, tmp_path, options):
    edit_weights(
        model / "model.safetensors", lambda tensors: tensors.update({f"{UP}.weight": torch.ones(32, 64)})
    )
    words = [f"{UP}.weight", "(32, 64)", "(96, 64)"]
    refused(ModelError, words, lambda: quantized(model, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{}, {"disable_model_free": True}], ids=["streamed", "live"])
def test_a_missing_weight_is_named(model, tmp_path, options):
    edit_weights(model / "model.safetensors", lambda tensors: tensors.pop(f"{UP}.weight"))
    refused(ModelError, [f"{UP}.weight"], lambda: quantized(model, tmp_path / "out", **options))


def test_a_config_of_another_model_is_refused(model, tmp_path):
    tiny("gpt2", tmp_path / "other")
    shutil.copyfile(tmp_path / "other" / "config.json", model / "config.json")
    refused(ModelError, ["missing", "config.json"], lambda: quantized(model, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "options", [RTN, {**RTN, "disable_model_free": True}, TUNED], ids=["streamed", "live", "tuned"]
)
def test_a_weight_that_is_not_finite_names_the_layer(model, tmp_path, bad, options):
    edit_weights(model / "model.safetensors", lambda tensors: tensors[f"{UP}.weight"][3, 5:7].fill_(bad))
    words = [f"{UP}.weight has 2 values that are NaN or Inf", "ignore_layers"]
    refused(ModelError, words, lambda: quantized(model, tmp_path / "out", dataset=samples(4), **options))
    assert left_of(tmp_path / "out") <= {PARTIAL}


def test_a_weight_that_is_not_finite_does_not_matter_where_it_is_ignored(model, tmp_path):
    edit_weights(model / "model.safetensors", lambda tensors: tensors[f"{UP}.weight"].fill_(float("nan")))
    quantized(model, tmp_path / "out", ignore_layers=UP)
    assert load_file(tmp_path / "out" / "model.safetensors")[f"{UP}.weight"].isnan().all()


def test_a_block_whose_output_is_not_finite_is_named(model, tmp_path):
    name = "model.layers.0.input_layernorm.weight"
    edit_weights(model / "model.safetensors", lambda tensors: tensors[name].fill_(float("nan")))
    with pytest.raises(AutoRoundError, match=r"model\.layers\.0: .*not finite"):
        quantized(model, tmp_path / "out", dataset=samples(4), **TUNED)
    assert not (tmp_path / "out").exists()


def test_weights_too_large_for_a_stored_scale_name_the_layer(model, tmp_path):
    edit_weights(model / "model.safetensors", lambda tensors: tensors[f"{UP}.weight"].mul_(1e8))
    refused(
        SchemeError, [UP, "scale", "float16", "ignore_layers"], lambda: quantized(model, tmp_path / "out")
    )
    assert left_of(tmp_path / "out") <= {PARTIAL}


@pytest.mark.parametrize("method", ["gptq", "awq", "auto-round", "fp8"])
def test_a_model_that_only_claims_to_be_quantized_is_refused(model, tmp_path, method):
    def change(config):
        config["quantization_config"] = {"quant_method": method, "bits": 4}

    edit(model / "config.json", change)
    words = ["no quantized tensor", method, "remove that entry"]
    refused(ModelError, words, lambda: quantized(model, tmp_path / "out"))


# -------------------------------------------------------------------------------------------------- wrong settings


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"scheme": "W4A61"}, SchemeError, ["'W4A61'", "Did you mean 'W4A16'"]),
        ({"format": "auto_gtpq"}, FormatError, ["'auto_gtpq'", "Did you mean 'auto_gptq'", "Available"]),
        ({"format": ","}, FormatError, ["no format", "Available"]),
        ({"format": "auto_gptq", "group_size": 0}, FormatError, ["_proj", "group size 0", "-1"]),
        ({"format": "auto_round", "group_size": 0}, FormatError, ["_proj", "group size 0", "-1"]),
        ({"format": "auto_gptq", "bits": 5}, FormatError, ["_proj", "2, 3, 4, 8", "got 5", "fake"]),
        ({"format": "auto_round", "bits": 6}, FormatError, ["_proj", "2, 3, 4, 8", "got 6", "fake"]),
        ({"format": "auto_awq", "bits": 8}, FormatError, ["_proj", "4 bits only", "got 8", "layer_config"]),
        ({"format": "auto_awq", "group_size": 48}, FormatError, ["_proj", "64", "got 48", "group_size"]),
        (
            {"format": "auto_awq", "layer_config": {"k_proj": {"sym": False}}},
            FormatError,
            ["k_proj", "auto_round"],
        ),
        ({"format": "auto_gptq", "layer_config": {"k_proj": {"bits": 5}}}, FormatError, ["k_proj", "got 5"]),
        ({"group_size": -3}, SchemeError, ["group_size -3", "-1 (one per row)"]),
        ({"bits": 9}, SchemeError, ["2 to 8 bits", "got 9"]),
        ({"format": "auto_gptq", "act_bits": 8}, FormatError, ["_proj", "inputs", "act_bits at 16"]),
        ({"act_dynamic": False}, SchemeError, ["act_dynamic=False", "act_bits"]),
        ({"recipe": "bets"}, PlanError, ["'bets'", "Did you mean 'best'"]),
        ({"algorithm": "sign_ruond"}, PlanError, ["'sign_ruond'", "Did you mean 'sign_round'"]),
        ({"algorithm": "svdquant"}, NotYetError, ["'svdquant'", "not there yet"]),
        ({"iters": -1}, PlanError, ["iters", "0 or more", "-1"]),
        ({"batch_size": 0}, PlanError, ["batch_size", "1 or more", "0"]),
        ({"max_shard_size": "5 potatoes"}, PlanError, ["5 potatoes", "5GB"]),
        ({"max_shard_size": "0GB"}, PlanError, ["0GB", "5GB"]),
        ({"device_map": "xpu:0,xpu:1", **TUNED}, PlanError, ["xpu:0", "cannot be used here"]),
        ({"device_map": "no_such_device", **TUNED}, PlanError, ["no_such_device", "cannot be used here"]),
        ({"rotation_config": "spinquart"}, PlanError, ["'spinquart'", "Did you mean 'spinquant'"]),
        ({"model_free": True, "iters": 2}, PlanError, ["model_free", "iters=0"]),
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_is_an_error_before_any_work(good, tmp_path, options, error, words):
    refused(error, words, lambda: quantized(good, tmp_path / "out", **{"dataset": samples(4), **options}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("itres", "iters"), ("grop_size", "group_size"), ("ignore_layer", "ignore_layers"), ("bss", "bs")],
)
def test_an_unknown_keyword_is_a_type_error_with_the_nearest_name(good, key, nearest):
    with pytest.raises(TypeError) as caught:
        AutoRound(good, **{key: 1})
    assert f"unexpected keyword {key!r}" in str(caught.value) and f"Did you mean '{nearest}'" in str(
        caught.value
    )


def test_saving_before_quantizing_is_an_error_that_says_what_to_call(good, tmp_path):
    refused(
        PlanError,
        ["save_quantized", "quantize()"],
        lambda: AutoRound(good, **RTN).save_quantized(tmp_path / "out"),
    )


@pytest.mark.parametrize(
    ("options", "fmt", "words"),
    [({"bits": 5}, "auto_round", ["q_proj", "got 5"]), ({"bits": 8}, "auto_awq", ["q_proj", "4 bits only"])],
    ids=str,
)
def test_saving_in_a_format_that_cannot_hold_the_codes_names_the_layer(options, fmt, words, tmp_path):
    made = AutoRound(tiny("llama", num_hidden_layers=1), **{**RTN, **options})
    made.quantize()
    refused(FormatError, words, lambda: made.save_quantized(tmp_path / "out", format=fmt))
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------- calibration data


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (samples(4, 16), ["none of 4 has 32 tokens", "longest has 16", "seqlen", "concat"]),
        (["A short one.", "Another."], ["none of 2 has 32 tokens", "seqlen"]),
        ([], ["none of 0"]),
        (["", ""], ["none of 2"]),
        ("./no_such_file.json", ["./no_such_file.json", "no such file"]),
        ("./no_such_file.json:num=3", ["./no_such_file.json", "no such file"]),
        (5, ["int", "iterable"]),
        (",", ["names nothing"]),
    ],
    ids=str,
)
def test_data_that_gives_no_sample_is_an_error_that_says_why(good, tmp_path, data, words):
    refused(DataError, words, lambda: quantized(good, tmp_path / "out", dataset=data, **TUNED))
    assert not (tmp_path / "out").exists()


def test_tuning_without_any_sample_is_an_error(good, tmp_path):
    options = {**TUNED, "nsamples": 0, "dataset": samples(4)}
    refused(DataError, ["nsamples=0", "iters=0"], lambda: quantized(good, tmp_path / "out", **options))


def test_tuning_without_network_and_without_data_says_how_to_give_some(good, tmp_path):
    words = ["NeelNanda/pile-10k", "Give a local file", "--dataset self"]
    refused(DataError, words, lambda: quantized(good, tmp_path / "out", **TUNED))
    assert not (tmp_path / "out").exists()


def test_text_without_a_tokenizer_is_an_error_that_says_what_to_pass(tmp_path):
    made = AutoRound(tiny("llama", num_hidden_layers=1), dataset=["some text " * 50], **TUNED)
    refused(
        DataError, ["text", "no tokenizer", "token ids"], lambda: made.quantize_and_save(tmp_path / "out")
    )


def test_token_ids_outside_the_vocabulary_are_named(good, tmp_path):
    data = [torch.full((32,), 100_000)] * 4
    refused(DataError, ["100000", "384"], lambda: quantized(good, tmp_path / "out", dataset=data, **TUNED))


def test_a_file_of_the_wrong_kind_is_named(good, tmp_path):
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    with pytest.raises(AutoRoundError, match=r"data\.parquet.*cannot be read"):
        quantized(good, tmp_path / "out", dataset=str(tmp_path / "data.parquet"), **TUNED)


@pytest.mark.parametrize(
    ("name", "text"), [("a.json", "{"), ("a.jsonl", '{"text": "x"}\n{'), ("a.json", '[{"x": 1, "y": 2}]')]
)
def test_a_damaged_data_file_is_named(good, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    dataset = str(tmp_path / name)
    refused(DataError, [name], lambda: quantized(good, tmp_path / "out", dataset=dataset, **TUNED))


# --------------------------------------------------------------------------------------------------- output folders


def unwritable(words, call):
    """`call()` raises one of our errors, whose message has all of `words`."""
    with pytest.raises(AutoRoundError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), caught.value


def test_an_output_folder_below_a_file_is_named(good, tmp_path):
    (tmp_path / "file").write_text("in the way")
    folder = tmp_path / "file" / "out"
    unwritable([str(folder), "cannot be written"], lambda: quantized(good, folder))
    assert (tmp_path / "file").read_text() == "in the way"


def test_an_output_folder_that_is_a_file_is_named(good, tmp_path):
    (tmp_path / "out").write_text("in the way")
    unwritable([str(tmp_path / "out"), "cannot be written"], lambda: quantized(good, tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "in the way"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_output_folder_is_named(good, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    unwritable(["closed", "cannot be written"], lambda: quantized(good, tmp_path / "closed" / "out"))


PARTIAL = ".auto_round_partial"
"""Where layers that a streamed run has finished wait for resume=True."""


def left_of(folder):
    """What is in `folder` after a run has failed."""
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def full_disk(*_args):
    """What the system says when there is no room."""
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_without_room_is_told_in_bytes_before_any_work(good, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**9, used=10**9, free=1234))
    words = [str(tmp_path / "out"), "1,234 are free", "needs"]
    unwritable(words, lambda: quantized(good, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(
    not hasattr(os, "posix_fallocate"), reason="space is claimed at the start where the system can"
)
def test_a_disk_that_is_full_at_the_start_leaves_nothing(good, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", full_disk)
    unwritable(["out", "No space left"], lambda: quantized(good, tmp_path / "out", format="auto_round,fake"))
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("nth", [1, 5, 20])
def test_a_disk_that_fills_up_midway_leaves_no_checkpoint(good, tmp_path, monkeypatch, nth):
    put, calls = ShardWriter.put, []

    def failing(self, name, tensor):
        calls.append(name)
        full_disk() if len(calls) == nth else put(self, name, tensor)

    monkeypatch.setattr(ShardWriter, "put", failing)
    unwritable(["out", "No space left"], lambda: quantized(good, tmp_path / "out"))
    assert len(calls) >= nth and left_of(tmp_path / "out") <= {PARTIAL}


def test_a_disk_that_fills_up_at_the_side_files_leaves_what_is_finished(good, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "copyfile", full_disk)
    unwritable(["out", "No space left"], lambda: quantized(good, tmp_path / "out"))
    assert left_of(tmp_path / "out") == {PARTIAL}


def test_bytes_that_read_back_differently_are_not_published(good, tmp_path, monkeypatch):
    put = ShardWriter.put
    monkeypatch.setattr(
        ShardWriter, "put", lambda self, name, t: put(self, name, t ^ 1 if "qweight" in name else t)
    )
    with pytest.raises(RuntimeError, match=r"qweight.*reads back differently"):
        quantized(good, tmp_path / "out")
    assert left_of(tmp_path / "out") == {PARTIAL}


@pytest.mark.parametrize("way", ["itself", "dotted", "link"])
def test_the_model_folder_is_refused_as_output(model, tmp_path, way):
    (tmp_path / "link").symlink_to(model, target_is_directory=True)
    out = {"itself": model, "dotted": model / ".." / "model", "link": tmp_path / "link"}[way]
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    refused(FormatError, ["is the model itself", "choose another"], lambda: quantized(model, out))
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_files_of_the_user_in_the_output_folder_stay(good, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.md").write_text("mine")
    with pytest.raises(SchemeError):
        quantized(good, tmp_path / "out", bits=9)
    quantized(good, tmp_path / "out")
    assert (tmp_path / "out" / "notes.md").read_text() == "mine"


# ------------------------------------------------------------------------------------------ damaged checkpoints at load


@pytest.fixture(scope="module")
def packed(good, tmp_path_factory):
    """Quantized folders by format."""
    folder = tmp_path_factory.mktemp("packed")
    quantized(good, folder, sym=False, bits=4, format="auto_round,auto_gptq,auto_awq")
    return folder


@pytest.fixture
def checkpoint(packed, tmp_path):
    """A copy of the quantized `auto_round` folder, to damage."""
    return shutil.copytree(packed / "auto-round", tmp_path / "checkpoint")


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
@pytest.mark.parametrize("fmt", ["auto-round", "auto-gptq", "auto-awq"])
def test_a_missing_tensor_is_named_at_load(packed, tmp_path, fmt, part):
    folder = shutil.copytree(packed / fmt, tmp_path / "checkpoint")
    edit_weights(folder / "model.safetensors", lambda tensors: tensors.pop(f"{UP}.{part}"))
    config = {} if fmt == "auto-round" else {"quantization_config": AutoRoundConfig()}
    refused(FormatError, [f"{UP}.{part}", "missing"], lambda: loaded(folder, **config))


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_a_tensor_of_the_wrong_shape_is_never_loaded(checkpoint, part):
    def change(tensors):
        tensors[f"{UP}.{part}"] = tensors[f"{UP}.{part}"][:, :-1]

    edit_weights(checkpoint / "model.safetensors", change)
    with pytest.raises((FormatError, RuntimeError), match=r"ignore_mismatched_sizes|shape"):
        loaded(checkpoint)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scales_that_are_not_finite_name_the_layer_at_load(checkpoint, bad):
    edit_weights(checkpoint / "model.safetensors", lambda tensors: tensors[f"{UP}.scales"][0, 0].fill_(bad))
    refused(FormatError, [UP, "NaN or Inf"], lambda: loaded(checkpoint))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"packing_format": "auto_round:gptqq"},
            FormatError,
            ["'auto_round:gptqq'", "Did you mean", "Available"],
        ),
        ({"data_type": "no_such_type"}, FormatError, ["q_proj", "no_such_type"]),
        ({"backend": "torhc"}, FormatError, ["'torhc'", "Did you mean 'torch'", "Available"]),
        ({"block_name_to_quantize": "no.such.blocks"}, FormatError, ["block_name_to_quantize", "Llama"]),
        ({"act_bits": 8, "act_dynamic": False}, FormatError, ["act_group_size 0"]),
        ({"extra_config": {UP: {"bits": 9}}}, FormatError, [UP, "got 9"]),
        ({"extra_config": ["q_proj"]}, FormatError, ["extra_config", "q_proj"]),
        ({"extra_config": {".*(": {"bits": 8}}}, FormatError, ["extra_config", "'.*('"]),
        ({"extra_config": {UP: 8}}, FormatError, ["extra_config", UP]),
        ({"extra_config": {UP: {"bits": "eight"}}}, FormatError, [UP, "eight"]),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_read_is_an_error_that_quotes_it(checkpoint, change, error, words):
    edit(checkpoint / "config.json", lambda config: config["quantization_config"].update(change))
    refused(error, words, lambda: loaded(checkpoint, backend=None))


RUNAWAY = [
    "(a+)+$", "(a|a)*b", "(a|ab)*$", "(a?){40}a{40}", "a?" * 40 + "a" * 40, ".*.*.*.*.*x", r"(\w+\s?)*$", "(?=(a+)+$)x",
    "(a{1,30}){1,30}$", "((((a+)+)+)+)+", "(" * 900 + ")" * 900, "a" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("pattern", RUNAWAY, ids=lambda pattern: pattern[:20])
def test_an_expression_that_could_run_forever_is_refused(pattern):
    refused(
        FormatError,
        ["extra_config key", "take forever", "name the layers"],
        lambda: compiled(pattern, "extra_config key"),
    )


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        (
            {"quant_method": "auto-round", "bits": 4, "extra_config": {"(a+)+$": {"bits": 8}}},
            "extra_config key",
        ),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {"-:(a+)+$": {}}},
            "rule of dynamic",
        ),
        ({"quant_method": "compressed-tensors", "ignore": ["re:(a+)+$"]}, "targets or ignore"),
    ],
    ids=lambda value: value if isinstance(value, str) else value["quant_method"],
)
def test_no_reader_of_settings_runs_such_an_expression(checkpoint, settings, where):
    refused(
        FormatError,
        [where, "(a+)+$"],
        lambda: described({"quantization_config": settings}, ["a" * 60 + "!"], ["a" * 60 + "!"]),
    )
    if settings["quant_method"] == "auto-round":
        edit(checkpoint / "config.json", lambda config: config["quantization_config"].update(settings))
        refused(FormatError, [where, "(a+)+$"], lambda: loaded(checkpoint, backend=None))


@pytest.mark.parametrize(
    "pattern",
    [r".*\.(?:0|1[0-3])\..*", "(q|k|v)_proj", "^(?!.*lm_head).*", r".*layers\..*\.mlp\..*_proj.*",
     r"(?:layers|blocks)\.\d+", r"model\.layers\.\d+\.mlp\.experts\.\d+\.(gate|up|down)_proj"],
)  # fmt: skip
def test_expressions_that_programs_write_are_allowed(pattern):
    assert compiled(pattern, "key").pattern == pattern


@pytest.mark.parametrize(
    "change", [{"bits": 9}, {"bits": 0}, {"bits": "four"}, {"group_size": 0}, {"group_size": -7}], ids=str
)
def test_numbers_out_of_range_are_never_loaded(checkpoint, change):
    edit(checkpoint / "config.json", lambda config: config["quantization_config"].update(change))
    with pytest.raises(ValueError, match=r"bits|group_size"):
        loaded(checkpoint)


@pytest.mark.parametrize(
    "change", [{"bits": 8}, {"group_size": 64}, {"extra_config": {UP: {"bits": 2}}}], ids=str
)
def test_a_config_that_contradicts_the_tensors_is_never_loaded(checkpoint, change):
    edit(checkpoint / "config.json", lambda config: config["quantization_config"].update(change))
    with pytest.raises((AutoRoundError, RuntimeError)):
        loaded(checkpoint)


def test_an_act_order_checkpoint_is_refused_by_name(packed, tmp_path):
    folder = shutil.copytree(packed / "auto-gptq", tmp_path / "checkpoint")
    edit_weights(folder / "model.safetensors", lambda t: t.update({f"{UP}.g_idx": t[f"{UP}.g_idx"].flip(0)}))
    refused(FormatError, [UP, "act-order"], lambda: loaded(folder, quantization_config=AutoRoundConfig()))


def test_a_symmetric_layer_with_other_zero_points_is_named(good, tmp_path):
    quantized(good, tmp_path / "out")
    edit_weights(tmp_path / "out" / "model.safetensors", lambda tensors: tensors[f"{UP}.qzeros"].add_(1))
    refused(FormatError, [UP, "zero points other than 8"], lambda: loaded(tmp_path / "out"))


def test_the_tokenizer_of_a_damaged_folder_is_named(model, tmp_path):
    (model / "tokenizer.json").write_text("{")
    made = AutoRound(model, dataset=["some text " * 50], **TUNED)
    refused(ModelError, [str(model), "tokenizer"], lambda: made.quantize_and_save(tmp_path / "out"))
    assert tokenizer() is not None


def test_a_layer_whose_rows_fill_no_words_is_named():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=100, num_hidden_layers=1, num_attention_heads=4, vocab_size=32
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.config.quantization_config = {
        "quant_method": "auto-round",
        "bits": 2,
        "group_size": 32,
        "sym": True,
    }
    with pytest.raises(FormatError, match=r"layers\.0\.mlp\.gate_proj.*100 codes of 2 bits"):
        convert_hf_model(model)
