"""A budget of bits: what a choice costs is measured as defined, predicted as it turns out, and never overdrawn."""

import itertools
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import loaded, logits, samples, tiny
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

from auto_round import AutoRound, AutoScheme, QuantizationScheme
from auto_round.codecs.base import fake, preset
from auto_round.core.allocation import Option, allocate
from auto_round.core.errors import FormatError, PlanError, SchemeError
from auto_round.core.plan import Plan
from auto_round.jobs import auto_scheme
from auto_round.jobs.auto_scheme import Candidates, Sensitivities, agreeing, stored_bits
from auto_round.jobs.quantize import Pass
from auto_round.models.anatomy import anatomy as anatomy_of
from auto_round.sources.blocks import LiveSource
from auto_round.sources.dataset import Calibration
from auto_round.sources.live_block import Execution

NOVELIST = Path(__file__).parent.parent / "examples" / "novelist-8m"
QUICK = {"iters": 0, "nsamples": 4, "seqlen": 16, "amp": False}
PAIR = ("W2A16G32", "W8A16G32")


def mixture(avg_bits, options=PAIR, **settings):
    """A wish that takes no more samples than the job."""
    return AutoScheme(avg_bits=avg_bits, options=options, nsamples=4, seqlen=16, **settings)


# Choosing


@pytest.mark.parametrize("seed", range(20))
def test_a_choice_is_the_best_of_all_that_fit(seed):
    draw = random.Random(seed)
    groups = [
        [
            Option(draw.randint(1, 30), draw.random() * 2 ** -draw.randint(0, 6))
            for _ in range(draw.randint(1, 3))
        ]
        for _ in range(draw.randint(1, 6))
    ]
    budget = sum(min(option.cost for option in group) for group in groups) + draw.randint(0, 40)
    found = allocate(groups, budget)

    def total(picks, what):
        return sum(getattr(group[at], what) for group, at in zip(groups, picks, strict=True))

    fitting = [p for p in itertools.product(*(range(len(g)) for g in groups)) if total(p, "cost") <= budget]
    assert total(found, "cost") <= budget
    assert total(found, "loss") == pytest.approx(min(total(picks, "loss") for picks in fitting))


def test_costs_beyond_all_steps_are_never_overdrawn():
    draw = random.Random(0)
    groups = [[Option(10**9 * draw.randint(1, 99) + 7, draw.random()) for _ in range(4)] for _ in range(300)]
    least = sum(min(option.cost for option in group) for group in groups)
    budget = least + 10**12
    found = allocate(groups, budget)
    assert least < sum(group[at].cost for group, at in zip(groups, found, strict=True)) <= budget


def test_a_budget_below_the_cheapest_choice_is_refused():
    with pytest.raises(PlanError, match="more than the budget of 3"):
        allocate([[Option(4, 1.0), Option(5, 0.0)]], 3)


# Measuring


def drawn_loss(model, tokens, seed):
    """What the sources differentiate, by the model as a whole: one number per sample."""
    generator = torch.Generator().manual_seed(seed)
    for row in tokens:
        logp = log_softmax(model(row[None]).logits.float(), -1)[0]
        drawn = torch.multinomial(logp.detach().exp(), 1, generator=generator)
        yield -logp.gather(1, drawn).sum()


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3-moe", "gemma3", "qwen3-tied"])
def test_gradients_found_backwards_are_those_of_the_whole_model(name):
    model = tiny(name).eval()
    anatomy = anatomy_of(model)
    data = Calibration(torch.stack(samples(3, 16)), None)
    source = LiveSource(model, anatomy, Execution(device=torch.device("cpu"), quantized_inputs=False), data)
    wanted = anatomy.in_blocks() + ([anatomy.head] if not anatomy.tied else [])
    found = {}
    for _, samples_of_block in source.backwards(wanted, 5):
        for row, products in enumerate(samples_of_block):
            for layer, pairs in products.items():
                found[layer, row] = sum(gradient.T @ x for x, gradient in pairs)
    parameters = {layer: model.get_parameter(anatomy.layers[layer].parameter) for layer in wanted}
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for row, loss in enumerate(drawn_loss(model, data.tokens, 5)):
        model.zero_grad()
        loss.backward()
        for layer, parameter in parameters.items():
            expected = anatomy.layers[layer].matrix(parameter.grad)
            mine = found.get((layer, row), torch.zeros_like(expected))  # an expert that no token went to
            torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-5)


