"""Architectures that do something of their own: name, store, call or share what others do not. Tiny and random."""

import pytest
import torch
import transformers
from models import (
    HEADS,
    INNER,
    LATENT,
    LLAMA_LIKE,
    POSITIONS,
    ROUTED,
    VOCAB,
    WIDTH,
    loaded,
    logits,
    randomize,
    samples,
    tokens,
)

from auto_round import AutoRound
from auto_round.core.errors import ModelError
from auto_round.jobs.verify import verify
from auto_round.models.anatomy import anatomy
from auto_round.models.capture import Recorder
from auto_round.sources.base import Needs
from auto_round.sources.blocks import LiveSource
from auto_round.sources.dataset import Calibration
from auto_round.sources.live_block import Execution
from auto_round.sources.rows import Notices

SMALL = {"group_size": 32, "seqlen": 16, "batch_size": 2, "amp": False}
RUNS = {"tuned": {"iters": 1, "nsamples": 4}, "streamed": {"iters": 0, "disable_opt_rtn": True}}
ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
GPT = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": 2, "n_head": HEADS, "n_positions": POSITIONS, **ENDS}
EXPERTS = {**ROUTED, "n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 32}
MIXED = ["sliding_attention", "full_attention"]
GEMMA_3N = {
    **LLAMA_LIKE, "num_hidden_layers": 4, "head_dim": 16, "intermediate_size": [INNER] * 4, "layer_types": MIXED * 2,
    "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * 4, "laurel_rank": 16, "sliding_window": 8,
    "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": VOCAB,
}  # fmt: skip
LINEAR = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}
XLNET = {
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "n_layer": 2,
    "n_head": HEADS,
    "d_inner": INNER,
    "bi_data": False,
}
RWKV = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 2, "intermediate_size": INNER, **ENDS}
PROPHET = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "num_decoder_layers": 2, "num_decoder_attention_heads": HEADS,
    "decoder_ffn_dim": INNER, "num_encoder_layers": 1, "num_encoder_attention_heads": HEADS, "encoder_ffn_dim": INNER,
    "is_decoder": True, "is_encoder_decoder": False, "add_cross_attention": False, "pad_token_id": 2,
    "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": POSITIONS,
}  # fmt: skip
CPM = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "dim_head": 16,
    "dim_ff": INNER,
}

ODD = {
    "buffers that loading computes, mask": ("GPTNeo", {
        "vocab_size": VOCAB, "hidden_size": WIDTH, "num_layers": 2, "num_heads": HEADS, "window_size": 4,
        "max_position_embeddings": POSITIONS, "attention_types": [[["global", "local"], 1]], **ENDS,
    }),
    "buffers that loading computes, positions": ("GPTJ", {**GPT, "rotary_dim": 8}),
    "weights that the model rescales": ("Rwkv", RWKV),
    "a head that only looks tied": ("CpmAnt", {**CPM, "num_hidden_layers": 2, "prompt_types": 8, "prompt_length": 4}),
    "blocks that return lists, transposed weights": ("OpenAIGPT", GPT),
    "an embedding that is stored under another name": ("ProphetNet", PROPHET),
    "tokens before samples": ("XLNet", XLNET),
    "four streams, keys that later blocks use again": ("Gemma3nText", GEMMA_3N),
    "convolutions that are stored apart": ("OlmoHybrid", {
        **LLAMA_LIKE, **LINEAR, "layer_types": ["linear_attention", "full_attention"],
    }),
    "projections that are stored together": ("HrmText", {**LLAMA_LIKE, "head_dim": 16}),
    "weights that blocks share": ("Zamba", {
        **LLAMA_LIKE, "num_hidden_layers": 4, "attention_hidden_size": 2 * WIDTH, "attention_head_dim": 32,
        "layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 2, "mamba_dt_rank": 32,
    }),
    "experts that do nothing": ("LongcatFlash", {
        **LLAMA_LIKE, **LATENT, "num_layers": 1, "num_hidden_layers": 2, "num_key_value_heads": HEADS, "head_dim": 16,
        "ffn_hidden_size": INNER, "expert_ffn_hidden_size": 32, "n_routed_experts": 4, "zero_expert_num": 2,
        "moe_topk": 2,
    }),
    "shared experts in three tensors": ("InklingText", {
        **LLAMA_LIKE, **EXPERTS, "head_dim": 16, "swa_num_attention_heads": HEADS, "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
    }),
}  # fmt: skip
"""What is odd -> prefix of the classes in transformers, and settings."""

HEAD_CLASSES = {"OpenAIGPT": "OpenAIGPTLMHeadModel", "XLNet": "XLNetLMHeadModel"}


