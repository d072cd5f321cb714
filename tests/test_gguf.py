"""GGUF files: names, orders, metadata, tokenizers, mixtures, and files that are whole or not there."""

import json
import shutil
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from auto_round import AutoRound
from auto_round.core.errors import AutoRoundError, DataError, FormatError, ModelError, OutputError, PlanError
from auto_round.formats.base import formats
from auto_round.jobs import gguf_export
from auto_round.models.imatrix import Origin, read_imatrix, write_imatrix
from tests import models

GGUFS = [fmt for fmt in formats().values() if fmt.whole_model]


def written(folder):
    """The only .gguf file of a folder, opened."""
    (path,) = Path(folder).glob("*.gguf")
    return gguf.GGUFReader(path)


def made(source, out, **options):
    """The file made from `source` without data."""
    settings = {"format": "gguf:q4_0", "iters": 0, "model_free": True, **options}
    _, folder = AutoRound(source, **settings).quantize_and_save(out)
    return written(folder)


def values(reader):
    """All keys and values of a file."""
    return {key: field.contents() for key, field in reader.fields.items()}


def floats(reader, name):
    """One tensor of a file as float32, in torch's order of dimensions."""
    tensor = next(t for t in reader.tensors if t.name == name)
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama whose rows are multiples of 256."""
    folder = tmp_path_factory.mktemp("llama")
    models.tiny("llama", folder, hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    return folder


@pytest.mark.parametrize("fmt", GGUFS, ids=lambda fmt: fmt.mixture)
def test_every_mixture_is_written_and_its_types_are_those_of_the_plan(llama, tmp_path, fmt):
    job = AutoRound(llama, format=fmt.name, iters=0, model_free=True)
    job.quantize_and_save(tmp_path)
    reader = written(tmp_path)
    assert values(reader)["general.file_type"] == fmt.file_type
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    names = {"model.embed_tokens": "token_embd", "lm_head": "output"}
    for layer, scheme in job.plan.items():
        if layer in names:
            expected = fmt.mixture.upper() if scheme.weight is None else scheme.weight.dtype.upper()
            assert types[f"{names[layer]}.weight"] == expected
    assert types["output_norm.weight"] == "F32"


def test_a_mixture_m_gives_more_bits_to_favoured_blocks(tmp_path):
    models.tiny("llama", tmp_path / "m", hidden_size=256, intermediate_size=256, num_hidden_layers=8)
    job = AutoRound(tmp_path / "m", scheme="GGUF:Q4_K_M", iters=0, model_free=True)
    _, folder = job.quantize_and_save(tmp_path / "out")
    types = {tensor.name: tensor.tensor_type.name for tensor in written(folder).tensors}
    favoured = [i for i in range(8) if types[f"blk.{i}.ffn_down.weight"] == "Q6_K"]
    assert favoured == [0, 3, 6, 7]
    assert types["output.weight"] == "Q6_K" and types["blk.1.ffn_down.weight"] == "Q4_K"
    assert "favoured" in job.plan.why["model.layers.3.mlp.down_proj"]


QKV_TYPES = {
    "q2_k": "33333333", "q2_k_s": "22222222", "q3_k_s": "33333333", "q3_k_m": "55444444", "q3_k_l": "55555555",
    "q4_k_s": "55554444", "q4_k_m": "64464466", "q5_k_s": "55555555", "q5_k_m": "65565566", "q6_k": "66666666",
}  # fmt: skip
"""Bits of query, key and value matrices of GPT-2 with 8 blocks, by benchmarks/gguf/mixtures.py those of llama.cpp."""


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A GPT-2 whose rows are multiples of 256."""
    folder = tmp_path_factory.mktemp("gpt2")
    models.tiny("gpt2", folder, n_embd=256, n_layer=8)
    return folder


@pytest.mark.parametrize("mixture", QKV_TYPES)
def test_a_matrix_with_the_values_in_it_is_treated_as_values(gpt2, mixture):
    plan = AutoRound(gpt2, format=f"gguf:{mixture}", model_free=True).outline(rehearse=False).plan
    found = [plan[f"transformer.h.{i}.attn.c_attn"].weight.bits for i in range(8)]
    assert "".join(map(str, found)) == QKV_TYPES[mixture]


