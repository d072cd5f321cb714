"""Time, memory and accuracy of tuning, ours and upstream's in turn: four goals, each with what was measured.

    python benchmarks/tune.py --model examples/novelist-8m --calibration c.jsonl --text heldout.txt \\
        --side ours=.venv/bin/python --side peer=/path/to/peer/bin/python

The first side is ours, the second the one it is compared with. Both run their own command line with the same number of
threads, 128 samples of 512 tokens and the default recipe; ours also with fewer steps. Rows are kept in the results
file, so the same command goes on where it stopped; `--table` only prints what the rows say.
Memory is the peak above that of importing the package.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from pathlib import Path

import accuracy

FEWER = ("20", "50", "100")
GOALS = {
    "wall time at equal steps": 0.5,
    "CPU time at equal steps": 0.5,
    "CPU time to the other's KL": 1 / 3,
    "peak memory above import": 0.6,
    "KL at equal CPU time": 0.8,
}


def import_peak(python: str) -> int:
    """Peak resident bytes of a process that only imports the package."""
    child = subprocess.Popen([python, "-c", "import auto_round; auto_round.AutoRound"])
    _, _, usage = os.wait4(child.pid, 0)
    return usage.ru_maxrss * 1024


def mean_row(rows: list[dict], side: str, scheme: str, recipe: str) -> dict:
    """One row with the means over the seeds of what was measured."""
    cells = [r for r in rows if (r["side"], r["scheme"], r["recipe"]) == (side, scheme, recipe)]
    measured = ("kl", "wall_seconds", "cpu_seconds", "peak_gb")
    return {"side": side, **{key: statistics.mean(r[key] for r in cells) for key in measured}}


def ratios(
    rows: list[dict], scheme: str, names: list[str], imports: dict[str, int]
) -> dict[str, float | None]:
    """Ours over the other's for every goal, means over the seeds; None where no run of ours can tell."""
    first, second = names
    recipes = dict.fromkeys(r["recipe"] for r in rows if r["side"] == first and r["scheme"] == scheme)
    mine = [mean_row(rows, first, scheme, recipe) for recipe in recipes]
    full, other = mean_row(rows, first, scheme, "default"), mean_row(rows, second, scheme, "default")
    as_good = [r["cpu_seconds"] for r in mine if r["kl"] <= other["kl"]]
    in_time = [r["kl"] for r in mine if r["cpu_seconds"] <= other["cpu_seconds"]]
    above = [r["peak_gb"] * 1e9 - imports[r["side"]] for r in (full, other)]
    return {
        "wall time at equal steps": full["wall_seconds"] / other["wall_seconds"],
        "CPU time at equal steps": full["cpu_seconds"] / other["cpu_seconds"],
        "CPU time to the other's KL": min(as_good) / other["cpu_seconds"] if as_good else None,
        "peak memory above import": above[0] / above[1],
        "KL at equal CPU time": min(in_time) / other["kl"] if in_time else None,
    }


def main() -> None:
    """Run the missing cells, ours and the other's in turn, and print the goals."""
    accuracy.RECIPES |= {f"{steps} steps": ["--iters", steps] for steps in FEWER}
    args = accuracy.arguments(
        description=__doc__,
        results=Path("benchmarks/results/tune.jsonl"),
        schemes=["W4A16", "W2A16G64"],
        recipes=["default", *(f"{steps} steps" for steps in FEWER)],
        seeds=[42],
        seqlen=512,
    )
    if len(args.side) != 2:
        raise SystemExit(f"give --side twice, ours first; got {args.side}")
    for seed in () if args.table else args.seeds:
        for scheme in args.schemes:
            for recipe in args.recipes:
                for side in args.side if recipe == "default" else args.side[:1]:
                    accuracy.run_cell(args, side, {"scheme": scheme, "recipe": recipe, "seed": seed})
    rows = accuracy.read_rows(args.results)
    sides = dict(side.split("=", 1) for side in args.side)
    imports = {name: import_peak(python) for name, python in sides.items()}
    print(json.dumps({"import_peak_gb": {name: peak / 1e9 for name, peak in imports.items()}}))
    print("| scheme | what | goal | measured |\n|---|---|---|---|")
    for scheme in args.schemes:
        for what, value in ratios(rows, scheme, list(sides), imports).items():
            print(f"| {scheme} | {what} | {GOALS[what]:.2f} | {'-' if value is None else f'{value:.2f}'} |")


if __name__ == "__main__":
    main()
