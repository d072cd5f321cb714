"""Where things live: limits are kept or refused, hidden states may be in a file, layers may be on other devices."""

import json
import re
import weakref

import pytest
import torch
from models import samples, tiny, tokenizer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from auto_round import AutoRound
from auto_round.codecs.base import preset
from auto_round.core.errors import DataError, PlanError
from auto_round.core.plan import Plan
from auto_round.formats.base import formats, parse_formats
from auto_round.jobs import limits, placing
from auto_round.jobs.planner import Costs, Packed, choose, predict, spread
from auto_round.jobs.quantize import quantize
from auto_round.models.device import elsewhere, parse_devices
from auto_round.models.memory import Tally
from auto_round.models.shards import parse_size
from auto_round.sources.base import Block, Source
from auto_round.sources.rows import FileRows, MemoryRows
from auto_round.sources.self_text import bytes_of_one, sample_tokens

GB = 10**9
TUNED = {"iters": 2, "nsamples": 8, "seqlen": 16, "batch_size": 4, "group_size": 32, "disable_opt_rtn": True}
PRETENDED = {
    "base": GB, "outside": GB, "block": GB, "fixed": 4 * GB, "per_sample": 2 * GB, "states": GB // 10,
    "chains": 3, "samples": 40, "name": "model.layers.0",
}  # fmt: skip