def test_the_predicted_divergence_is_the_measured_one():
    tokenizer = AutoTokenizer.from_pretrained(NOVELIST)
    model = AutoModelForCausalLM.from_pretrained(NOVELIST, dtype=torch.float32).eval()
    lines = (NOVELIST / "calibration.jsonl").read_text().splitlines()
    tokens = tokenizer(
        " ".join(json.loads(line)["text"] for line in lines[:40]), return_tensors="pt"
    ).input_ids
    tokens = tokens[:, : 16 * 128].view(16, 128)
    anatomy = anatomy_of(model)
    layers = {name: anatomy.shapes()[name] for name in anatomy.in_blocks()}
    schemes = {name: preset(name) for name in ("W4A16", "W3A16G64")}
    found = Sensitivities(Candidates(schemes=schemes, layers=layers, groups=[[name] for name in layers]))
    passes = {label: Pass(Plan(dict.fromkeys(layers, scheme), shapes=layers, base=scheme), [], [])
              for label, scheme in schemes.items()}  # fmt: skip
    data = Calibration(tokens, None)
    execution = Execution(device=torch.device("cpu"), quantized_inputs=False)
    found.measure(LiveSource(model, anatomy, execution, data), passes, tokens.numel(), 0)
    with torch.no_grad():
        before = log_softmax(model(data.tokens).logits, -1)
        for label, block in itertools.product(
            schemes, ("model.layers.0.", "model.layers.4.", "model.layers.7.")
        ):
            inside = [name for name in layers if name.startswith(block)]
            kept = {name: model.get_submodule(name).weight.clone() for name in inside}
            for name, weight in kept.items():
                model.get_submodule(name).weight.copy_(fake(weight, schemes[label].weight))
            after = log_softmax(model(data.tokens).logits, -1)
            measured = kl_div(after, before, reduction="none", log_target=True).sum(-1).mean().item()
            assert sum(found.losses[name][label] for name in inside) == pytest.approx(measured, rel=0.3)
            for name, weight in kept.items():
                model.get_submodule(name).weight.copy_(weight)


def test_inputs_that_are_quantized_count_too():
    model = tiny("llama")
    weights = QuantizationScheme(bits=8, group_size=32, data_type="mx_fp")
    both = QuantizationScheme(bits=8, group_size=32, data_type="mx_fp", act_bits=4, act_data_type="mx_fp")
    options = (QuantizationScheme(bits=4, group_size=32, data_type="mx_fp"), weights, both)
    job = AutoRound(model, scheme=mixture(8.25, options), dataset=samples(4, 16), **QUICK)
    job.quantize()
    assert {scheme.act for scheme in job.plan.values()} == {None}  # the same bits, and less lost


def test_a_layer_that_was_not_seen_loses_what_others_of_its_group_lose_per_weight():
    layers = {"b.0.e.0": (8, 8), "b.0.e.1": (8, 8), "b.0.e.2": (8, 16), "b.0.o": (8, 8)}
    schemes = {name: preset(name) for name in PAIR}
    groups = [["b.0.e.0", "b.0.e.1", "b.0.e.2"], ["b.0.o"]]
    found = Sensitivities(Candidates(schemes=schemes, layers=layers, groups=groups))

    class Two:
        """A source of one block whose third expert got no token and whose last layer is read in pieces."""

        def backwards(self, wanted, seed):
            block = SimpleNamespace(weights={name: torch.randn(shape) for name, shape in layers.items()})
            x, g = torch.randn(4, 8), torch.ones(4, 8)
            yield block, iter([{"b.0.e.0": [(x, g)], "b.0.e.1": [(x, g)], "b.0.o": [(x[:, :4], g)]}])

    plans = {
        label: Plan(dict.fromkeys(layers, scheme), shapes=layers, base=scheme)
        for label, scheme in schemes.items()
    }
    errors = {name: torch.full(shape, 0.1) for name, shape in layers.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auto_scheme, "_errors", lambda *_: errors)
        found.measure(Two(), {label: Pass(plan, [], []) for label, plan in plans.items()}, 4, 0)
    for label in PAIR:
        seen = [found.losses[f"b.0.e.{i}"][label] for i in (0, 1)]
        assert found.losses["b.0.e.2"][label] == pytest.approx(sum(seen)) and min(seen) > 0
        assert found.losses["b.0.o"][label] == pytest.approx(sum(seen) / 2)


