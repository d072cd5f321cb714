"""What the user guide shows and works today, run as it is written there, on a tiny model with local data."""

import json

import pytest
import torch
from models import SENTENCES, loaded, logits, samples, tiny, tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def model_name_or_path(tmp_path_factory):
    """A Qwen3 folder, the guide's model in small; projections are as wide as a group of 128."""
    folder = tmp_path_factory.mktemp("guide") / "Qwen3-tiny"
    tiny("qwen3", folder, hidden_size=128, intermediate_size=128, head_dim=32, num_key_value_heads=4)
    return folder


@pytest.fixture
def quick():
    """The numbers that keep a run short; the guide's own are 128 samples of 2048 tokens from the hub."""
    return {"dataset": samples(4), "nsamples": 4, "seqlen": 32, "batch_size": 2}


def config_of(folder):
    """The quantization settings that a folder states."""
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def bits_held(folder):
    """Layer -> bits, from the shapes of the tensors in the file."""
    from safetensors.torch import load_file

    held = load_file(folder / "model.safetensors")
    packed = {
        name.removesuffix(".qweight"): tensor for name, tensor in held.items() if name.endswith(".qweight")
    }
    return {name: t.shape[0] * 32 // t_in for name, t in packed.items() for t_in in [128]}


def test_the_first_example_writes_three_formats(model_name_or_path, quick, tmp_path):
    from auto_round import AutoRound

    ar = AutoRound(model_name_or_path, scheme="W4A16", iters=2, **quick)
    _, folders = ar.quantize_and_save(tmp_path, format="auto_gptq,auto_awq,auto_round")
    assert folders == [str(tmp_path / name) for name in ("auto-gptq", "auto-awq", "auto-round")]
    methods = {
        name: config_of(tmp_path / name)["quant_method"] for name in ("auto-gptq", "auto-awq", "auto-round")
    }
    assert methods == {"auto-gptq": "gptq", "auto-awq": "awq", "auto-round": "auto-round"}
    assert config_of(tmp_path / "auto-round")["group_size"] == 128


def test_mixed_bits_with_full_names_and_patterns(model_name_or_path, quick, tmp_path):
    from auto_round import AutoRound

    layer_config = {
        "model.decoder.layers.6.self_attn.out_proj": {"bits": 8, "group_size": 32},
        "model.decoder.layers.*k_proj": {"bits": 2, "group_size": 32},
    }
    ar = AutoRound(model_name_or_path, layer_config=layer_config, iters=1, **quick)
    ar.quantize_and_save(tmp_path, format="auto_round")
    # The names are those of another model: nothing matches, which is said and is no error.
    assert [f"{key!r} matches no layer" in " ".join(ar.plan.notes) for key in layer_config] == [True, True]
    assert set(bits_held(tmp_path).values()) == {4} and "extra_config" not in config_of(tmp_path)


def test_mixed_bits_with_names_that_match(model_name_or_path, quick, tmp_path):
    from auto_round import AutoRound

    layer_config = {
        "model.layers.1.self_attn.o_proj": {"bits": 8, "group_size": 32},
        "model.layers.*k_proj": {"bits": 2, "group_size": 32},
    }
    AutoRound(model_name_or_path, layer_config=layer_config, iters=1, **quick).quantize_and_save(tmp_path)
    bits = bits_held(tmp_path)
    assert bits["model.layers.1.self_attn.o_proj"] == 8 and bits["model.layers.0.self_attn.o_proj"] == 4
    assert {bits[f"model.layers.{i}.self_attn.k_proj"] for i in range(2)} == {2}
    assert torch.isfinite(logits(loaded(tmp_path))).all()


@pytest.mark.parametrize(
    "numbers", [{"iters": 2, "lr": 5e-3}, {"iters": 2, "low_gpu_mem_usage": True}], ids=["light", "best"]
)
def test_the_recipes_as_keywords(model_name_or_path, quick, tmp_path, numbers):
    from auto_round import AutoRound

    ar = AutoRound(model=model_name_or_path, scheme="W4A16", **numbers, **quick)
    ar.quantize_and_save(tmp_path, format="auto_round")
    assert config_of(tmp_path)["iters"] == 2 and torch.isfinite(logits(loaded(tmp_path))).all()


def test_optimised_rtn_is_iters_0(model_name_or_path, quick, tmp_path):
    from auto_round import AutoRound

    ar = AutoRound(model=model_name_or_path, scheme="W4A16", iters=0, **quick)
    ar.quantize_and_save(tmp_path, format="auto_round")
    assert "iters" not in config_of(tmp_path) and config_of(tmp_path)["enable_quanted_input"] is False


def test_the_model_free_example_with_layers_of_their_own_and_ignored_ones(model_name_or_path, tmp_path):
    from auto_round import AutoRound

    model, _ = AutoRound(
        model=str(model_name_or_path),
        scheme="W4A16",  # Or a QuantizationScheme instance for custom group_size / sym.
        layer_config={
            ".*k_proj": {"bits": 8, "group_size": 32},
            ".*v_proj": {"bits": 8, "group_size": 32},
        },
        ignore_layers="mlp",
        model_free=True,
    ).quantize_and_save(str(tmp_path))
    bits = bits_held(tmp_path)
    assert model is None
    assert bits == {
        f"model.layers.{i}.self_attn.{x}_proj": 8 if x in "kv" else 4 for i in range(2) for x in "qkvo"
    }
    assert torch.isfinite(logits(loaded(tmp_path))).all()


def test_model_free_is_the_plain_rtn_flow_bit_for_bit(model_name_or_path, tmp_path):
    from auto_round import AutoRound, QuantizationScheme

    scheme = QuantizationScheme(bits=2, group_size=32, sym=False, data_type="int", act_bits=16)
    AutoRound(model_name_or_path, scheme=scheme, model_free=True).quantize_and_save(tmp_path / "free")
    plain = {"iters": 0, "disable_opt_rtn": True, "disable_model_free": True}
    AutoRound(model_name_or_path, scheme=scheme, **plain).quantize_and_save(tmp_path / "plain")
    one, two = (tmp_path / name / "model.safetensors" for name in ("free", "plain"))
    assert one.read_bytes() == two.read_bytes()


def test_quantize_and_save_quantized_are_two_steps(model_name_or_path, quick, tmp_path):
    from auto_round import AutoRound

    model = AutoModelForCausalLM.from_pretrained(model_name_or_path, dtype="auto")
    own = AutoTokenizer.from_pretrained(model_name_or_path)
    autoround = AutoRound(model=model, tokenizer=own, low_gpu_mem_usage=True, iters=1, **quick)
    quantized, layer_config = autoround.quantize()
    autoround.save_quantized(format="auto_awq", output_dir=str(tmp_path))
    assert quantized is model and layer_config["model.layers.0.mlp.up_proj"]["bits"] == 4
    assert config_of(tmp_path)["quant_method"] == "awq" and (tmp_path / "tokenizer.json").is_file()


def test_the_configs_of_the_algorithms_are_where_the_guide_imports_them(model_name_or_path, quick):
    from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig

    from auto_round import AutoRound

    ar = AutoRound(
        model_name_or_path, alg_configs=[SignRoundConfig(iters=3, lr=0.1)], scheme="W4A16", **quick
    )
    assert (ar.numbers.iters, ar.numbers.lr, ar.numbers.nsamples) == (3, 0.1, 4)
    import auto_round

    assert auto_round.SignRoundConfig is SignRoundConfig


def test_custom_data_is_a_list_of_texts_or_of_token_ids(model_name_or_path):
    from auto_round import AutoRound

    def customized_data():
        return ["AutoRound is an advanced quantization algorithm for low-bits LLM inference" * 240]

    def customized_data_with_tokenizer(tokenizer, seqlen=2048):
        tokens = []
        for d in customized_data():
            tokens.append(tokenizer(d, truncation=True, max_length=seqlen, return_tensors="pt").data)
        return tokens

    for data in (customized_data(), customized_data_with_tokenizer(tokenizer(), seqlen=64)):
        ar = AutoRound(model_name_or_path, dataset=data, nsamples=1, seqlen=64, iters=1, batch_size=1)
        model, _ = ar.quantize()
        assert torch.isfinite(logits(model)).all()


def test_a_local_json_file_is_a_data_set(model_name_or_path, tmp_path):
    from auto_round import AutoRound

    (tmp_path / "tmp.json").write_text(json.dumps([{"text": text} for text in SENTENCES * 4]))
    ar = AutoRound(
        model_name_or_path,
        dataset=f"{tmp_path / 'tmp.json'}:num=4:concat=True",
        nsamples=4,
        seqlen=32,
        iters=1,
    )
    model, _ = ar.quantize()
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("settings", [{}, {"backend": "torch"}, {"backend": "auto"}], ids=str)
def test_a_checkpoint_is_loaded_with_auto_round_config(model_name_or_path, tmp_path, settings):
    from transformers import AutoRoundConfig

    from auto_round import AutoRound
    from auto_round import AutoRoundConfig as ours

    AutoRound(model_name_or_path, iters=0, disable_opt_rtn=True).quantize_and_save(tmp_path)
    quantization_config = AutoRoundConfig(**settings)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map="cpu", quantization_config=quantization_config, torch_dtype="auto"
    )
    own = AutoTokenizer.from_pretrained(tmp_path)
    inputs = own("There is a girl who likes adventure,", return_tensors="pt").to(model.device)
    out = model.generate(inputs["input_ids"], max_new_tokens=5, do_sample=False, pad_token_id=2)
    assert out.shape[1] > inputs["input_ids"].shape[1] and isinstance(own.decode(out[0]), str)
    assert ours is AutoRoundConfig


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, None], ids=str)
def test_a_checkpoint_loads_on_every_device_map_of_this_machine(model_name_or_path, tmp_path, device_map):
    from auto_round import AutoRound

    AutoRound(model_name_or_path, iters=0, disable_opt_rtn=True).quantize_and_save(tmp_path)
    assert torch.equal(logits(loaded(tmp_path, device_map=device_map)), logits(loaded(tmp_path)))


