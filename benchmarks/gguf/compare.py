"""Ours against llama.cpp's own quantizer: same model, same importance, one thread each, judged by llama.cpp itself.

python benchmarks/gguf/compare.py --llama /path/to/python [--model DIR] [--types q2_k_s,q4_k_m] [--out FILE.jsonl]
python benchmarks/gguf/compare.py --table FILE.jsonl
The importance is measured on calibration text by hooks of this script, and given to both; "ours" also lets weights make
up for one another's errors on that text, "ours, searched" does not. KL is that of the original model's logits (torch,
float32) against llama.cpp's on the quantized file, on held-out text.
"""

import argparse
import json
import logging
import subprocess
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers

from auto_round import AutoRound
from auto_round.formats.base import format_named
from auto_round.models.gguf_names import ARCHITECTURES, Names
from auto_round.models.imatrix import Origin, write_imatrix

HERE = Path(__file__).parent
NOVELIST = HERE.parent.parent / "examples" / "novelist-8m"
LENGTH = 256  # tokens of a sequence


def tokens(path, tokenizer, count, spread=False):
    """(count, LENGTH) token ids of a .jsonl of texts, or of plain text: its beginning, or windows all over it."""
    text = path.read_text()
    texts = [json.loads(line)["text"] for line in text.splitlines()] if path.suffix == ".jsonl" else [text]
    ids = [i for one in texts for i in tokenizer(one)["input_ids"]]
    step = len(ids) // count if spread else LENGTH
    return torch.tensor([ids[start : start + LENGTH] for start in range(0, count * step, step)])


@torch.no_grad()
def importance(model, ids, names):
    """Name in llama.cpp -> mean square of each input channel over `ids`."""
    sums, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def add(_, args, name=name):
                sums[name] = sums.get(name, 0) + args[0].float().flatten(0, -2).square().sum(0)

            hooks.append(module.register_forward_pre_hook(add))
    for row in ids:
        model(input_ids=row[None])
    for hook in hooks:
        hook.remove()
    return {names.place(f"{name}.weight").name: total / ids.numel() for name, total in sums.items()}


