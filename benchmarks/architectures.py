"""Every decoder that `AutoModelForCausalLM` knows, tiny and random: quantized, loaded by stock transformers, compared.

    python benchmarks/architectures.py [--types llama,gpt2] [--seconds 120]

Each model is quantized twice, tuned (two steps on eight samples) and streamed (plain rounding, the model never loaded),
in the formats `auto_round` and `fake`, and the logits of the two folders are compared in float32. Every type runs in a
process of its own and gives a row of `results/architectures.jsonl`; the same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, AutoRoundConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "architectures.jsonl"
sys.path.insert(0, str(HERE.parent / "tests"))
from models import randomize, samples, tokenizer, tokens  # noqa: E402

LENGTH, SLACK = 16, 1e-4
REFUSAL = "blocks cannot be tuned one after the other"
RUNS = {
    "tuned": {"iters": 2, "nsamples": 8, "seqlen": LENGTH},
    "streamed": {"iters": 0, "disable_opt_rtn": True},
}
SIZES: dict[int, str] = {
    512: "vocab_size decoder_vocab_size encoder_vocab_size vocab_size_per_layer_input",
    64: (
        "hidden_size d_model n_embd embed_dim dim n_embed emb_dim embedding_size d_embed "
        "word_embed_proj_dim dim_model lru_width attention_hidden_size input_embedding_size "
        "shared_expert_intermediate_size moe_shared_expert_intermediate_size"
    ),
    2: (
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
        "num_encoder_layers num_blocks num_key_value_heads n_head_kv num_kv_heads kv_n_heads "
        "attention_num_kv_heads num_attention_groups num_query_groups swa_num_key_value_heads "
        "num_global_key_value_heads linear_num_key_heads index_n_heads indexer_num_heads index_num_heads "
        "num_experts_per_tok top_k moe_top_k moe_k num_experts_per_token moe_topk topk "
        "num_selected_experts top_k_experts eos_token_id"
    ),
    4: (
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
        "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads "
        "linear_num_value_heads linear_num_heads kda_num_heads mamba_n_heads mamba_num_heads "
        "n_mamba_heads n_routed_experts num_experts num_local_experts moe_num_experts n_experts"
    ),
    1: (
        "n_shared_experts num_shared_experts moe_num_shared_experts topk_group first_k_dense_replace "
        "n_group mamba_n_groups bos_token_id decoder_start_token_id"
    ),
    16: (
        "head_dim attention_head_dim kv_channels dim_head d_kv swa_head_dim global_head_dim "
        "attention_k_dim qk_rope_head_dim qk_nope_head_dim v_head_dim swa_v_head_dim linear_key_head_dim "
        "linear_value_head_dim linear_k_head_dim linear_v_head_dim linear_head_dim kda_head_dim "
        "index_head_dim indexer_head_dim mamba_d_state mamba_chunk_size ssm_state_size state_size "
        "chunk_size mamba_state_size"
    ),
    32: (
        "moe_intermediate_size expert_ffn_hidden_size expert_intermediate_size "
        "routed_expert_intermediate_size q_lora_rank kv_lora_rank o_lora_rank index_q_lora_rank "
        "mamba_d_head mamba_head_dim time_step_rank mamba_dt_rank projection_dim "
        "hidden_size_per_layer_input cross_attention_hidden_size"
    ),
    96: (
        "intermediate_size ffn_dim d_ff n_inner ff_dim decoder_ffn_dim encoder_ffn_dim dff dim_ff "
        "ffn_hidden_size block_ff_dim intermediate_size_mlp dense_intermediate_size "
        "shared_intermediate_size feed_forward_size"
    ),
    128: (
        "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions "
        "max_seq_length mamba_d_ssm"
    ),
    8: (
        "index_topk indexer_topk sliding_window attention_window_size window_size sliding_window_size "
        "local_attention"
    ),
    0: "pad_token_id",
}
"""Size -> what configurations call it."""
KINDS = ("layer_types", "layers_block_type", "mlp_layer_types", "block_types", "hybrid_override_pattern")
"""Lists with a kind for every layer: each kind is tried once."""

MIXED = ["sliding_attention", "full_attention"]
ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
REUSE = {"num_hidden_layers": 4, "layer_types": MIXED * 2, "num_kv_shared_layers": 2}
SHARED_HEADS = {"attention_hidden_size": 128, "attention_head_dim": 32}
INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_budget": 8, "indexer_compress_ratio": 4}
DOTS = {
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 32, "swa_kv_lora_rank": 32,
    "swa_head_dim": 32, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16,
}  # fmt: skip
PART = {
    "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
    "intermediate_size": 96, "max_position_embeddings": 128, "hidden_size_global": 64,
}  # fmt: skip
SPECIAL: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 500, "patch_in_forward": False, "encoder_config": PART,
            "decoder_config": PART, "global_config": PART, "patcher_config": PART},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"layer_types": MIXED, "rope_parameters": dict.fromkeys(MIXED, ROPE)},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
             "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96}},
    "dots3_note": {"text_config": DOTS,
                   "vision_config": {"hidden_size": 64, "adapter_in_dim": 64, "adapter_out_dim": 64},
                   "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64, "hidden_size": 64}},
    "dots3_note_text": DOTS,
    "gemma3n_text": {**REUSE, "intermediate_size": [96] * 4, "activation_sparsity_pattern": [0.0] * 4,
                     "laurel_rank": 16},
    "gemma4_text": {**REUSE, "use_double_wide_mlp": True},
    "gemma4_unified_text": REUSE,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "nemotron_h": {"n_groups": 1},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "reformer": {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [32, 32], "attn_layers": ["local", "lsh"],
                 "num_hashes": 1, "lsh_attn_chunk_length": 8, "local_attn_chunk_length": 8, "attention_head_size": 16,
                 "num_buckets": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {**SHARED_HEADS, "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {**SHARED_HEADS, "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""What some types need besides `SIZES`."""