def bytes_of(folder):
    """Name -> contents of every file."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_without_limits_everything_runs_at_once_in_memory():
    placed = choose([Costs(**PRETENDED)], 8, ("memory", "file"), max_ram=None, max_vram=None)
    assert (placed.micro_batch, placed.activations) == (8, "memory")


@pytest.mark.parametrize(
    ("max_ram", "expected"),
    [(33, (8, "memory")), (25, (4, "memory")), (20, (1, "memory")), (10, (2, "file")), (7, (1, "file"))],
)
def test_a_limit_costs_no_more_than_it_must(max_ram, expected):
    placed = choose([Costs(**PRETENDED)], 8, ("memory", "file"), max_ram=max_ram * GB, max_vram=None)
    assert (placed.micro_batch, placed.activations) == expected
    assert placed.ram <= max_ram * GB


@pytest.mark.parametrize(
    ("max_vram", "expected"), [(40 * GB, "device"), (10 * GB, "pinned")], ids=["room", "no-room"]
)
def test_hidden_states_stay_on_a_card_that_has_room(max_vram, expected):
    found = Costs(**PRETENDED, device="cuda")
    placed = choose([found], 8, ("device", "pinned", "file"), max_ram=None, max_vram=max_vram)
    assert placed.activations == expected and placed.vram <= max_vram


def test_a_limit_that_cannot_be_kept_names_the_one_that_can():
    with pytest.raises(PlanError, match=r"max_ram 2,000,000,000.*needs 7,000,000,000.*--max-ram 7.00GB"):
        choose([Costs(**PRETENDED)], 8, ("memory", "file"), max_ram=2 * GB, max_vram=None)
    with pytest.raises(PlanError, match=r"max_vram.*--max-vram 6.00GB"):
        choose([Costs(**PRETENDED, device="cuda")], 8, ("pinned", "file"), max_ram=None, max_vram=GB)


def test_the_smallest_limit_named_would_do():
    found = Costs(**PRETENDED)
    least = min(predict(found, home, 1)[0] for home in ("memory", "file"))
    assert choose([found], 8, ("memory", "file"), max_ram=least, max_vram=None).ram == least


def test_samples_at_once_divide_the_batch():
    found = Costs(**{**PRETENDED, "samples": 1})
    for wanted in (6, 7, 12):
        for limit in range(7, 32):
            try:
                placed = choose([found], wanted, ("file",), max_ram=limit * GB, max_vram=None)
            except PlanError:
                continue
            assert wanted % placed.micro_batch == 0


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_block_is_spread_evenly_and_the_first_device_gets_less(count):
    weights = {f"experts.{i}": 100 for i in range(60)} | {"q": 300, "k": 30}
    devices = [f"cuda:{i}" for i in range(count)]
    placed = spread(weights, devices)
    load = dict.fromkeys(devices, 0)
    for name, size in weights.items():
        load[placed.get(name, "cuda:0")] += size
    assert max(load.values()) - min(load[d] for d in devices[1:]) <= 300 and load["cuda:0"] <= min(
        list(load.values())[1:]
    )


def test_one_device_keeps_everything():
    assert spread({"a": 1, "b": 2}, ["cuda:0"]) == {}


@pytest.mark.parametrize("said", [None, 0, "0", "auto", "0,1,2,3", "cpu", torch.device("cpu")], ids=str)
def test_without_an_accelerator_numbers_mean_the_cpu(said):
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    assert parse_devices(said).devices == (torch.device("cpu"),)


@pytest.mark.parametrize(
    "said", ["cuda:0", "cuda:0,cuda:1", "xpu", "hpu", "cuda:77", "tpu", {"q_proj": "cuda:0"}], ids=str
)
@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "tuned"])
def test_a_device_that_is_not_there_is_named(said, streamed, tmp_path):
    if torch.cuda.is_available() and "77" not in str(said):
        pytest.skip("this machine has one")
    tiny("llama", tmp_path / "model")
    options = {**TUNED, "dataset": samples(8, 16), **({"iters": 0} if streamed else {})}
    with pytest.raises(PlanError, match="cannot be used here"):
        AutoRound(tmp_path / "model", device_map=said, **options).quantize_and_save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "said", ["experts.1.*:cpu,q_proj:meta", {"experts.1.*": "cpu", "q_proj": "meta"}], ids=["text", "dict"]
)
def test_layers_may_be_given_devices_by_pattern(said):
    devices = parse_devices(said)
    assert devices.of("model.layers.3.self_attn.q_proj") == torch.device("meta")
    assert devices.of("model.layers.3.mlp.experts.17.up_proj") == torch.device("cpu")
    assert devices.of("model.layers.3.self_attn.k_proj") is None


def test_a_layer_on_another_device_gets_its_inputs_there_and_gives_its_output_back():
    class Times(nn.Module):
        def __init__(self, device):
            super().__init__()
            self.weight, self.saw = nn.Parameter(torch.empty(4, 4, device=device)), None

        def forward(self, x, *, scale):
            self.saw = (x.device, scale.device)
            return x @ self.weight

    # Tensors without data know their device, which needs no card.
    with FakeTensorMode(), torch.no_grad():
        there, home = torch.device("cuda:1"), torch.device("cuda:0")
        layer, x = Times(there), torch.empty(2, 4, device=home)
        hooks = elsewhere(layer, there, home)
        assert layer(x, scale=x).device == home and layer.saw == (there, there)
        for hook in hooks:
            hook.remove()
        assert layer(x.to(there), scale=x).device == there and layer.saw == (there, home)


@pytest.mark.parametrize("make", [MemoryRows, lambda shape: FileRows(shape, None)], ids=["memory", "file"])
def test_rows_give_back_what_was_put(make):
    values = torch.randn(11, 3, 5)
    rows = make((11, 3, 5))
    for index in torch.randperm(11).tolist():
        rows[[index]] = values[[index]]
    copy = rows.copy()
    rows[[2, 7]] = torch.zeros(2, 3, 5)
    assert torch.equal(copy[[7, 0, 10]], values[[7, 0, 10]]) and not rows[[7, 2]].any()
    valid = torch.rand(11, 3) > 0.5
    assert torch.equal(torch.cat(list(copy.tokens(valid))), values[valid])


def test_hidden_states_in_a_file_change_no_byte(tmp_path, monkeypatch):
    tiny("llama", tmp_path / "model", dtype=torch.bfloat16)
    for out in ("memory", "file"):
        monkeypatch.setattr(placing, "_homes", lambda *_, home=out, **__: ((home,), ()))
        made = AutoRound(tmp_path / "model", dataset=samples(8, 16), quant_lm_head=True, **TUNED)
        made.quantize_and_save(tmp_path / out)
        assert made.placement.activations == out
    assert bytes_of(tmp_path / "memory") == bytes_of(tmp_path / "file")


def test_a_limit_is_kept_or_refused_before_anything_is_written(tmp_path):
    tiny("llama", tmp_path / "model")
    job = {"dataset": samples(8, 16), **TUNED}
    with pytest.raises(PlanError, match=r"max_ram.*--max-ram"):
        AutoRound(tmp_path / "model", max_ram="10MB", **job).quantize_and_save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = tmp_path / "report.json"
    AutoRound(tmp_path / "model", max_ram="64GB", report=str(report), **job).quantize_and_save(
        tmp_path / "out"
    )
    told = json.loads(report.read_text())
    planned, measured = told["memory"]["planned"]["ram"], told["memory"]["measured"]["ram"]
    assert measured == pytest.approx(planned, rel=0.1)
    assert told["seconds"]["planned"] > 0 and len(told["blocks"]) == 2 and len(told["layers"]) == 14


def test_rehearsing_leaves_a_live_model_as_it_was(tmp_path):
    model = tiny("llama", dtype=torch.bfloat16)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    made = AutoRound(model, dataset=samples(8, 16), max_ram="64GB", **TUNED)
    made._place([(made.make_plan(parse_formats("auto_round")), [])], measure=True)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name


def test_a_tally_counts_what_lives_and_what_lived_at_a_time():
    with Tally() as tally:
        a = torch.zeros(1000)
        b = a.view(10, 100).t()
        c = a + 1
        del a, b
        d = torch.zeros(500)
        assert tally.now["cpu"] == 4000 + 2000
        del c, d
    assert tally.now["cpu"] == 0 and tally.peak["cpu"] == 8000


def test_planned_sizes_are_exact_for_every_format(tmp_path):
    tiny("llama", tmp_path / "model", dtype=torch.bfloat16, hidden_size=256, intermediate_size=256)
    rtn = {"iters": 0, "disable_opt_rtn": True, "max_shard_size": "500KB"}
    left = set(formats())
    for scheme in ("W4A16", "FP8_BLOCK"):
        told = AutoRound(tmp_path / "model", scheme=scheme, **rtn).outline(rehearse=False)
        assert all(isinstance(size, int) or size for size in told.sizes.values())
        for name in sorted(left & {name for name, size in told.sizes.items() if isinstance(size, int)}):
            out = tmp_path / name.replace(":", "-")
            AutoRound(tmp_path / "model", scheme=scheme, **rtn).quantize_and_save(out, format=name)
            files = [*out.glob("*.safetensors"), *out.glob("*.gguf")]
            assert sum(path.stat().st_size for path in files) == told.sizes[name], name
            left.discard(name)
    assert not left, "a format that neither scheme can be stored in: add one that can"


@pytest.fixture
def no_process(monkeypatch):
    """Limits are about the work alone: as if the process itself took nothing."""
    from auto_round import sizing

    for module in (sizing, placing):
        monkeypatch.setattr(module, "base_memory", lambda: 0)


def test_types_made_together_are_planned_together(tmp_path, no_process):
    tiny("llama", tmp_path / "model", hidden_size=256, intermediate_size=256)
    types = {"gguf:q4_0": "gguf-q4-0", "gguf:q4_k_m": "gguf-q4-k-m"}

    def told(format_):
        return AutoRound(tmp_path / "model", iters=0, nsamples=0).outline(format_)

    both, alone = told(",".join(types)), [told(name) for name in types]
    assert list(both.plans) == list(types) and both.plan == alone[0].plan
    assert [set(plan.values()) for plan in both.plans.values()] == [set(one.plan.values()) for one in alone]
    assert both.sizes == alone[0].sizes | alone[1].sizes
    # What one type leaves in memory is there while the next is made.
    assert both.placement.ram > max(one.placement.ram for one in alone)
    AutoRound(tmp_path / "model", iters=0, nsamples=0, format=",".join(types)).quantize_and_save(
        tmp_path / "out"
    )
    for name, folder in types.items():
        (path,) = (tmp_path / "out" / folder).glob("*.gguf")
        assert path.stat().st_size == both.sizes[name]


def test_a_dry_run_shows_layers_sizes_memory_and_time_and_writes_nothing(tmp_path, capsys, monkeypatch):
    from auto_round.cli.main import execute

    monkeypatch.setenv("COLUMNS", "200")
    tiny("llama", tmp_path / "model")
    short = ["--nsamples", "8", "--seqlen", "16", "--iters", "2", "--group_size", "32", "--disable_opt_rtn"]
    for argv in (["plan", str(tmp_path / "model")], [str(tmp_path / "model"), "--dry_run"]):
        out = ["--format", "auto_round", "--output_dir", str(tmp_path / "out")]
        assert execute("default", [*argv, *short, *out]) == 0
        said = capsys.readouterr().out
        assert all(
            word in said for word in ("14 as int4 g32 sym", "auto_round", "planned peak", "estimated time")
        )
    assert not (tmp_path / "out").exists()


def smallest(message):
    """The limit that an error names, in bytes."""
    return re.search(r"--max-ram (\S+GB)", message)[1]


@pytest.mark.parametrize("kind", ["tuned", "streamed"])
def test_the_smallest_limit_that_an_error_names_is_kept(kind, tmp_path, no_process):
    # Limits are named in steps of 10 MB, and a layer of a stream takes little more than itself.
    wide = {"hidden_size": 512, "intermediate_size": 4096}
    wide = wide if kind == "streamed" else {"hidden_size": 256, "intermediate_size": 1024}
    tiny("llama", tmp_path / "model", dtype=torch.bfloat16, **wide)
    rtn = {"iters": 0, "disable_opt_rtn": True, "workers": 4}
    job = rtn if kind == "streamed" else {**TUNED, "dataset": samples(8, 16)}
    with pytest.raises(PlanError, match=r"max_ram 500,000 bytes is not enough") as caught:
        AutoRound(tmp_path / "model", max_ram="500KB", **job).quantize_and_save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    least = smallest(str(caught.value))
    made = AutoRound(tmp_path / "model", max_ram=least, **job)
    made.quantize_and_save(tmp_path / "out")
    assert 0 < made.placement.ram <= parse_size(least)
    if kind == "streamed":
        assert made.placement.workers < 4 and "have room for a layer each" in made.placement.why[0]
    AutoRound(tmp_path / "model", **{**job, "workers": 1}).quantize_and_save(tmp_path / "free")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "free")


def test_the_head_counts_when_it_is_quantized_and_codes_that_stay_do(tmp_path, no_process):
    tiny("llama", tmp_path / "model", vocab_size=8192)
    job = {"dataset": samples(8, 16), "max_ram": "64GB", **TUNED}

    def planned(keeps=False, **more):
        made = AutoRound(tmp_path / "model", **job, **more)
        made._place([(made.make_plan(parse_formats("auto_round")), [])], keeps=keeps)
        return made.placement.ram

    body, whole = planned(), planned(quant_lm_head=True)
    assert whole > body + 4 * 8192 * 64  # at least its float weight
    assert planned(keeps=True) > body


def test_padded_samples_count_with_their_masks(tmp_path, no_process):
    tiny("llama", tmp_path / "model")
    rows = [{"input_ids": row, "attention_mask": (torch.arange(64) > 9).long()} for row in samples(8, 64)]
    found = []
    for dataset in (samples(8, 64), rows):
        made = AutoRound(tmp_path / "model", dataset=dataset, max_ram="64GB", **{**TUNED, "seqlen": 64})
        made._place([(made.make_plan(parse_formats("auto_round")), [])])
        found.append(made.placement.ram)
    assert found[1] >= found[0] + 8 * 64 * 64  # a mask of T x T for each


def test_a_model_that_is_to_be_loaded_as_a_whole_must_fit(tmp_path, no_process):
    tiny("llama", tmp_path / "model")
    job = {"dataset": samples(8, 16), "max_ram": "100KB", **TUNED}
    with pytest.raises(PlanError, match=r"as a whole \(low_cpu_mem_usage=False\).*--max-ram"):
        AutoRound(tmp_path / "model", low_cpu_mem_usage=False, **job).quantize_and_save(tmp_path / "out")
    with pytest.raises(PlanError, match=r"as a whole \(quantize\(\) returns it.*--max-ram"):
        AutoRound(tmp_path / "model", **job).quantize()


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ([], "weights are read block by block: low_cpu_mem_usage=True"),
        (["--low_cpu_mem_usage"], "weights are read block by block: low_cpu_mem_usage=True"),
        (["--disable_low_cpu_mem_usage"], "weights are in memory as a whole: low_cpu_mem_usage=False"),
        (["--max_ram", "64GB"], "weights are read block by block: max_ram is to be kept"),
        (["--low_gpu_mem_usage"], "low_gpu_mem_usage: blocks run on the CPU"),
        (["--low_gpu_mem_usage", "--model_free"], "there are no hidden states to move"),
    ],
    ids=["nothing", "low-cpu", "not-low-cpu", "limit", "low-gpu", "stream"],
)
def test_the_plan_shows_what_the_presets_decide(said, words, tmp_path, capsys, monkeypatch):
    from auto_round.cli.main import execute

    monkeypatch.setenv("COLUMNS", "200")
    tiny("llama", tmp_path / "model")
    short = ["--nsamples", "4", "--seqlen", "16", "--group_size", "32", "--disable_opt_rtn"]
    short += [] if "--model_free" in said else ["--iters", "1"]
    if torch.cuda.is_available():
        short += ["--device_map", "cpu"]
    assert execute("default", ["plan", str(tmp_path / "model"), "--format", "auto_round", *short, *said]) == 0
    assert words in capsys.readouterr().out


def test_hidden_states_stay_off_the_device_when_low_gpu_mem_usage_says_so():
    from auto_round.jobs.placing import _homes

    card = torch.device("cuda:0")
    assert _homes(card, low_vram=False)[0] == ("device", "pinned", "file")
    homes, why = _homes(card, low_vram=True)
    assert homes == ("pinned", "file") and "low_gpu_mem_usage" in why[0]


def test_a_finished_block_is_gone_before_the_next_one_is_read():
    class One(Block):
        def __init__(self, name):
            self.name, self.weights = name, {f"{name}.up_proj": torch.randn(32, 32)}

    class Two(Source):
        can_run = False

        def blocks(self, needs, wanted, finished=()):
            first = One("model.layers.0")
            gone = weakref.ref(first)
            yield first
            del first
            assert gone() is None
            yield One("model.layers.1")

    names = {f"model.layers.{i}.up_proj": (32, 32) for i in range(2)}
    scheme = preset("W4A16")
    plan = Plan(dict.fromkeys(names, scheme), shapes=names, base=scheme)
    quantize(Two(), plan, [], [Packed([])])


def test_the_model_writes_its_own_text_within_the_limit_or_the_error_names_one(tmp_path, monkeypatch):
    from auto_round import material

    monkeypatch.setattr(material, "resident_memory", lambda: 0)
    tiny("llama", tmp_path / "model")
    job = {**TUNED, "dataset": "self", "nsamples": 16}

    def author(max_ram):
        made = AutoRound(tmp_path / "model", max_ram=max_ram, **job)
        return made.material, made.material._author()

    with pytest.raises(DataError, match=r"dataset 'self'.*as a whole meanwhile.*--max-ram 0.01GB"):
        author("100KB")
    weights = sum(p.stat().st_size for p in (tmp_path / "model").glob("*.safetensors"))
    one = bytes_of_one(tiny("llama"), 16)
    _, some = author(weights + 5 * one)
    assert some.together == 5
    kept, plenty = author("64GB")
    assert plenty.together == 32 and kept.model is None  # read block by block afterwards
    assert kept.author_bytes == pytest.approx(weights + 32 * one, rel=0.05)


def test_what_one_sample_takes_while_it_is_drawn_is_counted():
    model = tiny("llama", num_hidden_layers=6, vocab_size=512)

    def peak(together):
        with Tally() as tally:
            sample_tokens(model, tokenizer(), count=together, length=100, seed=0, together=together)
        return tally.peak["cpu"]

    each = (peak(12) - peak(4)) / 8
    assert bytes_of_one(model, 100) == pytest.approx(each, rel=0.2)


def test_a_peak_above_the_limit_is_told_once_and_freed_memory_goes_back_after_every_block(
    tmp_path, monkeypatch, caplog
):
    tiny("llama", tmp_path / "model")
    peaks, returned = iter([50 << 30, 65 << 30, 70 << 30]), []
    monkeypatch.setattr(limits, "peak_memory", lambda: next(peaks))
    monkeypatch.setattr(limits, "give_back", lambda: returned.append(True))
    job = AutoRound(tmp_path / "model", dataset=samples(8, 16), max_ram="64GB", **TUNED)
    job.quantize_and_save(tmp_path / "out")
    told = [record.getMessage() for record in caplog.records if "memory has peaked" in record.getMessage()]
    assert len(told) == 1 and "model.layers.0" in told[0] and "max_ram 64,000,000,000" in told[0]
    assert len(returned) == 2
