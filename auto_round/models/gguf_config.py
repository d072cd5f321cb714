"""config.json from the header of a GGUF file: the inverse of `gguf_metadata`, one row per architecture.

transformers has such tables too, but leaves out what many models need (rope scaling, soft caps, widths of experts).
What no header holds, such as the activation function, is what the class has by default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from auto_round.core.errors import ModelError
from auto_round.models.gguf_metadata import llama3_factors
from auto_round.models.gguf_names import ARCHITECTURES, gemma_scalar

LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONTEXTS = [1 << n for n in range(5, 21)]
"""Original context lengths that are tried to find what made the factors of a Llama 3."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says. values: by key. shapes: tensor -> shape. factors: of rotary frequencies, by tensor."""

    values: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    factors: Mapping[str, Tensor]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of it."""
        return str(self.values.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        """The value of this architecture's `key`; the first block's when there is one per block."""
        value = self.values.get(f"{self.architecture}.{key}", default)
        if isinstance(value, list):
            if len(set(value)) > 1:
                raise ModelError(f"{self.architecture}.{key} differs from block to block: {value}")
            value = value[0] if value else default
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """A number of things, 1 or more. Raises ModelError for anything else."""
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
            raise ModelError(
                f"the header says {self.architecture}.{key} = {value!r}, which is no number from 1 on; "
                "the file is damaged, or made by a tool that this version does not understand"
            )
        return value

    def has(self, end: str) -> bool:
        """Whether some tensor's name ends so."""
        return any(name.endswith(end) for name in self.shapes)


Values = dict[str, Any]


def config_of(header: Header) -> Values:
    """The contents of config.json. Raises ModelError for an architecture that is not in the table."""
    if header.architecture not in BUILDERS:
        raise ModelError(
            f"architecture {header.architecture!r}: gguf files can be read for {', '.join(BUILDERS)}. "
            "Use the original model"
        )
    table = header.shapes.get("token_embd.weight")
    if table is None or len(table) != 2:
        raise ModelError("the file has no embedding (token_embd.weight); is it a whole language model?")
    blocks = {int(name.split(".")[1]) for name in header.shapes if name.startswith("blk.")}
    said = header.count("block_count"), header.count("embedding_length")
    found = max(blocks, default=-1) + 1, table[1]
    if said != found:
        raise ModelError(
            f"the header says {said[0]} blocks of width {said[1]}, the tensors are of {found[0]} blocks of width "
            f"{found[1]}; the file is damaged"
        )
    class_, model_type, build = BUILDERS[header.architecture](header)
    assert class_ in ARCHITECTURES, f"{class_} can be written too"
    config = {
        "architectures": [class_],
        "model_type": model_type,
        "vocab_size": table[0],
        # llama.cpp writes a tied head once, as the embedding.
        "tie_word_embeddings": "output.weight" not in header.shapes,
        **_tokens(header),
        **build,
    }
    return {key: value for key, value in config.items() if value is not None or key in NULLABLE}


NULLABLE = ("bos_token_id", "eos_token_id", "pad_token_id", "sliding_window", "q_lora_rank", "rope_scaling")
"""Settings whose default in a class is a number, so that "none" has to be said."""


def _tokens(header: Header) -> Values:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {key: header.values.get(f"tokenizer.ggml.{name}_token_id") for key, name in names.items()}


def _usual(header: Header) -> Values:
    """What most classes call the same."""
    rms = header.get("attention.layer_norm_rms_epsilon")
    plain = header.get("attention.layer_norm_epsilon")
    return {
        "hidden_size": header.count("embedding_length"),
        "num_hidden_layers": header.count("block_count"),
        "intermediate_size": header.count("feed_forward_length"),
        "num_attention_heads": header.count("attention.head_count"),
        "num_key_value_heads": header.count("attention.head_count_kv", header.get("attention.head_count")),
        "max_position_embeddings": header.count("context_length"),
        "rms_norm_eps": rms,
        "layer_norm_eps": plain,
        "sliding_window": header.get("attention.sliding_window") or None,
        **_rope(header),
    }