@pytest.mark.parametrize(
    ("mixture", "values", "output"),
    [("q2_k_s", "q8_0", "q2_k"), ("q3_k_l", "q8_0", "q3_k"), ("q4_k_m", "q8_0", "q5_k"), ("q6_k", "q8_0", "q6_k"),
     ("q4_0", "q8_0", "q4_0")],
)  # fmt: skip
def test_small_matrices_beside_eight_experts_are_those_of_llama_cpp(tmp_path, mixture, values, output):
    models.tiny("mixtral", tmp_path / "m", hidden_size=256, intermediate_size=256, num_local_experts=8)
    plan = AutoRound(tmp_path / "m", format=f"gguf:{mixture}", model_free=True).outline(rehearse=False).plan
    types = {
        name.rpartition(".")[2]: scheme.weight.dtype for name, scheme in plan.items() if ".0.self" in name
    }
    assert types["v_proj"] == types["k_proj"] == values and types["o_proj"] == output


def test_rows_of_queries_and_keys_are_put_in_the_order_of_llama_cpp(llama, tmp_path):
    reader = made(llama, tmp_path, format="gguf:bf16")
    weight = models.loaded(llama).model.layers[1].self_attn.q_proj.weight
    rows = floats(reader, "blk.1.attn_q.weight")
    size = 256 // models.HEADS
    for head in range(models.HEADS):
        for i in range(size // 2):  # neighbours in the file are half a head apart in the checkpoint
            for half in (0, 1):
                expected = weight[head * size + half * size // 2 + i].bfloat16().float()
                assert torch.equal(rows[head * size + 2 * i + half], expected)


def test_what_is_in_the_file_is_what_the_codec_made(llama, tmp_path):
    data = {"dataset": models.samples(4), "seqlen": 32, "low_cpu_mem_usage": False}
    job = AutoRound(
        llama, format="gguf:q4_k_s", iters=0, disable_model_free=True, model_dtype="float32", **data
    )
    model, folder = job.quantize_and_save(tmp_path)
    reader = written(folder)
    for layer, name in {"mlp.down_proj": "ffn_down", "self_attn.v_proj": "attn_v"}.items():
        weight = model.get_submodule(f"model.layers.0.{layer}").weight
        assert torch.equal(floats(reader, f"blk.0.{name}.weight"), weight)
    assert torch.equal(floats(reader, "token_embd.weight"), model.model.embed_tokens.weight)
    assert torch.equal(floats(reader, "output.weight"), model.lm_head.weight)


def test_tied_models_have_one_matrix_of_the_type_of_the_head(tmp_path):
    models.tiny("qwen3-tied", tmp_path / "m", hidden_size=256, intermediate_size=256)
    reader = made(tmp_path / "m", tmp_path / "out", format="gguf:q4_k_m")
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["token_embd.weight"] == "Q6_K" and "output.weight" not in types


def test_narrow_rows_take_types_of_32_values_and_say_so(tmp_path, caplog):
    models.tiny("llama", tmp_path / "m")
    job = AutoRound(tmp_path / "m", format="gguf:q5_k_m", iters=0, model_free=True)
    _, folder = job.quantize_and_save(tmp_path / "out")
    assert job.plan["model.layers.1.self_attn.k_proj"].weight.dtype == "q5_1"
    assert "no multiple of 256" in job.plan.why["lm_head"] and "no multiple of 256" in caplog.text
    assert {t.tensor_type.name for t in written(folder).tensors} <= {"Q5_1", "Q8_0", "F32"}


def test_layer_config_has_the_last_word(llama, tmp_path):
    settings = {"lm_head": "GGUF:Q8_0", "k_proj": {"bits": 6}, "model.layers.0.mlp.up_proj": {"bits": 16}}
    reader = made(llama, tmp_path, format="gguf:q2_k_s", layer_config=settings)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["output.weight"] == "Q8_0" and types["blk.1.attn_k.weight"] == "Q6_K"
    assert types["blk.0.ffn_up.weight"] == "F32" and types["blk.1.ffn_up.weight"] == "Q2_K"


def test_several_types_are_made_in_one_pass(llama, tmp_path):
    alone = made(llama, tmp_path / "alone", format="gguf:q4_1")
    types = "gguf:q8_0,gguf:q4_1,auto_round"
    job = AutoRound(llama, format=types, iters=0, model_free=True, max_ram="64GB")
    _, folders = job.quantize_and_save(tmp_path / "several")
    assert [Path(f).name for f in folders] == ["auto-round", "gguf-q8-0", "gguf-q4-1"]
    both = written(folders[2])
    for one, other in zip(alone.tensors, both.tensors, strict=True):
        assert one.name == other.name and (one.data == other.data).all()


def test_a_split_file_holds_the_same_tensors(llama, tmp_path):
    whole = {t.name: t.data for t in made(llama, tmp_path / "whole").tensors}
    AutoRound(llama, format="gguf:q4_0", iters=0, model_free=True, split_size="300KB").quantize_and_save(
        tmp_path / "parts"
    )
    paths = sorted((tmp_path / "parts").glob("*.gguf"))
    assert len(paths) > 2 and paths[0].name.endswith(f"-00001-of-{len(paths):05}.gguf")
    parts = {t.name: t.data for path in paths for t in gguf.GGUFReader(path).tensors}
    assert parts.keys() == whole.keys() and all((parts[name] == whole[name]).all() for name in whole)


def test_a_live_model_brings_its_own_tokenizer(tmp_path):
    model = models.tiny("llama")
    _, folder = AutoRound(model, models.tokenizer(), format="gguf:q8_0", iters=0).quantize_and_save(tmp_path)
    found = values(written(folder))
    assert found["tokenizer.ggml.tokens"][0] == "<s>" and found["tokenizer.ggml.pre"] == "gpt-2"


# ------------------------------------------------------------------------------------------------ what goes wrong


def nothing_left(folder):
    """Whether a failed job left no trace."""
    return not folder.exists() or not any(folder.iterdir())


def test_a_missing_tokenizer_stops_before_work(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        made(tmp_path / "m", tmp_path / "out")
    assert nothing_left(tmp_path / "out")


def test_more_tokens_than_rows_stop_before_work(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "m")
    path = tmp_path / "m" / "tokenizer.json"
    described = json.loads(path.read_text())
    described["added_tokens"].append({**described["added_tokens"][0], "id": 999, "content": "<late>"})
    path.write_text(json.dumps(described))
    with pytest.raises(ModelError, match="1000 tokens, but the model's embedding has 384 rows"):
        made(tmp_path / "m", tmp_path / "out")
    assert nothing_left(tmp_path / "out")


def test_an_unknown_architecture_is_refused_with_the_list(tmp_path):
    models.tiny("opt", tmp_path / "m")
    with pytest.raises(ModelError, match=r"OPTForCausalLM.*LlamaForCausalLM"):
        made(tmp_path / "m", tmp_path / "out")
    assert nothing_left(tmp_path / "out")


def test_rows_that_fit_no_block_stay_in_floating_point(tmp_path):
    models.tiny("llama", tmp_path / "m", intermediate_size=100)
    job = AutoRound(tmp_path / "m", format="gguf:q4_k_m", iters=0, model_free=True)
    _, folder = job.quantize_and_save(tmp_path / "out")
    types = {tensor.name: tensor.tensor_type.name for tensor in written(folder).tensors}
    assert types["blk.0.ffn_down.weight"] == "F32"
    assert "rows of 100 are no multiple of 32" in job.plan.why["model.layers.0.mlp.down_proj"]


def test_a_full_disk_is_an_error_and_leaves_nothing(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(OutputError, match="10 are free"):
        made(llama, tmp_path / "out")
    assert nothing_left(tmp_path / "out")


def test_an_existing_file_is_replaced_only_by_a_whole_one(llama, tmp_path, monkeypatch):
    made(llama, tmp_path)
    (path,) = tmp_path.glob("*.gguf")
    before = path.read_bytes()
    monkeypatch.setattr(gguf_export, "header_of", lambda path: (_ for _ in ()).throw(OSError("broken")))
    with pytest.raises(OutputError, match="broken"):
        made(llama, tmp_path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".auto_round_journal")] == [path.name]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"format": "gguf:q4_k"}, FormatError, "gguf:q4_k_"),
        ({"format": "gguf:q4_0", "scheme": "GGUF:Q8_0"}, PlanError, "gguf:q8_0"),
        ({"format": "auto_round", "scheme": "GGUF:Q8_0"}, PlanError, "written by format gguf:q8_0"),
        ({"format": "gguf:q4_0", "bits": 3}, PlanError, "scheme of its own"),
        ({"format": "gguf:q4_0", "layer_config": {"k_proj": {"bits": 7}}}, FormatError, "k_proj"),
        ({"scheme": "GGUF:Q4_K_X"}, AutoRoundError, "Did you mean 'GGUF:Q4_K_"),
    ],
)
def test_contradictions_are_named(llama, tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        AutoRound(llama, **{"iters": 0, "model_free": True, **options}).quantize_and_save(tmp_path / "out")
    assert nothing_left(tmp_path / "out")


# ------------------------------------------------------------------------------------------------ importance files


def means_of(names, columns=256):
    """Mean squares by name, different for each."""
    return {n: torch.rand(columns, generator=torch.Generator().manual_seed(i)) for i, n in enumerate(names)}


def test_importance_files_are_read_as_they_were_written(tmp_path):
    means = means_of(["blk.0.attn_q.weight", "output.weight"])
    means["blk.0.ffn_down_exps.weight"] = torch.rand(4, 256)
    write_imatrix(tmp_path / "i.gguf", means, Origin(4, 128, 512, ("a.txt",)))
    found = read_imatrix(tmp_path / "i.gguf")
    assert found.keys() == means.keys()
    assert all(torch.allclose(found[name], means[name]) for name in means)


def test_a_damaged_importance_file_is_an_error_at_once(tmp_path):
    write_imatrix(
        tmp_path / "i.gguf", means_of(["blk.0.attn_q.weight"]), Origin(4, 128, 512, ("a.txt", "b.txt"))
    )
    whole = (tmp_path / "i.gguf").read_bytes()
    length = (
        whole.index(b"imatrix.datasets") + len("imatrix.datasets") + 8
    )  # behind the kinds of list and entry
    for damaged in (whole[:-2000], whole[:length] + struct.pack("<Q", 1 << 60) + whole[length + 8 :]):
        (tmp_path / "i.gguf").write_bytes(damaged)
        with pytest.raises(DataError, match=r"i\.gguf"):
            read_imatrix(tmp_path / "i.gguf")


def test_the_older_importance_files_are_read(tmp_path):
    name, values = b"blk.0.attn_q.weight", np.arange(4, dtype=np.float32)
    entry = struct.pack("<i", len(name)) + name + struct.pack("<ii", 2, 4) + (values * 2).tobytes()
    (tmp_path / "i.dat").write_bytes(struct.pack("<i", 1) + entry)
    assert read_imatrix(tmp_path / "i.dat")["blk.0.attn_q.weight"].tolist() == [0, 1, 2, 3]


def squares_seen(folder, tokens, names):
    """Mean squares of the inputs of linear layers in the float model."""
    model, found, hooks = models.loaded(folder), {}, []
    for name in names:
        add = lambda _, args, name=name: found.update({name: args[0].float().flatten(0, -2).square().mean(0)})  # noqa: E731
        hooks.append(model.get_submodule(name).register_forward_pre_hook(add))
    with torch.no_grad():
        model(input_ids=tokens)
    return found


@pytest.mark.parametrize(
    ("ending", "more"),
    [
        ("gguf", {"format": "gguf:q4_0,gguf:q8_0", "iters": 2}),
        ("dat", {"format": "gguf:q4_0"}),
        ("imatrix", {"format": "auto_round", "disable_opt_rtn": True, "group_size": 32}),
    ],
)
def test_a_run_leaves_the_importance_that_it_measured(llama, tmp_path, ending, more):
    tokens, path = models.samples(8, 16), tmp_path / f"i.{ending}"
    settings = {"dataset": tokens, "seqlen": 16, "amp": False, "iters": 0}
    job = AutoRound(llama, save_imatrix=str(path), **{**settings, **more})
    job.quantize_and_save(tmp_path / "out")
    layers = {
        "model.layers.1.mlp.down_proj": "blk.1.ffn_down",
        "model.layers.0.self_attn.k_proj": "blk.0.attn_k",
    }
    found, seen = read_imatrix(path), squares_seen(llama, torch.stack(tokens), layers)
    assert len(found) == 14 + (ending != "imatrix")  # a gguf file quantizes the head too
    for layer, name in layers.items():
        torch.testing.assert_close(found[f"{name}.weight"], seen[layer], rtol=2e-2, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] in ([path.name, "out"], ["out", path.name])


def test_importance_of_experts_comes_with_the_tokens_of_each(tmp_path):
    models.tiny("mixtral", tmp_path / "m")
    settings = {"dataset": models.samples(16, 64), "seqlen": 64, "iters": 0, "disable_opt_rtn": True}
    AutoRound(
        tmp_path / "m", group_size=32, save_imatrix=str(tmp_path / "i.gguf"), **settings
    ).quantize_and_save(tmp_path / "out")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "i.gguf").tensors}
    experts = tensors["blk.0.ffn_down_exps.weight.in_sum2"]
    counts = tensors["blk.0.ffn_down_exps.weight.counts"]
    assert counts.shape == (len(experts), 1) and tensors["blk.0.attn_q.weight.counts"].tolist() == [[1024.0]]
    # Every token goes to two experts; a starved one is known by all tokens.
    assert counts.sum() == 2048 or 1024 in counts
    means = read_imatrix(tmp_path / "i.gguf")["blk.0.ffn_down_exps.weight"]
    assert means.shape == experts.shape and bool((means > 0).all())


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"save_imatrix": "i.txt"}, DataError, "must end in one of .gguf, .dat, .imatrix"),
        ({"save_imatrix": "missing/i.gguf"}, OutputError, "there is no folder missing"),
        ({"save_imatrix": "i.gguf", "nsamples": 0}, DataError, "need data"),
        ({"save_imatrix": "i.gguf", "model_free": True}, PlanError, "model_free"),
        ({"save_imatrix": "i.gguf", "resume": True}, PlanError, "leave resume out"),
    ],
)
def test_importance_that_cannot_be_saved_is_refused_before_any_work(llama, tmp_path, settings, error, words):
    with pytest.raises(error, match=words):
        AutoRound(
            llama,
            **{"format": "gguf:q4_0", "iters": 0, "dataset": models.samples(4), "seqlen": 16, **settings},
        ).quantize_and_save(tmp_path / "out")
    assert nothing_left(tmp_path / "out")


