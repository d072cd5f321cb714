"""Accuracy against the original, ours and upstream's side by side: KL, top-1, perplexity, CPU-seconds, peak memory.

    python benchmarks/accuracy.py --model examples/novelist-8m --calibration c.jsonl --text heldout.txt \\
        --side ours=.venv/bin/python --side peer=/path/to/peer/bin/python --results benchmarks/results/accuracy.jsonl

Each cell is one run of the side's own command line in its own environment; every result is loaded by stock transformers
in float32 in this environment and compared with the original. Rows already in the results file are not run again, so
an interrupted table goes on where it stopped. `--table` prints the table of a results file as Markdown.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCHEMES = ("W4A16", "W3A16", "W2A16G64", "W2A16G32")
FLOATS = ("MXFP4", "NVFP4", "MXINT4", "MXFP8", "INT8", "FP8_STATIC", "FP8_BLOCK", "FPW8A16")
PLAIN, OPTIMISED = ["--iters", "0", "--disable_opt_rtn"], ["--iters", "0", "--enable_opt_rtn"]
FUSED = '{"r1": true, "r2": true, "online_r1_rotation": false}'
TRAINED = '{"r1": true, "r2": true, "trainable_rotation": true}'
RECIPES = {
    "gptq": ["--iters", "0", "--algorithm", "gptq"],
    "rtn": PLAIN,
    "opt_rtn": OPTIMISED,
    "light": ["--iters", "50", "--lr", "5e-3"],
    "default": ["--iters", "200"],
    "awq": ["--algorithm", "awq"],
    "short": ["--iters", "50"],
    "turned": ["--iters", "200", "--rotation_type", "hadamard"],
    "turned_rtn": [*OPTIMISED, "--rotation_type", "hadamard"],
    "quarot_rtn": [*OPTIMISED, "--rotation_config", "quarot"],
    "quarot_r4_rtn": [*OPTIMISED, "--rotation_config", '{"r1": true, "r2": true, "r4": true}'],
    "fused_rtn": [*OPTIMISED, "--rotation_config", FUSED],
    "fused_plain": [*PLAIN, "--rotation_config", FUSED],
    "trained_rtn": [*OPTIMISED, "--rotation_config", TRAINED],
    "trained_plain": [*PLAIN, "--rotation_config", TRAINED],
    "spinquant_plain": [*PLAIN, "--rotation_config", "spinquant"],
}


def main() -> None:
    """Run the missing cells, or print the table."""
    args = arguments()
    if args.measure:
        print(json.dumps(measure(args, args.measure)))
        return
    if not args.table:
        for seed, scheme, recipe, side in itertools.product(
            args.seeds, args.schemes, args.recipes, args.side
        ):
            run_cell(args, side, {"scheme": scheme, "recipe": recipe, "seed": seed})
    print(table(args.results))


def arguments(description: str | None = __doc__, **defaults: object) -> argparse.Namespace:
    """What to measure on what; `defaults` take the place of those below."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("examples/novelist-8m"))
    parser.add_argument("--calibration", type=Path, default=Path("examples/novelist-8m/calibration.jsonl"))
    parser.add_argument("--text", type=Path, default=Path("examples/novelist-8m/heldout.jsonl"))
    parser.add_argument("--side", action="append", help="name=python of an environment with auto-round in it")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/accuracy.jsonl"))
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--recipes", nargs="+", default=["rtn", "opt_rtn", "light", "default"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8, help="samples per step, the same on every side")
    parser.add_argument("--format", default="auto_round", help="what both sides write")
    parser.add_argument("--windows", type=int, default=32, help="evaluation windows of --window tokens")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--measure", type=Path, help="only compare the checkpoint in this folder with the model"
    )
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.set_defaults(**defaults)
    found = parser.parse_args()
    found.side = found.side or [f"ours={sys.executable}"]
    return found


