"""Channels that may be scaled are found by running blocks, and AWQ scales them where that helps rounding."""

import re
from pathlib import Path

import pytest
import torch
from models import loaded, logits, samples, tiny, tokens

from auto_round import AutoRound, AWQConfig, SignRoundConfig
from auto_round.core.errors import PlanError
from auto_round.models.anatomy import anatomy
from auto_round.models.checkpoint import Checkpoint
from auto_round.options import Options
from auto_round.planning import settled
from auto_round.sources.base import Needs
from auto_round.sources.blocks import LiveSource
from auto_round.sources.channels import Scaler
from auto_round.sources.dataset import Calibration
from auto_round.sources.live_block import Execution

FOUND = {
    "llama": ["input_layernorm>q k v", "post_attention_layernorm>gate up", "up>down"],
    "gemma2": ["input_layernorm+1>q k v", "pre_feedforward_layernorm+1>gate up", "up>down"],
    "opt": ["self_attn_layer_norm>k v q", "v>out", "final_layer_norm>fc1", "fc1>fc2"],
    "gpt2": ["ln_1>c_attn", "ln_2>c_fc"],
    "gpt-neox": ["input_layernorm>query_key_value", "post_attention_layernorm>dense_h_to_4h"],
    "phi": ["input_layernorm>q k v fc1"],
    "mixtral": ["input_layernorm>q k v"],  # the router reads the other norm, and is not quantized
    "deepseek-v2": [
        "input_layernorm>q_a kv_a",
        "q_a_layernorm>q_b",
        "kv_a_layernorm>kv_b",
        "post_attention_layernorm>gate up",
        "up>down",
    ],
}
QUICK = {"group_size": 32, "nsamples": 8, "seqlen": 16, "batch_size": 4, "amp": False}


def short(name):
    """The last part, without words that all layers have."""
    return re.sub(r"_proj.*$", "", name.rpartition(".")[2])


def said(channels):
    """Maker and readers as one word."""
    plus = f"+{channels.plus:g}" if channels.plus else ""
    return f"{short(channels.maker)}{plus}>{' '.join(map(short, channels.readers))}"


def first_block(model):
    """The first block of `model` with its inputs, and its layers' statistics gathered."""
    body = anatomy(model)
    source = LiveSource(model, body, Execution(device=torch.device("cpu"), batch_size=2), DATA)
    return next(source.blocks(Needs.STATISTICS, body.in_blocks()))


DATA = Calibration(tokens(4, 16), None)


@pytest.mark.parametrize("kind", FOUND)
def test_channels_are_found_in_every_kind_of_block_and_scaling_them_changes_nothing(kind):
    block = first_block(tiny(kind))
    before, found = block.run([0, 1]), []
    grams = {name: block.importance(name) for name in block.weights}
    for channels in block.channels():
        found.append(said(channels))
        weights = {name: block.weights[name].clone() for name in channels.readers}
        factors = torch.exp(torch.randn(channels.width, generator=torch.Generator().manual_seed(1)))
        block.scale_channels(channels, factors)
        for name in channels.readers:
            torch.testing.assert_close(block.weights[name], weights[name] * factors, rtol=1e-4, atol=1e-6)
    assert sorted(found) == sorted(FOUND[kind])
    torch.testing.assert_close(block.run([0, 1]), before, rtol=1e-4, atol=1e-4)
    # And with given weights, which are what is quantized from now on.
    torch.testing.assert_close(block.run([0, 1], dict(block.weights)), before, rtol=1e-4, atol=1e-4)
    assert block.folded
    assert grams.keys() == block.weights.keys()