def run(python, *words):
    """What benchmarks/gguf/llama.py prints."""
    command = [python, str(HERE / "llama.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def judged(python, path, ids, original, folder):
    """KL, agreement of the first choice, bits per weight of a file."""
    np.save(folder / "ids.npy", ids.numpy())
    run(python, "logits", path, folder / "ids.npy", folder / "out.npy")
    found = np.load(folder / "out.npy", mmap_mode="r")
    divergence, agreement = [], []
    for ours, theirs in zip(original, found):  # row by row: a large vocabulary in float64 is gigabytes
        p, q = (x.double().log_softmax(-1) for x in (ours, torch.from_numpy(theirs.copy())))
        divergence.append((p.exp() * (p - q)).sum(-1))
        agreement.append((p.argmax(-1) == q.argmax(-1)).double())
    reader = gguf.GGUFReader(path)
    weights = sum(int(t.n_elements) for t in reader.tensors)
    return {
        "kl": round(torch.cat(divergence).mean().item(), 6),
        "top1": round(torch.cat(agreement).mean().item(), 4),
        "bpw": round(8 * sum(int(t.n_bytes) for t in reader.tensors) / weights, 3),
    }


def weighted_error(path, model, means, names):
    """Sum over matrices of blocks of importance-weighted squared error, relative to the weights' own."""
    found = {t.name: t for t in gguf.GGUFReader(path).tensors}
    total, power = 0.0, 0.0
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or ".layers." not in name:
            continue
        place = names.place(f"{name}.weight").name
        if any(part in place for part in ("attn_q", "attn_k")):
            continue  # rows in another order
        weight, w = module.weight.float(), means[place]
        fake = torch.from_numpy(gguf.quants.dequantize(found[place].data, found[place].tensor_type))
        total += ((fake - weight).square() * w).sum().item()
        power += (weight.square() * w).sum().item()
    return total / power


def recipes(calibration, tune):
    """Who -> options of ours, None for llama.cpp."""
    data = {"dataset": calibration.tolist(), "seqlen": LENGTH, "nsamples": len(calibration)}
    found = {
        "llama.cpp": None,
        "ours, searched": {"iters": 0, "nsamples": 0},
        "ours": {"iters": 0, **data},
    }
    return found | ({f"ours, {tune} sign steps": {"iters": tune, **data}} if tune else {})


def measured(options, place, type_, recipe, plain):
    """(the file, CPU seconds of making it) by llama.cpp, or by us with the options `recipe`."""
    if recipe is None:
        theirs, number = place / f"{type_}.gguf", format_named(f"gguf:{type_}").file_type
        seconds = run(options.llama, "quantize", plain, theirs, number, place / "imatrix.npz")
        return theirs, float(seconds)
    out = place / f"{type_}-{len(list(place.iterdir()))}"
    before = time.process_time()
    job = AutoRound(options.model, format=f"gguf:{type_}", imatrix=str(place / "i.gguf"), **recipe)
    job.quantize_and_save(out)
    seconds = time.process_time() - before
    (path,) = out.glob("*.gguf")
    return path, seconds


def arguments():
    """What the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama", help="an interpreter that has llama-cpp-python")
    parser.add_argument("--table", type=Path, help="only print the rows in this file as Markdown")
    parser.add_argument("--model", type=Path, default=NOVELIST)
    parser.add_argument("--calibration", type=Path, default=NOVELIST / "calibration.jsonl")
    parser.add_argument(
        "--heldout", type=Path, default=NOVELIST / "heldout.jsonl", help=".jsonl or plain text"
    )
    parser.add_argument("--nsamples", type=int, default=64, help="calibration sequences of 256 tokens")
    parser.add_argument("--samples", type=int, default=16, help="held-out sequences of 256 tokens")
    parser.add_argument("--types", default="q2_k_s,q3_k_m,q4_0,q4_k_m")
    parser.add_argument("--tune", type=int, default=0, help="sign steps of one more recipe of ours")
    parser.add_argument("--out", type=Path, help="rows are added; those that are there are not made again")
    parser.add_argument("--speed", action="store_true", help="measure tokens per second too")
    return parser.parse_args()


def table(rows):
    """Markdown: a row per type, each recipe's KL with that of llama.cpp in brackets."""
    found = {}
    for row in rows:
        found.setdefault((row["model"], row["type"]), {})[row["by"]] = row
    others = ("ours, searched", "ours", "ours, 200 sign steps")
    head = ["type", "bits per weight", "KL of llama.cpp's", *others, "top-1 of llama.cpp's, ours", "CPU s"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for (_, type_), by in sorted(found.items(), key=lambda item: item[1]["llama.cpp"]["bpw"]):
        theirs, ours = by["llama.cpp"], by["ours"]
        cells = [
            f"{by[who]['kl']:.5f} ({by[who]['kl'] / theirs['kl']:.2f}x)" if who in by else ""
            for who in others
        ]
        seconds = ", ".join(f"{by[who]['cpu_seconds']:.1f}" for who in ("llama.cpp", *others[:2]))
        parts = [f"`{type_}`", f"{theirs['bpw']:.2f}", f"{theirs['kl']:.5f}", *cells]
        parts += [f"{theirs['top1']:.3f}, {ours['top1']:.3f}", seconds]
        lines.append(f"| {' | '.join(parts)} |")
    return "\n".join(lines)


def main():
    """A row for each recipe of ours and one for llama.cpp, per type."""
    options = arguments()
    if options.table:
        print(table(map(json.loads, options.table.read_text().splitlines())))
        return
    logging.getLogger("auto_round").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    lines = options.out.read_text().splitlines() if options.out and options.out.exists() else []
    known = {(row["model"], row["type"], row["by"]) for row in map(json.loads, lines)}
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    calibration = tokens(options.calibration, tokenizer, options.nsamples)
    ids = tokens(options.heldout, tokenizer, options.samples, spread=True)
    names = Names(ARCHITECTURES[model.config.architectures[0]], model.config.num_hidden_layers)
    with torch.no_grad():
        original = torch.cat([model(input_ids=row[None]).logits for row in ids])
    means = importance(model, calibration, names)
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        np.savez(place / "imatrix.npz", **{name: values.numpy() for name, values in means.items()})
        origin = Origin(len(calibration), LENGTH, calibration.numel(), (options.calibration.name,))
        write_imatrix(place / "i.gguf", means, origin)
        bf16 = AutoRound(options.model, format="gguf:bf16", iters=0, model_free=True)
        bf16.quantize_and_save(place / "bf16")
        (plain,) = (place / "bf16").glob("*.gguf")
        for type_ in options.types.split(","):
            for who, recipe in recipes(calibration, options.tune).items():
                if (options.model.name, type_, who) in known:
                    continue
                path, seconds = measured(options, place, type_, recipe, plain)
                row = {"model": options.model.name, "type": type_, "by": who}
                row |= judged(options.llama, path, ids, original, place)
                row["weighted_error"] = round(weighted_error(path, model, means, names), 7)
                row["cpu_seconds"] = round(seconds, 2)
                if options.speed:
                    row["tokens_per_second"] = round(float(run(options.llama, "speed", path)), 1)
                print(json.dumps(row), flush=True)
                if options.out:
                    with options.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                path.unlink()


if __name__ == "__main__":
    main()
