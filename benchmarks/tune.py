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

FEWER = {
    "0 steps": ["--iters", "0", "--algorithm", "gptq"],
    **{f"{steps} steps": ["--iters", steps] for steps in ("20", "50", "100")},
}
GOALS = {
    "wall time at equal steps": 0.5,
    "CPU time at equal steps": 0.5,
    "CPU time to the other's KL": 1 / 3,
    "peak memory above import": 0.6,
    "peak memory above import of the model's class": 0.6,
    "KL at equal CPU time": 0.8,
}


def import_peak(python: str, also: str = "") -> int:
    """Peak resident bytes of a process that only imports the package, and the module `also`."""
    code = f"import auto_round; auto_round.AutoRound\n{also and f'import {also}'}"
    child = subprocess.Popen([python, "-c", code])
    _, status, usage = os.wait4(child.pid, 0)
    assert status == 0, f"{python} cannot import auto_round {also}"
    return usage.ru_maxrss * 1024


def import_peaks(sides: dict[str, str], model: Path) -> dict[str, tuple[int, int]]:
    """Side -> peaks of importing the package, and of importing transformers' class of the model with it."""
    kind = json.loads((model / "config.json").read_text())["model_type"]
    module = f"transformers.models.{kind}.modeling_{kind}"
    return {name: (import_peak(python), import_peak(python, module)) for name, python in sides.items()}


def mean_row(rows: list[dict], side: str, scheme: str, recipe: str, seeds: set[int]) -> dict:
    """One row with the means over the `seeds` of what was measured."""
    cells = [r for r in rows if (r["side"], r["scheme"], r["recipe"]) == (side, scheme, recipe)]
    cells = [r for r in cells if r["seed"] in seeds]
    measured = ("kl", "wall_seconds", "cpu_seconds", "peak_gb")
    return {"side": side, **{key: statistics.mean(r[key] for r in cells) for key in measured}}


def seeds_of(rows: list[dict], side: str, scheme: str, recipe: str) -> set[int]:
    """The seeds of that cell that were measured."""
    return {r["seed"] for r in rows if (r["side"], r["scheme"], r["recipe"]) == (side, scheme, recipe)}


def ratios(
    rows: list[dict], scheme: str, names: list[str], imports: dict[str, tuple[int, int]]
) -> dict[str, float | None]:
    """Ours over the other's for every goal; None where no run of ours can tell.

    Each recipe of ours is compared with the other's default on the seeds that both have.
    """
    first, second = names
    recipes = dict.fromkeys(r["recipe"] for r in rows if r["side"] == first and r["scheme"] == scheme)
    pairs = {}
    for recipe in recipes:
        seeds = seeds_of(rows, first, scheme, recipe) & seeds_of(rows, second, scheme, "default")
        if seeds:
            pairs[recipe] = [
                mean_row(rows, name, scheme, which, seeds)
                for name, which in ((first, recipe), (second, "default"))
            ]
    as_good = [
        mine["cpu_seconds"] / other["cpu_seconds"]
        for mine, other in pairs.values()
        if mine["kl"] <= other["kl"]
    ]
    in_time = [
        mine["kl"] / other["kl"]
        for mine, other in pairs.values()
        if mine["cpu_seconds"] <= other["cpu_seconds"]
    ]
    full = pairs.get("default")

    def above(which: int) -> float | None:
        if full is None:
            return None
        mine, other = (row["peak_gb"] * 1e9 - imports[row["side"]][which] for row in full)
        return mine / other

    return {
        "wall time at equal steps": full and full[0]["wall_seconds"] / full[1]["wall_seconds"],
        "CPU time at equal steps": full and full[0]["cpu_seconds"] / full[1]["cpu_seconds"],
        "CPU time to the other's KL": min(as_good, default=None),
        "peak memory above import": above(0),
        "peak memory above import of the model's class": above(1),
        "KL at equal CPU time": min(in_time, default=None),
    }


def main() -> None:
    """Run the missing cells, ours and the other's in turn, and print the goals."""
    accuracy.RECIPES |= FEWER
    args = accuracy.arguments(
        description=__doc__,
        results=Path("benchmarks/results/tune.jsonl"),
        schemes=["W4A16", "W2A16G64"],
        recipes=["default", *FEWER],
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
    imports = import_peaks(sides, args.model)
    print(json.dumps({"import_peak_gb": {name: [p / 1e9 for p in peaks] for name, peaks in imports.items()}}))
    print("| scheme | what | goal | measured |\n|---|---|---|---|")
    for scheme in args.schemes:
        for what, value in ratios(rows, scheme, list(sides), imports).items():
            print(f"| {scheme} | {what} | {GOALS[what]:.2f} | {'-' if value is None else f'{value:.2f}'} |")


if __name__ == "__main__":
    main()
