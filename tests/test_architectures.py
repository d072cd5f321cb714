"""Every architecture end to end: blocks found, chains true to the model, checkpoints that stock transformers loads."""

import json
import os
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from models import BLOCKS, KINDS, VOCAB, loaded, logits, randomize, samples, tiny, tokens
from safetensors.torch import load_file
from transformers import (
    AutoRoundConfig,
    BertConfig,
    BertLMHeadModel,
    GenerationConfig,
    MambaConfig,
    MambaForCausalLM,
)

from auto_round import AutoRound
from auto_round.core.errors import DataError, ModelError
from auto_round.formats.base import parse_formats
from auto_round.models.anatomy import anatomy
from auto_round.outputs import open_writers
from auto_round.sources.base import Needs
from auto_round.sources.blocks import LiveSource
from auto_round.sources.dataset import Calibration
from auto_round.sources.live_block import Execution

SMALL = {"group_size": 32, "seqlen": 32, "batch_size": 2}
TUNED = {**SMALL, "iters": 3, "nsamples": 6}
RTN = {**SMALL, "iters": 0, "disable_opt_rtn": True}
MOVING = {"bits": 2, "iters": 10, "disable_opt_rtn": True}
"""Two bits from plain rounding: a few steps are sure to find something better."""
LAYERS_PER_BLOCK = {
    "phi": 6,
    "opt": 6,
    "phi3": 4,
    "gpt2": 4,
    "gpt-neox": 4,
    "falcon": 4,
    "falcon-alibi": 4,
    "bloom": 4,
}

each_architecture = pytest.mark.parametrize("name", KINDS)


class Watch:
    """An observer that keeps every report, and raises `error` after the first block when there is one."""

    def __init__(self, error=None):
        self.error, self.reports, self.blocks = error, {}, None

    def started(self, plan, blocks):
        self.blocks = blocks

    def finished(self, result):
        self.reports[result.name] = result.report
        if self.error is not None:
            raise self.error


def job(model, watch=None, **options):
    """An `AutoRound` on random tokens, watched by `watch`."""
    made = AutoRound(model, dataset=samples(6), **{**TUNED, **options})
    if watch is not None:
        made.observers.append(watch)
    return made


