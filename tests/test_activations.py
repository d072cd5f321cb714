"""Quantized inputs from keyword to loaded model: ranges, tuning, checkpoints, resuming, refusals."""

import json

import pytest
import torch
from models import loaded, logits, samples, tiny
from safetensors.torch import load_file
from torch import nn

from auto_round import AutoRound
from auto_round.codecs.base import codec_of, fake_inputs, preset, presets
from auto_round.core.errors import DataError, FormatError, PlanError
from auto_round.core.scheme import TensorSpec
from auto_round.sources.activations import InputGrid, Limits, quantized_inputs
from auto_round.steps.inputs import shared_limits

PLAIN = {"iters": 0, "disable_opt_rtn": True}
UP = "model.layers.0.mlp.up_proj"
DATA = {"dataset": samples(4), "nsamples": 4, "seqlen": 32, "batch_size": 2}
WITH_FLOATS = [
    name
    for name, scheme in presets().items()
    if scheme.weight is not None
    and (scheme.act is not None or scheme.weight.dtype in ("mx_fp", "mx_int", "nv_fp", "fp"))
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tiny model."""
    folder = tmp_path_factory.mktemp("model")
    tiny("qwen3", folder, dtype=torch.bfloat16)
    return folder


def quantized(model, out, **options):
    """The checkpoint that these options make."""
    AutoRound(str(model), **{**DATA, **options}).quantize_and_save(out)
    return out


def config_of(folder):
    """quantization_config of a checkpoint."""
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def by_hand(folder, scheme):
    """The original with weights and inputs quantized by hooks of its own; ranges from the files."""
    stored, original = load_file(folder / "model.safetensors"), loaded(folder)
    modules = {name: m for name, m in original.named_modules() if hasattr(m, "dequantized")}
    weights = {name: m.dequantized(torch.float32) for name, m in modules.items()}
    kinds = ("scale", "global_scale", "zero")
    for name, module in modules.items():
        ranges = {k: stored[f"{name}.input_{k}"] for k in kinds if f"{name}.input_{k}" in stored}
        linear = nn.Linear(module.in_features, module.out_features, bias=False)
        linear.weight.data = weights[name]
        if scheme.act is not None:
            linear.register_forward_pre_hook(lambda _m, args, r=ranges: fake_inputs(args[0], scheme.act, r))
        original.set_submodule(name, linear)
    return original


@pytest.mark.parametrize("name", WITH_FLOATS)
def test_every_scheme_is_written_and_loaded_by_stock_transformers(model, tmp_path, name):
    out = quantized(model, tmp_path / "out", scheme=name, **PLAIN)
    found, original = logits(loaded(out)), logits(loaded(model))
    limit = 0.5 if preset(name).weight.bits == 4 else 0.12
    if name != "INT4":
        assert ((found - original).norm() / original.norm()) < limit
    assert torch.equal(found, logits(by_hand(out, preset(name))))


@pytest.mark.parametrize("name", ["MXFP4", "NVFP4", "FP8_STATIC", "INT8"])
def test_tuning_runs_on_quantized_inputs(model, tmp_path, name):
    seen = []
    ar = AutoRound(str(model), scheme=name, iters=8, **DATA)
    ar.observers.append(Watcher(seen))
    ar.quantize_and_save(tmp_path / "out")
    assert len(seen) == 2 and all(r.report.losses[r.report.kept] <= r.report.losses["plain"] for r in seen)
    without = []
    ar = AutoRound(str(model), scheme=name, act_bits=16, iters=8, **DATA)
    ar.observers.append(Watcher(without))
    ar.quantize_and_save(tmp_path / "weights only", format="fake")
    assert seen[0].report.losses["plain"] > 1.05 * without[0].report.losses["plain"] or name == "FP8_STATIC"


class Watcher:
    """Keeps the results of blocks."""

    def __init__(self, seen):
        self.seen = seen

    def started(self, plan, blocks):
        """Nothing."""

    def finished(self, result):
        """One block."""
        self.seen.append(result)


def test_ranges_hold_all_inputs_and_fused_layers_share_them(model, tmp_path):
    out = quantized(model, tmp_path / "out", scheme="FP8_STATIC", **PLAIN)
    stored, largest = load_file(out / "model.safetensors"), {}
    original = loaded(model)
    for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"):
        module = original.get_submodule(f"model.layers.0.{name}")

        def note(_module, args, name=name):
            largest[name] = max(largest.get(name, 0.0), args[0].abs().max().item())

        module.register_forward_pre_hook(note)
    with torch.no_grad():
        original(torch.stack(DATA["dataset"]))
    for name, value in largest.items():
        scale = stored[f"model.layers.0.{name}.input_scale"]
        assert scale.dtype == torch.bfloat16 and scale.item() * 448 == pytest.approx(value, rel=5e-3)
    nv = load_file(quantized(model, tmp_path / "nv", scheme="NVFP4", **PLAIN) / "model.safetensors")
    for suffix in ("weight_global_scale", "input_global_scale"):
        q, k, v = (nv[f"model.layers.0.self_attn.{x}_proj.{suffix}"] for x in "qkv")
        assert q == k == v and nv[f"model.layers.0.mlp.gate_proj.{suffix}"] == nv[f"{UP}.{suffix}"]


@pytest.mark.parametrize(
    "options",
    [
        {"act_bits": 8},
        {"act_bits": 8, "act_sym": False},
        {"act_bits": 8, "act_dynamic": False, "act_group_size": 0},
        {"act_bits": 8, "act_dynamic": False, "act_group_size": 0, "act_sym": False},
        {"act_data_type": "fp8"},
        {"act_data_type": "fp8_e5m2", "act_group_size": -1},
        {"act_bits": 8, "act_data_type": "mx_fp_rceil", "act_group_size": 32},
        {"act_data_type": "nv_fp4", "act_group_size": 16},
        {"scheme": "MXFP8", "act_data_type": "int", "act_group_size": -1},
        {"scheme": "MXFP4", "act_bits": 16},
        {"scheme": "FP8_STATIC", "scale_dtype": "fp32"},
        {
            "scheme": "MXFP8",
            "layer_config": {"down_proj": "MXFP4", "k_proj": {"bits": 16}, "v_proj": "W4A16"},
        },
        {"scheme": "W4A16", "layer_config": {"down_proj": "NVFP4", "o_proj": {"act_bits": 8}}},
    ],
    ids=str,
)
def test_any_combination_survives_writing_and_loading(model, tmp_path, options):
    ar = AutoRound(str(model), **{**DATA, **PLAIN, **options})
    ar.quantize_and_save(tmp_path)
    found = {name: m.site for name, m in loaded(tmp_path).named_modules() if hasattr(m, "site")}
    assert found.keys() == set(ar.plan.quantized())
    for name, site in found.items():
        assert (site.spec, site.act) == (ar.plan[name].weight, ar.plan[name].act), name
    assert logits(loaded(tmp_path)).isfinite().all()


def test_group_sizes_that_transformers_refuses_are_stated_elsewhere(model, tmp_path):
    block = config_of(quantized(model, tmp_path / "b", scheme="FP8_BLOCK", **PLAIN))
    assert (block["group_size"], block["weight_group_size"], block["weight_block_size"]) == (
        128,
        [128, 128],
        [128, 128],
    )
    tensor = config_of(quantized(model, tmp_path / "t", scheme="FPW8A16", **PLAIN))
    assert (tensor["group_size"], tensor["weight_group_size"]) == (-1, 0)


def test_a_layer_without_quantized_inputs_says_so(model, tmp_path):
    out = quantized(model, tmp_path, scheme="MXFP4", layer_config={"k_proj": {"act_bits": 16}}, **PLAIN)
    assert config_of(out)["extra_config"]["model.layers.0.self_attn.k_proj"] == {"act_bits": 16}


def test_rows_that_do_not_divide_stay_float(tmp_path):
    tiny("llama", tmp_path / "m", intermediate_size=80)
    ar = AutoRound(str(tmp_path / "m"), scheme="MXFP4", **DATA, **PLAIN)
    ar.quantize_and_save(tmp_path / "out")
    down = "model.layers.0.mlp.down_proj"
    assert ar.plan[down].weight is None and "80" in ar.plan.why[down]
    assert f"{down}.weight" in load_file(tmp_path / "out" / "model.safetensors")


def test_a_quantized_head_has_quantized_inputs(model, tmp_path):
    out = quantized(model, tmp_path, scheme="NVFP4", quant_lm_head=True, iters=0)
    assert "lm_head.input_global_scale" in load_file(out / "model.safetensors")
    assert logits(loaded(out)).isfinite().all()


def test_a_resumed_run_ends_with_the_same_bytes(model, tmp_path):
    class Stop(Watcher):
        """Raises after the first block."""

        def finished(self, result):
            """Stop."""
            raise KeyboardInterrupt

    options = {**DATA, "scheme": "NVFP4", "iters": 3}
    whole = AutoRound(str(model), **options)
    whole.quantize_and_save(tmp_path / "whole")
    broken = AutoRound(str(model), **options)
    broken.observers.append(Stop([]))
    with pytest.raises(KeyboardInterrupt):
        broken.quantize_and_save(tmp_path / "out")
    AutoRound(str(model), resume=True, **options).quantize_and_save(tmp_path / "out")
    first, second = ((tmp_path / f / "model.safetensors").read_bytes() for f in ("whole", "out"))
    assert first == second


# ---------------------------------------------------------------------------------------------------------- refusals


def test_calibrated_inputs_need_data(model, tmp_path):
    for options in ({"nsamples": 0}, {"model_free": True}):
        with pytest.raises((DataError, PlanError), match="calibrat"):
            quantized(model, tmp_path, scheme="FP8_STATIC", **PLAIN, **options)


@pytest.mark.parametrize("fmt", ["auto_gptq", "auto_awq", "auto_round:auto_gptq"])
def test_formats_without_inputs_refuse_them(model, tmp_path, fmt):
    with pytest.raises(FormatError, match="inputs"):
        AutoRound(str(model), scheme="W4A16", act_bits=8, **DATA, **PLAIN).quantize_and_save(
            tmp_path, format=fmt
        )


def test_a_damaged_layer_is_named_at_load(model, tmp_path):
    from safetensors.torch import save_file

    out = quantized(model, tmp_path, scheme="FP8_STATIC", **PLAIN)
    tensors = load_file(out / "model.safetensors")
    tensors[f"{UP}.weight_scale"][3] = float("nan")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=UP):
        loaded(out)


# ------------------------------------------------------------------------------------------------------------- parts


def limits(low, high):
    """Limits as tensors."""
    return torch.tensor(low), torch.tensor(high)


def test_experts_without_tokens_take_the_range_of_their_siblings():
    found = {"b.experts.0.up": limits(-1.0, 2.0), "b.experts.1.up": None, "b.experts.2.up": limits(-3.0, 1.0)}
    found["b.experts.1.down"] = limits(-9.0, 9.0)
    shared = shared_limits(found, ())
    assert shared["b.experts.1.up"] == limits(-3.0, 2.0) and shared["b.experts.0.up"] == limits(-1.0, 2.0)
    with pytest.raises(DataError, match="b_q"):
        shared_limits({"b_q": None}, ())


def test_fused_layers_share_the_widest_range():
    found = {"q": limits(-1.0, 2.0), "k": limits(-3.0, 1.0), "o": limits(-9.0, 9.0)}
    shared = shared_limits(found, [frozenset({"q", "k"})])
    assert shared["q"] == shared["k"] == limits(-3.0, 2.0) and shared["o"] == limits(-9.0, 9.0)


def test_a_percentile_leaves_outliers_out():
    seen, x = Limits(), torch.randn(1000, 32, generator=torch.Generator().manual_seed(0))
    x[3, 5] = 1000.0
    seen.add(x)
    assert seen.within(100.0)[1] == 1000.0
    low, high = seen.within(99.0)
    assert -2.8 < low < -2.4 and 2.4 < high < 2.8
    assert Limits().within(99.0) is None


def test_the_whole_range_needs_no_sample_of_the_inputs():
    seen, x = Limits(sampled=False), torch.randn(1000, 32, generator=torch.Generator().manual_seed(0))
    seen.add(x)
    assert seen.within(100) == (x.min(), x.max()) and not seen.sample


def test_a_percentile_makes_the_input_range_smaller(model, tmp_path):
    scale = {}
    for share in (100.0, 99.0):
        out = quantized(model, tmp_path / str(share), scheme="FP8_STATIC", act_percentile=share, **PLAIN)
        scale[share] = load_file(out / "model.safetensors")[f"{UP}.input_scale"].item()
    assert scale[99.0] < 0.9 * scale[100.0]
    with pytest.raises(PlanError, match="act_percentile"):
        quantized(model, tmp_path, act_percentile=101)


def test_limits_grow_and_pass_over_nothing():
    seen = Limits()
    for x in (torch.empty(0, 4), torch.tensor([1.0, 2.0]), torch.tensor([-3.0])):
        seen.add(x)
    assert (seen.low, seen.high) == (-3.0, 2.0)


def test_inputs_are_quantized_while_the_context_lasts():
    layer, x = nn.Linear(32, 4, bias=False), torch.randn(2, 32)
    act = TensorSpec(bits=2, group=-1, scale_dtype="float32")
    before = layer(x)
    with quantized_inputs({"a": layer}, {"a": InputGrid(act, {})}):
        inside = layer(x)
    assert torch.equal(inside, layer(fake_inputs(x, act, {}))) and not torch.equal(inside, before)
    assert torch.equal(layer(x), before)
    assert codec_of(act).needs_range(act) is False


@pytest.mark.parametrize(("bits", "steps"), [(8, 127), (4, 7)])
def test_symmetric_inputs_are_divided_as_servers_divide_them(bits, steps):
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * 3
    act = TensorSpec(bits=bits, group=-1, scale_dtype="float32")
    expected = torch.empty_like(x)
    for row in range(5):
        scale = max(abs(v) for v in x[row].tolist()) / steps
        expected[row] = torch.tensor([round(v / scale) * scale for v in x[row].tolist()])
    torch.testing.assert_close(fake_inputs(x, act, {}), expected, atol=1e-6, rtol=1e-5)
    assert fake_inputs(torch.zeros(2, 64), act, {}).count_nonzero() == 0
