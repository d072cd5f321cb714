"""Random models of every architecture, as GGUF files in llama.cpp: do they load, and do they say the same?

python benchmarks/gguf/architectures.py --llama /path/to/python [--only llama,gemma2] [--types bf16,q8_0,q4_k_m]

llama.cpp rounds the inputs of quantized matrices to 8 bits, torch does not: that is the divergence left. Where experts
are chosen, it now and then tips the choice of a token: a few tokens then differ a lot (`kl`), most do not (`median`).
The models called "-all" use every expert for every token, have no such choice, and agree like the dense ones.
"""

import argparse
import json
import logging
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

from auto_round import AutoRound

HERE = Path(__file__).parent
NOVELIST = HERE.parent.parent / "examples" / "novelist-8m"
VOCAB = 4096
LIKE = {
    "vocab_size": VOCAB, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 512, "max_position_embeddings": 512, "bos_token_id": 0,
    "eos_token_id": 0, "pad_token_id": 3, "tie_word_embeddings": False,
}  # fmt: skip
GEMMA = {**LIKE, "head_dim": 64, "tie_word_embeddings": True}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 16}
GPT = {"vocab_size": VOCAB, "n_embd": 256, "n_layer": 4, "n_head": 4, "n_positions": 512, "bos_token_id": 0}
BLOOM = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "n_layer": 4,
    "n_head": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
EXPERTS = {"moe_intermediate_size": 256, "num_experts": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 10000.0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}
DEEPSEEK = {
    **LIKE, "num_key_value_heads": 4, "q_lora_rank": 256, "kv_lora_rank": 256, "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32, "v_head_dim": 64, "head_dim": 32, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "moe_intermediate_size": 256, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "topk_method": "greedy", "routed_scaling_factor": 1.0, "norm_topk_prob": False,
}  # fmt: skip
KINDS = {
    "llama": ("Llama", LIKE),
    "llama-bias": ("Llama", {**LIKE, "attention_bias": True}),
    "llama3-rope": ("Llama", {**LIKE, "rope_parameters": LLAMA3}),
    "llama-linear": ("Llama", {**LIKE, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "mistral": ("Mistral", {**LIKE, "sliding_window": None}),
    "mixtral": ("Mixtral", {**LIKE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2", LIKE),
    "qwen2-yarn": ("Qwen2", {**LIKE, "rope_parameters": YARN}),
    "qwen2-moe": ("Qwen2Moe", {**LIKE, **EXPERTS, "shared_expert_intermediate_size": 256}),
    "qwen3": ("Qwen3", {**LIKE, "head_dim": 64}),
    "qwen3-tied": ("Qwen3", {**LIKE, "head_dim": 128, "tie_word_embeddings": True}),
    "qwen3-moe": ("Qwen3Moe", {**LIKE, **EXPERTS, "head_dim": 64, "norm_topk_prob": True}),
    "mixtral-all": ("Mixtral", {**LIKE, "num_local_experts": 4, "num_experts_per_tok": 4}),
    "qwen3-moe-all": ("Qwen3Moe", {**LIKE, **EXPERTS, "num_experts_per_tok": 8, "head_dim": 64}),
    "gemma": ("Gemma", GEMMA),
    "gemma2": ("Gemma2", {**GEMMA, **WINDOWS, "query_pre_attn_scalar": 64}),
    "gemma3": ("Gemma3", {**GEMMA, "num_hidden_layers": 6, "sliding_window": 16, "query_pre_attn_scalar": 64}),
    "phi3": ("Phi3", {**LIKE, "sliding_window": None}),
    "olmo2": ("Olmo2", LIKE),
    "gpt2": ("GPT2", {**GPT, "eos_token_id": 0}),
    "starcoder2": ("Starcoder2", {**LIKE, "sliding_window": None, "use_bias": True}),
    "falcon": ("Falcon", {**BLOOM, "num_hidden_layers": 4, "num_attention_heads": 4, "new_decoder_architecture": True,
                          "num_kv_heads": 2, "alibi": False}),
    "falcon-7b": ("Falcon", {**BLOOM, "num_hidden_layers": 4, "num_attention_heads": 4, "multi_query": True,
                             "parallel_attn": True, "alibi": False, "bias": False}),
    "gpt-neox": ("GPTNeoX", LIKE),
    "bloom": ("Bloom", {**BLOOM, "pad_token_id": 3}),
    "mpt": ("Mpt", {"vocab_size": VOCAB, "d_model": 256, "n_layers": 4, "n_heads": 4, "expansion_ratio": 2,
                    "max_seq_len": 512}),
    "deepseek-v2": ("DeepseekV2", DEEPSEEK),
}  # fmt: skip
CLASSES = {"GPT2": "GPT2LMHeadModel"}
CONFIGS = {"Gemma3": "Gemma3TextConfig"}


@torch.no_grad()
def random_model(kind, folder):
    """A model of `kind` in bfloat16, with weights that make its output depend on every part, saved with a tokenizer."""
    prefix, settings = KINDS[kind]
    config = getattr(transformers, CONFIGS.get(prefix, f"{prefix}Config"))(**settings)
    model = getattr(transformers, CLASSES.get(prefix, f"{prefix}ForCausalLM"))(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise * 0.06) if parameter.ndim > 1 else parameter.add_(noise * 0.05)
    model.to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((NOVELIST / name).read_bytes())
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def divergence(p, q):
    """KL in nats of logits `p` against `q`, for each token."""
    p, q = torch.as_tensor(p).double().log_softmax(-1), torch.as_tensor(q).double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).flatten()


def in_llama(python, path, ids, folder):
    """Logits of llama.cpp for token ids (N, T)."""
    np.save(folder / "ids.npy", ids.numpy())
    command = [
        python,
        str(HERE / "llama.py"),
        "logits",
        str(path),
        str(folder / "ids.npy"),
        str(folder / "out.npy"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "crashed")
    return torch.from_numpy(np.load(folder / "out.npy"))


def fake_model(folder, type_, ids, out):
    """(path of the file, logits of the dequantized model in torch) for one type, by the tested package."""
    whole = {"disable_model_free": True, "model_dtype": "float32", "low_cpu_mem_usage": False}
    job = AutoRound(folder, format=f"gguf:{type_}", iters=0, nsamples=0, **whole)
    model, _ = job.quantize_and_save(out)
    (path,) = out.glob("*.gguf")
    with torch.no_grad():
        return path, model(input_ids=ids).logits


def main():
    """One row per architecture and type."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama", required=True)
    parser.add_argument("--only", default=",".join(KINDS))
    parser.add_argument("--types", default="bf16,q8_0,q4_k_m")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    logging.getLogger("auto_round").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    ids = torch.randint(4, VOCAB, (2, 64), generator=torch.Generator().manual_seed(1))
    rows = []
    for kind in options.only.split(","):
        with tempfile.TemporaryDirectory() as place:
            place = Path(place)
            random_model(kind, place / "m")
            for type_ in options.types.split(","):
                try:
                    path, ours = fake_model(place / "m", type_, ids, place / type_)
                    kl = divergence(ours, in_llama(options.llama, path, ids, place))
                    found = {"kl": kl.mean().item(), "median": kl.median().item(), "largest": kl.max().item()}
                    row = {"model": kind, "type": type_} | {
                        key: float(f"{x:.3g}") for key, x in found.items()
                    }
                except (RuntimeError, ValueError, AssertionError) as error:
                    row = {"model": kind, "type": type_, "error": f"{type(error).__name__}: {error}"[:300]}
                rows.append(row)
                print(json.dumps(row), flush=True)
    if options.out:
        options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