# Agreeing


def test_layers_that_servers_merge_agree_and_shared_ones_too(tmp_path):
    shared = [["o_proj", "down_proj"]]
    model = tiny("qwen3", tmp_path / "model")
    job = AutoRound(
        tmp_path / "model", scheme=mixture(4.0, shared_layers=shared), dataset=samples(4, 16), **QUICK
    )
    _, folder = job.quantize_and_save(tmp_path / "out")
    assert len(set(job.plan.values())) == 2 and not job.plan.mixed_fused_sets()
    for block in range(2):
        path = f"model.layers.{block}"
        assert job.plan[f"{path}.self_attn.o_proj"] == job.plan[f"{path}.mlp.down_proj"]
    assert logits(loaded(Path(folder))).shape == logits(model).shape


def test_groups_are_joined_through_one_another_and_inside_blocks_only():
    layers = {f"b.{i}.{name}": f"b.{i}" for i in range(2) for name in ("q", "k", "o", "up")}
    groups = agreeing(layers, [["b.0.q", "b.0.k"], ["b.1.q", "b.1.k"]], [["q", "o"]])
    assert groups == [["b.0.q", "b.0.k", "b.0.o"], ["b.0.up"], ["b.1.q", "b.1.k", "b.1.o"], ["b.1.up"]]


def test_all_experts_of_a_block_get_the_same_scheme(tmp_path):
    tiny("qwen3-moe", tmp_path / "model")
    job = AutoRound(tmp_path / "model", scheme=mixture(5.0), dataset=samples(4, 16), **QUICK)
    job.quantize_and_save(tmp_path / "out", format="auto_round,fake")
    for block in range(2):
        experts = {job.plan[name] for name in job.plan if f"layers.{block}.mlp.experts" in name}
        assert len(experts) == 1
    assert torch.equal(
        logits(loaded(tmp_path / "out" / "auto-round")), logits(loaded(tmp_path / "out" / "fake"))
    )


# The budget


@pytest.mark.parametrize(
    ("avg_bits", "codes_only"),
    [(2.5, False), (3.0, False), (5.5, False), (8.5, False), (2.5, True), (5.5, True)],
)
def test_what_is_stored_is_within_the_budget(avg_bits, codes_only):
    wish = mixture(avg_bits, ignore_scale_zp_bits=codes_only)
    job = AutoRound(tiny("llama"), scheme=wish, dataset=samples(4, 16), **QUICK)
    job.quantize()
    bits = sum(stored_bits(job.plan[n], job.plan.shapes[n], codes_only=codes_only) for n in job.plan)
    weights = sum(rows * columns for rows, columns in job.plan.shapes.values())
    assert avg_bits - 1.5 < bits / weights <= avg_bits + 1e-3


def test_more_bits_never_predict_more_loss():
    layers = {f"b.{i}": (64, 64) for i in range(12)}
    schemes = {name: preset(name) for name in ("W2A16G32", "W4A16G32", "W8A16G32")}
    found = Sensitivities(Candidates(schemes=schemes, layers=layers, groups=[[n] for n in layers]))
    draw = random.Random(0)
    for losses in found.losses.values():
        losses.update(zip(schemes, sorted((draw.random() for _ in schemes), reverse=True), strict=True))
    mixes = [found.choose(bits / 10) for bits in range(25, 85, 5)]
    assert all(more.loss <= less.loss for less, more in itertools.pairwise(mixes))
    assert all(mix.bits <= bits / 10 for mix, bits in zip(mixes, range(25, 85, 5), strict=True))


