"""A loaded checkpoint: saved again, dequantized, compiled, adapted, copied; forced backends; what is logged."""

import copy
import json
import logging
import pickle

import pytest
import torch
from models import loaded, logits, tiny, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoRoundConfig

from auto_round import AutoRound
from auto_round.backends.base import Kernel, backends
from auto_round.core.errors import FormatError, ModelError

FORMATS = ["auto_round", "auto_gptq", "auto_awq", "auto_round:gptqmodel"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small Llama in several formats: format -> folder."""
    root = tmp_path_factory.mktemp("inference")
    tiny("llama", root / "plain", hidden_size=128, intermediate_size=256)
    made = {}
    for fmt in FORMATS:
        job = AutoRound(
            root / "plain",
            scheme="W4A16",
            group_size=32,
            sym=fmt != FORMATS[-1],
            iters=0,
            disable_opt_rtn=True,
        )
        job.quantize_and_save(root / fmt.replace(":", "-"), format=fmt)
        made[fmt] = root / fmt.replace(":", "-")
    job = AutoRound(
        tiny("gpt2", root / "gpt2") and root / "gpt2", group_size=32, iters=0, disable_opt_rtn=True
    )
    job.quantize_and_save(root / "gpt2-w4")
    made["gpt2"] = root / "gpt2-w4"
    return made


def on(folder, backend, dtype=torch.float32):
    """The checkpoint in `folder` on one backend."""
    return loaded(folder, dtype, quantization_config=AutoRoundConfig(backend=backend))


def needs(name):
    """Skip with the reason when a backend does not run here."""
    reason = backends()[name].missing() or backends()[name].prepare()
    if reason:
        pytest.skip(f"{name}: {reason}")


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", ["cpu", "ark", "mlx", "auto"])
def test_every_backend_gives_the_logits_of_the_reference(folders, fmt, name):
    if name != "auto":
        needs(name)
    ids = tokens(1, 6)
    want, got = logits(on(folders[fmt], "torch"), ids), logits(on(folders[fmt], name), ids)
    assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("fmt", ["auto_round", "auto_round:gptqmodel", "gpt2"])
@pytest.mark.parametrize("name", ["cpu", "torch", "ark"])
def test_saving_a_loaded_model_writes_the_same_tensors(folders, tmp_path, fmt, name):
    needs(name)
    on(folders[fmt], name).save_pretrained(tmp_path)
    before, after = load_file(folders[fmt] / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for key in before:
        assert before[key].dtype == after[key].dtype or not key.endswith(("qweight", "qzeros", "scales")), key
        assert torch.equal(before[key].to(after[key].dtype), after[key]), key
    assert torch.equal(logits(on(tmp_path, name)), logits(on(folders[fmt], name)))


@pytest.mark.parametrize("fmt", ["auto_round", "gpt2"])
def test_dequantize_gives_a_plain_model_that_saves_and_loads_as_one(folders, tmp_path, fmt):
    model = loaded(folders[fmt])
    want = logits(on(folders[fmt], "torch"))
    plain = model.dequantize()
    assert not any(isinstance(module, Kernel) for module in plain.modules())
    assert torch.allclose(logits(plain), want, atol=1e-5)
    plain.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(logits(again), logits(plain))


def test_a_loaded_model_and_its_config_survive_copy_and_pickle(folders):
    model = loaded(folders["auto_round"])
    for config in (copy.deepcopy(model.config), pickle.loads(pickle.dumps(model.config))):
        assert config.quantization_config.bits == 4
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(model))


@pytest.mark.parametrize("name", ["cpu", "torch"])
def test_generation_with_a_static_cache_gives_the_same_tokens(folders, name):
    needs(name)
    model, ids = on(folders["auto_round"], name), tokens(1, 5)
    settings = {
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 2,
        "attention_mask": torch.ones_like(ids),
    }
    free = model.generate(ids, **settings)
    assert torch.equal(
        model.generate(ids, cache_implementation="static", disable_compile=True, **settings), free
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu", "torch"])
def test_a_compiled_model_gives_the_same_logits(folders, name):
    needs(name)
    model = on(folders["auto_round"], name)
    want = logits(model)
    model.forward = torch.compile(model.forward, backend="aot_eager")
    assert torch.allclose(logits(model), want, atol=1e-5)


@pytest.mark.filterwarnings(
    "ignore:Unsupported layer type:UserWarning"
)  # peft, of every layer it did not write
@pytest.mark.parametrize("name", ["torch", "cpu", "triton:interpreter"])
def test_adapters_train_on_quantized_layers(folders, name):
    peft = pytest.importorskip("peft")
    needs(name)
    from auto_round.inference.plain import lora_config

    model = peft.get_peft_model(
        on(folders["auto_round"], name), lora_config(r=2, target_modules=["q_proj", "up_proj"])
    )
    ids = tokens(1, 6)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    with pytest.raises(ModelError, match="cannot be merged"):
        model.merge_and_unload()


def test_one_line_per_kind_of_layer_says_what_runs_and_what_is_missing(folders, caplog):
    with caplog.at_level(logging.INFO, "auto_round"):
        on(folders["auto_round"], "torch")
    (line,) = [m for m in caplog.messages if "layers int4" in m]
    assert line.startswith("14 layers int4 g32 sym (auto_round:auto_gptq, float32, cpu) run on torch")


@pytest.mark.parametrize(
    ("name", "words"),
    [("marlin", "device cpu is not among cuda"), ("nonsense", "is unknown"), ("hpu", "hpu")],
)
def test_a_backend_that_cannot_is_an_error_with_its_reason(folders, name, words):
    with pytest.raises(FormatError, match=words):
        on(folders["auto_round"], name)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_rows_that_are_stored_longer_than_they_are_meet_zeros(backend, tmp_path):
    """auto-round 0.16 fills the last group up in model-free mode, and says no more than that."""
    if reason := backends()[backend].missing() or backends()[backend].prepare():
        pytest.skip(reason)
    tiny("llama", tmp_path / "m", hidden_size=96, intermediate_size=128)
    AutoRound(tmp_path / "m", iters=0, group_size=64, format="auto_round").quantize_and_save(tmp_path / "q")
    expected = logits(loaded(tmp_path / "q", backend=backend)).detach()
    tensors = load_file(tmp_path / "q/model.safetensors")
    longer = {
        name: torch.cat([t, torch.full((4, t.shape[1]), -1, dtype=t.dtype)])  # 96 = 12 x 8 codes, up to 128
        for name, t in tensors.items()
        if name.endswith("qweight") and t.shape[0] == 12
    }
    assert len(longer) == 2 * 4  # keys and values have 48 rows and stay as they are
    save_file({**tensors, **longer}, tmp_path / "q/model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "q/config.json").read_text())
    config["quantization_config"]["model_free"] = True
    (tmp_path / "q/config.json").write_text(json.dumps(config))
    model = loaded(tmp_path / "q", backend=backend)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert model.model.layers[0].self_attn.q_proj.in_features == 96  # what adapters go by
    copied = pickle.loads(pickle.dumps(model)) if backend == "torch" else copy.deepcopy(model)
    torch.testing.assert_close(logits(copied), expected, rtol=1e-4, atol=1e-5)
    plain = model.dequantize()
    assert plain.model.layers[0].self_attn.q_proj.weight.shape == (96, 96)
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)