WHOLE = ("mllama",)
"""Types that transformers loads as language models only from checkpoints of the whole model, with its vision tower."""


def settings_of(kind: type) -> dict[str, Any]:
    """Small sizes for every setting that the configuration class `kind` has, and for the configurations within it."""
    known = {name for cls in kind.__mro__ for name in getattr(cls, "__annotations__", {})}
    known |= {
        name
        for cls in kind.__mro__
        if "__init__" in vars(cls)
        for name in inspect.signature(cls.__init__).parameters
    }
    try:
        default = vars(kind())
    except Exception:  # some have no valid defaults; then there is nothing to learn from them
        default = {}
    aliases = getattr(kind, "attribute_map", {})
    found = {
        name: size
        for size, names in SIZES.items()
        for name in names.split()
        if name in known | {*default, *aliases}
    }
    found = {name: size for name, size in found.items() if aliases.get(name) not in found}
    if "kv_lora_rank" in found and "num_key_value_heads" in found:
        found["num_key_value_heads"] = found["num_attention_heads"]  # latent attention has one for each
    lists = {name: list(dict.fromkeys(default[name])) for name in KINDS if _is_words(default.get(name))}
    layers = max([2, *(len(kinds) for kinds in lists.values())])
    found |= {name: (kinds * layers)[:layers] for name, kinds in lists.items()}
    if lists and "num_hidden_layers" in found:
        found["num_hidden_layers"] = layers
    for name, inner in (getattr(kind, "sub_configs", None) or {}).items():
        inner = type(default[name]) if inner.__name__ == "AutoConfig" and default.get(name) else inner
        if inner.__name__ != "AutoConfig":
            found[name] = settings_of(inner)
    return found


