"""Planned memory beside measured memory, and a checkpoint that is larger than the limit it is tuned within.

    python benchmarks/memory.py limit [--gigabytes 2.8] [--max-ram 1.4GB]  a checkpoint several times the limit
    python benchmarks/memory.py planned [--only wide]                       three models, planned beside measured peaks

Models are random, made here block by block. Each job is a process of its own; measured is the largest resident size of
the whole job (VmHWM), rehearsal and data included. Rows go to `--out` (results/memory.jsonl).
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from safetensors.torch import save_file

from auto_round import AutoRound
from auto_round.models.load import skeleton

HERE = Path(__file__).parent
VOCAB = 4096
SHORT = {"nsamples": 4, "seqlen": 32, "batch_size": 1, "iters": 2}
USUAL = {"nsamples": 8, "seqlen": 64, "batch_size": 4, "iters": 2}


def llama(hidden: int, blocks: int) -> transformers.PretrainedConfig:
    """Llama shaped, with matrices of `hidden` and four times as many features."""
    return transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=blocks,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, tie_word_embeddings=False,
    )  # fmt: skip


def mixture() -> transformers.PretrainedConfig:
    """Qwen3-MoE shaped: 16 experts, of which 4 see a token."""
    return transformers.Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=768, intermediate_size=1536, moe_intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=12, num_key_value_heads=4, head_dim=64, num_experts=16, num_experts_per_tok=4,
        tie_word_embeddings=False,
    )  # fmt: skip


def make(folder: Path, config: transformers.PretrainedConfig) -> int:
    """Write a random bfloat16 model, one file per block; its size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    parts: dict[str, list[str]] = {}
    tensors = skeleton(folder, dtype="bfloat16").state_dict()
    for name in tensors:
        part = ".".join(name.split(".")[:3]) if ".layers." in name else "outside"
        parts.setdefault(part, []).append(name)
    where, total, generator = {}, 0, torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 24, generator=generator).mul_(0.02).bfloat16()
    for number, names in enumerate(parts.values(), 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        made = {n: drawn(noise, tensors[n].shape, generator) for n in names}
        save_file(made, folder / file, metadata={"format": "pt"})
        total += sum(t.nbytes for t in made.values())
        where.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def drawn(noise: torch.Tensor, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """A tensor of `shape` from `noise`, begun at random: drawing gigabytes anew would take longer than tuning them."""
    count, start = shape.numel(), int(torch.randint(len(noise), (), generator=generator))
    if start + count > len(noise):
        noise = torch.cat([noise[start:], noise.repeat(-(-count // len(noise)))])
        start = 0
    return noise[start : start + count].reshape(shape).clone()


def job(model: Path, out: Path, options: dict) -> None:
    """Tune `model`, in this process; one JSON line with what it took."""
    rows = json.loads((model / "config.json").read_text())["vocab_size"]
    shape = (options["nsamples"], options["seqlen"])
    tokens = list(torch.randint(rows, shape, generator=torch.Generator().manual_seed(1)))
    report = out.with_suffix(".json")
    made = AutoRound(model, dataset=tokens, report=str(report), **options)
    started = time.perf_counter()
    made.quantize_and_save(out)
    told, used = json.loads(report.read_text()), resource.getrusage(resource.RUSAGE_SELF)
    placed = {key: told["placement"][key] for key in ("micro_batch", "activations")}
    print(json.dumps({
        "planned": told["memory"]["planned"]["ram"], "measured": told["memory"]["measured"]["ram"],
        "planned_seconds": round(told["seconds"]["planned"]), "seconds": round(time.perf_counter() - started),
        "cpu_seconds": round(used.ru_utime + used.ru_stime), "system_seconds": round(used.ru_stime), **placed,
    }))  # fmt: skip


def row(name: str, model: Path, size: int, out: Path, options: dict) -> dict:
    """What `job` says, from a process of its own."""
    command = [sys.executable, __file__, "job", str(model), str(out), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-3000:]}")
    said = json.loads(done.stdout.splitlines()[-1])
    return {
        "model": name, "checkpoint": size, "options": options, **said,
        "measured/planned": round(said["measured"] / said["planned"], 3), "torch": torch.__version__,
        "python": platform.python_version(),
    }  # fmt: skip


def main() -> None:
    """Make, tune, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["limit", "planned", "job"])
    parser.add_argument("job", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--gigabytes", type=float, default=2.8)
    parser.add_argument("--max-ram", default="1.4GB")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--only", help="one of the three models")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "memory.jsonl")
    options = parser.parse_args()
    if options.what == "job":
        job(Path(options.job[0]), Path(options.job[1]), json.loads(options.job[2]))
        return
    with tempfile.TemporaryDirectory(dir=".") as name:
        work = Path(name)
        if options.what == "limit":
            per_block = 2 * 16 * options.hidden**2
            config = llama(options.hidden, max(2, round(options.gigabytes * 1e9 / per_block)))
            jobs = [("llama", config, {**SHORT, "disable_opt_rtn": True, "max_ram": options.max_ram})]
        else:
            jobs = [
                ("novelist-8m", None, {**USUAL, "max_ram": "64GB"}),
                (
                    "wide",
                    llama(1024, 2),
                    {**USUAL, "quant_lm_head": True, "start": "search", "max_ram": "64GB"},
                ),
                ("moe", mixture(), {**USUAL, "max_ram": "64GB"}),
            ]
        for title, config, settings in jobs:
            if options.only not in (None, title):
                continue
            folder = work / title if config is not None else HERE.parent / "examples" / title
            size = sum(p.stat().st_size for p in folder.glob("*.safetensors")) if config is None else 0
            size = size or make(folder, config)
            line = json.dumps(
                {"what": options.what, **row(title, folder, size, work / f"{title}-out", settings)}
            )
            print(line, flush=True)
            with options.out.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
