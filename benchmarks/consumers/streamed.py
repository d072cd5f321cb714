"""Streamed checkpoints in vLLM: what it makes of them, and how far its logits are from the dequantized weights.

    python benchmarks/consumers/streamed.py --vllm /path/to/c_vllm/bin/python [--out benchmarks/results/streamed.jsonl]

Random Llama, Qwen3, Qwen3-MoE, DeepSeek-V3 (stored in FP8 blocks) and GPT-OSS (experts stored in MXFP4), streamed to
each format; the reference is the `fake` checkpoint of the plain weights in stock transformers, in float32. vLLM
computes in 16 bits on a CPU. Refusals are vLLM's own words.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
# In one process, with little room for keys and values; its 4-bit kernel rounds inputs to 8 bits unless told not to.
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_INT4_W4A8": "0",
    "OMP_NUM_THREADS": "1",
}  # fmt: skip
sys.path.insert(0, str(HERE.parent.parent / "tests"))

WIDE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
MODELS = {
    "llama": ("plain", WIDE),
    "qwen3": ("plain", {**WIDE, "head_dim": 64}),
    "qwen3-moe": ("plain", {**WIDE, "head_dim": 64, "moe_intermediate_size": 256}),
    "deepseek-v3": ("fp8", {**WIDE, "moe_intermediate_size": 256, "num_key_value_heads": 4, "q_lora_rank": 128,
                            "kv_lora_rank": 128, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64}),
    "gpt-oss": ("mxfp4", {**WIDE, "head_dim": 64, "intermediate_size": 256, "num_key_value_heads": 2}),
}  # fmt: skip
FORMATS = {"llm_compressor": "W4A16", "auto_round": "W4A16", "fp8": "FP8_BLOCK"}


def sources(name: str, work: Path) -> tuple[Path, Path]:
    """(The checkpoint as published, its weights as plain ones)."""
    import torch
    from models import tiny
    from stored_sources import in_fp8, in_mxfp4, rewritten

    kind, sizes = MODELS[name]
    tiny(name, work / "model", dtype=torch.float32, **sizes)
    if kind == "plain":
        return work / "model", work / "model"
    change = in_mxfp4 if kind == "mxfp4" else lambda tensors: in_fp8(tensors, "block", 128)
    config = {"quant_method": kind, **({"weight_block_size": [128, 128]} if kind == "fp8" else {})}
    return (
        rewritten(work / "model", work / "source", lambda tensors: change(tensors)[0], config),
        rewritten(work / "model", work / "plain", lambda tensors: change(tensors)[1]),
    )


def asked(python: str, how: str, folder: Path, tokens: Path, work: Path) -> tuple[dict, np.ndarray | None]:
    """(What a consumer says, its logits)."""
    out, jobs = work / f"{how}-{folder.name}", work / "jobs.json"
    job = {"folder": str(folder), "out": str(out), "override": False, "dtype": "float16"}
    if "FP8" in folder.name:  # has no float16, and on a CPU no kernel but the emulation
        job |= {"dtype": "bfloat16", "vllm": {"kernel_config": {"linear_backend": "emulation"}}}
    jobs.write_text(json.dumps({"tokens": str(tokens), "jobs": [job]}))
    command = [python, str(HERE / "logits.py"), how, str(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | SETTINGS)
    said = Path(f"{out}.json")
    if not said.exists():
        return {"status": "refused", "words": done.stderr.strip().splitlines()[-1][:400]}, None
    found = json.loads(said.read_text())
    return found, np.load(f"{out}.npy") if found["status"] == "loaded" else None


def divergence(expected: np.ndarray, logits: np.ndarray) -> float:
    """Mean KL of the reference to `logits`, nats; the last position is left out, which vLLM does not tell."""

    def logp(values: np.ndarray) -> np.ndarray:
        values = values[:, :-1].astype(np.float64)
        return values - np.logaddexp.reduce(values, -1, keepdims=True)

    p, q = logp(expected), logp(logits[..., : expected.shape[-1]])
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def main() -> None:
    """A row per model and scheme."""
    from auto_round import AutoRound

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm", required=True)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "streamed.jsonl")
    args = parser.parse_args()
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            source, plain = sources(name, work)
            vocabulary = json.loads((plain / "config.json").read_text())["vocab_size"]
            tokens = work / "tokens.npy"
            np.save(tokens, np.random.default_rng(0).integers(3, vocabulary, (2, 64)))
            for kind, scheme in FORMATS.items():
                job = {"model_free": True, "scheme": scheme}
                AutoRound(source, **job).quantize_and_save(work / f"{kind}-{scheme}", format=kind)
                AutoRound(plain, **job).quantize_and_save(work / f"fake-{kind}-{scheme}", format="fake")
                _, expected = asked(sys.executable, "plain", work / f"fake-{kind}-{scheme}", tokens, work)
                said, logits = asked(args.vllm, "vllm", work / f"{kind}-{scheme}", tokens, work)
                row = {"model": name, "source": MODELS[name][0], "scheme": scheme, "format": kind, **said}
                if logits is not None and expected is not None:
                    row["kl"] = divergence(expected, logits)
                print(json.dumps(row), flush=True)
                with args.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
