"""Which start is best for how many sign steps: KL to the original and CPU-seconds, for every start, scheme and seed.

    python benchmarks/study.py --model examples/novelist-8m --calibration c.jsonl --text heldout.txt

Every cell quantizes in memory and compares in float32. Rows that are in the results file are not run again, so the same
command goes on where it stopped. `--table` prints the table as Markdown.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

SCHEMES = ("W4A16", "W3A16", "W2A16G64", "W2A16G32")
STARTS = ("none", "search", "gptq", "refit")


def starts(kind: str) -> list:
    """The steps before tuning: plain, searched ranges, GPTQ on them, or GPTQ and refitted scales in turn, twice."""
    from auto_round.jobs.starts import start
    from auto_round.steps.gptq import Gptq
    from auto_round.steps.search import Search

    return {"none": [], "search": [Search()], "gptq": [Search(), Gptq()], "refit": start("gptq")}[kind]


def run(args: argparse.Namespace, cell: dict) -> dict:
    """`cell` with what came out."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from auto_round import AutoRound
    from auto_round.jobs.compare import compare
    from auto_round.steps.sign_round import SignRound

    torch.set_num_threads(args.threads)
    tuner = AutoRound(
        str(args.model),
        scheme=cell["scheme"],
        dataset=str(args.calibration),
        nsamples=args.nsamples,
        seqlen=args.seqlen,
        batch_size=args.batch,
        iters=cell["steps"],
        seed=cell["seed"],
        device_map="cpu",
        algorithm="gptq" if cell["steps"] == 0 else None,
    )
    tuning = [SignRound(iters=cell["steps"], seed=cell["seed"])] if cell["steps"] else []
    tuner.steps = lambda plan, **placed: [*starts(cell["start"]), *tuning]
    began = time.process_time()
    model, _ = tuner.quantize()
    seconds = time.process_time() - began
    found = compare(
        AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval(),
        model.float(),
        AutoTokenizer.from_pretrained(args.model),
        [args.text.read_text()],
        seqlen=512,
        max_windows=args.windows,
    )
    return {**cell, "kl": found.kl, "top1": found.top1, "cpu_seconds": round(seconds, 1)}


def table(rows: list[dict]) -> str:
    """One line per model, scheme and number of steps; mean KL (and CPU-seconds) for each start."""
    lines = [f"| model | scheme | steps | seeds | {' | '.join(STARTS)} |", "|" + "---|" * (4 + len(STARTS))]
    for model, scheme, steps in sorted({(r["model"], r["scheme"], r["steps"]) for r in rows}):
        mine = [r for r in rows if (r["model"], r["scheme"], r["steps"]) == (model, scheme, steps)]
        cells = []
        for kind in STARTS:
            of_kind = [r for r in mine if r["start"] == kind]
            mean = (
                {k: statistics.mean(r[k] for r in of_kind) for k in ("kl", "cpu_seconds")} if of_kind else {}
            )
            cells.append(f"{mean['kl']:.5f} ({mean['cpu_seconds']:.0f} s)" if mean else "-")
        seeds = len({r["seed"] for r in mine})
        lines.append(f"| {model} | {scheme} | {steps} | {seeds} | {' | '.join(cells)} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """What to measure on what."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("examples/novelist-8m"))
    parser.add_argument("--calibration", type=Path, default=Path("examples/novelist-8m/calibration.jsonl"))
    parser.add_argument("--text", type=Path, default=Path("examples/novelist-8m/heldout.jsonl"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/study.jsonl"))
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--starts", nargs="+", default=list(STARTS))
    parser.add_argument("--steps", nargs="+", type=int, default=[0, 20, 50, 100, 200])
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8, help="samples per step")
    parser.add_argument("--windows", type=int, default=16, help="evaluation windows of 512 tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only print the table")
    return parser.parse_args()


def main() -> None:
    """Run the missing cells, or print the table."""
    args = arguments()
    text = args.results.read_text() if args.results.exists() else ""
    rows = [json.loads(line) for line in text.splitlines()]
    grid = () if args.table else itertools.product(args.seeds, args.steps, args.schemes, args.starts)
    for seed, steps, scheme, kind in grid:
        cell = {"model": args.model.name, "scheme": scheme, "start": kind, "steps": steps, "seed": seed}
        cell |= {"nsamples": args.nsamples, "seqlen": args.seqlen, "batch": args.batch}
        if any(all(old.get(key) == value for key, value in cell.items()) for old in rows):
            continue
        rows.append(run(args, cell))
        args.results.parent.mkdir(parents=True, exist_ok=True)
        with args.results.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(json.dumps(rows[-1]), flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