def tensors_of(folder):
    """All tensors of a checkpoint, whatever its shards."""
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def files_of(folder):
    """Name -> bytes of every file."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# ---------------------------------------------------------------------------------------------------------- anatomy


@each_architecture
def test_all_blocks_and_their_matrices_are_found(name):
    model = tiny(name)
    body = anatomy(model)
    (blocks,) = body.block_lists
    assert len(blocks) == BLOCKS
    per_block = Counter(layer.block for layer in body.layers.values() if layer.block)
    assert set(per_block.values()) == {LAYERS_PER_BLOCK.get(name, 7)} and set(per_block) == set(blocks)
    matrices = [n for n, p in model.named_parameters() if p.ndim == 2 and n.startswith(body.prefixes[0])]
    assert sorted(body.layers[n].tensor for n in body.in_blocks()) == sorted(matrices)
    assert body.tied == model.config.tie_word_embeddings


# ----------------------------------------------------------------------------------------------------------- chains


def padded(side):
    """Five samples of 32 tokens, the later ones with more padding on `side`; None for no padding."""
    ids, mask = tokens(5), torch.ones(5, 32, dtype=torch.int64)
    if side is None:
        return Calibration(ids)
    for row in range(1, 5):
        mask[row, slice(0, 3 * row) if side == "left" else slice(32 - 3 * row, 32)] = 0
    return Calibration(ids, mask)


def walk(model, data, replace):
    """Run both chains, giving each layer the weight `replace(w)`; (target, output) of the last block."""
    body = anatomy(model)
    source = LiveSource(model, body, Execution(device=torch.device("cpu"), batch_size=2), data)
    for block in source.blocks(Needs.FORWARD, body.in_blocks()):
        replaced = {layer: replace(weight.clone()) for layer, weight in block.weights.items()}
        rows = list(range(block.samples))
        with torch.no_grad():
            last = block.target(rows), block.run(rows, replaced)
        source.done(block, replaced)
    return last


@torch.no_grad()
def states_before_the_norm(model, data):
    """What the last block of `model` returns, by a hook on the block itself."""
    seen = []
    block = model.get_submodule(anatomy(model).block_lists[0][-1])
    handle = block.register_forward_hook(
        lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    model(input_ids=data.tokens, attention_mask=data.attention_mask, use_cache=False)
    handle.remove()
    return seen[0]


def assert_same(found, expected, data):
    """Equal up to the order of float sums, at every token that is no padding."""
    valid = torch.ones_like(data.tokens, dtype=torch.bool) if data.valid is None else data.valid
    torch.testing.assert_close(found[valid], expected[valid], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("side", [None, "left", "right"])
@each_architecture
def test_the_float_chain_is_the_model(name, side):
    model, data = tiny(name), padded(side)
    expected = states_before_the_norm(model, data)
    target, output = walk(model, data, lambda w: w)
    assert_same(target, expected, data)
    assert_same(output, expected, data)


@pytest.mark.parametrize("side", [None, "left"])
@each_architecture
def test_the_quantized_chain_is_the_model_with_the_replaced_weights(name, side):
    model, data = tiny(name), padded(side)
    expected = states_before_the_norm(model, data)
    target, output = walk(model, data, lambda w: (w * 8).round() / 8)
    assert_same(target, expected, data)
    assert_same(output, states_before_the_norm(model, data), data)
    assert not torch.allclose(output, target, atol=1e-2)


# ------------------------------------------------------------------------------------------------------ checkpoints


ADDS_ITSELF = {"gpt2": 2e-3, "falcon-alibi": 2e-3}
"""Conv1D and FalconLinear add the bias in their own way: (largest difference of float16 logits)."""


def assert_equal_logits(one, other, name):
    """Bit for bit, except where the model's own layer sums in another order."""
    slack = ADDS_ITSELF.get(name, 0.0)
    torch.testing.assert_close(logits(one), logits(other), atol=slack, rtol=slack)


