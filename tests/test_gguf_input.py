"""GGUF files as input: weights, logits and tokens come back equal, and broken files are refused in clear words."""

import json
import logging
import shutil
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as kinds

from auto_round import AutoRound
from auto_round.cli.main import execute
from auto_round.core.errors import ModelError
from auto_round.models import load
from auto_round.models.gguf_config import CONTEXTS
from auto_round.models.gguf_file import GgufFile, header_of
from tests import models
from tests.models import GEMMA_LIKE, KINDS, LLAMA_LIKE, MOES

WIDE = {**LLAMA_LIKE, "hidden_size": 256, "intermediate_size": 256}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 10000.0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
LONG = {
    "rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7], "rope_theta": 10000.0,
    "long_factor": [2.0, 2.1, 2.2, 2.3, 2.4, 2.5, 2.6, 2.7],
}  # fmt: skip
GEMMA = {**GEMMA_LIKE, "query_pre_attn_scalar": 16}
ALL = {
    **{name: KINDS[name] for name in ("qwen2", "qwen3-tied", "gemma", "gpt2", "gpt-neox", "falcon", "bloom")},
    **{name: MOES[name] for name in ("mixtral", "qwen2-moe")},
    "llama-bias": ("Llama", {**LLAMA_LIKE, "attention_bias": True}),
    "llama3-rope": ("Llama", {**LLAMA_LIKE, "rope_parameters": LLAMA3}),
    "llama-linear": (
        "Llama",
        {**LLAMA_LIKE, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "qwen2-yarn": ("Qwen2", {**LLAMA_LIKE, "rope_parameters": YARN}),
    "qwen3-moe": ("Qwen3Moe", {**MOES["qwen3-moe"][1], "norm_topk_prob": True}),
    "gemma2": ("Gemma2", {**KINDS["gemma2"][1], **GEMMA, "attn_logit_softcapping": 9.0}),
    "gemma3": ("Gemma3", {**GEMMA, "num_hidden_layers": 6, "sliding_window": 8}),
    "phi3": ("Phi3", {**LLAMA_LIKE, "sliding_window": None}),
    "phi3-long": ("Phi3", {**LLAMA_LIKE, "rope_parameters": LONG, "original_max_position_embeddings": 16}),
    "olmo2": ("Olmo2", LLAMA_LIKE),
    "starcoder2": ("Starcoder2", {**LLAMA_LIKE, "sliding_window": None, "use_bias": True}),
    "falcon-7b": ("Falcon", {**KINDS["falcon"][1], "new_decoder_architecture": False, "multi_query": True}),
    "mpt": (
        "Mpt",
        {"vocab_size": models.VOCAB, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
    ),
    "deepseek-v2": ("DeepseekV2", {**MOES["deepseek-v2"][1], "head_dim": 16, "topk_method": "greedy"}),
}
"""Name -> prefix of the classes in transformers, and settings; one of each architecture that can be written."""


def saved(kind, folder, dtype=torch.bfloat16):
    """A random model in a folder, with a tokenizer."""
    prefix, settings = ALL[kind]
    config = getattr(transformers, models.CONFIGS.get(prefix, f"{prefix}Config"))(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, models.CLASSES.get(prefix, f"{prefix}ForCausalLM"))(config).eval()
    models.randomize(model, 0)
    model.to(dtype).save_pretrained(folder)
    models.tokenizer().save_pretrained(folder)
    return models.loaded(folder, dtype=dtype)


def to_gguf(source, out, type_="bf16", **options):
    """The path of the file made of `source`."""
    _, folder = AutoRound(
        source, format=f"gguf:{type_}", iters=0, model_free=True, **options
    ).quantize_and_save(out)
    return min(Path(folder).glob("*.gguf"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama in bfloat16 whose rows are multiples of 256."""
    folder = tmp_path_factory.mktemp("source") / "tiny-llama"
    models.tiny("llama", folder, dtype=torch.bfloat16, **WIDE)
    return folder


@pytest.fixture(scope="module")
def file(llama, tmp_path_factory):
    """The same as a bf16 file."""
    return to_gguf(llama, tmp_path_factory.mktemp("file"))


# ---------------------------------------------------------------------------------------------------- what comes back


@pytest.mark.parametrize("kind", ALL)
def test_a_float_file_gives_back_weights_and_logits(kind, tmp_path):
    model = saved(kind, tmp_path / "m")
    job = AutoRound(to_gguf(tmp_path / "m", tmp_path / "out"), iters=0)
    again = job.material.live_model()
    expected, found = model.state_dict(), again.state_dict()
    assert type(again) is type(model) and found.keys() == expected.keys()
    for name in expected:
        # Gemma's norms are stored plus one in float32, which costs numbers near zero their last bits.
        least = 2.0**-23 if kind.startswith("gemma") and "norm" in name else 0.0
        assert (found[name].float() - expected[name].float()).abs().max() <= least, name
    assert found[name].dtype == torch.bfloat16
    torch.testing.assert_close(models.logits(again), models.logits(model), rtol=0, atol=0)
    assert job.tokenizer("The old  lady, 123").input_ids == models.tokenizer()("The old  lady, 123").input_ids


def test_float16_files_give_back_float16(tmp_path):
    model = saved("qwen2", tmp_path / "m", dtype=torch.float16)
    again = AutoRound(to_gguf(tmp_path / "m", tmp_path / "out", "f16"), iters=0).material.live_model()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor) and tensor.dtype == torch.float16


@pytest.mark.parametrize("type_", ["q8_0", "q4_k_m", "q2_k", "q5_0"])
def test_a_quantized_file_is_read_as_what_gguf_dequantizes(llama, tmp_path, type_):
    models.tiny("llama", tmp_path / "m", **WIDE)  # float32, so that nothing is rounded on the way in
    path = to_gguf(tmp_path / "m", tmp_path / "out", type_)
    again = AutoRound(path, iters=0).material.live_model().state_dict()
    for tensor in gguf.GGUFReader(path).tensors:
        expected = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            continue  # in another order, as the next test has it
        place = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
        inside = {"attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_up": "mlp.up_proj",
                  "ffn_gate": "mlp.gate_proj", "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
                  "ffn_norm": "post_attention_layernorm"}  # fmt: skip
        parts = tensor.name.split(".")
        name = place.get(parts[0]) or f"model.layers.{parts[1]}.{inside[parts[2]]}"
        assert torch.equal(again[f"{name}.weight"], expected), tensor.name


def test_rows_of_queries_come_back_in_their_own_order(llama, tmp_path):
    models.tiny("llama", tmp_path / "m", **WIDE)
    path = to_gguf(tmp_path / "m", tmp_path / "out", "q8_0")
    again = AutoRound(path, iters=0).material.live_model().model.layers[1].self_attn.q_proj.weight
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.attn_q.weight")
    rows = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    size = 256 // models.HEADS
    for head in range(models.HEADS):
        for i in range(size // 2):
            assert torch.equal(again[head * size + i], rows[head * size + 2 * i])
            assert torch.equal(again[head * size + size // 2 + i], rows[head * size + 2 * i + 1])


def test_types_without_a_codec_here_are_read_by_the_package(file, tmp_path):
    path = tmp_path / "iq.gguf"
    values = np.random.default_rng(0).integers(0, 255, (256, 256 // 32 * 18), dtype=np.uint8)
    values[:, 0::18], values[:, 1::18] = 0, 0x2C  # a scale of 1/16
    rewritten(file, path, {"blk.0.attn_v.weight": (values[:128], gguf.GGMLQuantizationType.IQ4_NL)})
    weight = AutoRound(path, iters=0).material.live_model().model.layers[0].self_attn.v_proj.weight
    expected = gguf.quants.dequantize(values[:128], gguf.GGMLQuantizationType.IQ4_NL)
    assert torch.equal(weight.float(), torch.from_numpy(expected).to(weight.dtype).float())


def test_parts_of_a_split_file_are_one_model(llama, tmp_path):
    first = to_gguf(llama, tmp_path / "parts", "bf16", split_size="300KB")
    assert len(list(first.parent.glob("*.gguf"))) > 2
    model = models.loaded(llama, dtype=torch.bfloat16)
    for path in (first, max(first.parent.glob("*.gguf"))):  # whichever part is given
        again = AutoRound(path, iters=0).material.live_model()
        assert torch.equal(models.logits(again), models.logits(model))


# ------------------------------------------------------------------------------------------------------ what is done


def streamed(source, out, **options):
    """The tensors that a stream makes of `source`."""
    options = {"format": "auto_round", "iters": 0, "model_free": True, **options}
    _, folder = AutoRound(source, **options).quantize_and_save(out)
    return {n: t for path in Path(folder).glob("*.safetensors") for n, t in load_file(path).items()}


def load_file(path):
    """All tensors of a safetensors file."""
    from safetensors.torch import load_file as read

    return read(path)


def assert_same(found, expected):
    """Equal names and bits."""
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_stream_from_a_float_file_makes_what_the_model_itself_makes(llama, file, tmp_path):
    assert_same(streamed(file, tmp_path / "a"), streamed(llama, tmp_path / "b"))
    assert models.loaded(tmp_path / "a").config.architectures == ["LlamaForCausalLM"]
    assert json.loads((tmp_path / "a" / "tokenizer.json").read_text())["model"]["type"] == "BPE"


def test_experts_of_a_file_are_layers(tmp_path):
    saved("mixtral", tmp_path / "m")
    path = to_gguf(tmp_path / "m", tmp_path / "g")
    assert_same(streamed(path, tmp_path / "a"), streamed(tmp_path / "m", tmp_path / "b"))


def test_tuning_from_a_file_is_tuning_from_the_model(llama, file, tmp_path):
    data = {"dataset": models.samples(2, 16), "seqlen": 16, "iters": 1, "nsamples": 2, "format": "auto_round"}
    outcomes = []
    for source, name in ((llama, "a"), (file, "b")):
        AutoRound(source, low_cpu_mem_usage=True, **data).quantize_and_save(tmp_path / name)
        outcomes.append(load_file(tmp_path / name / "model.safetensors"))
    assert_same(*outcomes)


def test_quantizing_in_memory_from_a_file(file, tmp_path):
    model, settings = AutoRound(file, iters=0, nsamples=0).quantize()
    assert settings["model.layers.0.mlp.up_proj"]["bits"] == 4
    assert len(model.model.layers[0].mlp.up_proj.weight[0, :128].unique()) <= 16


def test_a_file_on_the_command_line(file, tmp_path, capsys):
    argv = [str(file), "--scheme", "W4A16", "--iters", "0", "--model_free", "--output_dir", str(tmp_path)]
    assert execute("default", argv) == 0
    assert models.loaded(tmp_path).config.quantization_config.bits == 4


def test_a_file_becomes_another_file_and_says_what_it_was(llama, tmp_path, caplog):
    path = to_gguf(llama, tmp_path / "a", "q8_0")
    again = to_gguf(path, tmp_path / "b", "q4_0")
    assert "16 of Q8_0" in caplog.text and "second time" in caplog.text
    assert gguf.GGUFReader(again).fields["tokenizer.ggml.tokens"].contents()[0] == "<s>"


def test_float_files_are_no_reason_to_warn(file, tmp_path, caplog):
    streamed(file, tmp_path)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_file_of_the_hub_is_fetched_with_its_parts(file, tmp_path, monkeypatch):
    asked = []

    def snapshot(model, revision=None, **wanted):
        asked.append((model, wanted))
        return str(file.parent)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert load.resolve(f"owner/name/{file.name}") == file
    with pytest.raises(ModelError, match=r"has no file sub/x-00001-of-00003\.gguf"):
        load.resolve("owner/name/sub/x-00001-of-00003.gguf")
    assert asked == [
        ("owner/name", {"allow_patterns": [file.name]}),
        ("owner/name", {"allow_patterns": ["sub/x-*-of-00003.gguf"]}),
    ]


def test_a_folder_with_one_file_is_that_file(file, tmp_path):
    assert load.resolve(str(file.parent)) == file
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(file, tmp_path / name)
    with pytest.raises(ModelError, match=r"one of its GGUF files, such as a\.gguf"):
        load.resolve(str(tmp_path))


def test_a_configuration_beside_the_file_is_taken(llama, file, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(llama / name, tmp_path)
    shutil.copy(file, tmp_path)
    assert_same(streamed(tmp_path, tmp_path / "a"), streamed(llama, tmp_path / "b"))


# ------------------------------------------------------------------------------------------------------- tokenizers

PROBES = (
    "Hello  world, the old lady!",
    " a block is  tuned.",
    "é 你好 <s> x",
    "",
    "letter</s>lady  ",
    "   three",
)


def sentence_piece(prefix):
    """BPE over characters with byte fallback, with or without a leading space."""
    found = Tokenizer(kinds.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    first = [normalizers.Prepend("\u2581")] if prefix else []
    found.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "\u2581")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=384, special_tokens=special, show_progress=False)
    found.train_from_iterator(models.SENTENCES, trainer)
    described = json.loads(found.to_str())
    described["added_tokens"] = [t for t in described["added_tokens"] if not t["content"].startswith("<0x")]
    last = [decoders.Strip(" ", 1, 0)] if prefix else []
    found = Tokenizer.from_str(json.dumps(described))
    found.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    )
    return found


def unigram(prefix):
    """Pieces of most probability."""
    found = Tokenizer(kinds.Unigram())
    found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if prefix else "never")
    found.decoder = decoders.Metaspace(prepend_scheme="always" if prefix else "never")
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    found.train_from_iterator(models.SENTENCES, trainer)
    return found


@pytest.mark.parametrize("make", [sentence_piece, unigram])
@pytest.mark.parametrize("prefix", [True, False])
def test_tokenizers_of_sentence_piece_come_back(llama, tmp_path, make, prefix):
    shutil.copytree(llama, tmp_path / "m")
    make(prefix).save(str(tmp_path / "m" / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "unk_token": "<unk>"}
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(about))
    again = AutoRound(to_gguf(tmp_path / "m", tmp_path / "out"), iters=0).tokenizer
    own = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    for text in PROBES:
        ids = own(text).input_ids
        assert again(text).input_ids == ids and again.decode(ids) == own.decode(ids)
    assert (again.bos_token, again.unk_token, len(again)) == ("<s>", "<unk>", len(own))


def test_tokens_at_the_ends_and_chat_template_come_back(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "m")
    found = Tokenizer.from_file(str(llama / "tokenizer.json"))
    from tokenizers.processors import TemplateProcessing

    found.post_processor = TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    found.save(str(tmp_path / "m" / "tokenizer.json"))
    again = AutoRound(to_gguf(tmp_path / "m", tmp_path / "out"), iters=0).tokenizer
    ids = again("The rain").input_ids
    assert ids[0] == 0 and ids[-1] == 1 and again("x", "y").input_ids.count(0) == 2
    chat = [{"role": "user", "content": "The rain"}]
    assert again.apply_chat_template(chat, tokenize=False) == "<|user|>The rain<|end|>"


def test_frequency_factors_of_no_known_origin_are_kept_as_they_are(llama, tmp_path):
    models.tiny("llama", tmp_path / "m", rope_parameters=LLAMA3, **{**WIDE, "num_attention_heads": 4})
    path = to_gguf(tmp_path / "m", tmp_path / "out")
    factors = np.linspace(1, 3, 32, dtype=np.float32)
    rewritten(path, tmp_path / "x.gguf", {"rope_freqs.weight": (factors, None)})
    model = AutoRound(tmp_path / "x.gguf", iters=0).material.live_model()
    base = 10000.0 ** -(torch.arange(0, 64, 2) / 64)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, base / torch.from_numpy(factors))
    assert 64 in CONTEXTS


# ---------------------------------------------------------------------------------------------------- what is broken


def rewritten(source, target, tensors=None, values=None, without=()):
    """A copy of a file with other tensors (name -> data, type or None) and values (None leaves a key out)."""
    reader, tensors, values = gguf.GGUFReader(source), tensors or {}, values or {}
    known = {key: entry for key, entry in reader.fields.items() if not key.startswith("GGUF.")}
    writer = gguf.GGUFWriter(
        target, values.get("general.architecture") or known["general.architecture"].contents()
    )
    for key, entry in known.items():
        if key == "general.architecture":
            continue
        value, type_ = values.get(key, entry.contents()), entry.types
        if value is not None:
            writer.add_key_value(key, value, type_[0], type_[1] if len(type_) > 1 else None)
    for tensor in reader.tensors:
        if tensor.name not in without:
            data, kind = tensors.get(tensor.name, (tensor.data, tensor.tensor_type))
            writer.add_tensor(tensor.name, data, raw_dtype=kind)
    for name in tensors.keys() - {tensor.name for tensor in reader.tensors}:
        writer.add_tensor(name, tensors[name][0], raw_dtype=tensors[name][1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def refusal(path, out):
    """What is said about the file `path`; there must be no output."""
    with pytest.raises(ModelError) as caught:
        AutoRound(path, iters=0, model_free=True).quantize_and_save(out)
    assert not out.exists()
    assert path.name in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.001, 0.02, 0.1, 0.5, 0.999])
def test_a_file_that_is_cut_off_is_refused(file, tmp_path, share):
    path = tmp_path / "cut.gguf"
    content = file.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "truncated or damaged" in refusal(path, tmp_path / "out")


def test_a_file_that_shrinks_while_it_is_read_is_refused(file, tmp_path):
    path = tmp_path / "shrinks.gguf"
    shutil.copy(file, path)
    opened = GgufFile([path])
    with path.open("r+b") as shrinking:
        shrinking.truncate(path.stat().st_size // 2)
    tensor = max(opened.tensors.values(), key=lambda tensor: tensor.offset)
    with pytest.raises(ModelError, match="ends within a tensor"):
        tensor.read(0, tensor.rows)


@pytest.mark.parametrize("order", ["LITTLE", "BIG"])
def test_lists_of_every_kind_read_as_the_package_reads_them(tmp_path, order):
    path = tmp_path / "lists.gguf"
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian[order])
    lists = {
        "words": ["", "a", "ü\n" * 50],
        "numbers": [1, -2, 3],
        "floats": [0.5, 1e30],
        "flags": [True, False],
    }
    for key, values in lists.items():
        writer.add_array(key, values)
    writer.add_array("nested", [[1, 2], [3, 4]])
    writer.add_string("behind", "them")
    writer.add_tensor("x", np.arange(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = header_of(path), gguf.GGUFReader(path)
    assert list(ours.fields) == list(theirs.fields) and {*lists, "nested", "behind"} <= ours.fields.keys()
    for key, entry in ours.fields.items():
        assert entry.contents() == theirs.fields[key].contents()
        assert entry.types == theirs.fields[key].types
    assert [(t.name, t.data_offset) for t in ours.tensors] == [
        (t.name, t.data_offset) for t in theirs.tensors
    ]


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_header_is_an_error_or_harmless(file, tmp_path, seed):
    content = bytearray(file.read_bytes())
    random = np.random.default_rng(seed)
    for at in random.integers(4, 12000, 20):
        content[at] = random.integers(0, 256)
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    try:
        AutoRound(path, iters=0, model_free=True).quantize_and_save(tmp_path / "out")
    except ModelError as error:
        assert "damaged.gguf" in str(error)
        assert not (tmp_path / "out").exists()


def test_a_length_of_billions_ends_at_once(file, tmp_path):
    content = bytearray(file.read_bytes())
    at = content.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 8
    content[at : at + 8] = struct.pack("<Q", 1 << 40)
    path = tmp_path / "long.gguf"
    path.write_bytes(content)
    assert "truncated or damaged" in refusal(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"general.architecture": "mamba"}, "'mamba': gguf files can be read for llama, qwen2"),
        ({"llama.block_count": 3}, "the header says 3 blocks"),
        ({"llama.embedding_length": 128}, "of width 128, the tensors are of 2 blocks of width 256"),
        ({"llama.attention.head_count": 0}, "head_count = 0, which is no number from 1 on"),
        ({"llama.feed_forward_length": None}, "feed_forward_length = None"),
        ({"llama.feed_forward_length": 512}, r"has the shape \(256, 256\) in the file, \(512, 256\) by its header"),
        ({"tokenizer.ggml.bos_token_id": 5000}, "bos is token 5000, of 384 tokens"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "384 tokens and kinds of 2"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_headers_that_contradict_the_tensors_are_refused(file, tmp_path, values, words):
    import re

    assert re.search(words, refusal(rewritten(file, tmp_path / "x.gguf", values=values), tmp_path / "out"))


def test_missing_and_unknown_tensors_are_named(file, tmp_path):
    path = rewritten(file, tmp_path / "less.gguf", without=("blk.1.ffn_up.weight",))
    assert "blk.1.ffn_up.weight is missing" in refusal(path, tmp_path / "out")
    more = {"blk.0.attn_k_b.weight": (np.zeros((4, 4), np.float32), None)}
    path = rewritten(file, tmp_path / "more.gguf", more)
    assert "blk.0.attn_k_b.weight and 0 other tensors are none of LlamaForCausalLM's" in refusal(
        path, tmp_path / "out"
    )


def test_a_missing_part_is_named(llama, tmp_path):
    first = to_gguf(llama, tmp_path / "parts", "bf16", split_size="300KB")
    last = max(first.parent.glob("*.gguf"))
    last.unlink()
    assert f"{last.name} is missing" in refusal(first, tmp_path / "out")


def test_an_unknown_tokenizer_is_left_out_with_a_warning(file, tmp_path, caplog):
    path = rewritten(file, tmp_path / "x.gguf", values={"tokenizer.ggml.model": "rwkv"})
    streamed(path, tmp_path / "out")
    assert "tokenizer (rwkv) cannot be made into one of transformers" in caplog.text
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_an_unknown_way_of_cutting_words_is_said(file, tmp_path, caplog):
    path = rewritten(file, tmp_path / "x.gguf", values={"tokenizer.ggml.pre": "martian"})
    streamed(path, tmp_path / "out")
    assert "cutting words (martian) is not known" in caplog.text