def _headed(header: Header) -> Values:
    """The same for classes whose heads need not share the width among them."""
    default = header.count("embedding_length") // header.count("attention.head_count")
    return {**_usual(header), "head_dim": header.count("attention.key_length", max(1, default))}


def _rope(header: Header) -> Values:
    """Base and scaling of rotary embeddings, in the spelling that old and new transformers read."""
    found: Values = {"rope_theta": header.get("rope.freq_base", 10000.0), "rope_scaling": None}
    kind = header.get("rope.scaling.type", "none")
    if "rope_freqs.weight" in header.factors:
        found["rope_scaling"] = _by_factors(header, header.factors["rope_freqs.weight"])
    elif kind == "linear" or (kind == "none" and header.get("rope.scale_linear")):
        factor = header.get("rope.scaling.factor", header.get("rope.scale_linear"))
        found["rope_scaling"] = {"rope_type": "linear", "factor": float(factor)}
    elif kind == "yarn":
        original = header.count("rope.scaling.original_context_length", header.count("context_length"))
        found["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": float(header.get("rope.scaling.factor", 1.0)),
            "original_max_position_embeddings": original,
        }
        attention = header.get("rope.scaling.attn_factor")
        found["rope_scaling"] |= {} if attention is None else {"attention_factor": float(attention)}
    return found


def _by_factors(header: Header, factors: Tensor) -> Values:
    """The settings of Llama 3 that give `factors`; else the factors themselves, which longrope takes."""
    base, size = float(header.get("rope.freq_base", 10000.0)), 2 * factors.numel()
    for original in CONTEXTS:
        settings = {**LLAMA3, "factor": float(factors.max()), "original_max_position_embeddings": original}
        made = llama3_factors({**settings, "rope_theta": base}, size)
        if torch.allclose(made, factors, rtol=1e-5):  # float32 in the file, made in float64
            return settings
    each = factors.tolist()
    return {
        "rope_type": "longrope", "short_factor": each, "long_factor": each, "attention_factor": 1.0, "factor": 1.0,
        "original_max_position_embeddings": header.count("context_length"),
    }  # fmt: skip


Built = tuple[str, str, Values]
"""Class in transformers, model_type, and what else the configuration says."""


def _llama(header: Header) -> Built:
    biases = {"attention_bias": header.has(".attn_q.bias"), "mlp_bias": header.has(".ffn_up.bias")}
    if not header.get("expert_count"):
        return "LlamaForCausalLM", "llama", {**_headed(header), **biases, "sliding_window": None}
    experts = {
        "num_local_experts": header.count("expert_count"),
        "num_experts_per_tok": header.count("expert_used_count"),
    }
    return "MixtralForCausalLM", "mixtral", {**_headed(header), **experts}


def _simple(class_: str, model_type: str, *, headed: bool = False) -> Callable[[Header], Built]:
    """An architecture that says the usual things."""

    def build(header: Header) -> Built:
        biases = {"attention_bias": header.has(".attn_q.bias")}
        return class_, model_type, {**(_headed(header) if headed else _usual(header)), **biases}

    return build


def _experts(header: Header) -> Values:
    return {
        "num_experts": header.count("expert_count"),
        "num_experts_per_tok": header.count("expert_used_count"),
        "moe_intermediate_size": header.get("expert_feed_forward_length") or _width_of_experts(header),
    }


def _width_of_experts(header: Header) -> int | None:
    """Older files do not say it."""
    return next((shape[1] for name, shape in header.shapes.items() if ".ffn_gate_exps." in name), None)


def _qwen2moe(header: Header) -> Built:
    shared = header.get("expert_shared_feed_forward_length") or next(
        (shape[0] for name, shape in header.shapes.items() if ".ffn_gate_shexp." in name), None
    )
    own = {"shared_expert_intermediate_size": shared}
    return "Qwen2MoeForCausalLM", "qwen2_moe", {**_usual(header), **_experts(header), **own}