@pytest.mark.parametrize(
    ("scheme", "form"), [("INT8", "auto_round:llm_compressor"), ("W4A16", "auto_round")], ids=str
)
def test_awq_is_an_algorithm(model_name_or_path, quick, tmp_path, scheme, form):
    from auto_round import AutoRound

    ar = AutoRound(model_name_or_path, scheme=scheme, algorithm="awq", **quick)
    ar.quantize_and_save(tmp_path, format=form)
    if scheme == "W4A16":  # the other needs a reader that is not installed here
        assert torch.isfinite(logits(loaded(tmp_path))).all()
    else:
        assert config_of(tmp_path)["quant_method"] == "compressed-tensors"


@pytest.mark.parametrize(
    "rotation",
    [
        "quarot",
        {"r1": True},
        {"r1": True, "r2": True},
        {"r1": True, "r2": True, "r3": True, "r4": True},
        {"r1": True, "r2": True, "r3": True, "r4": True, "random_r1": True, "random_r2": True, "random_r3": True,
         "random_r4": True},
        "default",
    ],
    ids=str,
)  # fmt: skip
def test_rotations_are_saved_and_restored(quick, tmp_path, rotation):
    from auto_round.algorithms.transforms.spinquant import SpinQuantConfig

    from auto_round import AutoRound

    tiny("qwen3", tmp_path / "model")
    config = SpinQuantConfig(**rotation) if isinstance(rotation, dict) else rotation
    ar = AutoRound(str(tmp_path / "model"), scheme="MXFP4", rotation_config=config, iters=2, **quick)
    ar.quantize_and_save(output_dir=str(tmp_path / "out"), format="auto_round")
    assert {"rotation_config", "spinquant_config"} & config_of(tmp_path / "out").keys()
    assert torch.isfinite(logits(loaded(tmp_path / "out", device_map="auto", backend=None))).all()


