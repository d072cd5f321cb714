"""Tiny random language models of many architectures, a tokenizer and token ids, all built in code."""

import json
from functools import cache
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

VOCAB, WIDTH, BLOCKS, HEADS, INNER, POSITIONS = 384, 64, 2, 4, 96, 128
LLAMA_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "intermediate_size": INNER,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
GEMMA_LIKE = {**LLAMA_LIKE, "head_dim": 16, "tie_word_embeddings": True}
MIXED_LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
OPT = {
    **LLAMA_LIKE,
    "ffn_dim": INNER,
    "word_embed_proj_dim": WIDTH,
    "do_layer_norm_before": True,
    "tie_word_embeddings": True,
}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": WIDTH,
    "n_layer": BLOCKS,
    "n_head": HEADS,
    "n_inner": INNER,
    "n_positions": POSITIONS,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
FALCON = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
BLOOM = {"vocab_size": VOCAB, "hidden_size": WIDTH, "n_layer": BLOCKS, "n_head": HEADS, "bos_token_id": 0}
BLOOM |= {"eos_token_id": 1, "pad_token_id": 2}

KINDS = {
    "llama": ("Llama", LLAMA_LIKE),
    "qwen2": ("Qwen2", LLAMA_LIKE),
    "qwen3": ("Qwen3", {**LLAMA_LIKE, "head_dim": 16}),
    "qwen3-tied": ("Qwen3", {**LLAMA_LIKE, "head_dim": 16, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {**LLAMA_LIKE, "sliding_window": 8}),
    "gemma": ("Gemma", GEMMA_LIKE),
    "gemma2": ("Gemma2", {**GEMMA_LIKE, **MIXED_LAYERS}),
    "gemma3": ("Gemma3", {**GEMMA_LIKE, **MIXED_LAYERS}),
    "phi": ("Phi", {**LLAMA_LIKE, "partial_rotary_factor": 0.5}),
    "phi3": ("Phi3", LLAMA_LIKE),
    "opt": ("OPT", OPT),
    "gpt2": ("GPT2", GPT2),
    "gpt-neox": ("GPTNeoX", LLAMA_LIKE),
    "falcon": ("Falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}),
    "falcon-alibi": ("Falcon", {**FALCON, "multi_query": True, "alibi": True, "bias": True}),
    "bloom": ("Bloom", BLOOM),
}
"""Name -> prefix of the classes in transformers, and settings."""

ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
DEEPSEEK = {
    **LLAMA_LIKE,
    **ROUTED,
    **LATENT,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "topk_group": 1,
}
LLAMA4 = {
    "head_dim": 16,
    "intermediate_size_mlp": INNER,
    "num_local_experts": 4,
    "interleave_moe_layer_step": 1,
}
MOES = {
    "mixtral": ("Mixtral", {**LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": (
        "Qwen2Moe",
        {**LLAMA_LIKE, **ROUTED, "num_experts": 4, "shared_expert_intermediate_size": 64},
    ),
    "qwen3-moe": ("Qwen3Moe", {**LLAMA_LIKE, **ROUTED, "num_experts": 4, "head_dim": 16}),
    "deepseek-v2": ("DeepseekV2", {**DEEPSEEK, "n_group": 1}),
    "deepseek-v3": ("DeepseekV3", {**DEEPSEEK, "n_group": 2}),
    "gpt-oss": ("GptOss", {**LLAMA_LIKE, **MIXED_LAYERS, **ROUTED, "num_local_experts": 4, "head_dim": 16}),
    "llama4": ("Llama4", {**LLAMA_LIKE, **LLAMA4}),
}
"""The same for mixtures of four experts."""

CLASSES = {"GPT2": "GPT2LMHeadModel", "Gemma3": "Gemma3ForCausalLM"}
CONFIGS = {"Gemma3": "Gemma3TextConfig", "Llama4": "Llama4TextConfig"}
SENTENCES = (
    "The old lady put down her letter, looked out of the window at the rain, and said nothing for a while.",
    "Quantization maps the weights of a model to a few integers; calibration text tells which of them matter.",
    "A block is tuned, written, read back and compared; then the next block is tuned on what the first one gives.",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny(
    name: str, folder: Path | None = None, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes
):
    """The model `name` of `KINDS` or `MOES`, random; with `folder` it is saved there too, with a tokenizer."""
    prefix, settings = {**KINDS, **MOES}[name]
    config = getattr(transformers, CONFIGS.get(prefix, f"{prefix}Config"))(**{**settings, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(
            seed
        )  # what is added to below, the sinks of GPT-OSS for one, may be random from the start
        model = getattr(transformers, CLASSES.get(prefix, f"{prefix}ForCausalLM"))(config).to(dtype).eval()
    randomize(model, seed)
    if folder is not None:
        model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    return model


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Weights large enough for every layer to matter, and biases and norms that are not neutral."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise * 0.1)
        else:
            parameter.add_((noise * 0.05).to(parameter.dtype))


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer.to_str()


def tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with at most `VOCAB` words, with a chat template unless `chat` is False."""
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    found = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_trained()), **names)
    if chat:
        found.chat_template = CHAT_TEMPLATE
    return found


def tokens(count: int, length: int = 32, seed: int = 0) -> torch.Tensor:
    """(count, length) token ids that are no special tokens."""
    return torch.randint(3, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))


def samples(count: int, length: int = 32, seed: int = 0) -> list[torch.Tensor]:
    """`tokens` as a data set that `AutoRound` takes."""
    return list(tokens(count, length, seed))


@torch.no_grad()
def logits(model, ids: torch.Tensor | None = None) -> torch.Tensor:
    """What `model` says about `ids`, float32."""
    ids = tokens(2, 24, seed=9) if ids is None else ids
    return model(input_ids=ids, use_cache=False).logits.float()


def loaded(folder: Path, dtype: torch.dtype = torch.float32, *, backend: str | None = "torch", **options):
    """The checkpoint in `folder` by stock transformers; on the reference backend, which sums as a plain model does."""
    about = json.loads((folder / "config.json").read_text()).get("quantization_config") or {}
    if backend is not None and about.get("quant_method") == "auto-round":
        options.setdefault("quantization_config", transformers.AutoRoundConfig(backend=backend))
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()