def _qwen3moe(header: Header) -> Built:
    # llama.cpp always lets the weights of the chosen experts sum to one.
    own = {"norm_topk_prob": True, "attention_bias": header.has(".attn_q.bias")}
    return "Qwen3MoeForCausalLM", "qwen3_moe", {**_headed(header), **_experts(header), **own}


def _scalar(header: Header) -> int:
    heads, width = header.count("attention.head_count"), header.count("embedding_length")
    size = header.count("attention.key_length", max(1, width // heads))
    return gemma_scalar(header.architecture, header.count("block_count"), width // heads, size)


def _caps(header: Header) -> Values:
    return {
        "attn_logit_softcapping": header.get("attn_logit_softcapping"),
        "final_logit_softcapping": header.get("final_logit_softcapping"),
    }


def _gemma2(header: Header) -> Built:
    own = {**_headed(header), **_caps(header), "query_pre_attn_scalar": _scalar(header)}
    return "Gemma2ForCausalLM", "gemma2", own


def _gemma3(header: Header) -> Built:
    own = {
        **_headed(header),
        **_caps(header),
        "query_pre_attn_scalar": _scalar(header),
        "rope_local_base_freq": header.get("rope.freq_base_swa", 10000.0),
        "sliding_window_pattern": 6,
    }
    return "Gemma3ForCausalLM", "gemma3_text", own


def _phi3(header: Header) -> Built:
    original = header.get("rope.scaling.original_context_length") or header.count("context_length")
    values = {**_usual(header), "original_max_position_embeddings": original}
    share = _rotary_share(header)
    if share != 1:
        values["partial_rotary_factor"] = share
    factors = {name: header.factors.get(f"rope_factors_{name}.weight") for name in ("long", "short")}
    if all(found is not None for found in factors.values()):
        values["rope_scaling"] = {
            "rope_type": "longrope",
            **{f"{name}_factor": found.tolist() for name, found in factors.items() if found is not None},
            "attention_factor": header.get("rope.scaling.attn_factor"),
            "original_max_position_embeddings": original,
        }
    return "Phi3ForCausalLM", "phi3", values


def _rotary_share(header: Header) -> float:
    size = header.count("embedding_length") // header.count("attention.head_count")
    return header.count("rope.dimension_count", max(1, size)) / max(1, size)


def _gpt2(header: Header) -> Built:
    return "GPT2LMHeadModel", "gpt2", {
        "n_embd": header.count("embedding_length"),
        "n_layer": header.count("block_count"),
        "n_head": header.count("attention.head_count"),
        "n_inner": header.count("feed_forward_length"),
        "n_positions": header.count("context_length"),
        "layer_norm_epsilon": header.get("attention.layer_norm_epsilon"),
    }  # fmt: skip


def _starcoder2(header: Header) -> Built:
    usual = _usual(header)
    own = {"norm_epsilon": usual.pop("layer_norm_eps"), "use_bias": header.has(".attn_q.bias")}
    return "Starcoder2ForCausalLM", "starcoder2", {**usual, **own}


def _falcon(header: Header) -> Built:
    usual, kv = _usual(header), header.count("attention.head_count_kv", 1)
    new = kv > 1 or header.has(".attn_norm_2.weight")
    own = {
        "ffn_hidden_size": usual.pop("intermediate_size"),
        "layer_norm_epsilon": usual.pop("layer_norm_eps"),
        "new_decoder_architecture": new,
        "num_kv_heads": kv,
        "multi_query": not new,
        "parallel_attn": True,
        "alibi": False,
        "bias": header.has(".attn_qkv.bias"),
        "num_ln_in_parallel_attn": 2 if header.has(".attn_norm_2.weight") else 1,
    }
    return "FalconForCausalLM", "falcon", {**usual, **own}


def _neox(header: Header) -> Built:
    own = {
        "rotary_pct": _rotary_share(header),
        "rotary_emb_base": header.get("rope.freq_base", 10000.0),
        "use_parallel_residual": bool(header.get("use_parallel_residual", True)),
        "attention_bias": header.has(".attn_qkv.bias"),
    }
    return "GPTNeoXForCausalLM", "gpt_neox", {**_usual(header), **own}


def _bloom(header: Header) -> Built:
    return "BloomForCausalLM", "bloom", {
        "hidden_size": header.count("embedding_length"),
        "n_layer": header.count("block_count"),
        "n_head": header.count("attention.head_count"),
        "layer_norm_epsilon": header.get("attention.layer_norm_epsilon"),
        "seq_length": header.get("context_length"),
    }  # fmt: skip


def _mpt(header: Header) -> Built:
    alibi = float(header.get("attention.max_alibi_bias", 0.0))
    attention = {
        "alibi": alibi > 0,
        "alibi_bias_max": int(alibi) or 8,
        "clip_qkv": header.get("attention.clamp_kqv"),
    }
    return "MptForCausalLM", "mpt", {
        "d_model": header.count("embedding_length"),
        "n_layers": header.count("block_count"),
        "n_heads": header.count("attention.head_count"),
        "max_seq_len": header.count("context_length"),
        "layer_norm_epsilon": header.get("attention.layer_norm_epsilon"),
        "attn_config": {key: value for key, value in attention.items() if value is not None},
    }  # fmt: skip


def _deepseek2(header: Header) -> Built:
    if header.has(".attn_k_b.weight"):
        raise ModelError(
            "keys and values are split per head (attn_k_b, attn_v_b), as newer converters do: such files are not "
            "read. Use the original model"
        )
    # Keys are two parts side by side, of which the header gives the second and the sum.
    rotary, key = header.count("rope.dimension_count"), header.count("attention.key_length")
    own = {
        **_experts(header),
        "n_routed_experts": header.count("expert_count"),
        "n_shared_experts": header.get("expert_shared_count"),
        "first_k_dense_replace": header.get("leading_dense_block_count", 0),
        "q_lora_rank": header.get("attention.q_lora_rank"),
        "kv_lora_rank": header.count("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotary,
        "qk_nope_head_dim": key - rotary,
        "v_head_dim": header.count("attention.value_length"),
        "head_dim": rotary,
        "routed_scaling_factor": header.get("expert_weights_scale", 1.0),
        "norm_topk_prob": bool(header.get("expert_weights_norm", False)),
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
    }
    own.pop("num_experts")
    values = {**_usual(header), **own}
    logarithm = header.get("rope.scaling.yarn_log_multiplier")
    if logarithm and values["rope_scaling"]:
        # The file has a tenth of it; the checkpoint's two settings are equal in all published models.
        share = round(10 * logarithm, 4)
        values["rope_scaling"] |= {"mscale": share, "mscale_all_dim": share}
    return "DeepseekV2ForCausalLM", "deepseek_v2", values


BUILDERS: Mapping[str, Callable[[Header], Built]] = {
    "llama": _llama,
    "qwen2": _simple("Qwen2ForCausalLM", "qwen2"),
    "qwen2moe": _qwen2moe,
    "qwen3": _simple("Qwen3ForCausalLM", "qwen3", headed=True),
    "qwen3moe": _qwen3moe,
    "gemma": _simple("GemmaForCausalLM", "gemma", headed=True),
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "olmo2": _simple("Olmo2ForCausalLM", "olmo2"),
    "gpt2": _gpt2,
    "starcoder2": _starcoder2,
    "falcon": _falcon,
    "gptneox": _neox,
    "bloom": _bloom,
    "mpt": _mpt,
    "deepseek2": _deepseek2,
}
"""llama.cpp's name of an architecture -> what makes a configuration of it."""
