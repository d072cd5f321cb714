"""Peak memory of writing GGUF files from a large checkpoint, beside the goal: 1.5 GB plus its largest tensor.

python benchmarks/stream.py make FOLDER --gigabytes 4
python benchmarks/gguf/memory.py FOLDER [--types q4_0,q4_k_m] [--out FILE.jsonl]

Memory is what the kernel counts as the most resident of the process (`ru_maxrss`), pages of mapped files included.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors import safe_open

GOAL = 1.5e9


def sizes(folder):
    """Bytes of every tensor of a bfloat16 checkpoint."""
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found += [2 * math.prod(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
    return found


def measured(folder, type_, workers):
    """(peak bytes, CPU seconds, bytes of the files) of one run of the command line."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        command = [sys.executable, "-m", "auto_round", "--model", str(folder), "--format", f"gguf:{type_}"]
        command += [
            "--iters",
            "0",
            "--nsamples",
            "0",
            "--workers",
            str(workers),
            "--output_dir",
            f"{place}/out",
        ]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        errors = process.stderr.read().decode()
        _, status, used = os.wait4(process.pid, 0)
        if status:
            raise RuntimeError(f"{' '.join(command)} failed:\n{errors[-2000:]}")
        written = sum(path.stat().st_size for path in Path(place).rglob("*.gguf"))
    return used.ru_maxrss * 1024, used.ru_utime + used.ru_stime, written


def main():
    """One row per type and number of workers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--types", default="q4_0,q4_k_m")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    tensors, rows = sizes(options.folder), []
    for type_ in options.types.split(","):
        for workers in options.workers:
            peak, seconds, written = measured(options.folder, type_, workers)
            rows.append({
                "type": type_, "workers": workers, "checkpoint_gb": round(sum(tensors) / 1e9, 3),
                "largest_tensor_gb": round(max(tensors) / 1e9, 3), "goal_gb": round((GOAL + max(tensors)) / 1e9, 3),
                "peak_gb": round(peak / 1e9, 3), "written_gb": round(written / 1e9, 3),
                "cpu_seconds": round(seconds, 1),
            })  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    if options.out:
        options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
