"""Mixed bits: what our AutoScheme and upstream's choose for the same budget, each quantized by ours and measured.

    python benchmarks/auto_scheme.py --model examples/novelist-8m --calibration c.jsonl --text heldout.txt \\
        --peer /path/to/peer/bin/python --out benchmarks/results/auto_scheme.jsonl

Both look at 16 samples of 256 tokens. Upstream counts zero points of symmetric schemes, which are not stored, so that
it spends less than the budget; ours has what upstream's choice really takes. "ours" gives layers that servers merge the
same scheme (q, k and v; gate and up), "ours, apart" does not, as upstream. KL and top-1 are against the
original on held-out text; CPU seconds are those of choosing, the import of the package and of the model included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

OPTIONS = "W2A16G64,W4A16,W8A16"
PEER = """
import sys, json
from auto_round import AutoRound, AutoScheme
if __name__ == "__main__":
    model, bits, options, data, out = sys.argv[1:]
    scheme = AutoScheme(avg_bits=float(bits), options=tuple(options.split(",")), nsamples=16, seqlen=256)
    made = AutoRound(model, scheme=scheme, iters=0, nsamples=1, seqlen=128, dataset=data, device_map="cpu",
                     disable_opt_rtn=True)
    _, layers = made.quantize()
    names = ("bits", "group_size", "sym")
    flat = {n: c if isinstance(c, dict) else vars(c) for n, c in layers.items()}
    json.dump({n: {k: c[k] for k in names if k in c} for n, c in flat.items()}, open(out, "w"))
"""
OURS = """
import sys, json
from auto_round import AutoRound, AutoScheme
model, bits, options, data, out, kind, recipe = sys.argv[1:]
made = AutoRound(model, scheme=AutoScheme(avg_bits=float(bits), options=options), iters=0, nsamples=1, seqlen=256,
                 dataset=data, device_map="cpu", disable_opt_rtn=recipe == "rtn")
made.quantize_and_save(out + ".model", format=kind)
json.dump(made.plan.flat(), open(out, "w"))
"""


def chosen(python: str, script: str, args: argparse.Namespace, bits: float, *more: str) -> tuple[dict, float]:
    """(Layer -> settings, CPU seconds) of one side."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "layers.json"
        (Path(folder) / "choose.py").write_text(script)
        command = [
            python,
            str(Path(folder) / "choose.py"),
            str(args.model.resolve()),
            str(bits),
            args.options,
        ]
        command += [str(args.calibration.resolve()), str(out), *more]
        log = Path(folder) / "log"
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" or python != args.peer}
        with log.open("w") as file:
            child = subprocess.Popen(command, cwd=folder, stdout=file, stderr=file, env=env)
            _, status, used = os.wait4(child.pid, 0)
        if status:
            raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-2000:]}")
        return json.loads(out.read_text()), used.ru_utime + used.ru_stime


def judged(args: argparse.Namespace, layers: dict, recipe: str) -> dict[str, float]:
    """Bits per weight, KL and top-1 of the model with these settings, quantized here."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from auto_round import AutoRound
    from auto_round.jobs.auto_scheme import stored_bits
    from auto_round.jobs.compare import compare

    torch.set_num_threads(args.threads)
    quantized = {name: flat for name, flat in layers.items() if flat.get("bits", 16) < 16}
    made = AutoRound(
        str(args.model), layer_config=quantized, dataset=str(args.calibration), iters=0, nsamples=128, seqlen=128,
        disable_opt_rtn=recipe == "rtn", device_map="cpu",
    )  # fmt: skip
    model, _ = made.quantize()
    bits = sum(stored_bits(made.plan[name], made.plan.shapes[name]) for name in made.plan)
    weights = sum(rows * columns for rows, columns in made.plan.shapes.values())
    found = compare(
        AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval(), model.float(),
        AutoTokenizer.from_pretrained(args.model), [args.text.read_text()], seqlen=512, max_windows=args.windows,
    )  # fmt: skip
    return {"stored_bits": round(bits / weights, 4), "kl": found.kl, "top1": found.top1}


def row_of(args: argparse.Namespace, side: str, recipe: str, layers: dict, seconds: float) -> dict:
    """What a row says beside the budget."""
    return {"side": side, "recipe": recipe, "cpu": round(seconds, 1), **judged(args, layers, recipe)}


def main() -> None:
    """Run what is not in the results yet, a line per budget, side and recipe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("examples/novelist-8m"))
    parser.add_argument("--calibration", type=Path, default=Path("examples/novelist-8m/calibration.jsonl"))
    parser.add_argument("--text", type=Path, default=Path("examples/novelist-8m/heldout.jsonl"))
    parser.add_argument("--peer", required=True, help="the Python of an environment with upstream in it")
    parser.add_argument("--options", default=OPTIONS)
    parser.add_argument("--bits", type=float, nargs="+", default=[2.6, 3.0, 3.5, 4.5])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/auto_scheme.jsonl"))
    args = parser.parse_args()
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    for bits in args.bits:
        about = {"model": args.model.name, "options": args.options, "budget": bits}
        if any(about.items() <= row.items() for row in done):
            continue

        rows, theirs = [], chosen(args.peer, PEER, args, bits)
        for recipe in ("rtn", "opt_rtn"):
            rows.append({**about, **row_of(args, "upstream", recipe, *theirs)})
            spent = rows[-1]["stored_bits"]
            for side, kind in (("ours", "auto_round"), ("ours, apart", "fake")):
                mine = chosen(sys.executable, OURS, args, spent, kind, recipe)
                rows.append({**about, **row_of(args, side, recipe, *mine)})
        with args.out.open("a") as file:
            for row in rows:
                print(json.dumps(row), flush=True)
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
