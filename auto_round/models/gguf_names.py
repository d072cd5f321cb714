"""Architectures that llama.cpp knows, as data: where each tensor of a checkpoint goes in a GGUF file.

Names come from the tables of the `gguf` package. What it does not know is here: which architecture a model is, which
rows are put in another order, which norms are stored with one added. Metadata is in `gguf_metadata.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from auto_round.core.errors import ModelError

Config = Mapping[str, Any]
Order = Callable[[int, Config], Tensor]
"""Number of rows and configuration to the permutation: row i of the file is row order[i] of the checkpoint."""


def first(config: Config, *names: str, default: Any = None) -> Any:
    """The first of the settings `names` that `config` has, or `default`."""
    return next((config[name] for name in names if config.get(name) is not None), default)


def heads(config: Config) -> int:
    """Attention heads."""
    return int(first(config, "num_attention_heads", "n_head", "n_heads"))


def kv_heads(config: Config) -> int:
    """Heads of keys and values."""
    if config.get("model_type") == "falcon":
        if config.get("new_decoder_architecture"):
            return int(config["num_kv_heads"])
        return 1 if config.get("multi_query") else heads(config)
    if config.get("model_type") in ("gpt_neox", "bloom", "mpt", "gpt2"):
        return heads(config)
    return int(first(config, "num_key_value_heads", default=heads(config)))


def _rotary_pairs(rows: int, count: int) -> Tensor:
    """Halves of each head interleaved: llama.cpp rotates neighbours, transformers rotates value i with i + half."""
    # A head of 4: rows 0 1 | 2 3 of the checkpoint become 0 2 1 3 of the file.
    return torch.arange(rows).view(count, 2, -1).transpose(1, 2).reshape(-1)


def _query_rows(rows: int, config: Config) -> Tensor:
    return _rotary_pairs(rows, heads(config))


def _key_rows(rows: int, config: Config) -> Tensor:
    return _rotary_pairs(rows, kv_heads(config))


def _per_head_qkv(rows: int, config: Config) -> Tensor:
    """(head, q k v, value) to (q k v, head, value)."""
    # Two heads of one value: q0 k0 v0 q1 k1 v1 become q0 q1 k0 k1 v0 v1.
    return torch.arange(rows).view(heads(config), 3, -1).transpose(0, 1).reshape(-1)


def _grouped_qkv(rows: int, config: Config) -> Tensor:
    """Groups of several query heads, one key and one value head, to all queries, all keys, all values."""
    groups = kv_heads(config)
    per_group = heads(config) // groups
    index = torch.arange(rows).view(groups, per_group + 2, -1)
    return torch.cat([index[:, :per_group].reshape(-1), index[:, -2].reshape(-1), index[:, -1].reshape(-1)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One architecture of llama.cpp. orders: part of a tensor's name -> order of its rows."""

    name: str
    orders: Mapping[str, Order] = field(default_factory=dict)
    norms_plus_one: bool = False
    rotary: bool = True
    skipped: tuple[str, ...] = ()  # ends of names of buffers that the file does not hold
    refuses: Callable[[Config], str | None] = lambda config: None


def _falcon_alibi(config: Config) -> str | None:
    if config.get("alibi"):
        return "Falcon with alibi positions has no counterpart in llama.cpp"
    if not (config.get("new_decoder_architecture") or config.get("multi_query")):
        return "Falcon without multi_query has no counterpart in llama.cpp"
    return None


def _windows_every(period: int) -> Callable[[Config], str | None]:
    """llama.cpp knows one pattern: every so many-th block sees everything, the others a window."""

    def refuse(config: Config) -> str | None:
        kinds = config.get("layer_types") or []
        wanted = [
            "full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(len(kinds))
        ]
        if list(kinds) == wanted:
            return None
        return (
            f"llama.cpp gives a sliding window to all blocks but every {period}th; layer_types says otherwise"
        )

    return refuse


def gemma_scalar(name: str, blocks: int, share: int, size: int) -> int:
    """What llama.cpp divides the queries of Gemma 2 and 3 by, squared: `size` of a head, or width over heads (`share`).

    No file says it; the largest models, known by their number of blocks, are the exception.
    """
    return share if (name, blocks) in (("gemma2", 46), ("gemma3", 62)) else size


def _gemma(name: str, period: int) -> Callable[[Config], str | None]:
    windows = _windows_every(period)

    def refuse(config: Config) -> str | None:
        share = int(config["hidden_size"]) // heads(config)
        wanted = gemma_scalar(name, int(config["num_hidden_layers"]), share, int(config["head_dim"]))
        if config.get("query_pre_attn_scalar", wanted) != wanted:
            return (
                f"llama.cpp scales queries by {wanted} here and has no setting for it; query_pre_attn_scalar is "
                f"{config['query_pre_attn_scalar']}"
            )
        return windows(config)

    return refuse


