"""Streaming a generated checkpoint: seconds and peak memory against a plain copy, a pass over memory, and upstream.

    python benchmarks/stream.py make FOLDER --gigabytes 8            # dense, 4 shards; --experts for a mixture
    python benchmarks/stream.py run FOLDER --schemes W4A16,W8A16 [--peer PYTHON] [--rounds 2] --out results.jsonl

`run` alternates plain copy, a pass over memory, ours with 1 and 2 workers, and upstream's `--model_free` with as many
(the Python of an environment that has it), each in a process of its own, and goes on where the results end. Files are
in the page cache: rates are those of processor and memory, not of a disk. Outputs are removed after each run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

NOVELIST = Path(__file__).parent.parent / "examples" / "novelist-8m"
SHARDS = 4
DENSE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32064,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "bfloat16",
    "hidden_act": "silu",
}  # fmt: skip
MOE = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 64, "num_experts_per_tok": 8,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 32064,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "dtype": "bfloat16",
    "hidden_act": "silu", "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
}  # fmt: skip


def block_shapes(config: dict, block: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of one decoder layer."""
    width, heads, kv, size = (
        config[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
        "self_attn.q_proj": (heads * size, width),
        "self_attn.k_proj": (kv * size, width),
        "self_attn.v_proj": (kv * size, width),
        "self_attn.o_proj": (width, heads * size),
    }
    named = {f"model.layers.{block}.{name}.weight": shape for name, shape in shapes.items()}
    if "num_experts" not in config:
        inner = config["intermediate_size"]
        parts = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
        return {**named, **{f"model.layers.{block}.mlp.{p}.weight": s for p, s in parts.items()}}
    count, inner = config["num_experts"], config["moe_intermediate_size"]
    path = f"model.layers.{block}.mlp"
    for name in ("q_norm", "k_norm"):
        named[f"model.layers.{block}.self_attn.{name}.weight"] = (size,)
    named[f"{path}.gate.weight"] = (count, width)
    named[f"{path}.experts.gate_up_proj"] = (count, 2 * inner, width)
    named[f"{path}.experts.down_proj"] = (count, width, inner)
    return named


def make(folder: Path, gigabytes: float, experts: bool) -> None:
    """Write a random checkpoint of about that size."""
    config = dict(MOE if experts else DENSE)
    bytes_of = lambda shapes: sum(2 * torch.Size(s).numel() for s in shapes.values())  # noqa: E731
    blocks = max(SHARDS, round(gigabytes * 1e9 / bytes_of(block_shapes(config, 0))))
    config["num_hidden_layers"] = blocks
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json"):  # GGUF files hold one
        shutil.copy(NOVELIST / name, folder / name)
    ends = dict.fromkeys(
        ("model.embed_tokens.weight", "lm_head.weight"), (config["vocab_size"], config["hidden_size"])
    )
    index, total, generator = {}, 0, torch.Generator().manual_seed(0)
    for shard in range(SHARDS):
        shapes = {} if shard else {**ends, "model.norm.weight": (config["hidden_size"],)}
        for block in range(shard * blocks // SHARDS, (shard + 1) * blocks // SHARDS):
            shapes |= block_shapes(config, block)
        tensors = {}
        for name, shape in shapes.items():
            values = torch.empty(shape, dtype=torch.bfloat16)
            piece = (
                torch.randn(min(values.numel(), 1 << 22), generator=generator).mul_(0.02).to(torch.bfloat16)
            )
            for part in values.view(-1).split(len(piece)):
                part.copy_(piece[: len(part)])
            tensors[name] = values if len(shape) > 1 else torch.ones_like(values)
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, file))
        total += sum(t.nbytes for t in tensors.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
    (folder / "model.safetensors.index.json").write_text(text)


OURS = """
import sys
from auto_round import AutoRound
source, out, scheme, workers = sys.argv[1:]
options = {"sym": False} if scheme.endswith("-asym") else {}
if scheme.endswith("-opt"): options["enable_opt_rtn"] = True
name = scheme.removesuffix("-asym").removesuffix("-opt")
if name.startswith("gguf:"): options["format"] = name
else: options["scheme"] = name
if name.startswith("MXFP"): options["format"] = "llm_compressor"
if name == "FP8_BLOCK": options["format"] = "llm_compressor"
AutoRound(source, model_free=True, workers=int(workers), **options).quantize_and_save(out)
"""
PEER = """
import sys
from auto_round import AutoRound
if __name__ == "__main__":
    source, out, scheme, workers = sys.argv[1:]
    options = {"sym": False} if scheme.endswith("-asym") else {}
    import auto_round
    assert auto_round.__version__.startswith("0."), f"this is no upstream: {auto_round.__file__}"
    job = AutoRound(source, scheme=scheme.removesuffix("-asym"), model_free=True, **options)
    job.quantize_and_save(out, format="auto_round")
"""
PASS = """
import sys, torch
from safetensors import safe_open
from pathlib import Path
total = 0
for shard in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    with safe_open(shard, "pt") as file:
        for name in file.keys():
            total += int(file.get_tensor(name).view(torch.int16).sum())
"""


def timed(command: list[str], log: Path, env: dict[str, str]) -> dict[str, float]:
    """Run `command`: wall and processor seconds of it and its children, peak memory of the whole tree in bytes."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    peak = 0
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=env)
        while process.poll() is None:
            peak = max(peak, resident(process.pid))
            time.sleep(0.05)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise SystemExit(f"{command[:3]} failed; last lines of {log}:\n{log.read_text()[-2000:]}")
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(seconds, 2), "cpu": round(used, 2), "peak": peak}


def resident(root: int) -> int:
    """Anonymous memory of the process tree in bytes: mapped files count for nobody."""
    total, waiting = 0, [root]
    while waiting:
        pid = waiting.pop()
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            total += (
                sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) * 1024
            )
            waiting += [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        except (OSError, ValueError):
            continue
    return total


def cells(source: Path, work: Path, schemes: list[str], peer: str | None) -> dict[str, list[str]]:
    """Name -> command of everything that is measured."""
    scripts = {name: source.parent / f"{name}.py" for name in ("ours", "peer", "walk")}
    for name, text in (("ours", OURS), ("peer", PEER), ("walk", PASS)):
        scripts[name].write_text(text)
    found = {
        "copy": ["cp", "-r", str(source), str(work)],
        "memory pass": [sys.executable, str(scripts["walk"]), str(source)],
    }
    for scheme in schemes:
        paths = [str(source), str(work), scheme]
        for count in ("1", "2"):
            found[f"{scheme}, ours, {count}"] = [sys.executable, str(scripts["ours"]), *paths, count]
            if peer and not scheme.endswith("-opt") and not scheme.startswith(("gguf", "FP8")):
                found[f"{scheme}, upstream, {count}"] = [peer, str(scripts["peer"]), *paths, count]
    return found


def run(args: argparse.Namespace) -> None:
    """The cells that the results lack, in the order of rounds; each becomes a line of the results at once."""
    source, work = args.folder, args.folder.parent / f"{args.folder.name}-out"
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    lines = args.out.read_text().splitlines() if args.out.is_file() else []
    done = [(entry["source"], entry["cell"]) for entry in map(json.loads, lines)]
    jobs = cells(source, work, args.schemes.split(","), args.peer)
    for turn in range(1, args.rounds + 1):
        for name, command in jobs.items():
            if done.count((source.name, name)) >= turn or not re.search(args.only, name):
                continue
            # One thread per worker, as many workers as the cell says; upstream starts a process for each.
            env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
            if ", upstream" in name:
                env["AR_MODEL_FREE_SHARD_PARALLELISM"] = name[-1]
                del env["PYTHONPATH"]  # its environment must not see this repository's package
            shutil.rmtree(work, ignore_errors=True)
            try:
                result: dict[str, object] = dict(timed(command, source.parent / "log", env))
            except SystemExit as error:
                result = {"error": str(error)[-600:]}
            written = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
            shutil.rmtree(work, ignore_errors=True)
            entry = {"source": source.name, "bytes": size, "cell": name, "written": written, **result}
            print(entry, flush=True)
            with args.out.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            if args.one:
                return
    raise SystemExit(3 if args.one else 0)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="what", required=True)
    making, running = parts.add_parser("make"), parts.add_parser("run")
    making.add_argument("folder", type=Path)
    making.add_argument("--gigabytes", type=float, default=8)
    making.add_argument("--experts", action="store_true")
    running.add_argument("folder", type=Path)
    running.add_argument("--schemes", default="W4A16")
    running.add_argument("--peer")
    running.add_argument("--rounds", type=int, default=2)
    running.add_argument("--only", default="", help="a regular expression that names of cells must match")
    running.add_argument(
        "--one", action="store_true", help="one cell, then stop; exit status 3 when none is left"
    )
    running.add_argument("--out", type=Path, default=Path("stream.jsonl"))
    args = parser.parse_args()
    if args.what == "make":
        make(args.folder, args.gigabytes, args.experts)
    else:
        run(args)


if __name__ == "__main__":
    main()