def _is_words(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and isinstance(value[0], str)


def merged(settings: dict[str, Any], special: dict[str, Any]) -> dict[str, Any]:
    """`settings` with those of `special`, at every depth."""
    inner = {
        k: merged(settings[k], v)
        for k, v in special.items()
        if isinstance(v, dict) and isinstance(settings.get(k), dict)
    }
    return {**settings, **special, **inner}


def build(name: str) -> torch.nn.Module:
    """A random model of the type `name`."""
    kind = CONFIG_MAPPING[name]
    config = kind(**merged(settings_of(kind), SPECIAL.get(name, {})))
    if getattr(config, "is_decoder", None) is False and not getattr(config, "is_encoder_decoder", False):
        config.is_decoder = True
    torch.manual_seed(0)
    loader = AutoModelForImageTextToText if name in WHOLE else AutoModelForCausalLM
    model = loader.from_config(config).float().eval()
    randomize(model, 0)
    return model


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    """What the checkpoint in `folder` says about two random texts, by stock transformers in float32."""
    about = json.loads((folder / "config.json").read_text()).get("quantization_config")
    options = {"quantization_config": AutoRoundConfig(backend="torch")} if about else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    return model(input_ids=tokens(2, LENGTH, seed=9), use_cache=False).logits.float()


def trial(name: str, folder: Path, note: Callable[..., None]) -> None:
    """Build, quantize, load and compare; `note` keeps what was found out so far."""
    from auto_round import AutoRound
    from auto_round.core.errors import ModelError

    note(at="building")
    model = build(name)
    model.save_pretrained(folder / "m")
    tokenizer().save_pretrained(folder / "m")
    del model
    note(at="loading the original")
    original = logits(folder / "m")
    for run, options in RUNS.items():
        note(at=f"{run}: quantizing")
        started = time.perf_counter()
        job = AutoRound(str(folder / "m"), tokenizer(), dataset=samples(8, LENGTH), group_size=32, **options)
        try:
            job.quantize_and_save(folder / run, format="auto_round,fake")
        except ModelError as error:
            if REFUSAL not in str(error):
                raise
            note(refused=str(error))
            continue
        seconds = round(time.perf_counter() - started, 1)
        note(at=f"{run}: loading")
        packed, plain = logits(folder / run / "auto-round"), logits(folder / run / "fake")
        note(**{run: {
            "layers": len(job.plan.quantized()), "seconds": seconds, "finite": bool(packed.isfinite().all()),
            "difference": _relative(packed, plain), "from_original": _relative(plain, original),
        }})  # fmt: skip
    note(at="done")


def _relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def in_a_process(name: str, seconds: float) -> dict[str, Any]:
    """The row of the type `name`: `trial` in a child, which is ended after `seconds`."""
    with tempfile.TemporaryDirectory() as place:
        folder, row = Path(place), {"type": name, "transformers": transformers.__version__}
        child = os.fork()
        if child == 0:
            _child(name, folder, row)
        end, ended = time.monotonic() + seconds, (0, 0)
        while not ended[0] and time.monotonic() < end:
            time.sleep(0.1)
            ended = os.waitpid(child, os.WNOHANG)
        if not ended[0]:
            os.kill(child, 9)
            os.waitpid(child, 0)
        row = json.loads((folder / "row.json").read_text())
    if not ended[0]:
        row["error"] = f"not done after {seconds:.0f} s"
    return {**row, "result": verdict(row)}


def _child(name: str, folder: Path, row: dict[str, Any]) -> None:
    """`trial`, told in folder/row.json; does not return."""

    def note(**told: Any) -> None:
        row.update(told)
        (folder / "row.json").write_text(json.dumps(row))

    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        trial(name, folder, note)
    except Exception as error:  # whatever goes wrong is the result
        note(error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    os._exit(0)


def verdict(row: dict[str, Any]) -> str:
    """equal, streamed only, different, failed; or not tried, where transformers itself does not load the original."""
    if "error" in row:
        if row["at"] in ("building", "loading the original"):
            return "not tried"
        return "failed"
    done = [row[run] for run in RUNS if run in row]
    if not all(one["finite"] and one["difference"] <= SLACK for one in done):
        return "different"
    return "streamed only" if "refused" in row else "equal"


def main() -> None:
    """Try what has no row yet, or the types that are named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", help="comma list; these are tried even if they have a row")
    parser.add_argument("--seconds", type=float, default=120, help="time limit of one type")
    asked = parser.parse_args()
    rows = {}
    if RESULTS.is_file():
        rows = {row["type"]: row for row in map(json.loads, RESULTS.read_text().splitlines())}
    wanted = (
        asked.types.split(",")
        if asked.types
        else [n for n in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if n not in rows]
    )
    torch.set_num_threads(1)
    for name in wanted:
        rows[name] = in_a_process(name, asked.seconds)
        print(rows[name]["result"], name, rows[name].get("error", ""), flush=True)
        RESULTS.write_text("".join(json.dumps(rows[n]) + "\n" for n in sorted(rows)))
    counts = {
        result: sum(row["result"] == result for row in rows.values())
        for result in sorted({r["result"] for r in rows.values()})
    }
    print(len(rows), "types:", counts)


if __name__ == "__main__":
    main()
