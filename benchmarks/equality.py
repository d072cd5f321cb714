"""Streams against upstream's `--model_free` for the presets that its guide lists: stored tensors, and what they mean.

    python benchmarks/equality.py MODEL --peer PYTHON --work FOLDER --out equality.jsonl

Upstream's guide promises that its model-free mode equals its regular flow; for the MX types, where it does not, the
weights of that flow are compared too (`regular_unequal`). Weights are dequantized here, independently of both packages:
GPTQ's packing (codes, zero points, scales) and compressed-tensors' MXFP4 and MXFP8.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

PRESETS = ("W2A16", "W2A16G32", "W2A16G64", "W4A16", "W4A16_MIXED", "W8A16", "MXFP4", "MXFP8")
ASYMMETRIC = ("W2A16", "W2A16G32", "W2A16G64")  # W8A16 is in the guide, and refused by upstream 0.16.1
SCRIPT = """
import sys
from auto_round import AutoRound
if __name__ == "__main__":
    source, out, scheme, sym = sys.argv[1:]
    options = {} if sym == "sym" else {"sym": False}
    AutoRound(source, scheme=scheme, model_free=True, **options).quantize_and_save(out)
"""
REGULAR = """
import sys
from auto_round import AutoRound
if __name__ == "__main__":
    source, out, scheme, sym = sys.argv[1:]
    job = AutoRound(source, scheme=scheme, iters=0, disable_opt_rtn=True, disable_model_free=True)
    job.quantize_and_save(out, format="fake")
"""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def unpacked(words: Tensor, bits: int) -> Tensor:
    """int32 words, codes along the last axis, lowest bits first."""
    shifts = torch.arange(0, 32, bits)
    return ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)


def gptq(tensors: dict[str, Tensor], offset: int) -> Tensor:
    """(O, I) of qweight, qzeros, scales. offset: what was taken from the zero points before they were stored."""
    scales = tensors["scales"].float()
    bits = tensors["qzeros"].shape[1] * 32 // scales.shape[1]
    codes = unpacked(tensors["qweight"].t().contiguous(), bits)
    zeros = (unpacked(tensors["qzeros"], bits) + offset) & ((1 << bits) - 1)
    group = codes.shape[1] // scales.shape[0]
    spread = [table.t().repeat_interleave(group, dim=1) for table in (zeros, scales)]
    return (codes - spread[0]) * spread[1]


def mx(tensors: dict[str, Tensor]) -> Tensor:
    """(O, I) of weight_packed or weight, and weight_scale with exponents of 2."""
    scale = torch.exp2(tensors["weight_scale"].view(torch.uint8).float() - 127)
    if "weight_packed" in tensors:
        packed = tensors["weight_packed"].view(torch.uint8)
        codes = torch.stack([packed & 0xF, packed >> 4], -1).flatten(-2).long()
        values = torch.tensor([*E2M1, *(-v for v in E2M1)])[codes]
    else:
        values = tensors["weight"].float()
    return values * scale.repeat_interleave(values.shape[1] // scale.shape[1], dim=1)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def weights(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Layer -> dequantized weight, for the quantized layers."""
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    offset = 1 if said.get("packing_format") == "auto_round:auto_gptq" else 0
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        layers.setdefault(layer, {})[part] = tensor
    found = {}
    for layer, parts in layers.items():
        if "qweight" in parts:
            found[layer] = gptq(parts, offset)
        elif "weight_scale" in parts:
            found[layer] = mx(parts)
    return found


def compared(ours: Path, theirs: Path) -> dict[str, object]:
    """What differs between two checkpoints of the same model and scheme."""
    a, b = tensors_of(ours), tensors_of(theirs)
    same = [
        name
        for name in a.keys() & b.keys()
        if a[name].dtype == b[name].dtype and torch.equal(a[name], b[name])
    ]
    values, others = weights(ours, a), weights(theirs, b)
    apart = {layer: float((values[layer] - others[layer]).abs().max()) for layer in values if layer in others}
    unequal = sum(int((values[layer] != others[layer]).sum()) for layer in apart)
    return {
        "layers": len(values), "only_ours": sorted(values.keys() - others.keys()),
        "only_theirs": sorted(others.keys() - values.keys()), "tensors": len(a), "equal_tensors": len(same),
        "unequal_tensors": sorted(a.keys() & b.keys() - set(same))[:4],
        "names_apart": sorted(a.keys() ^ b.keys())[:4],
        "unequal_weights": unequal, "weights": sum(w.numel() for w in values.values()),
        "largest_difference": max(apart.values(), default=0.0),
    }  # fmt: skip


def unlike_regular(ours: Path, regular: Path) -> int:
    """Weights that differ from those of a folder of dequantized ones."""
    folder = next(regular.rglob("*.safetensors")).parent
    plain, values = tensors_of(folder), weights(ours, tensors_of(ours))
    return sum(
        int((w.to(plain[f"{n}.weight"].dtype) != plain[f"{n}.weight"]).sum()) for n, w in values.items()
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--peer", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("equality.jsonl"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for scheme, sym in [*((name, "sym") for name in PRESETS), *((name, "asym") for name in ASYMMETRIC)]:
        sides = {"ours": (sys.executable, SCRIPT), "theirs": (args.peer, SCRIPT)}
        if scheme.startswith("MX"):
            sides["regular"] = (args.peer, REGULAR)
        for side, (python, text) in sides.items():
            script, out = args.work / f"{side}.py", args.work / side
            shutil.rmtree(out, ignore_errors=True)
            script.write_text(text)
            env = {k: v for k, v in os.environ.items() if side == "ours" or k != "PYTHONPATH"}
            command = [python, script, args.model.resolve(), out, scheme, sym]
            subprocess.run(command, check=True, env=env, cwd=args.work, capture_output=True)
        about = {"model": args.model.name, "scheme": scheme, "sym": sym == "sym"}
        entry = {**about, **compared(args.work / "ours", args.work / "theirs")}
        if "regular" in sides:
            entry["regular_unequal"] = unlike_regular(args.work / "ours", args.work / "regular")
        print(entry, flush=True)
        with args.out.open("a") as file:
            file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