def odd(what, folder=None, *, table=ODD):
    """The random model of a row of `table`, saved in `folder`. Skips the test where transformers does not know it."""
    prefix, settings = table[what]
    config = getattr(transformers, f"{prefix}Config", None)
    if config is None:
        pytest.skip(f"transformers {transformers.__version__} has no {prefix}")
    name = HEAD_CLASSES.get(prefix, f"{prefix.removesuffix('Text')}ForCausalLM")
    kind = getattr(transformers, name, None) or getattr(transformers, f"{prefix}ForCausalLM")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config(**settings)).float().eval()
    randomize(model, 0)
    if folder is not None:
        model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("what", ODD)
def test_a_model_with_something_odd_loads_as_what_fake_stores(what, run, tmp_path):
    original = logits(odd(what, tmp_path / "m"))
    made = AutoRound(tmp_path / "m", dataset=samples(4, 16), **SMALL, **RUNS[run])
    made.quantize_and_save(tmp_path / "out", format="auto_round,fake")
    packed, plain = (logits(loaded(tmp_path / "out" / name)) for name in ("auto-round", "fake"))
    assert made.plan.quantized() and plain.isfinite().all() and not torch.allclose(plain, original)
    torch.testing.assert_close(packed, plain, atol=2e-4, rtol=2e-4)


@torch.no_grad()
def last_states(model, data, blocks):
    """What the last block returns in a run of the whole model, as it returns it."""
    seen = []
    handle = model.get_submodule(blocks[-1]).register_forward_hook(lambda *call: seen.append(call[-1]))
    model(input_ids=data.tokens, attention_mask=data.attention_mask, use_cache=False)
    handle.remove()
    return seen[0][0] if isinstance(seen[0], (tuple, list)) else seen[0]


CHAINS = {
    what: ODD[what] for what in ODD if ODD[what][0] in ("XLNet", "Gemma3nText", "OpenAIGPT", "OlmoHybrid")
}


@pytest.mark.parametrize("what", CHAINS)
def test_chains_are_the_model_wherever_samples_lie_and_whatever_blocks_leave_for_others(what):
    model, data = odd(what), Calibration(tokens(5, 16))
    body = anatomy(model)
    (blocks,) = body.block_lists
    expected = last_states(model, data, blocks)
    source = LiveSource(model, body, Execution(device=torch.device("cpu"), batch_size=2), data)
    for block in source.blocks(Needs.FORWARD, body.in_blocks()):
        rows, changed = list(range(5)), {name: (w * 8).round() / 8 for name, w in block.weights.items()}
        with torch.no_grad():
            target, output = block.target(rows), block.run(rows, changed)
        source.done(block, changed)
    recorder = Recorder(model, [model.get_submodule(name) for name in blocks])
    axes = recorder(data.tokens, None).calls[0].axes
    torch.testing.assert_close(axes.first(expected), target, atol=1e-4, rtol=1e-4)
    again = axes.first(last_states(model, data, blocks))
    torch.testing.assert_close(again, output, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(again, axes.first(expected), atol=1e-2)


XLM = {
    "vocab_size": VOCAB,
    "emb_dim": WIDTH,
    "n_layers": 2,
    "n_heads": HEADS,
    "max_position_embeddings": POSITIONS,
}
REFORMER = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "num_attention_heads": HEADS, "attention_head_size": 16,
    "num_buckets": 2, "feed_forward_size": INNER, "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [32, 32],
    "is_decoder": True, "attn_layers": ["local", "local"], "local_attn_chunk_length": 8,
    "max_position_embeddings": POSITIONS,
}  # fmt: skip
APART = {
    "XLM": ("XLM", XLM),
    "Reformer": ("Reformer", REFORMER),
    "RWKV that halves": ("Rwkv", {**RWKV, "rescale_every": 1}),
}
HEAD_CLASSES |= {"XLM": "XLMWithLMHeadModel", "Reformer": "ReformerModelWithLMHead"}


