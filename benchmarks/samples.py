"""What more calibration samples are worth without tuning: KL by their number, on texts of several kinds.

python benchmarks/samples.py --model DIR --calibration FILE --text NAME=FILE --text NAME=FILE --out FILE.jsonl
    [--schemes GGUF:Q4_K_M,GGUF:Q2_K_S] [--counts 8,32,64]
python benchmarks/samples.py --table FILE.jsonl

Samples have 256 tokens. A text is judged on passages from all over it: its beginning is often of a kind of its own.
CPU seconds are those of quantizing, on one thread.
"""

import argparse
import json
import logging
import time
from pathlib import Path

import torch
import transformers

from auto_round import AutoRound
from auto_round.jobs.compare import compare

LENGTH = 256
CHARACTERS = 1500  # of a passage, enough for about as many tokens as a window has
PASSAGES = 40


def passages(path):
    """Texts from all over a .jsonl of texts, or plain text."""
    text = path.read_text()
    if path.suffix == ".jsonl":
        text = "\n".join(json.loads(line)["text"] for line in text.splitlines())
    step = len(text) // PASSAGES
    return [text[start : start + CHARACTERS] for start in range(0, PASSAGES * step, step)]


def measured(options, scheme, count, original, tokenizer, texts):
    """One row."""
    job = AutoRound(
        options.model, scheme=scheme, iters=0, dataset=str(options.calibration), nsamples=count, seqlen=LENGTH
    )
    before = time.process_time()
    model, _ = job.quantize()
    row = {"model": options.model.name, "scheme": scheme, "samples": count}
    row["cpu_seconds"] = round(time.process_time() - before, 1)
    for name, found in texts.items():
        result = compare(original, model, tokenizer, found, seqlen=LENGTH, max_windows=PASSAGES)
        row |= {f"kl_{name}": round(result.kl, 6), f"top1_{name}": round(result.top1, 4)}
    return row


def table(rows):
    """Markdown of `rows`."""
    names = [key.removeprefix("kl_") for key in rows[0] if key.startswith("kl_")]
    lines = [
        f"| scheme | samples | {' | '.join(f'KL, {name}' for name in names)} | CPU s |",
        "|---" * (len(names) + 3) + "|",
    ]
    for row in rows:
        cells = [
            row["scheme"],
            row["samples"],
            *(f"{row[f'kl_{name}']:.4f}" for name in names),
            f"{row['cpu_seconds']:.0f}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main():
    """A row for each scheme and number of samples."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--text", action="append", default=[], help="NAME=FILE")
    parser.add_argument("--schemes", default="GGUF:Q4_K_M,GGUF:Q2_K_S")
    parser.add_argument("--counts", default="8,24,64,192")
    parser.add_argument("--out", type=Path, help="rows are added")
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    if options.table:
        print(table([json.loads(line) for line in options.table.read_text().splitlines()]))
        return
    logging.getLogger("auto_round").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    original = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    texts = {name: passages(Path(path)) for name, path in (item.split("=", 1) for item in options.text)}
    for scheme in options.schemes.split(","):
        for count in map(int, options.counts.split(",")):
            row = measured(options, scheme, count, original, tokenizer, texts)
            print(json.dumps(row), flush=True)
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
