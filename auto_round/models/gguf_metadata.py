"""What a GGUF file says about a model's dimensions, from its configuration; and the tensors computed from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from auto_round.core.errors import ModelError
from auto_round.models.gguf_names import Architecture, Config, first, heads, kv_heads

Values = dict[str, Any]


def language_config(config: Config) -> dict[str, Any]:
    """`config` with all defaults of its class, of the language part if there are several, and its `architectures`."""
    from transformers import AutoConfig

    given = {name: value for name, value in config.items() if name != "quantization_config"}
    # Through the class: config.json leaves out what has the class's default, and a file has to say it.
    full = AutoConfig.for_model(given.pop("model_type"), **given).get_text_config().to_dict()
    return {**full, "architectures": config.get("architectures")}


def metadata(architecture: Architecture, config: Config, vocabulary: int) -> Values:
    """Key -> value of everything about dimensions; int, float, bool and str in their natural GGUF types."""
    width, size = embedding_length(config), head_size(config)
    values: Values = {
        "block_count": block_count(config),
        "context_length": first(
            config, "max_position_embeddings", "n_positions", "seq_length", "max_seq_len", default=2048
        ),
        "embedding_length": width,
        "feed_forward_length": first(
            config, "intermediate_size", "n_inner", "ffn_hidden_size", default=4 * width
        ),
        "vocab_size": vocabulary,
        "attention.head_count": heads(config),
        "attention.head_count_kv": kv_heads(config),
    }
    if config.get("rms_norm_eps") is not None:
        values["attention.layer_norm_rms_epsilon"] = float(config["rms_norm_eps"])
    else:
        values["attention.layer_norm_epsilon"] = float(
            first(config, "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", default=1e-5)
        )
    if config.get("head_dim"):
        values |= {"attention.key_length": size, "attention.value_length": size}
    if architecture.rotary:
        values |= _rotary(config, size)
    values |= EXTRAS.get(architecture.name, _nothing)(config)
    values = {f"{architecture.name}.{key}": value for key, value in values.items() if value is not None}
    if architecture.name == "falcon":
        values["falcon.tensor_data_layout"] = "jploski"  # llama.cpp's name of q, k and v sorted by kind
    return values


def block_count(config: Config) -> int:
    """Blocks of the model."""
    return int(first(config, "num_hidden_layers", "n_layer", "n_layers"))


def embedding_length(config: Config) -> int:
    """Width of the hidden states."""
    return int(first(config, "hidden_size", "n_embd", "d_model"))


def head_size(config: Config) -> int:
    """Values of a head."""
    return int(first(config, "head_dim", default=embedding_length(config) // heads(config)))


def rope(config: Config) -> Mapping[str, Any]:
    """Settings of the rotary embedding of full attention, however the configuration spells them."""
    found = config.get("rope_parameters") or {}
    if "full_attention" in found:
        found = found["full_attention"]
    old = config.get("rope_scaling") or {}
    base = {"rope_theta": first(config, "rope_theta", "rotary_emb_base", default=10000.0)}
    merged = {**base, **old, **{key: value for key, value in found.items() if value is not None}}
    return {**merged, "rope_type": merged.get("rope_type", merged.get("type", "default"))}


def _rotary(config: Config, size: int) -> Values:
    settings = rope(config)
    share = first(settings, "partial_rotary_factor", default=None)
    share = first(config, "partial_rotary_factor", "rotary_pct", default=1.0) if share is None else share
    values: Values = {
        "rope.freq_base": float(settings["rope_theta"]),
        "rope.dimension_count": int(config.get("qk_rope_head_dim") or size * share),
    }
    kind = settings["rope_type"]
    if kind in ("linear", "yarn"):
        values |= {"rope.scaling.type": kind, "rope.scaling.factor": float(settings["factor"])}
    if kind == "yarn":
        values["rope.scaling.original_context_length"] = first(
            settings, "original_max_position_embeddings", default=config.get("max_position_embeddings")
        )
        if settings.get("mscale_all_dim"):
            values["rope.scaling.yarn_log_multiplier"] = 0.1 * float(settings["mscale_all_dim"])
        elif settings.get("attention_factor"):
            values["rope.scaling.attn_factor"] = float(settings["attention_factor"])
    if kind not in ("default", "linear", "yarn", "llama3", "longrope", "proportional"):
        raise ModelError(f"rope scaling {kind!r} has no counterpart in llama.cpp. Use another format")
    return values


def computed_tensors(architecture: Architecture, config: Config) -> dict[str, Tensor]:
    """Tensors that a file holds and a checkpoint does not: factors of rotary frequencies, float32."""
    settings = rope(config)
    if not architecture.rotary:
        return {}
    if settings["rope_type"] == "llama3":
        return {"rope_freqs.weight": llama3_factors(settings, head_size(config))}
    if settings["rope_type"] == "longrope":
        return {
            f"rope_factors_{length}.weight": torch.tensor(settings[f"{length}_factor"], dtype=torch.float32)
            for length in ("long", "short")
        }
    return {}


def llama3_factors(settings: Mapping[str, Any], size: int) -> Tensor:
    """Divisors of the rotary frequencies: 1 for short wavelengths, `factor` for long ones, smooth between them."""
    frequency = float(settings["rope_theta"]) ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    wavelength, context = 2 * math.pi / frequency, settings["original_max_position_embeddings"]
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    smooth = ((context / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / settings["factor"] + smooth)).float()


def _nothing(config: Config) -> Values:
    return {}


def _experts(config: Config) -> Values:
    return {
        "expert_count": first(config, "num_local_experts", "num_experts", "n_routed_experts"),
        "expert_used_count": config.get("num_experts_per_tok"),
        "expert_feed_forward_length": config.get("moe_intermediate_size"),
        "expert_shared_feed_forward_length": config.get("shared_expert_intermediate_size"),
    }


def _llama(config: Config) -> Values:
    return _experts(config) if config.get("num_local_experts") else {}


def _soft_capped(config: Config) -> Values:
    return {
        "attn_logit_softcapping": config.get("attn_logit_softcapping"),
        "final_logit_softcapping": config.get("final_logit_softcapping"),
        "attention.sliding_window": config.get("sliding_window"),
    }


def _gemma3(config: Config) -> Values:
    local = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
    return {
        **_soft_capped(config),
        "rope.freq_base_swa": float(
            first(local, "rope_theta", default=config.get("rope_local_base_freq", 10000.0))
        ),
    }


def _phi3(config: Config) -> Values:
    settings = rope(config)
    original = first(
        settings, "original_max_position_embeddings", default=config.get("original_max_position_embeddings")
    )
    return {
        "attention.sliding_window": config.get("sliding_window") or 0,
        "rope.scaling.original_context_length": original or config["max_position_embeddings"],
        "rope.scaling.attn_factor": _longrope_attention(config, settings, original),
    }


def _longrope_attention(config: Config, settings: Mapping[str, Any], original: int | None) -> float | None:
    """Factor on attention of long contexts, as the model's own code has it."""
    if settings["rope_type"] != "longrope":
        return None
    if settings.get("attention_factor"):
        return float(settings["attention_factor"])
    ratio = config["max_position_embeddings"] / (original or config["max_position_embeddings"])
    return math.sqrt(1 + math.log(ratio) / math.log(original or 2)) if ratio > 1 else 1.0


