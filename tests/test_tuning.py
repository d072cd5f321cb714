"""Each option of tuning changes what it says: blocks together, norms and biases, predictions, compiled blocks, time."""

import logging
import weakref

import pytest
import torch
from models import loaded, logits, samples, tiny, tokens
from safetensors.torch import load_file

from auto_round import AutoRound
from auto_round.core.errors import PlanError
from auto_round.jobs.budget import parse_duration, within
from auto_round.jobs.journal import JOURNAL
from auto_round.sources.rows import MemoryRows

TUNED = {
    "iters": 30,
    "nsamples": 8,
    "seqlen": 16,
    "batch_size": 4,
    "bits": 2,
    "group_size": 32,
    "start": "search",
}


SHORT = {**TUNED, "iters": 6, "lr": 0.03, "start": "none"}


class Results(list):
    """An observer that keeps what it is told, and raises after the block `stop_after`."""

    stop_after = None

    def started(self, plan, blocks):
        self.blocks = blocks

    def finished(self, result):
        self.append(result)
        if len(self) == self.stop_after:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama of three blocks, with biases in its layers."""
    path = tmp_path_factory.mktemp("tuning") / "model"
    tiny("llama", path, dtype=torch.bfloat16, num_hidden_layers=3, attention_bias=True)
    return path


def tuned(folder, **options):
    """(the model with quantized weights, results by block)."""
    # amp: what is compared differs by less than bfloat16 resolves.
    options = {"dataset": samples(8, 16), "amp": False, **TUNED, **options}
    job, seen = AutoRound(str(folder), device_map="cpu", **options), Results()
    job.observers.append(seen)
    return job.quantize()[0], seen


def states_after(model, blocks):
    """Hidden states (B, T, H) of unseen tokens after so many blocks of `model`."""
    with torch.no_grad():
        return model.float()(tokens(8, 16, seed=9), output_hidden_states=True).hidden_states[blocks]


def written(folder, out, stop_after=None, **options):
    """File name -> bytes of the checkpoint of a run, which may be stopped after some blocks."""
    job = AutoRound(str(folder), dataset=samples(8, 16), device_map="cpu", **{**SHORT, **options})
    job.observers.append(seen := Results())
    seen.stop_after = stop_after
    job.quantize_and_save(out, format="auto_round")
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def test_blocks_tuned_together_come_closer_to_their_common_output(folder):
    original = states_after(loaded(folder), 2)
    enough = {"dataset": samples(64, 16), "nsamples": 64}
    together, seen = tuned(folder, nblocks=2, **enough)
    untuned, _ = tuned(folder, **{**enough, "iters": 0})
    assert [result.name for result in seen] == ["model.layers.0-1", "model.layers.2"] and seen.blocks == 2
    assert seen[0].layers == 14 and seen[1].layers == 7
    off = [(states_after(model, 2) - original).square().mean() for model in (untuned, together)]
    assert off[1] < 0.98 * off[0]


@pytest.mark.parametrize(
    ("options", "most"), [({}, 2), ({"enable_quanted_input": False}, 2), ({"nblocks": 2}, 2)], ids=str
)
def test_hidden_states_are_in_memory_twice_and_no_more(options, most, folder, monkeypatch):
    alive, counts, make = weakref.WeakSet(), [], MemoryRows.__init__

    def counted(self, *args, **kwargs):
        make(self, *args, **kwargs)
        alive.add(self)
        counts.append(len(alive))

    monkeypatch.setattr(MemoryRows, "__init__", counted)
    tuned(folder, **{**SHORT, **options})
    assert max(counts) == most


def test_targets_in_the_place_of_inputs_are_the_outputs_of_the_original(folder):
    model, _ = tuned(folder, **SHORT, enable_quanted_input=False)
    other, _ = tuned(folder, **SHORT, enable_quanted_input=True)
    # The first block has the same inputs on both chains; only there are the two jobs the same.
    first = [dict(m.model.layers[0].named_parameters()) for m in (model, other)]
    assert all(torch.equal(value, first[1][name]) for name, value in first[0].items())


def test_tuned_norms_and_biases_lower_the_loss_of_a_block(folder):
    _, without = tuned(folder)
    _, along = tuned(folder, enable_norm_bias_tuning=True)
    assert along[0].report.losses["searched"] == without[0].report.losses["searched"]
    assert along[0].report.losses["tuned"] < without[0].report.losses["tuned"]


def test_of_the_tensors_that_are_not_quantized_norms_and_biases_change_and_nothing_else(folder, tmp_path):
    written(folder, tmp_path / "out", enable_norm_bias_tuning=True)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    kept = [name for name in before if name in after]
    changed = {name for name in kept if not torch.equal(before[name], after[name])}
    assert changed and all("layernorm" in name or name.endswith(".bias") for name in changed)
    assert all(after[name].dtype == before[name].dtype for name in kept)


def test_what_is_tuned_along_is_what_is_stored(folder, tmp_path):
    job = AutoRound(
        str(folder), dataset=samples(8, 16), device_map="cpu", enable_norm_bias_tuning=True, **TUNED
    )
    model, _ = job.quantize()
    job.save_quantized(tmp_path / "out", format="fake")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in model.state_dict().items():
        if "norm" in name or name.endswith(".bias"):
            assert torch.equal(saved[name], tensor), name


def test_the_last_block_tuned_on_predictions_predicts_more_like_the_original(folder):
    target = logits(loaded(folder), tokens(32, 32)).log_softmax(-1)

    def divergence(model):
        found = logits(model.float(), tokens(32, 32)).log_softmax(-1)
        return float((target.exp() * (target - found)).sum(-1).mean())

    more = {"dataset": samples(32, 32), "nsamples": 32, "seqlen": 32, "batch_size": 16, "lr": 0.02}
    start, _ = tuned(folder, **{**more, "iters": 0, "start": "search", "enable_opt_rtn": True})
    by_predictions, seen = tuned(folder, enable_lfq=True, **{**more, "iters": 40})
    assert seen[-1].report.losses["tuned"] < seen[-1].report.losses["searched"]
    assert divergence(by_predictions) < 0.9 * divergence(start)


def test_only_the_last_block_goes_by_predictions(folder):
    _, plain = tuned(folder)
    _, seen = tuned(folder, enable_lfq=True)
    assert [r.report for r in seen[:-1]] == [r.report for r in plain[:-1]]
    assert seen[-1].report.losses["plain"] != plain[-1].report.losses["plain"]


@pytest.mark.parametrize("options", [{"nblocks": 2}, {"enable_norm_bias_tuning": True}], ids=str)
def test_a_stopped_run_with_the_option_goes_on_to_the_same_bytes(folder, tmp_path, options):
    whole = written(folder, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        written(folder, tmp_path / "out", stop_after=1, **options)
    assert (tmp_path / "out" / JOURNAL).is_dir()
    assert written(folder, tmp_path / "out", resume=True, **options) == whole


@pytest.mark.parametrize(
    "options", [{"nblocks": 2}, {"enable_norm_bias_tuning": True}, {"enable_lfq": True}], ids=str
)
def test_a_stopped_run_does_not_go_on_with_another_option(folder, tmp_path, options):
    with pytest.raises(KeyboardInterrupt):
        written(folder, tmp_path / "out", stop_after=1)
    with pytest.raises(PlanError, match=r"was (1|False), is (2|True)"):
        written(folder, tmp_path / "out", resume=True, **options)


@pytest.mark.parametrize(
    "options", [{"nblocks": 2}, {"enable_norm_bias_tuning": True}, {"enable_lfq": True}], ids=str
)
def test_options_of_tuning_are_refused_where_nothing_is_tuned(folder, options):
    with pytest.raises(PlanError, match=f"{next(iter(options))}=.*this recipe does none"):
        AutoRound(str(folder), **{**TUNED, **options, "iters": 0})


def test_tuning_leaves_the_model_trainable_as_it_was():
    model = tiny("llama")
    model.model.norm.weight.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    AutoRound(model, dataset=samples(8, 16), device_map="cpu", **{**TUNED, "iters": 1}).quantize()
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_a_block_that_cannot_be_compiled_is_run_without(folder, tmp_path, monkeypatch, caplog):
    def refused(_function, **_options):
        def call(*_args, **_kwargs):
            raise torch._dynamo.exc.Unsupported("no compiler here")

        return call

    plain = written(folder, tmp_path / "plain")
    monkeypatch.setattr(torch, "compile", refused)
    with caplog.at_level(logging.WARNING, "auto_round"):
        assert written(folder, tmp_path / "out", enable_torch_compile=True) == plain
    assert "torch.compile failed, going on without: no compiler here" in caplog.text


@pytest.mark.slow
def test_compiled_blocks_are_tuned_like_others(folder):
    _, eager = tuned(folder)
    _, compiled = tuned(folder, enable_torch_compile=True)
    for one, other in zip(eager, compiled, strict=True):
        assert other.report.losses["tuned"] == pytest.approx(one.report.losses["tuned"], rel=0.1)


def test_deterministic_algorithms_are_on_during_the_run_and_off_after_it(folder):
    class Asked(Results):
        def finished(self, result):
            self.append(torch.are_deterministic_algorithms_enabled())

    for wanted in (True, False):
        job = AutoRound(
            str(folder), dataset=samples(8, 16), device_map="cpu", enable_deterministic_algorithms=wanted,
            **{**TUNED, "iters": 1},
        )  # fmt: skip
        job.observers.append(seen := Asked())
        job.quantize()
        assert seen == [wanted] * 3
        assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("said", "seconds"), [("10m", 600), ("90s", 90), ("1h30m", 5400), ("0.5h", 1800), (45, 45), ("45", 45)]
)
def test_a_duration_is_understood(said, seconds):
    assert parse_duration(said) == seconds


@pytest.mark.parametrize("said", ["soon", "10 minutes", "m", "-5s", "0", "5m later"])
def test_a_duration_that_is_none_is_an_error_with_examples(said):
    with pytest.raises(PlanError, match=rf"{said}.*10m, 90s, 1h30m"):
        parse_duration(said)


@pytest.mark.parametrize("budget", [19, 21, 40, 100, 520, 10_000])
def test_the_steps_chosen_fit_and_one_more_would_not(budget):
    def seconds(iters):
        return 10 + 0.5 * iters + min(iters, 10) * 0.1  # the held-out loss costs time in the first steps

    chosen = within(budget, seconds, 1000)
    assert seconds(chosen.iters) <= budget
    assert chosen.iters == 1000 or seconds(max(10, chosen.iters + 1)) > budget
    assert f"{chosen.iters} steps fit into {budget} s" in chosen.why


def test_a_budget_below_the_least_gives_no_steps_and_says_so():
    chosen = within(5, lambda iters: 10 + iters, 1000)
    assert chosen.iters == 0 and "will take longer than 5 s" in chosen.why


def test_a_time_budget_sets_the_steps_and_says_why(folder, caplog):
    with caplog.at_level(logging.INFO, "auto_round"):
        _, seen = tuned(folder, iters=3, time_budget="1h")
    assert [result.report.iterations for result in seen] == [3] * 3
    assert "3 steps fit into 3600 s" in caplog.text


def test_a_run_within_a_budget_goes_on_with_the_steps_it_began_with(folder, tmp_path, caplog):
    whole = written(folder, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        written(folder, tmp_path / "out", stop_after=1, time_budget="1h")
    with caplog.at_level(logging.INFO, "auto_round"):
        resumed = written(folder, tmp_path / "out", resume=True, time_budget="2h", iters=500)
    assert resumed == whole and "6 steps, as in the run that is resumed" in caplog.text
