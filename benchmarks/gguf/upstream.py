"""Ours against upstream's optimised RTN: same model, same calibration file, one thread each, judged by llama.cpp.

python benchmarks/gguf/upstream.py --upstream /path/to/python --gguf-py DIR --llama /path/to/python [--out FILE.jsonl]

Upstream's converter needs a newer `gguf` package than the registry has: DIR is the one in llama-cpp-python's source,
with `sentencepiece` beside it. It knows tokenizers by a list of hashes; this script answers "gpt-2" for the others.
CPU seconds are those of the whole process, start and imports included.
"""

import argparse
import importlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
NOVELIST = HERE.parent.parent / "examples" / "novelist-8m"
NUMBERS = {"nsamples": 64, "seqlen": 256, "batch_size": 8}


def peer(model, type_, data, out):
    """What runs in upstream's environment."""
    import torch

    from auto_round import AutoRound

    torch.set_num_threads(1)
    found = importlib.import_module

    def patched(name, *rest):
        module = found(name, *rest)
        if name == "conversion":
            sys.modules["conversion.base"].TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
        return module

    importlib.import_module = patched
    job = AutoRound(model, scheme=f"gguf:{type_}", iters=0, dataset=data, device_map="cpu", **NUMBERS)
    job.quantize_and_save(out, format=f"gguf:{type_}")


def measured(command, **environment):
    """CPU seconds of a command."""
    process = subprocess.Popen(
        list(map(str, command)), env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    errors = process.stderr.read().decode()
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(errors.strip()[-1500:])
    return round(used.ru_utime + used.ru_stime, 1)


def sides(options, type_, out):
    """Who -> (command, environment)."""
    paths = os.pathsep.join(map(str, options.gguf_py))
    own = [
        sys.executable,
        "-m",
        "auto_round",
        "--model",
        options.model,
        "--format",
        f"gguf:{type_}",
        "--iters",
        "0",
    ]
    own += ["--dataset", options.calibration, "--output_dir", out]

    def ours(*more, **numbers):
        return [
            *own,
            *more,
            *(word for item in {**NUMBERS, **numbers}.items() for word in (f"--{item[0]}", item[1])),
        ]

    theirs = [options.upstream, __file__, "--peer", options.model, type_, options.calibration, out]
    return {
        "upstream": (theirs, {"PYTHONPATH": paths}),
        "ours": (ours(), {}),
        "ours, 8 samples": (ours(nsamples=8), {}),
        "ours, searched": (ours("--start", "search"), {}),
    }


def main():
    """Per type a row for each side."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--gguf-py", type=Path, nargs="+", required=True)
    parser.add_argument("--llama", required=True)
    parser.add_argument("--model", type=Path, default=NOVELIST)
    parser.add_argument("--calibration", type=Path, default=NOVELIST / "calibration.jsonl")
    parser.add_argument("--heldout", type=Path, default=NOVELIST / "heldout.jsonl")
    parser.add_argument("--types", default="q4_k_m,q4_0,q3_k_m,q2_k_s")
    parser.add_argument("--samples", type=int, default=16, help="held-out sequences of 256 tokens")
    parser.add_argument("--out", type=Path, help="rows are added; those that are there are not made again")
    options = parser.parse_args()
    import compare
    import torch
    import transformers

    logging.getLogger("auto_round").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    lines = options.out.read_text().splitlines() if options.out and options.out.exists() else []
    known = {(row["model"], row["type"], row["by"]) for row in map(json.loads, lines)}
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    ids = compare.tokens(options.heldout, tokenizer, options.samples, spread=True)
    with torch.no_grad():
        original = torch.cat([model(input_ids=row[None]).logits for row in ids])
    for type_ in options.types.split(","):
        for who, (command, environment) in sides(options, type_, "OUT").items():
            if (options.model.name, type_, who) in known:
                continue
            with tempfile.TemporaryDirectory() as place:
                words = [place if word == "OUT" else word for word in command]
                seconds = measured(words, **environment)
                (path,) = Path(place).rglob("*.gguf")
                row = {"model": options.model.name, "type": type_, "by": who}
                row |= compare.judged(options.llama, path, ids, original, Path(place))
                row["cpu_seconds"] = seconds
            print(json.dumps(row), flush=True)
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        peer(*sys.argv[2:])
    else:
        main()
