"""The user guide's chapter on model-free mode: its command lines, with a tiny model in place of the named one."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from models import loaded, logits, tiny
from safetensors.torch import load_file

from auto_round.cli.main import execute

NAMED = "meta-llama/Llama-3.2-1B-Instruct"
ROUTED = r"""
auto_round meta-llama/Llama-3.2-1B-Instruct \
  --scheme W4A16 \
  --iters 0 --disable_opt_rtn \
  --output_dir ./int4-llama
"""
EXPLICIT = r"""
auto_round meta-llama/Llama-3.2-1B-Instruct \
  --model_free \
  --scheme W4A16 \
  --output_dir ./int4-llama
"""
OPTED_OUT = r"""
auto_round meta-llama/Llama-3.2-1B-Instruct \
  --scheme W4A16 \
  --iters 0 --disable_opt_rtn --disable_model_free \
  --output_dir ./int4-llama
"""
LAYERS = r"""
auto_round meta-llama/Llama-3.2-1B-Instruct \
  --model_free \
  --scheme W4A16 \
  --group_size 32 \
  --asym \
  --layer_config "{k_proj:{bits:8},v_proj:{bits:8}}" \
  --ignore_layers "mlp" \
  --output_dir ./int4-llama
"""
MXFP4 = EXPLICIT.replace("W4A16", "MXFP4").replace("int4", "mxfp4")
MXFP8 = MXFP4.replace("MXFP4", "MXFP8").replace("mxfp4", "mxfp8")
WORKS = ["W2A16", "W2A16G32", "W2A16G64", "W4A16", "W4A16_MIXED", "W8A16", "MXFP4", "MXFP8"]
BETTER = ["W3A16", "FPW8A16", "MXINT4", "NVFP4", "FP8_BLOCK"]
"""Schemes for which the guide says that they raise an error; NVFP4 with inputs left alone."""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A Llama whose projections are as wide as a group of 128."""
    folder = tmp_path_factory.mktemp("guide") / "llama"
    tiny("llama", folder, hidden_size=128, intermediate_size=128, num_key_value_heads=4)
    return folder


def typed(command, source, tmp_path, monkeypatch):
    """Run `command` as a shell would in an empty folder; the output folder."""
    monkeypatch.chdir(tmp_path)
    _, *argv = shlex.split(command.replace("\\\n", " ").replace(NAMED, str(source)))
    assert execute("default", argv) == 0
    return Path(argv[-1]).resolve()


def tensors(folder):
    """All tensors of a checkpoint."""
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def about(folder):
    """The quantization settings that a folder states."""
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_three_ways_to_say_plain_rounding_write_the_same_tensors(source, tmp_path, monkeypatch):
    found = []
    for name, command in (("a", ROUTED), ("b", EXPLICIT), ("c", OPTED_OUT)):
        (tmp_path / name).mkdir()
        folder = typed(command, source, tmp_path / name, monkeypatch)
        assert folder.name == "int4-llama" and about(folder)["packing_format"] == "auto_round:auto_gptq"
        found.append(tensors(folder))
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(other[name], found[0][name]) for name in other)


def test_layers_of_their_own_and_ignored_ones(source, tmp_path, monkeypatch):
    folder = typed(LAYERS, source, tmp_path, monkeypatch)
    held = tensors(folder)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        layer = f"model.layers.0.self_attn.{name}"
        bits = 8 if name[0] in "kv" else 4
        assert held[f"{layer}.qweight"].shape[0] * 32 == 128 * bits
        assert held[f"{layer}.scales"].shape[0] == 128 // 32
    assert "model.layers.0.mlp.up_proj.weight" in held and about(folder)["sym"] is False
    assert torch.isfinite(logits(loaded(folder))).all()


@pytest.mark.parametrize("command, kind", [(MXFP4, "mxfp4-pack-quantized"), (MXFP8, "mxfp8-quantized")])
def test_mxfp_goes_to_compressed_tensors(command, kind, source, tmp_path, monkeypatch):
    folder = typed(command, source, tmp_path, monkeypatch)
    assert folder.name == f"{kind[:5]}-llama"
    assert about(folder)["quant_method"] == "compressed-tensors" and kind in json.dumps(about(folder))


@pytest.mark.parametrize(
    "scheme, options",
    [(scheme, "") for scheme in WORKS + BETTER]
    + [(scheme, "--asym") for scheme in WORKS + BETTER if scheme.startswith("W")],
)
def test_every_scheme_of_the_chapter_is_written(scheme, options, source, tmp_path, monkeypatch):
    options += " --act_bits 16" if scheme == "NVFP4" else ""
    command = EXPLICIT.replace("W4A16", scheme).replace("--model_free", f"--model_free {options}")
    held = tensors(typed(command, source, tmp_path, monkeypatch))
    changed = [
        name for name in held if name.startswith("model.layers") and "scale" in name.rpartition(".")[2]
    ]
    assert len({name.rpartition(".")[0] for name in changed}) == 14


def test_static_inputs_are_refused_with_the_reason(source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = [str(source), "--model_free", "--scheme", "FP8_STATIC", "--output_dir", "out"]
    assert execute("default", argv) != 0
    said = " ".join(capsys.readouterr().err.split())
    assert "model_free quantizes from weights alone" in said and "inputs need no calibration" in said
    assert not (tmp_path / "out").exists()