def test_rotations_are_trained(quick, tmp_path, monkeypatch):
    from auto_round import AutoRound
    from auto_round.core.rotation import NAMED

    tiny("qwen3", tmp_path / "model")
    monkeypatch.setitem(
        NAMED, "spinquant", {**NAMED["spinquant"], "iters": 2}
    )  # the word means a hundred steps
    ar = AutoRound(str(tmp_path / "model"), scheme="MXFP4", rotation_config="spinquant", iters=0, **quick)
    ar.quantize_and_save(output_dir=str(tmp_path / "out"), format="auto_round")
    assert torch.isfinite(logits(loaded(tmp_path / "out", device_map="auto", backend=None))).all()


def test_gguf_is_a_format(model_name_or_path, tmp_path):
    from auto_round import AutoRound

    AutoRound(model=model_name_or_path, iters=0, nsamples=0).quantize_and_save(tmp_path, format="gguf:q4_k_m")
    assert [path.suffix for path in tmp_path.iterdir()] == [".gguf"]


def test_a_budget_with_shared_layers_gives_settings_layer_by_layer(model_name_or_path, quick):
    from auto_round import AutoRound, AutoScheme

    shared_layers = [
        ["*.self_attn.k_proj", "v_proj", "q_proj", "out_proj"],
        ("model.decoder.layers.6.fc1", "model.decoder.layers.6.fc2"),
        ("fc1", "fc2"),
    ]
    target_bits = 5.0
    scheme = AutoScheme(avg_bits=target_bits, options=("W4A16", "MXFP8"), shared_layers=shared_layers)
    ar = AutoRound(model=model_name_or_path, scheme=scheme, iters=0, **{**quick, "nsamples": 1})
    _model, layer_config = ar.quantize()
    kinds = {name: settings["data_type"] for name, settings in layer_config.items()}
    assert len(set(kinds.values())) == 2
    for block in range(2):
        assert len({kinds[f"model.layers.{block}.self_attn.{part}_proj"] for part in "qkv"}) == 1


def test_a_budget_among_gguf_types_leaves_a_layer_that_has_its_own(tmp_path):
    from auto_round import AutoRound, AutoScheme

    wide = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 1}
    tiny("qwen3", tmp_path / "model", **wide)
    scheme = AutoScheme(avg_bits=3.0, options=("GGUF:Q2_K_S", "GGUF:Q4_K_S"), ignore_scale_zp_bits=True)
    layer_config = {"lm_head": "GGUF:Q6_K"}
    data = {"dataset": samples(4), "nsamples": 4, "seqlen": 32}
    ar = AutoRound(model=tmp_path / "model", scheme=scheme, layer_config=layer_config, iters=0, **data)
    ar.quantize_and_save(tmp_path / "out")
    types = {name: scheme.weight.dtype for name, scheme in ar.plan.items()}
    assert types["lm_head"] == "q6_k" and {"q2_k", "q4_k"} <= set(types.values())
    assert list((tmp_path / "out").glob("*.gguf"))
