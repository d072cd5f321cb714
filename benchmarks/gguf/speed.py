"""Tokens per second of each type in llama.cpp while generating, one thread, the types in turn.

python benchmarks/gguf/speed.py --llama /path/to/python --model DIR [--types q4_0,q4_k_m] [--out FILE.jsonl]

All files are made in one run, by weights alone. A row has the best of the rounds: other work only makes a file slower.
"""

import argparse
import json
import logging
import subprocess
import tempfile
from pathlib import Path

from auto_round import AutoRound

HERE = Path(__file__).parent
TYPES = "q2_k_s,q2_k,q3_k_s,q3_k_m,q3_k_l,q4_0,q4_1,q4_k_s,q4_k_m,q5_0,q5_1,q5_k_s,q5_k_m,q6_k,q8_0,bf16"


def main():
    """A row for each type."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama", required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    logging.getLogger("auto_round").setLevel(logging.ERROR)
    types = options.types.split(",")
    with tempfile.TemporaryDirectory() as place:
        job = AutoRound(options.model, iters=0, nsamples=0)
        _, folders = job.quantize_and_save(place, format=",".join(f"gguf:{name}" for name in types))
        files = [next(Path(folder).glob("*.gguf")) for folder in ([folders] if len(types) == 1 else folders)]
        found = {name: [] for name in types}
        for _ in range(options.rounds):
            for name, path in zip(types, files):
                command = [options.llama, str(HERE / "llama.py"), "speed", str(path)]
                found[name].append(
                    float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                )
        sizes = {name: path.stat().st_size for name, path in zip(types, files)}
    rows = [
        {"model": options.model.name, "type": name, "megabytes": round(sizes[name] / 1e6, 1),
         "tokens_per_second": round(max(values), 1)}
        for name, values in found.items()
    ]  # fmt: skip
    print("\n".join(map(json.dumps, rows)))
    if options.out:
        options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