@pytest.fixture(scope="module", params=KINDS)
def tuned(request, tmp_path_factory):
    """One tuned run per architecture, with every format."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny(request.param, folder / "model")
    made = job(folder / "model", scheme="W4A16", low_cpu_mem_usage=False)
    _, folders = made.quantize_and_save(folder / "out", format="auto_round,fake,auto_gptq,auto_awq")
    assert folders == [str(folder / "out" / out) for out in ("auto-round", "fake", "auto-gptq", "auto-awq")]
    return SimpleNamespace(name=request.param, job=made, out=folder / "out")


def test_a_tuned_checkpoint_loads_as_what_was_tuned(tuned):
    assert_equal_logits(loaded(tuned.out / "auto-round"), tuned.job.model, tuned.name)
    assert_equal_logits(loaded(tuned.out / "fake"), tuned.job.model, "exactly")


@pytest.mark.parametrize("fmt", ["auto-gptq", "auto-awq"])
def test_gptq_and_awq_checkpoints_load_through_auto_round_config(tuned, fmt):
    model = loaded(tuned.out / fmt, quantization_config=AutoRoundConfig(backend="torch"))
    assert_equal_logits(model, tuned.job.model, tuned.name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "phi", "gpt2", "opt"])
def test_a_checkpoint_loads_as_what_fake_stores_in_half_precision(name, dtype, tmp_path):
    tiny(name, tmp_path / "model")
    AutoRound(tmp_path / "model", **RTN).quantize_and_save(tmp_path / "out", format="auto_round,fake")
    packed, plain = (loaded(tmp_path / "out" / out, dtype) for out in ("auto-round", "fake"))
    assert {p.dtype for p in packed.parameters()} == {dtype}
    assert_equal_logits(packed, plain, name)


@each_architecture
def test_a_tuned_block_is_never_worse_than_a_searched_or_a_plain_one(name):
    watch = Watch()
    job(tiny(name), watch, scheme="W2A16G32", iters=6).quantize()
    assert len(watch.reports) == watch.blocks == BLOCKS
    for report in watch.reports.values():
        assert set(report.losses) == {"plain", "gptq", "tuned"} and report.iterations <= 6
        assert report.losses[report.kept] == min(report.losses.values())


@each_architecture
def test_streamed_bytes_are_in_memory_bytes(name, tmp_path):
    tiny(name, tmp_path / "model", dtype=torch.bfloat16)
    streamed = AutoRound(tmp_path / "model", **RTN)
    model, _ = streamed.quantize_and_save(tmp_path / "streamed")
    assert model is None and streamed.model is None
    whole = AutoRound(tmp_path / "model", disable_model_free=True, low_cpu_mem_usage=False, **RTN)
    model, _ = whole.quantize_and_save(tmp_path / "live")
    assert model is not None
    assert files_of(tmp_path / "streamed") == files_of(tmp_path / "live")


@each_architecture
def test_every_tensor_of_the_source_is_copied_or_replaced(name, tmp_path):
    tiny(name, tmp_path / "model", dtype=torch.bfloat16)
    made = AutoRound(tmp_path / "model", **RTN)
    made.quantize_and_save(tmp_path / "out")
    source, written = tensors_of(tmp_path / "model"), tensors_of(tmp_path / "out")
    replaced = {f"{made.subject().stored_name(layer)}.weight" for layer in made.plan.quantized()}
    assert replaced <= set(source) and not replaced & set(written)
    for tensor in set(source) - replaced:
        assert torch.equal(source[tensor], written[tensor]), tensor
    added = {
        name.removesuffix("weight") + part for name in replaced for part in ("qweight", "qzeros", "scales")
    }
    assert set(written) == set(source) - replaced | added
    with open_writers(
        made.material, tmp_path / "again", parse_formats("auto_round"), made.plan, several=False
    ) as (writer,):
        account = writer.layout.account
        assert sorted(account.copied + account.replaced) == sorted(source) and set(account.added) == added
        for layer, q in _encoded(made).items():
            writer.add(layer, q)


def _encoded(made):
    """Every layer of the plan of `made`, rounded to nearest."""
    from auto_round.codecs.base import codec_of

    subject, plan = made.subject(), made.plan
    found = {}
    for layer in plan.quantized():
        w = subject.files.store.get(subject.names[f"{layer}.weight"])
        w = w.t() if subject.anatomy.layers[layer].transposed else w
        found[layer] = codec_of(plan[layer].weight).quantize(w, plan[layer].weight)
    return found


# ------------------------------------------------------------------------------------- one architecture is enough


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama folder in bfloat16 with everything that travels along."""
    folder = tmp_path_factory.mktemp("llama")
    tiny("llama", folder, dtype=torch.bfloat16)
    GenerationConfig(max_new_tokens=7, bos_token_id=0).save_pretrained(folder)
    (folder / "special_notes.txt").write_text("travels")
    (folder / "weights.bin").write_bytes(b"stays")
    return folder


def test_the_same_seed_gives_the_same_bytes(llama, tmp_path):
    for out in ("one", "two"):
        job(llama, **MOVING).quantize_and_save(tmp_path / out)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_another_seed_gives_other_bytes(llama, tmp_path):
    for seed in (1, 2):
        job(llama, seed=seed, **MOVING).quantize_and_save(tmp_path / str(seed))
    one, two = (files_of(tmp_path / out)["model.safetensors"] for out in ("1", "2"))
    assert len(one) == len(two) and one != two


def test_quantize_then_save_gives_the_bytes_of_quantize_and_save(llama, tmp_path):
    job(llama).quantize_and_save(tmp_path / "at_once")
    made = job(llama)
    made.quantize()
    made.save_quantized(tmp_path / "later", format="auto_round")
    assert files_of(tmp_path / "at_once") == files_of(tmp_path / "later")


def test_one_run_with_several_formats_writes_what_one_run_each_writes(llama, tmp_path):
    AutoRound(llama, **RTN).quantize_and_save(tmp_path / "both", format="auto_round,auto_awq")
    for name in ("auto_round", "auto_awq"):
        AutoRound(llama, **RTN).quantize_and_save(tmp_path / name, format=name)
        assert files_of(tmp_path / "both" / name.replace("_", "-")) == files_of(tmp_path / name)