def test_layers_that_were_decided_keep_their_scheme_and_count(tmp_path):
    config = {"model.layers.0.mlp.down_proj": {"bits": 8, "group_size": 32}}
    job = AutoRound(
        tiny("llama"), scheme=mixture(4.0), layer_config=config, ignore_layers="layers.1.self_attn",
        dataset=samples(4, 16), **QUICK,
    )  # fmt: skip
    job.quantize()
    assert job.plan["model.layers.0.mlp.down_proj"].weight.bits == 8
    assert all(job.plan[n].weight is None for n in job.plan if "layers.1.self_attn" in n)
    quantized = job.plan.quantized()
    bits = sum(stored_bits(job.plan[n], job.plan.shapes[n]) for n in quantized)
    assert bits <= 4.0 * sum(job.plan.shapes[n][0] * job.plan.shapes[n][1] for n in quantized) + 1


def test_a_head_that_is_quantized_is_chosen_for_too():
    job = AutoRound(tiny("llama"), scheme=mixture(4.0), quant_lm_head=True, dataset=samples(4, 16), **QUICK)
    job.quantize()
    assert "lm_head" in job.mix.chosen and job.plan["lm_head"].weight is not None
    bits = sum(stored_bits(job.plan[n], job.plan.shapes[n]) for n in job.plan)
    assert bits <= 4.0 * sum(rows * columns for rows, columns in job.plan.shapes.values())


# The job


def test_the_guides_example_writes_a_checkpoint_of_mixed_bits(tmp_path):
    tiny("qwen3", tmp_path / "model", hidden_size=128, intermediate_size=128)
    scheme = AutoScheme(avg_bits=3.0, options=("W2A16G64", "W4A16", "W8A16"))
    ar = AutoRound(
        model=tmp_path / "model", scheme=scheme, iters=0, nsamples=1, seqlen=32, dataset=samples(16, 32)
    )
    ar.quantize_and_save(tmp_path / "out", format="auto_round,fake")
    config = json.loads((tmp_path / "out" / "auto-round" / "config.json").read_text())["quantization_config"]
    held = {config["bits"], *(entry.get("bits", config["bits"]) for entry in config["extra_config"].values())}
    assert len(held) > 1 and held <= {2, 4, 8}
    assert torch.equal(
        logits(loaded(tmp_path / "out" / "auto-round")), logits(loaded(tmp_path / "out" / "fake"))
    )


def test_the_same_seed_chooses_the_same_and_a_live_model_is_not_changed_by_choosing():
    model = tiny("llama", dtype=torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plans = []
    for _ in range(2):
        job = AutoRound(model, scheme=mixture(4.0), dataset=samples(4, 16), **QUICK)
        job._formats(None)
        plans.append(dict(job.mix.chosen))
    assert plans[0] == plans[1] and len(set(plans[0].values())) == 2
    after = model.state_dict()
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype
        for name, tensor in before.items()
    )


def test_a_stream_follows_the_choice(tmp_path):
    tiny("llama", tmp_path / "model")
    job = AutoRound(
        tmp_path / "model",
        scheme=mixture(4.0),
        dataset=samples(4, 16),
        model_free=True,
        seqlen=16,
        nsamples=4,
    )
    job.quantize_and_save(tmp_path / "out")
    assert job.placement.workers and len(set(job.plan.values())) == 2


def test_gguf_types_are_mixed_and_the_rest_is_the_formats(tmp_path):
    from models import tokenizer

    wide = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 1}
    tiny("llama", tmp_path / "model", **wide)
    tokenizer().save_pretrained(tmp_path / "model")
    wish = mixture(3.5, ("GGUF:Q2_K_S", "GGUF:Q4_K_S"))
    job = AutoRound(tmp_path / "model", scheme=wish, dataset=samples(4, 16), **QUICK)
    _, folder = job.quantize_and_save(tmp_path / "out")
    types = {name: scheme.weight.dtype for name, scheme in job.plan.items()}
    assert types["lm_head"] == "q6_k"
    assert {kind for name, kind in types.items() if "layers" in name} == {"q2_k", "q4_k"}
    assert list(Path(folder).glob("*.gguf"))