def test_a_given_importance_decides_the_search(llama, tmp_path):
    weights = torch.ones(256)
    weights[::16] = 1e4
    write_imatrix(tmp_path / "i.gguf", {"blk.0.attn_q.weight": weights}, Origin(1, 8, 8))
    data = {"format": "gguf:q2_k_s", "iters": 0, "nsamples": 0}
    weight = floats(made(llama, tmp_path / "f", format="gguf:bf16"), "blk.0.attn_q.weight")
    errors = []
    for given in (None, str(tmp_path / "i.gguf")):
        _, folder = AutoRound(llama, imatrix=given, **data).quantize_and_save(tmp_path / str(given is None))
        errors.append((floats(written(folder), "blk.0.attn_q.weight") - weight)[:, ::16].square().sum())
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("content", [b"", b"GGUF", b"\xff" * 64, struct.pack("<i", 0)], ids=repr)
def test_what_is_no_importance_file_is_said_so(llama, tmp_path, content):
    (tmp_path / "i").write_bytes(content)
    with pytest.raises(DataError, match="imatrix"):
        AutoRound(llama, format="gguf:q4_0", iters=0, imatrix=str(tmp_path / "i")).quantize_and_save(
            tmp_path / "out"
        )
    assert nothing_left(tmp_path / "out")