def _neox(config: Config) -> Values:
    return {"use_parallel_residual": bool(config.get("use_parallel_residual", True))}


def _mpt(config: Config) -> Values:
    attention = config.get("attn_config") or {}
    return {
        "feed_forward_length": 4 * config["d_model"],  # in transformers, whatever expansion_ratio says
        "attention.clamp_kqv": attention.get("clip_qkv"),
        "attention.max_alibi_bias": float(attention.get("alibi_bias_max", 8))
        if attention.get("alibi", True)
        else 0.0,
    }


def _deepseek2(config: Config) -> Values:
    return {
        "leading_dense_block_count": config.get("first_k_dense_replace", 0),
        "attention.q_lora_rank": config.get("q_lora_rank"),
        "attention.kv_lora_rank": config["kv_lora_rank"],
        "attention.key_length": config["qk_nope_head_dim"] + config["qk_rope_head_dim"],
        "attention.value_length": config["v_head_dim"],
        "attention.head_count_kv": heads(config),
        **_experts(config),
        "expert_shared_count": config.get("n_shared_experts"),
        "expert_weights_scale": float(config.get("routed_scaling_factor") or 1.0),
        "expert_weights_norm": bool(config.get("norm_topk_prob")),
        "expert_gating_func": 1,  # softmax
    }


EXTRAS: Mapping[str, Callable[[Config], Values]] = {
    "llama": _llama,
    "qwen2moe": _experts,
    "qwen3moe": _experts,
    "gemma2": _soft_capped,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "gptneox": _neox,
    "mpt": _mpt,
    "deepseek2": _deepseek2,
}
"""What single architectures say beyond the common settings."""