def test_a_live_model_gives_the_tensors_of_its_folder(llama, tmp_path):
    AutoRound(loaded(llama, torch.bfloat16), **RTN).quantize_and_save(tmp_path / "live")
    AutoRound(llama, **RTN).quantize_and_save(tmp_path / "folder")
    live, folder = tensors_of(tmp_path / "live"), tensors_of(tmp_path / "folder")
    assert set(live) == set(folder) and all(torch.equal(live[name], folder[name]) for name in live)
    assert torch.equal(logits(loaded(tmp_path / "live")), logits(loaded(tmp_path / "folder")))


def test_a_bfloat16_model_loads_as_what_quantize_returned(llama, tmp_path):
    made = job(llama)
    model, _ = made.quantize()
    made.save_quantized(tmp_path, format="auto_round")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(loaded(tmp_path, torch.bfloat16)), logits(model))


WIDTHS = [
    (2, True, 32),
    (3, True, -1),
    (8, True, 48),
    (2, False, -1),
    (3, False, 48),
    (4, False, 32),
    (4, False, 48),
]


@pytest.mark.parametrize(("bits", "sym", "group"), [*WIDTHS, (8, False, 32)])
def test_every_width_loads_as_what_fake_stores(tmp_path, bits, sym, group):
    tiny("llama", tmp_path / "model", num_hidden_layers=1)
    options = {**RTN, "bits": bits, "sym": sym, "group_size": group}
    AutoRound(tmp_path / "model", **options).quantize_and_save(tmp_path / "out", format="auto_round,fake")
    assert torch.equal(
        logits(loaded(tmp_path / "out" / "auto-round")), logits(loaded(tmp_path / "out" / "fake"))
    )


def test_tuning_beats_searching_when_there_is_enough_data():
    watch = Watch()
    made = AutoRound(
        tiny("llama"),
        dataset=samples(48),
        scheme="W2A16G32",
        iters=60,
        nsamples=48,
        seqlen=32,
        start="search",
    )
    made.observers.append(watch)
    made.quantize()
    assert all(r.kept == "tuned" and r.losses["tuned"] < r.losses["searched"] for r in watch.reports.values())


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), ModelError("bad")], ids=repr)
def test_a_run_that_breaks_off_leaves_nothing_but_its_journal(llama, tmp_path, error):
    made = job(llama, Watch(error))
    with pytest.raises(type(error)):
        made.quantize_and_save(tmp_path / "out", format="auto_round,auto_gptq")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".auto_round_journal"]


def test_a_run_that_breaks_off_before_its_first_block_leaves_nothing(llama, tmp_path):
    with pytest.raises(DataError):
        AutoRound(llama, dataset="no.jsonl").quantize_and_save(tmp_path / "a" / "b", format="auto_round,fake")
    assert not list(tmp_path.iterdir())


def test_a_run_that_breaks_off_leaves_an_older_checkpoint_whole(llama, tmp_path):
    AutoRound(llama, **RTN).quantize_and_save(tmp_path)
    before = files_of(tmp_path)
    with pytest.raises(RuntimeError):
        job(llama, Watch(RuntimeError("boom"))).quantize_and_save(tmp_path)
    assert files_of(tmp_path) == before


def test_a_killed_run_leaves_no_config_and_the_next_run_cleans_up(llama, tmp_path):
    child = os.fork()
    if child == 0:
        made = job(llama, SimpleNamespace(started=lambda *_: None, finished=lambda _: os._exit(9)))
        made.quantize_and_save(tmp_path / "out")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert (tmp_path / "out").is_dir() and not (tmp_path / "out" / "config.json").exists()
    AutoRound(llama, **RTN).quantize_and_save(tmp_path / "out")
    AutoRound(llama, **RTN).quantize_and_save(tmp_path / "clean")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "clean")


