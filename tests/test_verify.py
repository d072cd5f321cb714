"""`verify`: thirty-odd faults planted one at a time are all found, and good checkpoints are passed in silence."""

import json
import re
import shutil

import pytest
import torch
from models import samples, tiny
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from auto_round import AutoRound
from auto_round.cli.main import execute
from auto_round.codecs.base import presets
from auto_round.core.errors import ModelError
from auto_round.formats.base import formats
from auto_round.jobs.verify import verify

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
LLAMA = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 8}


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """name, format, options -> the folder of an export, made once."""
    made, home = {}, tmp_path_factory.mktemp("verify")

    def export(name, fmt, **options):
        key = (name, fmt, *map(str, options.items()))
        if key not in made:
            source = home / name
            if not source.exists():
                if name == "moe":
                    config = Qwen3MoeConfig(
                        vocab_size=320, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_experts=4,
                        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                        num_experts_per_tok=2, tie_word_embeddings=False,
                    )  # fmt: skip
                    Qwen3MoeForCausalLM(config).save_pretrained(source)
                else:
                    tiny(name, source, **(LLAMA if name == "llama" else {}))
            out = home / f"out{len(made)}"
            settings = {
                "iters": 0,
                "disable_opt_rtn": True,
                "dataset": samples(2),
                "seqlen": 32,
                "nsamples": 2,
            }
            AutoRound(str(source), **{**settings, **options}).quantize_and_save(out, format=fmt)
            made[key] = out
        return made[key]

    return export