def test_another_budget_needs_no_measuring_and_fits_layer_config(monkeypatch):
    model = tiny("llama")
    job = AutoRound(model, scheme=mixture(4.0), dataset=samples(4, 16), **QUICK)
    job.outline("auto_round", rehearse=False)
    monkeypatch.setattr(LiveSource, "backwards", lambda *_, **__: pytest.fail("measured"))
    more = job.mix.at(6.0)
    assert more.bits <= 6.0 and more.loss < job.mix.loss
    plan = AutoRound(model, layer_config=more.flat(), **QUICK).outline("auto_round", rehearse=False).plan
    assert {name: plan[name] for name in more.chosen} == dict(more.chosen)


def test_an_outline_tells_what_was_chosen_and_what_it_costs():
    job = AutoRound(tiny("llama"), scheme=mixture(4.0), dataset=samples(4, 16), **QUICK)
    outline = job.outline("auto_round", rehearse=False)
    note = next(note for note in outline.plan.notes if "AutoScheme" in note)
    assert f"{job.mix.bits:.3f} bits per weight" in note and all(label in note for label in PAIR)


def test_schemes_and_bits_are_short_for_a_budget():
    job = AutoRound(
        tiny("llama"), schemes=["W2A16G32", "W8A16G32"], bits=4.5, dataset=samples(16, 32), **QUICK
    )
    assert job.options.scheme == AutoScheme(avg_bits=4.5, options=["W2A16G32", "W8A16G32"])


# What is refused


@pytest.mark.parametrize(
    ("wish", "error", "said"),
    [
        (lambda: mixture(2.0), PlanError, r"avg_bits 2 is not possible.*2\.500 to 8\.500"),
        (lambda: mixture(9.0), PlanError, r"avg_bits 9 is not possible"),
        (lambda: mixture(-1), PlanError, "must be a positive number"),
        (lambda: mixture(4.0, []), PlanError, "options is empty"),
        (lambda: mixture(4.0, ("W2A16G32", "W9")), SchemeError, "W9"),
        (lambda: mixture(4.0, method="hessian"), PlanError, "method must be"),
        (lambda: mixture(4.0, batch_size=8), PlanError, "batch_size must be 1"),
    ],
)  # fmt: skip
def test_impossible_wishes_are_refused_before_anything_is_measured(wish, error, said, monkeypatch):
    monkeypatch.setattr(LiveSource, "backwards", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(error, match=said):
        AutoRound(tiny("llama"), scheme=wish(), dataset=samples(4, 16), **QUICK).quantize()


def test_an_option_that_a_format_cannot_hold_is_named_first(tmp_path):
    with pytest.raises(FormatError, match=r"AutoScheme option W2A16G32.*4 bits only"):
        AutoRound(
            tiny("llama"), scheme=mixture(4.0), dataset=samples(4, 16), format="auto_awq", **QUICK
        ).quantize()


def test_single_settings_beside_a_budget_are_refused():
    with pytest.raises(PlanError, match="group_size: with AutoScheme the options say it all"):
        AutoRound(tiny("llama"), scheme=mixture(4.0), group_size=64, **QUICK)
    with pytest.raises(PlanError, match="an average number of bits needs schemes"):
        AutoRound(tiny("llama"), bits=3.5, **QUICK)


def test_a_limit_that_gradients_would_break_is_refused(tmp_path):
    tiny("llama", tmp_path / "model")
    with pytest.raises(PlanError, match=r"max_ram 1,000,000 bytes is not enough for AutoScheme.*--max-ram"):
        AutoRound(
            tmp_path / "model", scheme=mixture(4.0), max_ram="1MB", dataset=samples(4, 16), **QUICK
        ).quantize_and_save(tmp_path / "out")
