"""Rotations: orthogonal matrices, models that compute what they did before, checkpoints that say what was turned."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import KINDS, loaded, logits, samples, tiny, tokens
from safetensors.torch import load_file, save_file

from auto_round import AutoRound, AutoRoundConfig, QuantizationScheme, RotationConfig, SpinQuantConfig
from auto_round.cli.main import execute
from auto_round.codecs.base import codec_of, preset
from auto_round.core.errors import (
    AutoRoundError,
    FormatError,
    ModelError,
    PlanError,
    SchemeError,
)
from auto_round.core.hadamard import Learned, Rotation, hadamard, power_of_two
from auto_round.core.rotation import read_rotations, restored, rotations_of, stored
from auto_round.formats.base import format_named, parse_formats
from auto_round.jobs.verify import verify
from auto_round.models.absorbing import Fusion, Turns, untie
from auto_round.models.quirks import PLAIN_STREAMS, PLAIN_VALUES
from auto_round.rotation_training import Orthogonal
from auto_round.version import __version__

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "rotations.jsonl"
RTN = {"scheme": "W8A16", "group_size": 32, "iters": 0, "disable_opt_rtn": True, "device_map": "cpu"}
EVERYWHERE = SpinQuantConfig(r3=True, r4=True)
RANDOM = SpinQuantConfig(r3=True, r4=True, random_r1=True, random_r2=True, random_r3=True, random_r4=True)
FUSED = SpinQuantConfig(online_r1_rotation=False)
TRAINED = SpinQuantConfig(trainable_rotation=True, trainable_smooth=True, iters=3, batch_size=2)
ONLINE = SpinQuantConfig(r2=False, r4=True)
WISHES = {
    "quarot": "quarot",
    "everywhere": EVERYWHERE,
    "random": RANDOM,
    "fused": FUSED,
    "fused-random": SpinQuantConfig(online_r1_rotation=False, random_r1=True, random_r2=True),
    "fused-and-r4": SpinQuantConfig(online_r1_rotation=False, r4=True),
    "blocks-of-16": SpinQuantConfig(r4=True, rotation_size=16),
    "default": "default",
    "random-hadamard": RotationConfig(hadamard_type="random_hadamard", block_size=16, seed=7),
}


# -------------------------------------------------------------------------------------------------------- matrices


@pytest.mark.parametrize(
    "order", [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 44, 48, 60, 64, 76, 108, 140, 256, 768]
)
def test_a_hadamard_matrix_has_signs_and_orthogonal_rows(order):
    found = hadamard(order).int()
    assert (found.abs() == 1).all()
    assert torch.equal(found @ found.T, order * torch.eye(order, dtype=torch.int32))


@pytest.mark.parametrize("order", [0, 3, 6, 10, 92])
def test_an_order_without_a_construction_is_refused(order):
    with pytest.raises(PlanError, match=f"order {order}" if order != 92 else "order"):
        hadamard(order)


@settings(max_examples=40, deadline=None)
@given(power=st.integers(1, 9), blocks=st.integers(1, 3), flipped=st.booleans(), seed=st.integers(0, 99))
def test_a_rotation_is_its_matrix_block_by_block_and_can_be_undone(power, blocks, flipped, seed):
    size, generator = 1 << power, torch.Generator().manual_seed(seed)
    rotation = Rotation.random(size, generator) if flipped else Rotation(size)
    x = torch.randn(3, blocks * size, generator=generator, dtype=torch.float64)
    whole = torch.block_diag(*[rotation.matrix().double()] * blocks)
    assert torch.allclose(rotation(x), x @ whole, atol=1e-6)
    assert torch.allclose(rotation.back(rotation(x)), x, atol=1e-9)


@pytest.mark.parametrize("place", ["r1", "r4", "hadamard"])
@pytest.mark.parametrize("flipped", [False, True])
def test_what_a_checkpoint_tells_of_a_rotation_is_that_rotation(place, flipped):
    made = Rotation.random(32, torch.Generator().manual_seed(0)) if flipped else Rotation(32)
    again = restored(place, stored(place, made), made)
    assert torch.equal(again.matrix(), made.matrix())


def test_other_signs_make_another_fingerprint(tmp_path):
    tiny("llama", tmp_path)
    prints = set()
    for seed in (1, 2, 2):
        job = AutoRound(
            tmp_path, rotation_config=RotationConfig(hadamard_type="random_hadamard", seed=seed), **RTN
        )
        job.make_plan(parse_formats("auto_round"))
        prints.add(job.subject().files.store.fingerprint())
    assert len(prints) == 2


def test_a_default_device_does_not_matter():
    hadamard.cache_clear()
    with torch.device("meta"):
        made = Rotation.random(16, torch.Generator())
    assert made.signs.device.type == hadamard(16).device.type == "cpu"


def test_power_of_two_is_the_largest_that_divides():
    assert [power_of_two(n) for n in (768, 11008, 4096, 7)] == [256, 256, 4096, 1]


# ---------------------------------------------------------------------------------------- the model stays what it is


def turned(model, wish, **options):
    """The float model of a job with rotations, and the layers whose inputs it turns."""
    job = AutoRound(model, rotation_config=wish, **{**RTN, **options})
    job.make_plan(parse_formats("auto_round"))
    return job.material.live_model(), job.material.rotator.turns


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3-tied", "mistral"])
@pytest.mark.parametrize("wish", WISHES.values(), ids=WISHES)
def test_a_rotated_model_computes_what_it_did_before(name, wish, tmp_path):
    reference = logits(tiny(name, tmp_path))
    model, turns = turned(tmp_path, wish)
    assert torch.allclose(logits(model), reference, atol=2e-4), (logits(model) - reference).abs().max()
    named = rotations_of(wish)
    assert bool(turns) == any(place != "r3" for place in named.online)
    weights = {n: p for n, p in model.named_parameters() if n.endswith("q_proj.weight")}
    plain = {n: p for n, p in tiny(name).named_parameters() if n in weights}
    assert not any(torch.allclose(weights[n], plain[n], atol=1e-2) for n in weights)


@pytest.mark.parametrize("name", [n for n in KINDS if n not in ("llama", "qwen2", "mistral")])
def test_inputs_can_be_turned_in_any_architecture(name, tmp_path):
    reference = logits(tiny(name, tmp_path))
    model, turns = turned(tmp_path, "default")
    assert turns and torch.allclose(logits(model), reference, atol=1e-3)


@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral", "gpt-oss", "deepseek-v3"])
def test_experts_keep_their_inputs_and_are_loaded_so(name, tmp_path, caplog):
    reference = logits(tiny(name, tmp_path / "model"))
    job = AutoRound(tmp_path / "model", rotation_config="default", **RTN)
    job.quantize_and_save(tmp_path / "out")
    assert "stay as they are" in caplog.text and not any(
        ".experts." in layer for layer in job.material.rotator.turns
    )
    assert (logits(loaded(tmp_path / "out")) - reference).norm() < 0.1 * reference.norm()
    for file in ("config.json", "quantization_config.json"):
        text = (tmp_path / "out" / file).read_text()
        (tmp_path / "out" / file).write_text(text.replace(__version__, "0.16.1"))
    with pytest.raises(FormatError, match="experts"):
        loaded(tmp_path / "out")


@pytest.mark.parametrize("wish", [EVERYWHERE, FUSED, "default"], ids=["everywhere", "fused", "default"])
def test_a_live_model_is_rotated_once(wish):
    model = tiny("qwen3-tied")
    reference = logits(model)
    job = AutoRound(model, rotation_config=wish, dataset=samples(4), nsamples=4, seqlen=32, **RTN)
    quantized, _ = job.quantize()
    assert quantized is model and (logits(model) - reference).norm() < 0.03 * reference.norm()


def test_a_folder_quantized_in_memory_is_turned_like_one_that_is_saved(tmp_path):
    reference = logits(tiny("llama", tmp_path / "model"))
    job = AutoRound(tmp_path / "model", rotation_config=EVERYWHERE, format="auto_round", **RTN)
    model, _ = job.quantize()  # the model is loaded before its layers are known
    assert (logits(model) - reference).norm() < 0.03 * reference.norm()
    job.save_quantized(tmp_path / "one")
    AutoRound(tmp_path / "model", rotation_config=EVERYWHERE, **RTN).quantize_and_save(tmp_path / "two")
    one, two = (load_file(tmp_path / part / "model.safetensors") for part in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_another_job_in_the_same_process_is_not_rotated(tmp_path):
    reference = logits(tiny("llama", tmp_path))
    turned(tmp_path, EVERYWHERE)
    model, turns = turned(tmp_path, None)
    assert not turns and torch.equal(logits(model), reference)


def test_keys_in_the_cache_are_turned_and_answers_are_not(tmp_path):
    plain = tiny("llama", tmp_path)
    model, _ = turned(tmp_path, SpinQuantConfig(r1=False, r2=False, r3=True))
    ids = tokens(1, 8)
    caches = [m(input_ids=ids, use_cache=True).past_key_values.layers[0].keys for m in (plain, model)]
    assert torch.allclose(caches[1], Rotation(16)(caches[0]), atol=1e-5)
    answers = [m.generate(ids, max_new_tokens=4, do_sample=False) for m in (plain, model)]
    assert torch.equal(*answers)


# --------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("scheme", ["W8A16", "W4A16", "MXFP4", "NVFP4", "FP8_STATIC"])
@pytest.mark.parametrize(
    "wish", [EVERYWHERE, RANDOM, "default", WISHES["random-hadamard"]], ids=["e", "r", "d", "h"]
)
def test_a_loaded_checkpoint_turns_as_the_job_did(scheme, wish, tmp_path):
    reference = logits(tiny("llama", tmp_path / "model"))
    size = {"group_size": 32} if scheme.startswith("W") else {}
    data = {"dataset": samples(4), "nsamples": 4, "seqlen": 32}
    job = AutoRound(
        tmp_path / "model",
        scheme=scheme,
        rotation_config=wish,
        iters=0,
        low_cpu_mem_usage=False,
        **size,
        **data,
    )
    live, _ = job.quantize_and_save(tmp_path / "out")
    folder = tmp_path / "out"
    found = loaded(folder)
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert ("spinquant_config" in said) != ("rotation_config" in said)
    assert not verify(folder)
    slack = {"W8A16": 0.05, "FP8_STATIC": 0.3}.get(scheme, 1.5)
    assert (logits(found) - reference).abs().max() < slack * reference.std() * 4
    if scheme.startswith("W"):  # no quantized inputs: what was tuned, written and loaded are equal
        assert torch.allclose(logits(live.float()), logits(found), atol=1e-4)
        plain = loaded(folder).dequantize()
        assert torch.allclose(logits(plain), logits(found), atol=1e-3)
    found.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(loaded(tmp_path / "again")), logits(found))


@pytest.mark.parametrize("wish", ["default", "random_hadamard"])
def test_a_quantized_head_keeps_its_inputs(wish, tmp_path):
    reference = logits(tiny("llama", tmp_path / "model"))
    job = AutoRound(tmp_path / "model", rotation_config=wish, quant_lm_head=True, **RTN)
    job.quantize_and_save(tmp_path / "out")
    assert (logits(loaded(tmp_path / "out")) - reference).norm() < 0.03 * reference.norm()


@pytest.mark.parametrize(
    "form", ["auto_gptq", "auto_awq", "auto_round:mlx", "gguf:q8_0", "llm_compressor", "fake"]
)
def test_what_weights_take_up_goes_into_every_format(form, tmp_path):
    if form.startswith("gguf"):
        pytest.importorskip("gguf")
    reference = logits(tiny("qwen3-tied", tmp_path / "model", hidden_size=64))
    bits = {} if form.startswith("gguf") else {"group_size": 32, "bits": 4 if form == "auto_awq" else 8}
    job = AutoRound(tmp_path / "model", rotation_config=FUSED, iters=0, disable_opt_rtn=True, **bits)
    job.quantize_and_save(tmp_path / "out", format=form)
    own = form in ("fake", "auto_round:mlx")
    again = None if own else AutoRound(tmp_path / "out", **RTN)
    model = loaded(tmp_path / "out") if again is None else again.material.live_model()
    assert (logits(model) - reference).abs().max() < (2.0 if form == "auto_awq" else 0.2)


def test_tuning_sees_the_turned_inputs_and_resumes_to_the_same_bytes(tmp_path):
    tiny("llama", tmp_path / "model")
    data = {"dataset": samples(8), "nsamples": 8, "seqlen": 32, "batch_size": 4, "iters": 3}

    def run(out, *observers, **more):
        job = AutoRound(tmp_path / "model", scheme="MXFP4", rotation_config=EVERYWHERE, **data, **more)
        job.observers.extend(observers)
        job.quantize_and_save(tmp_path / out)
        return {path.name: path.read_bytes() for path in (tmp_path / out).glob("model*.safetensors")}

    class Stop:
        def started(self, plan, blocks):
            pass

        def finished(self, result):
            raise RuntimeError("boom")

    whole = run("whole")
    with pytest.raises(RuntimeError, match="boom"):
        run("out", Stop())
    assert run("out", resume=True) == whole
    with pytest.raises(RuntimeError, match="boom"):
        run("out", Stop())
    with pytest.raises(AutoRoundError, match=r"weights was|plan"):
        AutoRound(
            tmp_path / "model", scheme="MXFP4", rotation_config=FUSED, resume=True, **data
        ).quantize_and_save(tmp_path / "out")


@pytest.fixture
def written(tmp_path):
    """A checkpoint with random rotations at R1 and R4."""
    tiny("llama", tmp_path / "model")
    AutoRound(tmp_path / "model", rotation_config=RANDOM, **RTN).quantize_and_save(tmp_path / "out")
    return tmp_path / "out"


def test_the_tensors_and_settings_are_those_that_upstream_writes(written):
    told = {
        name: (str(tensor.dtype), list(tensor.shape))
        for name, tensor in load_file(written / "model.safetensors").items()
        if "spinquant" in name
    }
    prefix = "model.layers.0.self_attn.q_proj.spinquant_r1_"
    assert {k.removeprefix(prefix): v for k, v in told.items() if k.startswith(prefix)} == {
        "type": ("torch.int32", []),
        "size": ("torch.int32", []),
        "matrix": ("torch.int8", [64, 64]),
    }
    assert sum("r1_size" in k for k in told) == 10 and sum("r4_size" in k for k in told) == 2
    said = json.loads((written / "config.json").read_text())["quantization_config"]["spinquant_config"]
    assert said == {
        "r1": True, "r2": True, "r3": True, "r4": True, "rotation_size": None, "online_r1_rotation": True,
        "random_r1": True, "random_r2": True, "random_r3": True, "random_r4": True, "trainable_rotation": False,
        "hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "algorithm": "spinquant",
    }  # fmt: skip


def test_upstreams_shared_matrix_and_odd_width_are_read(tmp_path):
    reference = logits(tiny("llama", tmp_path / "model"))
    config = RotationConfig(hadamard_type="random_hadamard", block_size=32)
    AutoRound(tmp_path / "model", rotation_config=config, **RTN).quantize_and_save(tmp_path / "one")
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    matrices = [name for name in tensors if name.endswith("hadamard_matrix")]
    for name in matrices[1:]:  # auto-round 0.16 keeps the first one only
        del tensors[name]
    save_file(tensors, tmp_path / "one" / "model.safetensors", {"format": "pt"})
    assert (logits(loaded(tmp_path / "one")) - reference).abs().max() < 0.1

    # 96 = 12 * 8: auto-round 0.16 turns it as a whole, by a matrix of order 12 that it stores.
    AutoRound(tmp_path / "model", rotation_config=ONLINE, **RTN).quantize_and_save(tmp_path / "two")
    whole = Rotation(96, torch.kron(hadamard(12).t().contiguous(), hadamard(8)))
    tensors = load_file(tmp_path / "two" / "model.safetensors")
    codec_free = AutoRound(tmp_path / "model", **RTN)
    for block in (0, 1):
        name = f"model.layers.{block}.mlp.down_proj"
        weight = whole(codec_free.subject().files.store.get(f"{name}.weight"))
        tensors |= {f"{name}.{key}": value for key, value in packed(weight).items()}
        tensors[f"{name}.spinquant_r4_size"] = torch.tensor(96, dtype=torch.int32)
    tensors["spinquant_R4_had_K"] = hadamard(12).float()
    save_file(tensors, tmp_path / "two" / "model.safetensors", {"format": "pt"})
    for file in ("config.json", "quantization_config.json"):
        text = (tmp_path / "two" / file).read_text()
        (tmp_path / "two" / file).write_text(text.replace(__version__, "0.16.1"))
    assert (logits(loaded(tmp_path / "two")) - reference).abs().max() < 0.1


def packed(weight):
    """The tensors of an 8-bit layer as `auto_round` lays them out."""
    spec = replace(preset("W8A16").weight, group=32)
    return format_named("auto_round:auto_gptq").write(codec_of(spec).quantize(weight, spec))


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("form", ["auto_gptq", "auto_awq", "llm_compressor", "mlx", "gguf:q4_0", "fake"])
def test_readers_that_turn_nothing_are_refused_with_the_remedy(form, tmp_path):
    tiny("llama", tmp_path / "model")
    job = AutoRound(tmp_path / "model", rotation_config=ONLINE, iters=0)
    with pytest.raises(
        FormatError, match=r"do not turn inputs at run time \(r1, r4\).*online_r1_rotation=False"
    ):
        job.quantize_and_save(tmp_path / "out", format=form)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wish", "error", "said"),
    [
        ("quarto", PlanError, "Did you mean 'quarot'"),
        ({"r1": False, "r2": False, "r3": True, "trainable_rotation": True}, PlanError, "trains R1 and R2"),
        ({"r1": True, "trainable_smooth": True}, PlanError, "goes with trainable_rotation"),
        ({"r1": True, "trainable_rotation": True, "iters": 0}, PlanError, "iters must be positive"),
        ({"r1": True, "r5": True}, PlanError, "'r5' is unknown"),
        ({"r1": False, "r2": False}, PlanError, "turns nothing"),
        ({"r1": True, "rotation_size": 48}, PlanError, "power of two"),
        ({"block_size": 48}, PlanError, "power of two"),
        ({"hadamard_type": "quarot_hadamard"}, PlanError, "rotation_config='quarot'"),
        ({"backend": "inplace"}, PlanError, "online_r1_rotation=False"),
        ('{"r1": tru}', PlanError, "no JSON"),
        (3, PlanError, "type int"),
    ],
    ids=str,
)
def test_a_rotation_that_is_none_is_refused_at_once(wish, error, said, tmp_path):
    tiny("llama", tmp_path)
    with pytest.raises(error, match=said):
        AutoRound(tmp_path, rotation_config=wish)


@pytest.mark.parametrize("name", ["gemma2", "opt", "qwen3-moe"])
def test_fusing_into_an_architecture_that_is_not_known_is_refused(name, tmp_path):
    from models import MOES

    assert name in {**KINDS, **MOES}
    tiny(name, tmp_path)
    with pytest.raises(PlanError, match=r"not among those.*llama"):
        AutoRound(tmp_path, rotation_config=FUSED, **RTN).subject()


def test_the_known_architectures_are_those_that_were_run():
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    for place, known in (("r1", PLAIN_STREAMS), ("r2", PLAIN_VALUES)):
        right = {row["model_type"] for row in rows if isinstance(row[place], float) and row[place] < 1e-4}
        assert known <= right, f"{place}: {known - right}"


@pytest.mark.parametrize(("name", "wish"), [("gpt2", ONLINE), ("bloom", SpinQuantConfig(r2=False))])
def test_rotations_that_find_no_layer_are_refused(name, wish, tmp_path):
    tiny(name, tmp_path)
    with pytest.raises(PlanError, match=r"none of the layers.*'default'"):
        turned(tmp_path, wish)


@pytest.mark.parametrize(
    "more", [{"imatrix": "x.dat"}, {"model_free": True}, {"distributed": "auto"}], ids=str
)
def test_what_is_about_the_model_as_it_is_does_not_go_with_rotations(more, tmp_path):
    tiny("llama", tmp_path)
    with pytest.raises(PlanError, match="rotation_config turns it"):
        AutoRound(tmp_path, rotation_config="quarot", **more)


def test_a_layer_has_no_rotation_of_its_own(tmp_path):
    tiny("llama", tmp_path)
    with pytest.raises(SchemeError, match="whole model's"):
        AutoRound(tmp_path, layer_config={"q_proj": {"rotation_config": "quarot"}}, **RTN)


def test_a_rotated_checkpoint_is_no_source(written):
    with pytest.raises(ModelError, match="turns inputs at run time"):
        AutoRound(written, **RTN).subject()


def number(value):
    """As checkpoints store one."""
    return torch.tensor(value, dtype=torch.int32)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda t: t.pop("model.layers.1.mlp.down_proj.spinquant_r4_size"), "missing"),
        (lambda t: t.update({"model.layers.1.mlp.down_proj.spinquant_r4_type": number(2)}), "type 2"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.spinquant_r1_size": number(48)}), "48"),
    ],
    ids=["missing", "trained", "size"],
)  # fmt: skip
def test_a_damaged_rotation_is_named(written, damage, said):
    tensors = load_file(written / "model.safetensors")
    damage(tensors)
    save_file(tensors, written / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=said):
        loaded(written)


# ------------------------------------------------------------------------------------------------ ways to ask for it


def test_every_spelling_means_the_same():
    quarot = SpinQuantConfig(r1=True, r2=True)
    for asked in (
        "quarot",
        "QuaRot",
        {"r1": True, "r2": True},
        {"algorithm": "spinquant"},
        '{"r1": true}',
        quarot,
    ):
        assert rotations_of(asked) == quarot
    for asked in ("default", "hadamard", {"hadamard_type": "hadamard"}, RotationConfig()):
        assert rotations_of(asked) == RotationConfig()
    assert rotations_of(None) is None
    from auto_round.algorithms.transforms.spinquant import SpinQuantConfig as documented

    assert documented is SpinQuantConfig


@pytest.mark.parametrize(
    "options",
    [
        {"algorithm": "quarot,rtn"},
        {"algorithm": "quarot", "iters": 0},
        {"scheme": QuantizationScheme(bits=8, group_size=32, rotation_config="quarot"), "iters": 0},
    ],
    ids=str,
)
def test_an_algorithm_or_a_scheme_may_ask_for_it(options, tmp_path):
    tiny("llama", tmp_path)
    job = AutoRound(tmp_path, **options)
    assert job.material.rotator.wish == SpinQuantConfig() and job.options.algorithm in (
        "rtn",
        None,
        "opt_rtn",
    )


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        (["--rotation_config", "quarot"], "spinquant_config"),
        (["--rotation-config", '{"r1": true, "r2": false, "r4": true}'], "spinquant_config"),
        (["--rotation_type", "hadamard", "--rotation_block_size", "16"], "rotation_config"),
        (["--rotation_type", "random_hadamard"], "rotation_config"),
        (["--algorithm", "hadamard"], "rotation_config"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_ask_for_it_too(flags, key, tmp_path):
    tiny("llama", tmp_path / "model")
    argv = ["--iters", "0", "--disable_opt_rtn", "--group_size", "32", "--output_dir", str(tmp_path / "out")]
    assert execute("default", [str(tmp_path / "model"), *argv, *flags]) == 0
    assert key in json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert torch.isfinite(logits(loaded(tmp_path / "out", quantization_config=AutoRoundConfig()))).all()


# --------------------------------------------------------------------------------------------------------- trained


@settings(deadline=None, max_examples=20)
@given(channels=st.sampled_from([4, 12, 64]), rate=st.sampled_from([0.1, 1.0, 100.0]), seed=st.integers(0, 9))
def test_a_step_of_training_stays_among_the_orthogonal_matrices_and_goes_down(channels, rate, seed):
    noise = torch.Generator().manual_seed(seed)
    wanted, start = torch.randn(channels, channels, generator=noise), Rotation(power_of_two(channels))
    matrix = Orthogonal(start, channels, torch.device("cpu"))
    before = ((matrix.value - wanted) ** 2).mean()
    for _ in range(10):
        loss = ((matrix.value - wanted) ** 2).mean()
        (gradient,) = torch.autograd.grad(loss, [matrix.value])
        matrix.step(gradient, rate)
    found = matrix.kept().matrix()
    assert torch.allclose(found @ found.T, torch.eye(channels), atol=1e-5)
    assert torch.allclose(found, matrix.value, atol=1e-4) and loss < before


def test_a_learned_rotation_is_its_matrix_block_by_block_and_can_be_undone():
    values = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))[0]
    x, turn = torch.randn(3, 12), Learned(6, values=values)
    assert torch.allclose(turn(x), torch.cat([x[:, :6] @ values, x[:, 6:] @ values], 1))
    assert torch.allclose(turn.back(turn(x)), x, atol=1e-5) and torch.allclose(turn.down(x.T), turn(x).T)
    assert turn.told() != Learned(6, values=values.T).told()


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_weights_may_take_up_any_orthogonal_matrices_and_factors(name, tmp_path):
    model, ids, noise = tiny(name, tmp_path).eval(), tokens(2), torch.Generator().manual_seed(3)
    before = logits(model, ids)
    untie(model)
    state = model.state_dict()

    def orthogonal(size):
        return Learned(size, values=torch.linalg.qr(torch.randn(size, size, generator=noise))[0])

    values = {f"model.layers.{i}.self_attn": orthogonal(16) for i in range(2)}
    norms = Fusion(state, state.__getitem__, Turns()).norms([n for n in state if "_proj" in n])
    factors = {norm: torch.rand(64, generator=noise) + 0.5 for norm in norms}
    turns = Turns(orthogonal(64), values.__getitem__, factors)
    for tensor, steps in Fusion(state, state.__getitem__, turns).changes.items():
        found = state[tensor].clone()
        for step in steps:
            found = step(found)
        state[tensor].copy_(found)
    assert len(norms) == 4 and torch.allclose(model.get_parameter(norms[0]), 1 / factors[norms[0]])
    assert torch.allclose(logits(model, ids), before, atol=1e-4)


@pytest.mark.parametrize("live", [False, True])
def test_a_model_with_trained_rotations_computes_what_it_did_before(live, tmp_path):
    model, ids = tiny("llama", tmp_path / "model"), tokens(2)
    before, embedding = logits(model, ids), model.get_input_embeddings().weight.clone()
    options = {**RTN, "dataset": samples(8), "seqlen": 32, "nsamples": 8, "rotation_config": TRAINED}
    job = AutoRound(model if live else tmp_path / "model", **options)
    job.quantize_and_save(tmp_path / "out", format="fake")
    rotated = loaded(tmp_path / "out")
    assert (logits(rotated, ids) - before).norm() <= 0.02 * before.norm()
    assert not torch.allclose(rotated.get_input_embeddings().weight, embedding, atol=0.01)


def test_the_same_seed_trains_the_same_bytes(tmp_path):
    tiny("qwen3", tmp_path / "model")
    options = {**RTN, "dataset": samples(8), "seqlen": 32, "nsamples": 8, "rotation_config": TRAINED}
    written = []
    for name in ("first", "second"):
        AutoRound(tmp_path / "model", **options).quantize_and_save(tmp_path / name, format="auto_round")
        written.append((tmp_path / name / "model.safetensors").read_bytes())
    assert written[0] == written[1]


def test_training_lowers_the_divergence_on_samples_that_it_has_not_seen(tmp_path, caplog):
    tiny("llama", tmp_path / "model")
    wish = SpinQuantConfig(trainable_rotation=True, iters=40, batch_size=4)
    options = {**RTN, "scheme": "W3A16", "dataset": samples(32), "seqlen": 32, "nsamples": 32}
    caplog.set_level("INFO")
    AutoRound(tmp_path / "model", rotation_config=wish, **options).quantize_and_save(tmp_path / "out")
    steps = [r.args for r in caplog.records if r.msg.startswith("rotations: step")]
    assert len(steps) == 10 and steps[-1][:2] == (40, 40)
    assert min(now for _, _, now, _, _ in steps) < 0.97 * steps[0][3]


def test_inputs_that_are_quantized_and_turned_at_run_time_go_along_with_training(tmp_path):
    tiny("llama", tmp_path / "model")
    wish = replace(TRAINED, r4=True)
    options = {**RTN, "scheme": "MXFP4", "dataset": samples(8), "seqlen": 32, "nsamples": 8}
    AutoRound(tmp_path / "model", rotation_config=wish, **options).quantize_and_save(tmp_path / "out")
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    told = said["spinquant_config"]
    assert told["trainable_rotation"] and not told["online_r1_rotation"] and told["r4"]
    assert read_rotations(said).online == ("r4",)
    assert torch.isfinite(logits(loaded(tmp_path / "out", quantization_config=AutoRoundConfig()))).all()


def test_rotations_that_were_trained_for_run_time_are_not_misread():
    said = {"spinquant_config": {"r1": True, "trainable_rotation": True, "online_r1_rotation": True}}
    with pytest.raises(FormatError, match="cannot be read"):
        read_rotations(said)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("gemma2", {}, "'gemma2' models"),
    ],
)
def test_training_that_cannot_be_is_refused(name, options, said, tmp_path):
    tiny(name, tmp_path / "model")
    data = {"dataset": samples(4), "seqlen": 32, "nsamples": 4}
    with pytest.raises(AutoRoundError, match=said):
        AutoRound(
            tmp_path / "model", rotation_config=TRAINED, **{**RTN, **data, **options}
        ).quantize_and_save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_training_rounds_each_layer_as_the_plan_has_it(tmp_path, monkeypatch):
    tiny("llama", tmp_path / "model")
    seen = []

    def no_training(task, wish, data, seed):
        seen.append(task)
        return Turns.fixed(task.config, wish, seed)

    monkeypatch.setattr("auto_round.rotating.train", no_training)
    chosen = {"layer_config": {"down_proj": {"bits": 4}}, "ignore_layers": "layers.1.mlp", "nsamples": 4}
    job = AutoRound(
        tmp_path / "model", rotation_config=TRAINED, dataset=samples(4), seqlen=32, **chosen, **RTN
    )
    job.quantize_and_save(tmp_path / "out")
    layers = {name: scheme.weight.bits for name, (_, scheme) in seen[0].layers.items()}
    assert len(seen) == 1 and layers.keys() == set(job.plan.quantized()) and len(layers) == 11
    assert {name for name, bits in layers.items() if bits == 4} == {"model.layers.0.mlp.down_proj"}


def test_ggml_types_and_their_fallbacks_are_trained_for(tmp_path):
    tiny("llama", tmp_path / "model")
    data = {"dataset": samples(8), "seqlen": 32, "nsamples": 8, "iters": 0, "device_map": "cpu"}
    job = AutoRound(tmp_path / "model", format="gguf:q4_k_m", rotation_config=TRAINED, **data)
    job.quantize_and_save(tmp_path / "out")
    assert list((tmp_path / "out").glob("*.gguf"))


def test_training_needs_data_and_memory(tmp_path, monkeypatch):
    tiny("llama", tmp_path / "model")
    with pytest.raises(AutoRoundError, match="nsamples=0"):
        AutoRound(tmp_path / "model", rotation_config=TRAINED, nsamples=0, **RTN).quantize_and_save(
            tmp_path / "out"
        )
    monkeypatch.setattr("auto_round.rotating.available_memory", lambda: 1000)
    data = {"dataset": samples(4), "seqlen": 32, "nsamples": 4}
    with pytest.raises(PlanError, match=r"samples of 32 tokens.*GB are free on cpu"):
        AutoRound(tmp_path / "model", rotation_config=TRAINED, **data, **RTN).quantize_and_save(
            tmp_path / "out"
        )


def test_nothing_is_trained_to_plan_or_for_what_is_impossible(tmp_path, monkeypatch):
    tiny("llama", tmp_path / "model")
    data = {"dataset": samples(4), "seqlen": 32, "nsamples": 4}
    monkeypatch.setattr("auto_round.rotating.train", lambda *_: pytest.fail("trained"))
    job = AutoRound(tmp_path / "model", rotation_config=TRAINED, **data, **RTN)
    assert job.outline("auto_round").sizes
    with pytest.raises(FormatError, match="4 bits only"):
        job.quantize_and_save(tmp_path / "out", format="auto_awq")


@pytest.mark.parametrize("live", [False, True])
def test_rotations_are_trained_to_quantize_in_memory_too(live, tmp_path):
    model = tiny("llama", tmp_path / "model")
    data = {"dataset": samples(8), "seqlen": 32, "nsamples": 8}
    wish = replace(TRAINED, r4=True)
    job = AutoRound(model if live else tmp_path / "model", rotation_config=wish, **data, **RTN)
    before = logits(tiny("llama", tmp_path / "again"))
    found, _ = job.quantize()
    assert (logits(found) - before).norm() <= 0.02 * before.norm()
    job.save_quantized(tmp_path / "out")
    written = loaded(tmp_path / "out", quantization_config=AutoRoundConfig())
    assert (logits(written) - before).norm() <= 0.02 * before.norm()