def edit_config(folder, change, *, aside=True):
    """Change config.json in place, and the copy of its quantization_config."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    if aside and (folder / "quantization_config.json").exists():
        (folder / "quantization_config.json").write_text(json.dumps(config["quantization_config"]))


def setting(*path, value):
    """A fault: that entry of the quantization config has another value."""

    def plant(folder):
        def change(config):
            place = config["quantization_config"]
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value

        edit_config(folder, change)

    return plant


def top(key, value):
    """A fault: that entry of config.json has another value."""
    return lambda folder: edit_config(folder, lambda config: config.update({key: value}))


def tensor(name, change):
    """A fault: that tensor is changed, or dropped when `change` gives None."""

    def plant(folder):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        changed = change(tensors.pop(name) if name in tensors else tensors)
        save_file({**tensors, **({} if changed is None else {name: changed.contiguous()})}, path)

    return plant


def first(value):
    """A change: the first entry becomes `value`."""

    def change(t):
        t = t.clone()
        t.view(-1)[0] = value
        return t

    return change


def index(change):
    """A fault in the index of a checkpoint in shards."""

    def plant(folder):
        path = folder / "model.safetensors.index.json"
        text = json.loads(path.read_text())
        change(text)
        path.write_text(json.dumps(text))

    return plant


def other_shard(text):
    shards = sorted(set(text["weight_map"].values()))
    name = next(name for name, shard in text["weight_map"].items() if shard == shards[0])
    text["weight_map"][name] = shards[1]


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def append(key, value):
    """A fault: that list of the quantization config has one entry more."""
    return lambda folder: edit_config(folder, lambda c: c["quantization_config"][key].append(value))


def drop(key, value):
    return lambda folder: edit_config(folder, lambda c: c["quantization_config"][key].remove(value))


ASYM = {"sym": False}
AR, GPTQ, AWQ = ("llama", "auto_round", {}), ("llama", "auto_gptq", {}), ("llama", "auto_awq", ASYM)
CT, MLX = ("llama", "llm_compressor", {}), ("llama", "mlx", {"group_size": 64})
FP8 = ("llama", "llm_compressor", {"scheme": "FP8_STATIC"})
NV = ("llama", "llm_compressor", {"scheme": "NVFP4"})
MX = ("llama", "auto_round", {"scheme": "MXFP4"})
SHARDS = ("llama", "auto_round", {"max_shard_size": "100KB"})
TIED = ("qwen3-tied", "auto_round", {"quant_lm_head": True})
MOE = ("moe", "auto_round", {"group_size": 32})
MIXED = ("llama", "auto_round", {"layer_config": {"k_proj": {"bits": 8}}})
NARROW = ("llama", "auto_round", {"layer_config": {"up_proj": {"group_size": 32}}})

FAULTS = {
    "a shard that the index names is missing": (SHARDS, lambda f: min(f.glob("model-*")).unlink(), "missing"),
    "the index sends a tensor to another shard": (SHARDS, index(other_shard), "should be in"),
    "the index lacks a tensor": (SHARDS, index(lambda t: t["weight_map"].pop(f"{Q}.scales")), "says nothing"),
    "the index states another size": (SHARDS, index(lambda t: t["metadata"].update(total_size=1)), "total_size is 1"),
    "a file of another export lies beside the shards": (
        SHARDS, lambda f: shutil.copy(min(f.glob("model-*")), f / "model.safetensors"), "named nowhere"),
    "the weights are cut off": (AR, cut, "truncated"),
    "config.json is no JSON": (AR, lambda f: (f / "config.json").write_text("{"), "config.json|Expecting"),
    "the two copies of the settings differ": (
        AR, lambda f: edit_config(f, lambda c: c["quantization_config"].update(bits=8), aside=False), "differs from"),
    "an unknown method": (AR, setting("quant_method", value="gbtq"), "'gbtq' is not understood"),
    "the settings say other bits": (AR, setting("bits", value=8), "qweight: shape"),
    "the settings say other groups": (AR, setting("group_size", value=32), "scales: shape"),
    "the settings say symmetric": (GPTQ, tensor(f"{Q}.qzeros", first(0)), "zero points other than 8"),
    "act-order": (GPTQ, tensor(f"{Q}.g_idx", lambda t: t.flip(0) + 1), "act-order"),
    "extra_config names no layer": (AR, setting("extra_config", value={f"{Q}x": {"bits": 8}}), "no such module"),
    "block_name_to_quantize names no block": (
        AR, setting("block_name_to_quantize", value="model.layer"), "leave it in floating point"),
    "a quantized layer is called float": (AR, setting("extra_config", value={Q: {"bits": 16}}), "stored as"),
    "AWQ leaves out the head by a wrong name": (AWQ, append("modules_to_not_convert", "lm_hed"), "lm_hed"),
    "AWQ calls a float matrix quantized": (AWQ, drop("modules_to_not_convert", "lm_head"), "lm_head.qweight: missing"),
    "ignore lacks a float matrix": (CT, drop("ignore", "lm_head"), "lm_head.weight_packed: missing"),
    "ignore names a quantized layer": (CT, append("ignore", Q), "leave it in floating point"),
    "ignore names no layer": (CT, append("ignore", "model.layers.0.self_attn.qq_proj"), "no such module"),
    "targets name no layer": (CT, setting("config_groups", "group_0", "targets", value=[Q + "x"]), "no such module"),
    "MLX is told other bits": (
        MLX, lambda f: edit_config(f, lambda c: c["quantization"][Q].update(bits=8)), "weight: shape"),
    "scales are missing": (AR, tensor(f"{Q}.scales", lambda t: None), "scales: missing"),
    "a norm is missing": (AR, tensor("model.norm.weight", lambda t: None), "model.norm.weight: missing"),
    "a weight is stored twice": (AR, tensor(f"{Q}.weight", lambda t: torch.zeros(128, 128)), "not a tensor of"),
    "a tensor of no module": (AR, tensor("model.layers.0.extra.weight", lambda t: torch.zeros(3)), "no such parameter"),
    "the embedding has other rows": (AR, top("vocab_size", 77), "embed_tokens.weight: shape"),
    "a scale is NaN": (AR, tensor(f"{Q}.scales", first(float("nan"))), "1 values are NaN"),
    "a scale is infinite": (AR, tensor(f"{Q}.scales", first(float("inf"))), "NaN or Inf"),
    "a scale is zero": (AR, tensor(f"{Q}.scales", first(0.0)), "1 scales are zero"),
    "an E8M0 scale is NaN": (MX, tensor(f"{Q}.weight_scale", first(255)), "255, which means NaN"),
    "an FP8 scale is negative": (FP8, tensor(f"{Q}.weight_scale", first(-1.0)), "negative"),
    "an input scale has no dimension": (FP8, tensor(f"{Q}.input_scale", lambda t: t.reshape(())), "one element"),
    "an input scale is missing": (FP8, tensor(f"{Q}.input_scale", lambda t: None), "input_scale: missing"),
    "scales in float32": (AR, tensor(f"{Q}.scales", lambda t: t.float()), "float16 scales only"),
    "FP8 weights stored as bytes": (FP8, tensor(f"{Q}.weight", lambda t: t.view(torch.uint8)), "torch.uint8"),
    "a norm has NaN": (AR, tensor("model.norm.weight", first(float("nan"))), "model.norm.weight: 1 values"),
    "q, k and v differ in bits": (MIXED, lambda f: None, "refuse different settings"),
    "gate and up differ in groups": (NARROW, lambda f: None, "refuse different settings"),
    "merged NVFP4 layers differ in global scale": (
        NV, tensor(f"{Q}.weight_global_scale", first(9.0)), "another weight_global_scale"),
    "a router is quantized": (
        MOE, tensor("model.layers.0.mlp.gate.qweight", lambda t: torch.zeros(8, 4, dtype=torch.int32)), "routers"),
    "a quantized head is tied": (TIED, top("tie_word_embeddings", True), "tie_word_embeddings is true"),
    "a head that is not tied is missing": (AR, tensor("lm_head.weight", lambda t: None), "lm_head.weight: missing"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(make, tmp_path, fault):
    (name, fmt, options), plant, words = FAULTS[fault]
    folder = tmp_path / "planted"
    shutil.copytree(make(name, fmt, **options), folder)
    plant(folder)
    found = [str(finding) for finding in verify(folder)]
    assert any(re.search(words, line) for line in found), found


def test_there_are_enough_faults():
    assert len(FAULTS) >= 30


GOOD = [AR, GPTQ, AWQ, CT, MLX, FP8, NV, MX, SHARDS, TIED, MOE]
GOOD += [("llama", "llm_compressor", ASYM), ("gpt2", "auto_round", {"group_size": 32}), ("llama", "fake", {})]
GOOD += [
    ("llama", "auto_round:mlx", {"group_size": 32}),
    ("qwen3-tied", "llm_compressor", {"group_size": 32}),
]
GOOD += [("llama", "fp8", {"scheme": "FP8_BLOCK"})]
GOOD += [
    ("llama", fmt, {"scheme": scheme})
    for fmt in ("auto_round", "llm_compressor")
    for scheme in ("MXFP8", "FPW8A16", "FP8_BLOCK", "INT8", "NVFP4")
    if formats()[fmt].reject(presets()[scheme], (128, 128)) is None
]


@pytest.mark.parametrize("good", GOOD, ids=lambda good: f"{good[0]}-{good[1]}-{good[2]}")
def test_good_checkpoints_are_passed_in_silence(make, good):
    name, fmt, options = good
    assert verify(make(name, fmt, **options)) == []


def test_parts_under_tensor_parallelism_are_whole_groups(make):
    folder = make(*AR[:2])
    assert verify(folder) == []
    found = [str(f) for f in verify(folder, tp=(2, 16))]
    assert any("down_proj: 128 input features do not divide into 2 parts of whole 128s" in f for f in found)
    assert any("num_attention_heads: 8 do not divide by 16" in f for f in found)
    assert verify(make("llama", "auto_round", group_size=32), tp=(2, 4)) == []


def test_an_export_that_servers_refuse_says_so(make, tmp_path, caplog):
    name, _, options = MIXED
    source = make(*AR[:2]).parent / name
    AutoRound(str(source), iters=0, disable_opt_rtn=True, **options).quantize_and_save(
        tmp_path, format="auto_round"
    )
    assert "refuse different settings" in caplog.text and "[fused]" in caplog.text


def test_the_command_verifies(make, capsys):
    folder = str(make(*AR[:2]))
    assert execute("default", ["verify", folder]) == 0
    assert "nothing found" in capsys.readouterr().out
    assert execute("default", ["verify", folder, "--tp", "2"]) == 1
    assert "whole 128s" in capsys.readouterr().out
    assert execute("default", ["verify", folder, "--tp", "two"]) == 2
    assert execute("default", ["verify", f"{folder}/nowhere"]) == 1


def test_a_folder_that_is_not_there_is_an_error():
    with pytest.raises(ModelError, match="no folder"):
        verify("/nowhere")


def test_a_head_that_fp8_settings_do_not_name_is_float_all_the_same(make, tmp_path):
    shutil.copytree(make("llama", "fp8", scheme="FP8_BLOCK"), tmp_path / "fp8")
    for name in ("modules_to_not_convert", "ignored_layers"):
        setting(name, value=[])(tmp_path / "fp8")
    assert verify(tmp_path / "fp8") == []