def test_a_new_checkpoint_replaces_an_older_one_without_a_trace(llama, tmp_path):
    AutoRound(llama, max_shard_size="20KB", **RTN).quantize_and_save(tmp_path / "out")
    AutoRound(llama, **RTN).quantize_and_save(tmp_path / "out", format="fake")
    AutoRound(llama, **RTN).quantize_and_save(tmp_path / "clean", format="fake")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "clean")


@pytest.mark.parametrize("fmt", ["auto_round", "fake"])
def test_sharded_output_has_a_right_index_and_loads(llama, tmp_path, fmt):
    AutoRound(llama, **RTN).quantize_and_save(tmp_path / "whole", format=fmt)
    AutoRound(llama, max_shard_size="50KB", **RTN).quantize_and_save(tmp_path / "parts", format=fmt)
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert len(shards) > 1 and not (tmp_path / "parts" / "model.safetensors").exists()
    assert index["weight_map"] == {name: shard.name for shard in shards for name in load_file(shard)}
    held = tensors_of(tmp_path / "parts")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in held.values())
    assert all(shard.stat().st_size < 60_000 for shard in shards)
    assert torch.equal(logits(loaded(tmp_path / "parts")), logits(loaded(tmp_path / "whole")))


def test_a_sharded_source_gives_the_bytes_of_a_whole_one(llama, tmp_path):
    loaded(llama, torch.bfloat16).save_pretrained(tmp_path / "parts", max_shard_size="50KB")
    assert (tmp_path / "parts" / "model.safetensors.index.json").is_file()
    AutoRound(tmp_path / "parts", **RTN).quantize_and_save(tmp_path / "from_parts")
    AutoRound(llama, **RTN).quantize_and_save(tmp_path / "from_whole")
    one, two = tensors_of(tmp_path / "from_parts"), tensors_of(tmp_path / "from_whole")
    assert set(one) == set(two) and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("fmt", ["auto_round", "auto_gptq", "auto_awq", "fake"])
def test_side_files_travel(llama, tmp_path, fmt):
    AutoRound(llama, **RTN).quantize_and_save(tmp_path, format=fmt)
    travelling = (
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "special_notes.txt",
    )
    for name in travelling:
        assert (tmp_path / name).read_bytes() == (llama / name).read_bytes(), name
    assert not (tmp_path / "weights.bin").exists()
    assert (tmp_path / "quantization_config.json").exists() == (fmt != "fake")


def test_the_tokenizer_of_a_live_model_travels(tmp_path):
    from models import tokenizer

    AutoRound(tiny("llama"), tokenizer(), **RTN).quantize_and_save(tmp_path)
    assert {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    } <= set(files_of(tmp_path))