def planted(folder, **changes):
    """A Llama that computes what it did, with a few channels of its norms thirty times as large: hard to round."""
    model = tiny("llama", dtype=torch.float32, **changes)
    with torch.no_grad():
        for layer in model.model.layers:
            for norm, readers in (
                (
                    layer.input_layernorm,
                    (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                ),
                (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
            ):
                norm.weight[::16] /= 30
                for reader in readers:
                    reader.weight[:, ::16] *= 30
    model.save_pretrained(folder)
    return model


def test_what_unequal_channels_cost_plain_rounding_is_won_back(tmp_path):
    whole = logits(planted(tmp_path / "m"))
    errors = {}
    for name, options in {"rtn": {"algorithm": "rtn"}, "awq": {"algorithm": "awq"}}.items():
        options |= {"disable_opt_rtn": True, "dataset": samples(8, 16)}
        AutoRound(tmp_path / "m", **QUICK, **options).quantize_and_save(tmp_path / name)
        errors[name] = (logits(loaded(tmp_path / name)) - whole).norm() / whole.norm()
    assert errors["awq"] < errors["rtn"] / 2


@pytest.mark.parametrize("algorithm", ["awq", "awq,auto_round", "auto_round,awq", "awq,gptq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_written_model_is_the_quantized_one_with_its_norms(algorithm, dtype, tmp_path):
    tiny("llama", tmp_path / "m", dtype=dtype)
    made = AutoRound(tmp_path / "m", algorithm=algorithm, dataset=samples(8, 16), **QUICK)
    model, _ = made.quantize()
    made.save_quantized(tmp_path / "out", format="auto_round")
    made.save_quantized(tmp_path / "fake", format="fake")
    stored, original = Checkpoint(tmp_path / "out"), Checkpoint(tmp_path / "m")
    norm = "model.layers.0.input_layernorm.weight"
    assert stored.get(norm).dtype == dtype
    assert not torch.equal(stored.get(norm), original.get(norm))
    assert torch.equal(stored.get(norm), model.get_parameter(norm).data)
    if dtype == torch.float32:  # else `fake` rounds the weights once more
        found, wanted = (logits(loaded(tmp_path / name)) for name in ("out", "fake"))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_an_interrupted_run_goes_on_to_the_same_bytes_and_a_rehearsal_changes_none(tmp_path):
    class Stop:
        def started(self, plan, blocks):
            pass

        def finished(self, result):
            raise KeyboardInterrupt

    tiny("llama", tmp_path / "m", dtype=torch.bfloat16)

    def job(**options):
        return AutoRound(tmp_path / "m", algorithm="awq", dataset=samples(8, 16), **QUICK, **options)

    job().quantize_and_save(tmp_path / "whole")
    stopped = job()
    stopped.observers.append(Stop())
    with pytest.raises(KeyboardInterrupt):
        stopped.quantize_and_save(tmp_path / "out")
    job(resume=True).quantize_and_save(tmp_path / "out")
    job(max_ram="64GB").quantize_and_save(tmp_path / "limited")
    wanted = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == wanted
    assert (tmp_path / "limited" / "model.safetensors").read_bytes() == wanted


def test_dynamic_inputs_are_quantized_as_they_are_scaled_and_calibrated_ones_are_left_alone(tmp_path):
    tiny("llama", tmp_path / "m")
    norm = "model.layers.0.input_layernorm.weight"
    changed = {}
    for scheme in ("INT8", "FP8_STATIC"):
        job = AutoRound(
            tmp_path / "m", scheme=scheme, algorithm="awq", dataset=samples(8, 16), nsamples=8, seqlen=16
        )
        _, folder = job.quantize_and_save(tmp_path / scheme, format="llm_compressor")
        changed[scheme] = not torch.equal(
            Checkpoint(Path(folder)).get(norm), Checkpoint(tmp_path / "m").get(norm)
        )
    assert changed == {"INT8": True, "FP8_STATIC": False}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"algorithm": "awq", "duo_scaling": "maybe"},
            "duo_scaling must be one of true, false, both, got 'maybe'",
        ),
        ({"algorithm": "awq", "n_grid": 1}, "n_grid must be 2 or more"),
        ({"n_grid": 10}, "are about awq"),
        ({"algorithm": "awq", "imatrix": "x.gguf"}, "imatrix='x.gguf' is about inputs as they are"),
        ({"algorithm": "awq,rtn,gptq"}, "give one that rounds"),
        ({"algorithm": "awq", "model_free": True}, "model_free quantizes from weights alone"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(options, words, tmp_path):
    tiny("llama", tmp_path / "m")
    with pytest.raises(PlanError, match=re.escape(words)):
        AutoRound(tmp_path / "m", **options).quantize_and_save(tmp_path / "out")


def test_a_model_that_is_quantized_already_is_refused(tmp_path):
    tiny("llama", tmp_path / "m")
    AutoRound(tmp_path / "m", algorithm="rtn", group_size=32).quantize_and_save(tmp_path / "q")
    with pytest.raises(PlanError, match="those of this model are quantized already"):
        AutoRound(tmp_path / "q", algorithm="awq", dataset=samples(8, 16), **QUICK).quantize_and_save(
            tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "rounding", "iters"),
    [
        ({"algorithm": "awq"}, "opt_rtn", 0),
        ({"algorithm": "awq", "iters": 7}, "sign_round", 7),
        ({"algorithm": "awq,auto_round"}, "sign_round", 200),
        ({"alg_configs": [AWQConfig(n_grid=5, duo_scaling="both")]}, "opt_rtn", 0),
        ({"alg_configs": [AWQConfig(), SignRoundConfig(iters=3)]}, "sign_round", 3),
        ({"alg_configs": [SignRoundConfig(iters=3), AWQConfig()]}, "sign_round", 3),
        ({"alg_configs": ["awq", "auto_round"]}, "sign_round", 200),
    ],
    ids=str,
)
def test_awq_comes_before_whatever_rounds(given, rounding, iters):
    options = settled(Options.of(given))
    assert (options.enable_awq, options.algorithm, options.numbers().iters) == (True, rounding, iters)


def test_the_guides_path_and_upstreams_lead_to_the_same_config():
    from auto_round.algorithms.quantization.awq.config import AWQConfig as guides
    from auto_round.algorithms.transforms.awq.config import AWQConfig as upstreams

    assert guides is upstreams is AWQConfig


class Gated(torch.nn.Module):
    """A gated MLP that `taken` tokens go through, as one of many experts."""

    def __init__(self):
        super().__init__()
        for name in ("gate", "up", "down"):
            setattr(self, name, torch.nn.Linear(8, 8, bias=False))

    def forward(self, x, taken):
        return x + taken * self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize(("taken", "makers"), [(1.0, ["up"]), (0.0, [])])
def test_a_path_that_the_sample_does_not_take_proves_nothing(taken, makers):
    module, x = Gated(), torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    matrices = {name: module.get_parameter(f"{name}.weight").detach() for name in ("gate", "up", "down")}
    before = {name: matrix.clone() for name, matrix in matrices.items()}
    scaler = Scaler(
        module, {name: name for name in matrices}, matrices, lambda: module(x, taken).detach(), {}
    )
    assert [channels.maker for channels in scaler.find([("down",)])] == makers
    assert all(torch.equal(matrices[name], before[name]) for name in matrices)