LLAMA = Architecture(
    name="llama", orders={"attn_q": _query_rows, "attn_k": _key_rows}, skipped=(".rotary_emb.inv_freq",)
)
GEMMA3 = Architecture(name="gemma3", norms_plus_one=True, refuses=_gemma("gemma3", 6))
QKV = {"attn_qkv": _per_head_qkv}
ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "MixtralForCausalLM": LLAMA,
    "Qwen2ForCausalLM": Architecture(name="qwen2"),
    "Qwen2MoeForCausalLM": Architecture(name="qwen2moe"),
    "Qwen3ForCausalLM": Architecture(name="qwen3"),
    "Qwen3MoeForCausalLM": Architecture(name="qwen3moe"),
    "GemmaForCausalLM": Architecture(name="gemma", norms_plus_one=True),
    "Gemma2ForCausalLM": Architecture(name="gemma2", norms_plus_one=True, refuses=_gemma("gemma2", 2)),
    "Gemma3ForCausalLM": GEMMA3,
    "Gemma3ForConditionalGeneration": GEMMA3,
    "Phi3ForCausalLM": Architecture(name="phi3"),
    "Olmo2ForCausalLM": Architecture(name="olmo2"),
    "GPT2LMHeadModel": Architecture(name="gpt2", rotary=False, skipped=(".attn.bias", ".attn.masked_bias")),
    "Starcoder2ForCausalLM": Architecture(name="starcoder2"),
    "FalconForCausalLM": Architecture(
        name="falcon", orders={"attn_qkv": _grouped_qkv}, refuses=_falcon_alibi
    ),
    "GPTNeoXForCausalLM": Architecture(
        name="gptneox",
        orders=QKV,
        skipped=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
    ),
    "BloomForCausalLM": Architecture(name="bloom", orders=QKV, rotary=False),
    "MptForCausalLM": Architecture(name="mpt", rotary=False),
    "DeepseekV2ForCausalLM": Architecture(name="deepseek2"),
}
"""Class of the model in transformers -> architecture in llama.cpp."""


def architecture_of(config: Config) -> Architecture:
    """The architecture of a model by the class its configuration names.

    Raises ModelError, with the list, for one that is not in the table.
    """
    classes = config.get("architectures") or ["none"]
    found = next((ARCHITECTURES[name] for name in classes if name in ARCHITECTURES), None)
    if found is None:
        raise ModelError(
            f"architecture {', '.join(classes)}: gguf files can be written for {', '.join(ARCHITECTURES)}. "
            "Use another format"
        )
    reason = found.refuses(config)
    if reason:
        raise ModelError(f"architecture {', '.join(classes)}: {reason}. Use another format")
    return found


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of a checkpoint goes: name in the file, and which of the stacked experts it is, if it is one."""

    name: str
    expert: int | None = None


EXPERT = re.compile(r"\.experts\.(\d+)\.")
LANGUAGE_PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.", ""),
)


class Names:
    """Names in a GGUF file of the tensors of a checkpoint of `blocks` blocks."""

    def __init__(self, architecture: Architecture, blocks: int) -> None:
        import gguf

        kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        self.architecture = architecture
        self._map = gguf.get_tensor_name_map(kinds[architecture.name], blocks)

    def place(self, stored: str) -> Place | None:
        """The place of the tensor called `stored` in the checkpoint; None for a buffer that files do not hold.

        Raises ModelError when there is no place for it.
        """
        if stored.endswith(self.architecture.skipped or ("\n",)):  # no name ends in a line break
            return None
        expert = EXPERT.search(stored)
        # llama.cpp stacks the experts of a block, so its tables know them without a number.
        joint = EXPERT.sub(".experts.", stored) if expert else stored
        for candidate in _spellings(joint):
            found = self._map.get_name(candidate, try_suffixes=(".weight", ".bias"))
            if found is not None:
                return Place(found, int(expert[1]) if expert else None)
        raise ModelError(
            f"{stored}: llama.cpp's architecture {self.architecture.name!r} has no tensor for it. Use another format"
        )


def _spellings(name: str) -> list[str]:
    """`name` as checkpoints of the same model may also spell it."""
    found = [name, name.removeprefix("transformer."), f"transformer.{name}", f"model.{name}"]
    return found + [new + name.removeprefix(old) for old, new in LANGUAGE_PREFIXES if name.startswith(old)]


def is_other_tower(stored: str) -> bool:
    """Whether a tensor belongs to a vision or audio part, which goes to no language model file."""
    return (
        re.search(r"(^|\.)(vision\w*|visual|audio\w*|multi_modal_projector|mm_projector)\.", stored)
        is not None
    )


def row_order(architecture: Architecture, place: str, rows: int, config: Config) -> Tensor | None:
    """The order in which rows of a tensor stand in the file, or None for their own order."""
    part = place.split(".")[-2] if "." in place else place
    order = architecture.orders.get(part)
    return None if order is None else order(rows, config)


def adds_one(architecture: Architecture, place: str) -> bool:
    """Whether the file holds the weight of a norm plus one."""
    return architecture.norms_plus_one and place.endswith("norm.weight")