def test_the_written_config_tells_what_the_files_hold(llama, tmp_path):
    layer = "model.layers.1.mlp.down_proj"
    config = {"k_proj": {"bits": 8}, layer: {"bits": 16}}
    AutoRound(llama, layer_config=config, **RTN).quantize_and_save(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert described == json.loads((tmp_path / "quantization_config.json").read_text())
    held = tensors_of(tmp_path)
    assert held["model.layers.0.self_attn.k_proj.qweight"].shape[0] == 64 * 8 // 32
    assert described["extra_config"]["model.layers.0.self_attn.k_proj"] == {"bits": 8}
    assert f"{layer}.weight" in held and described["extra_config"][layer]["bits"] == 16
    assert described["bits"] == 4 and described["group_size"] == 32 and described["sym"] is True


@pytest.mark.parametrize("options", [RTN, TUNED], ids=["rtn", "tuned"])
@pytest.mark.parametrize("name", ["llama", "qwen3-tied", "gpt2", "phi", "gemma2"])
def test_a_quantized_head_loads_as_what_fake_stores(name, options, tmp_path):
    model = tiny(name, tmp_path / "model")
    made = AutoRound(tmp_path / "model", dataset=samples(6), quant_lm_head=True, **options)
    made.quantize_and_save(tmp_path / "out", format="auto_round,fake")
    assert "lm_head" in made.plan.quantized()
    assert "lm_head.qweight" in tensors_of(tmp_path / "out" / "auto-round")
    one, other = (logits(loaded(tmp_path / "out" / out)) for out in ("auto-round", "fake"))
    assert torch.equal(one, other)
    assert not torch.allclose(one, logits(model))


@pytest.mark.parametrize("name", ["qwen3-tied", "opt", "gpt2", "gemma", "bloom"])
def test_tied_embeddings_stay_tied_and_unquantized_by_default(name, tmp_path):
    tiny(name, tmp_path / "model")
    made = AutoRound(tmp_path / "model", **RTN)
    made.quantize_and_save(tmp_path / "out")
    assert "lm_head" not in made.plan.quantized()
    assert not [tensor for tensor in tensors_of(tmp_path / "out") if tensor.startswith("lm_head")]
    model = loaded(tmp_path / "out")
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("name", ["qwen3-tied", "opt", "gpt2", "gemma", "bloom"])
def test_a_quantized_tied_head_is_untied_and_the_user_is_told(name, tmp_path):
    model = tiny(name, tmp_path / "model")
    made = AutoRound(tmp_path / "model", quant_lm_head=True, **RTN)
    made.quantize_and_save(tmp_path / "out")
    assert any("lm_head is tied to the embedding" in note for note in made.plan.notes)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    again = loaded(tmp_path / "out")
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize("head", [False, True])
def test_what_is_under_padding_changes_nothing(tmp_path, head):
    ids, mask = tokens(6), torch.ones(6, 32, dtype=torch.int64)
    mask[1:, 24:] = 0
    for filler in (5, 200):
        ids[1:, 24:] = filler
        data = [{"input_ids": row, "attention_mask": own} for row, own in zip(ids, mask)]
        made = AutoRound(tiny("llama"), dataset=data, quant_lm_head=head, **{**TUNED, "bits": 2})
        made.quantize_and_save(tmp_path / str(filler))
    assert files_of(tmp_path / "5") == files_of(tmp_path / "200")


@pytest.mark.parametrize("formats", ["auto_round", "auto_round,gguf:q4_0"])
def test_as_many_blocks_are_finished_as_were_announced(formats, tmp_path):
    tiny("llama", tmp_path / "m")
    watch, made = Watch(), AutoRound(tmp_path / "m", iters=0, dataset=samples(6), seqlen=16)
    made.observers.append(watch)
    made.quantize_and_save(tmp_path / "out", format=formats)
    assert watch.blocks == len(watch.reports)


@pytest.mark.parametrize("options", [{"iters": 0, "disable_opt_rtn": True}, {"iters": 1}])
def test_a_tied_bias_that_the_checkpoint_holds_once_is_read_for_both(options, tmp_path):
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    BertLMHeadModel(BertConfig(**sizes, num_attention_heads=2, is_decoder=True)).save_pretrained(
        tmp_path / "m"
    )
    made = AutoRound(tmp_path / "m", **SMALL, dataset=samples(4), **options)
    made.quantize_and_save(tmp_path / "out", format="auto_round,fake")
    packed, plain = (loaded(tmp_path / "out" / name) for name in ("auto-round", "fake"))
    assert_equal_logits(packed, plain, "bert")


@pytest.mark.parametrize("fmt", ["auto_round", "auto_gptq", "auto_awq"])
def test_readers_are_told_of_the_small_projections_of_state_space_layers(fmt, tmp_path):
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "state_size": 8,
        "time_step_rank": 32,
        "num_hidden_layers": 2,
    }
    model = MambaForCausalLM(
        MambaConfig(**sizes, use_cache=False, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    )
    randomize(model, 0)
    model.save_pretrained(tmp_path / "m")
    made = AutoRound(tmp_path / "m", **SMALL, sym=fmt != "auto_awq", iters=0, disable_opt_rtn=True)
    made.quantize_and_save(tmp_path / "out", format=f"{fmt},fake")
    asked = {} if fmt == "auto_round" else {"quantization_config": AutoRoundConfig(backend="torch")}
    packed = loaded(tmp_path / "out" / fmt.replace("_", "-"), **asked)
    assert {name.rpartition(".")[2] for name in made.plan.quantized()} == {"in_proj", "out_proj"}
    torch.testing.assert_close(logits(packed), logits(loaded(tmp_path / "out" / "fake")))