def run_cell(args: argparse.Namespace, side: str, cell: dict) -> None:
    """Quantize and measure one cell, unless its row is there; RTN and optimised RTN do not depend on the seed."""
    name, _, given = side.partition("=")
    python = os.path.abspath(given)  # the command runs in another folder; links of a venv must stay links
    row = {"side": name, **cell, "nsamples": args.nsamples, "seqlen": args.seqlen, "model": args.model.name}
    if cell["recipe"] == "rtn" and cell["seed"] != args.seeds[0]:
        return
    row |= {"batch": args.batch, **({"format": args.format} if args.format != "auto_round" else {})}
    known = [{"batch": 8, **old} for old in read_rows(args.results)]  # rows from before it could be chosen
    if any(all(old.get(key) == value for key, value in row.items()) for old in known):
        return
    with tempfile.TemporaryDirectory() as folder:
        started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        peak = quantize(args, python, cell, Path(folder) / "out")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        row["wall_seconds"] = round(time.perf_counter() - started, 1)
        row["cpu_seconds"] = round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1)
        row["peak_gb"] = round(peak / 1e9, 3)
        row.update(measured_apart(args, next((Path(folder) / "out").rglob("config.json")).parent))
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with args.results.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def quantize(args: argparse.Namespace, python: str, cell: dict, out: Path) -> int:
    """Run one side's command line; its peak resident size in bytes."""
    command = [python, "-m", "auto_round", "--model", str(args.model.resolve()), "--scheme", cell["scheme"]]
    command += [
        "--format",
        args.format,
        "--output_dir",
        str(out),
        "--dataset",
        str(args.calibration.resolve()),
    ]
    command += ["--nsamples", str(args.nsamples), "--seqlen", str(args.seqlen)]
    command += ["--batch_size", str(args.batch)]
    command += [
        "--seed",
        str(cell["seed"]),
        "--device_map",
        "cpu",
        "--disable_torch_compile",
        *RECIPES[cell["recipe"]],
    ]
    threads = {
        name: str(args.threads)
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")
    }
    # An environment of its own must not see this checkout.
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" or python == sys.executable}
    log = out.parent / "log"
    with log.open("w") as file:
        child = subprocess.Popen(
            command, stdout=file, stderr=file, cwd=out.parent, env={**inherited, **threads}
        )
        _, status, usage = os.wait4(child.pid, 0)
    if status != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    return usage.ru_maxrss * 1024


def measured_apart(args: argparse.Namespace, folder: Path) -> dict:
    """`measure` in a process of its own: a child's peak memory counts that of the process it was forked from."""
    command = [
        sys.executable,
        __file__,
        "--measure",
        str(folder),
        "--model",
        str(args.model),
        "--text",
        str(args.text),
    ]
    command += ["--windows", str(args.windows), "--window", str(args.window), "--threads", str(args.threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(args: argparse.Namespace, folder: Path) -> dict:
    """KL, top-1 and perplexity of the checkpoint in `folder`."""
    import torch
    from transformers import AutoTokenizer

    from auto_round.jobs.compare import compare

    torch.set_num_threads(args.threads)
    restate(folder)
    text = args.text.read_text()
    texts = (
        [json.loads(line)["text"] for line in text.splitlines()] if args.text.suffix == ".jsonl" else [text]
    )
    found = compare(
        args.model,
        folder,
        AutoTokenizer.from_pretrained(args.model),
        texts,
        seqlen=args.window,
        max_windows=args.windows,
    )
    return {
        "kl": found.kl,
        "top1": found.top1,
        "perplexity": found.perplexity_quantized,
        "original": found.perplexity_original,
        "bytes": found.bytes_quantized,
    }


def restate(folder: Path) -> None:
    """State group sizes that stock transformers refuses (0, a list) in the form that it takes; nothing else changes."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    quantization = config.get("quantization_config", {})
    group = quantization.get("group_size", 1)
    if isinstance(group, list) or group == 0:
        quantization |= {"group_size": group[1] if group else -1, "weight_group_size": group}
        path.write_text(json.dumps(config))


def read_rows(path: Path) -> list[dict]:
    """The rows measured so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def mean_of(rows: list[dict], name: str, form: str) -> str:
    """Mean of a cost over the rows that have it; rows of another machine do not."""
    known = [row[name] for row in rows if name in row]
    return format(statistics.mean(known), form) if known else "-"


def table(path: Path) -> str:
    """Mean over the seeds (lowest .. highest KL), one line per scheme, recipe and side."""
    groups: dict[tuple, list[dict]] = {}
    for row in read_rows(path):
        groups.setdefault((row["scheme"], row["recipe"], row["side"]), []).append(row)
    lines = [
        "| scheme | recipe | side | seeds | KL | range | top-1 | perplexity | CPU s | peak GB |",
        "|" + "---|" * 10,
    ]
    order = sorted(
        groups,
        key=lambda k: (
            (*SCHEMES, *FLOATS).index(k[0]) if k[0] in (*SCHEMES, *FLOATS) else 99,
            list(RECIPES).index(k[1]),
            k[2],
        ),
    )
    for key in order:
        rows = groups[key]
        mean = {n: statistics.mean(r[n] for r in rows) for n in ("kl", "top1", "perplexity")}
        seconds, peak = mean_of(rows, "cpu_seconds", ".0f"), mean_of(rows, "peak_gb", ".2f")
        low, high = min(r["kl"] for r in rows), max(r["kl"] for r in rows)
        lines.append(
            f"| {' | '.join(key)} | {len(rows)} | {mean['kl']:.5f} | {low:.5f} .. {high:.5f} | {mean['top1']:.4f} | "
            f"{mean['perplexity']:.3f} | {seconds} | {peak} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