@pytest.mark.parametrize("what", APART)
def test_blocks_that_do_not_follow_one_another_are_refused_and_streamed(what, tmp_path):
    odd(what, tmp_path / "m", table=APART)
    with pytest.raises(ModelError, match=r"one after the other.*iters=0, disable_opt_rtn=True"):
        AutoRound(tmp_path / "m", dataset=samples(4, 16), **SMALL, **RUNS["tuned"]).quantize()
    AutoRound(tmp_path / "m", **SMALL, **RUNS["streamed"]).quantize_and_save(
        tmp_path / "out", format="auto_round,fake"
    )
    packed, plain = (
        logits(loaded(tmp_path / "out" / name), tokens(2, 16)) for name in ("auto-round", "fake")
    )
    torch.testing.assert_close(packed, plain, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize(
    "what", ["buffers that loading computes, mask", "blocks that return lists, transposed weights"]
)
def test_code_that_reads_a_weight_past_its_layer_gets_that_of_the_plain_layer(what, tmp_path):
    odd(what, tmp_path / "m")
    made = AutoRound(tmp_path / "m", **SMALL, **RUNS["streamed"])
    made.quantize_and_save(tmp_path / "out", format="auto_round,fake")
    packed, plain = (loaded(tmp_path / "out" / name) for name in ("auto-round", "fake"))
    for name in made.plan.quantized():
        torch.testing.assert_close(packed.get_submodule(name).weight, plain.get_submodule(name).weight)


RENAMED = {"names that only checkpoints use": ("DeepseekV4", {
    **LLAMA_LIKE, **ROUTED, **LATENT, "n_routed_experts": 4, "n_shared_experts": 1, "head_dim": 16, "o_lora_rank": 8,
    "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8, "o_groups": 2, "sliding_window": 8, "num_hash_layers": 1,
})}  # fmt: skip


def test_nothing_is_said_about_layers_and_routers_that_checkpoints_call_otherwise(tmp_path, caplog):
    odd("names that only checkpoints use", tmp_path / "m", table=RENAMED)
    AutoRound(tmp_path / "m", **SMALL, **RUNS["streamed"]).quantize_and_save(tmp_path / "out")
    assert not [
        r.getMessage()
        for r in caplog.records
        if "[missing]" in r.getMessage() or "[router]" in r.getMessage()
    ]
    findings = verify(tmp_path / "out")
    assert not [finding for finding in findings if finding.rule in ("missing", "router")]


def test_a_rehearsal_has_what_earlier_blocks_leave():
    model = odd("four streams, keys that later blocks use again")
    body = anatomy(model)
    source = LiveSource(
        model, body, Execution(device=torch.device("cpu"), batch_size=2), Calibration(tokens(2, 16))
    )
    for name in body.in_order():  # the second leaves keys, the last has none of its own
        block = source.sample(name, Needs.FORWARD)()
        with torch.no_grad():
            assert torch.equal(block.run([0, 1]), block.target([0, 1]))
    assert (
        source.call_bytes > 2 * 2 * 16 * 2 * 16 * 4
    )  # keys and values, samples, tokens, heads, their width, bytes


@pytest.mark.parametrize(("fmt", "told"), [("llm_compressor", True), ("auto_round", False)])
def test_who_exports_transposed_layers_for_a_reader_of_linear_ones_alone_is_told(fmt, told, tmp_path):
    odd("blocks that return lists, transposed weights", tmp_path / "m")
    made = AutoRound(tmp_path / "m", **SMALL, **RUNS["streamed"])
    made.quantize_and_save(tmp_path / "out", format=fmt)
    assert any("Conv1D layers of openai-gpt" in note for note in made.plan.notes) is told


def test_notices_give_every_sample_its_own_and_hold_no_whole_batches():
    notices, batch = Notices(), torch.arange(24.0).reshape(4, 2, 3)
    notices.post([5, 6, 7, 8], {"keys": (batch, batch + 1)})
    assert notices.nbytes == 2 * batch.nbytes
    keys, values = notices.show([8, 5], torch.device("cpu"))["keys"]
    assert torch.equal(keys, batch[[3, 0]]) and torch.equal(values, batch[[3, 0]] + 1)
    assert notices.show([5, 9], torch.device("cpu")) == {}


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "MXFP8"])
def test_layers_whose_codes_are_called_weight_load_next_to_parents_that_initialize(scheme, tmp_path):
    odd("buffers that loading computes, mask", tmp_path / "m")
    made = AutoRound(tmp_path / "m", scheme=scheme, iters=0, disable_opt_rtn=True)
    made.quantize_and_save(tmp_path / "out", format="auto_round,fake")
    packed, plain = (loaded(tmp_path / "out" / name) for name in ("auto-round", "fake"))
    for name in made.plan.quantized():
        torch.testing.assert_close(
            packed.get_submodule(name).plain_weight(), plain.get_submodule(name).weight
        )


def test_a_cast_between_blocks_is_not_in_the_way():
    model = odd("blocks that return lists, transposed weights")
    recorder = Recorder(model, [model.get_submodule(name) for name in anatomy(model).block_lists[0]])
    states = torch.randn(1, 4, WIDTH, generator=torch.Generator().manual_seed(0))
    recorder._check_link(1, states, states.bfloat16())
    with pytest.raises(ModelError, match="does not get what the block before it returns"):
        recorder._check_link(1, states, states / 2)


def test_a_live_model_whose_store_keeps_the_heads_name_of_a_shared_table_is_quantized(tmp_path):
    config = transformers.CamembertConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=INNER,
        max_position_embeddings=POSITIONS, is_decoder=True, **ENDS,
    )  # fmt: skip
    model = transformers.CamembertForCausalLM(config).eval()
    randomize(model, 0)
    job = AutoRound(model, dataset=samples(4, 16), iters=0, nsamples=4, **SMALL)
    job.quantize_and_save(tmp_path, format="auto_round,fake")
    assert torch.equal(logits(loaded(tmp_path / "auto-round")), logits(loaded(tmp_path / "fake")))
