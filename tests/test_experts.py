"""Mixtures of experts: every expert matrix is a layer under its checkpoint name, tuned, written, loaded."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
import transformers
from models import MOES, loaded, logits, randomize, samples, tiny, tokenizer
from safetensors import safe_open
from safetensors.torch import load_file

from auto_round import AutoRound
from auto_round.codecs.base import fake_inputs, preset
from auto_round.models.anatomy import anatomy
from auto_round.models.subject import Origin, open_subject
from auto_round.sources.activations import InputGrid
from auto_round.sources.expert_inputs import quantized_expert_inputs

SMALL = {"group_size": 32, "seqlen": 32, "batch_size": 4}
RTN = {**SMALL, "iters": 0, "disable_opt_rtn": True}
PROJECTIONS = {"mixtral": ("w1", "w3", "w2")}
PLACES = {"mixtral": "block_sparse_moe.experts", "llama4": "feed_forward.experts"}
FIRST_MOE_BLOCK = {"deepseek-v2": 1, "deepseek-v3": 1}

BRIEFLY = ("deepseek-v3", "gpt-oss", "llama4")
"""One of each way to call experts; the others are tuned in slow tests."""

each_moe = pytest.mark.parametrize("name", MOES)


def expected_layers(name):
    """The names of all expert matrices, as servers know them."""
    place, last = (
        PLACES.get(name, "mlp.experts"),
        PROJECTIONS.get(name, ("gate_proj", "up_proj", "down_proj")),
    )
    blocks = range(FIRST_MOE_BLOCK.get(name, 0), 2)
    return {f"model.layers.{b}.{place}.{e}.{p}" for b in blocks for e in range(4) for p in last}


def subject_of(folder=None, model=None):
    """The subject of a folder, or of a live model."""
    return open_subject(Origin(folder=folder, model=model, load_live=lambda: model))


def files_of(folder):
    """Name -> bytes of the weight files."""
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@each_moe
def test_every_expert_matrix_is_a_layer_and_no_router_is(name):
    body = anatomy(tiny(name))
    assert {layer for layer in body.layers if ".experts." in layer} == expected_layers(name)
    assert not [layer for layer in body.layers if layer.endswith((".gate", ".router", "shared_expert_gate"))]
    assert not body.notes


@each_moe
def test_the_experts_of_a_block_are_one_fused_set(name):
    body = anatomy(tiny(name))
    sets = [group for group in body.fused() if any(".experts." in layer for layer in group)]
    assert set().union(*sets) == expected_layers(name)
    assert len(sets) == 2 - FIRST_MOE_BLOCK.get(name, 0)


@each_moe
def test_a_live_model_and_its_folder_show_the_same_tensors(name, tmp_path):
    model = tiny(name, tmp_path)
    live, stored = subject_of(model=model), subject_of(tmp_path)
    assert dict(live.names) == dict(stored.names)
    assert set(live.files.store.infos) == set(stored.files.store.infos)
    for tensor in live.files.store.infos:
        assert torch.equal(live.files.store.get(tensor), stored.files.store.get(tensor)), tensor


def test_pieces_are_the_matrices_that_an_expert_multiplies_by():
    model = tiny("gpt-oss")
    experts = model.model.layers[0].mlp.experts
    layers = anatomy(model).layers
    x = torch.randn(5, 64)
    both = x @ experts.gate_up_proj[2] + experts.gate_up_proj_bias[2]
    for part, name in enumerate(("gate_proj", "up_proj")):
        layer = layers[f"model.layers.0.mlp.experts.2.{name}"]
        own = x @ layer.matrix(experts.gate_up_proj).T + experts.gate_up_proj_bias[2, part::2]
        torch.testing.assert_close(own, both[:, part::2])


@pytest.fixture(scope="module", params=MOES)
def rounded(request, tmp_path_factory):
    """One plainly rounded checkpoint per shape, streamed, in two formats."""
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny(request.param, folder / "model")
    AutoRound(folder / "model", **RTN).quantize_and_save(folder / "out", format="auto_round,fake")
    return SimpleNamespace(name=request.param, model=model, out=folder / "out")


def test_streamed_bytes_are_the_bytes_made_in_memory(rounded, tmp_path):
    AutoRound(copy.deepcopy(rounded.model), **RTN).quantize_and_save(tmp_path, format="auto_round,fake")
    for fmt in ("auto-round", "fake"):
        assert files_of(rounded.out / fmt) == files_of(tmp_path / fmt)


def test_every_expert_matrix_is_packed_and_every_router_kept(rounded):
    packed = load_file(rounded.out / "auto-round" / "model.safetensors")
    assert {f"{layer}.qweight" for layer in expected_layers(rounded.name)} <= set(packed)
    assert not [name for name in packed if re.search(r"experts\.(\d+\..*\.weight|gate_up_proj)$", name)]
    routers = [
        name for name in packed if name.endswith((".gate.weight", ".router.weight", "expert_gate.weight"))
    ]
    assert len(routers) >= 2 - FIRST_MOE_BLOCK.get(rounded.name, 0)


def test_packed_experts_load_as_the_model_with_rounded_weights(rounded):
    packed, plain = loaded(rounded.out / "auto-round"), loaded(rounded.out / "fake")
    torch.testing.assert_close(logits(packed), logits(plain), atol=1e-5, rtol=1e-5)
    assert (logits(plain) - logits(rounded.model)).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_experts_may_differ_in_their_scheme(name, tmp_path, caplog):
    tiny(name, tmp_path / "model")
    job = AutoRound(
        tmp_path / "model", ignore_layers=".experts.1", layer_config={".experts.2": {"bits": 8}}, **RTN
    )
    job.quantize_and_save(tmp_path / "out", format="auto_round,fake")
    assert "(2 times)" in caplog.text and "3 layers float" in caplog.text and "3 layers int8" in caplog.text
    packed, plain = loaded(tmp_path / "out" / "auto-round"), loaded(tmp_path / "out" / "fake")
    torch.testing.assert_close(logits(packed), logits(plain), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "gpt-oss"])
def test_the_mixed_scheme_has_experts_in_4_bits_and_other_layers_in_8(name, tmp_path):
    tiny(name, tmp_path / "model")
    job = AutoRound(tmp_path / "model", scheme="W4A16_MIXED", layer_config={"k_proj": {"bits": 3}}, **RTN)
    job.quantize_and_save(tmp_path / "out", format="auto_round,fake")
    bits = {layer: job.plan[layer].weight.bits for layer in job.plan.quantized()}
    experts = expected_layers(name)
    assert {bits[layer] for layer in experts} == {4}
    others = {layer: width for layer, width in bits.items() if layer not in experts}
    assert all(width == (3 if layer.endswith("k_proj") else 8) for layer, width in others.items())
    packed, plain = loaded(tmp_path / "out" / "auto-round"), loaded(tmp_path / "out" / "fake")
    torch.testing.assert_close(logits(packed), logits(plain), atol=1e-5, rtol=1e-5)


def test_the_mixed_scheme_is_plain_4_bits_in_a_model_without_experts(tmp_path):
    tiny("llama", tmp_path / "model")
    AutoRound(tmp_path / "model", scheme="W4A16_MIXED", **RTN).quantize_and_save(tmp_path / "mixed")
    AutoRound(tmp_path / "model", scheme="W4A16", **RTN).quantize_and_save(tmp_path / "plain")
    assert files_of(tmp_path / "mixed") == files_of(tmp_path / "plain")


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_experts_left_in_floating_point_are_stored_as_they_were(name, tmp_path):
    tiny(name, tmp_path / "model")
    AutoRound(tmp_path / "model", ignore_layers=".experts.", **RTN).quantize_and_save(tmp_path / "out")
    before, after = (load_file(tmp_path / part / "model.safetensors") for part in ("model", "out"))
    experts = [tensor for tensor in before if ".experts." in tensor]
    assert experts and all(torch.equal(before[tensor], after[tensor]) for tensor in experts)


def test_tuning_is_the_same_for_a_folder_and_a_live_model(tmp_path):
    model = tiny("gpt-oss", tmp_path / "model")
    options = {**SMALL, "iters": 3, "nsamples": 4, "dataset": samples(4)}
    AutoRound(tmp_path / "model", **options).quantize_and_save(tmp_path / "a")
    AutoRound(model, **options).quantize_and_save(tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


# ------------------------------------------------------------------------------------------------- tuning, starvation


class Watch:
    """An observer that keeps what it is told about each block."""

    def __init__(self):
        self.results = []

    def started(self, plan, blocks):
        pass

    def finished(self, result):
        self.results.append(result)


LONGER = [name if name in BRIEFLY else pytest.param(name, marks=pytest.mark.slow) for name in MOES]


@pytest.mark.parametrize("name", LONGER)
def test_tuned_logits_are_closer_to_the_original_than_rounded_ones(name):
    model, watch = tiny(name), Watch()
    rounded_model, _ = AutoRound(copy.deepcopy(model), bits=2, **RTN).quantize()
    options = {**SMALL, "iters": 15, "nsamples": 32, "dataset": samples(32)}
    job = AutoRound(copy.deepcopy(model), bits=2, **options)
    job.observers.append(watch)
    tuned_model, _ = job.quantize()
    errors = [(logits(other) - logits(model)).square().mean() for other in (tuned_model, rounded_model)]
    assert errors[0] < 0.95 * errors[1]
    chosen = 1 if name == "llama4" else 2
    counted = [sum(result.tokens.values()) for result in watch.results]
    assert counted == [0] * FIRST_MOE_BLOCK.get(name, 0) + [32 * 32 * chosen] * (
        2 - FIRST_MOE_BLOCK.get(name, 0)
    )


def inputs_of(experts, model, ids):
    """What `experts` get, (T, H)."""
    seen = []
    handle = experts.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    logits(model, ids)
    handle.remove()
    return seen[0]


@torch.no_grad()
def starving(name):
    """A model whose routers never choose expert 3: by its bias, or by a channel that is large for every token."""
    model = tiny(name)
    for path, router in model.named_modules():
        if path.rpartition(".")[2] not in ("gate", "router") or len(router.weight) != 4:
            continue
        if name == "gpt-oss":
            router.bias[3] = -100.0
        elif name == "deepseek-v3":
            router.e_score_correction_bias[3] = -100.0
        else:
            model.model.embed_tokens.weight[:, 0] = 100.0
            router.weight[3] = 0.0
            router.weight[3, 0] = -100.0
    return model


STARVED = [("gpt-oss", 3), *((name, 0) for name in MOES if name != "gpt-oss")]
STARVED = [each if each[0] in BRIEFLY else pytest.param(*each, marks=pytest.mark.slow) for each in STARVED]


@pytest.mark.parametrize(("name", "iters"), STARVED)
def test_a_starved_expert_is_named_and_no_worse_than_rounded(name, iters, caplog):
    model, watch, data = starving(name), Watch(), samples(8)
    experts = f"model.layers.1.{PLACES.get(name, 'mlp.experts')}"
    fused = model.get_submodule(anatomy(model).experts[-1].path)
    x = inputs_of(fused, model, torch.stack(data))
    found = [layer for n, layer in anatomy(model).layers.items() if n.startswith(f"{experts}.3.")]

    def matrices(other):
        return [layer.matrix(other.get_parameter(layer.parameter)).detach().clone() for layer in found]

    before, plain = matrices(model), AutoRound(copy.deepcopy(model), **RTN).quantize()[0]
    job = AutoRound(model, **{**SMALL, "iters": iters, "nsamples": 8, "dataset": data})
    job.observers.append(watch)
    job.quantize()
    assert watch.results[1].tokens[f"{experts}.3"] == 0
    assert {layer.name for layer in found} <= set(watch.results[1].starved)
    assert f"{experts}.3 (0 tokens)" in caplog.text
    inner = inner_states(fused, x, *before[:2])
    for own, rounded, weight, inputs in zip(matrices(model), matrices(plain), before, (x, x, inner)):
        error, allowed = (((w - weight) @ inputs.T).norm() for w in (own, rounded))
        assert error.isfinite() and error <= allowed * (1 + 1e-5)


@torch.no_grad()
def test_quantized_inputs_of_experts_are_those_of_each_layer():
    model = tiny("gpt-oss")
    fused, place = model.model.layers[1].mlp.experts, "model.layers.1.mlp.experts.3."
    layers = [layer for path, layer in anatomy(model).layers.items() if path.startswith(place)]
    act = preset("MXFP4").act
    grids = {layer.name: InputGrid(act, {}) for layer in layers}
    (experts,) = [found for found in anatomy(model).experts if found.path == "model.layers.1.mlp.experts"]
    x = torch.randn(5, 64)
    routing = torch.tensor([[3]] * 5), torch.full((5, 1), 0.5)
    with quantized_expert_inputs(fused, experts, grids):
        found = fused(x, *routing)
    gate, up, down = (layer.matrix(model.get_parameter(layer.parameter)) for layer in layers)
    inner = fake_inputs(inner_states(fused, fake_inputs(x, act, {}), gate, up), act, {})
    expected = inner @ down.T + fused.down_proj_bias[3]
    torch.testing.assert_close(found, 0.5 * expected)
    assert not torch.allclose(found, fused(x, *routing), atol=1e-3)


def inner_states(fused, x, gate, up):
    """What the down projection of expert 3 gets when every token of `x` is sent to it, by its other two matrices."""
    gate, up = x @ gate.T, x @ up.T
    if hasattr(fused, "limit"):  # GPT-OSS
        gate, up = gate + fused.gate_up_proj_bias[3, ::2], up + fused.gate_up_proj_bias[3, 1::2]
        gate, up = gate.clamp(max=fused.limit), up.clamp(-fused.limit, fused.limit)
        return (up + 1) * gate * torch.sigmoid(gate * fused.alpha)
    return torch.nn.functional.silu(gate) * up


class Mixture(torch.nn.Module):
    """Experts that are modules of their own, as code outside transformers has them; the last one is never chosen."""

    def __init__(self):
        super().__init__()
        self.gate = torch.nn.Linear(64, 4)
        self.experts = torch.nn.ModuleList(
            torch.nn.ModuleDict({"up": torch.nn.Linear(64, 64)}) for _ in range(4)
        )

    def forward(self, x):
        flat = x.reshape(-1, 64)
        chosen, out = self.gate(flat)[:, :3].argmax(-1), torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            mine = (chosen == number).nonzero()[:, 0]
            if len(mine):
                out = out.index_add(0, mine, expert["up"](flat[mine]))
        return out.view_as(x)


def test_separate_experts_are_counted_and_starved_ones_searched_by_their_weights(caplog, monkeypatch):
    # Its sums take one dtype only: on every machine a case of a block that cannot run under autocast.
    monkeypatch.setattr("auto_round.api.execution_dtype", lambda device: torch.bfloat16)
    model = tiny("llama")
    for block in model.model.layers:
        block.mlp = Mixture()
    watch, before = Watch(), copy.deepcopy(model)
    plain, _ = AutoRound(copy.deepcopy(model), **RTN).quantize()
    job = AutoRound(model, **{**SMALL, "iters": 2, "nsamples": 8, "dataset": samples(8)})
    job.observers.append(watch)
    job.quantize()
    tokens = watch.results[1].tokens
    assert sum(tokens.values()) == 8 * 32 and tokens["model.layers.1.mlp.experts.3"] == 0
    assert "model.layers.1.mlp.experts.3 (0 tokens)" in caplog.text
    assert caplog.text.count("model.layers.0 cannot compute in torch.bfloat16 (index_add_") == 1
    name = "model.layers.1.mlp.experts.3.up.weight"
    errors = [(other.get_parameter(name) - before.get_parameter(name)).norm() for other in (model, plain)]
    assert errors[0] <= errors[1] * (1 + 1e-6)


@pytest.mark.parametrize(
    "options",
    [{"iters": 0, "disable_opt_rtn": True}, {"iters": 0, "nsamples": 4}],
    ids=["streamed", "by data"],
)
def test_experts_that_a_checkpoint_keeps_in_modules_of_other_names_are_quantized_and_read_again(
    options, tmp_path
):
    settings = {"num_local_experts": 4, "num_experts_per_tok": 2, "hidden_size": 64, "intermediate_size": 96}
    config = transformers.GraniteMoeConfig(
        **settings, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=512
    )
    model = transformers.GraniteMoeForCausalLM(config).eval()
    randomize(model, 0)
    model.save_pretrained(tmp_path / "m")
    tokenizer().save_pretrained(tmp_path / "m")
    with safe_open(tmp_path / "m/model.safetensors", "pt") as file:  # else this is a case like the others
        assert "model.layers.0.block_sparse_moe.output_linear.weight" in file.keys()  # noqa: SIM118
    job = AutoRound(
        tmp_path / "m", group_size=32, dataset=samples(4), seqlen=16, format="auto_round,fake", **options
    )
    job.quantize_and_save(tmp_path / "q")
    assert len(job.plan.quantized()) == 2 * (4 + 4 * 3)
    ours, fake = (logits(loaded(tmp_path / "q" / name)) for name in ("auto-round", "fake"))
    torch.testing.assert_close(ours, fake, rtol=1e-4, atol=1e-4)
