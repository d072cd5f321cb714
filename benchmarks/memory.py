"""Tune a checkpoint of random weights within a memory limit smaller than it, and compare planned with measured peaks.

    python benchmarks/memory.py [--gigabytes 4] [--max-ram 3GB] [--hidden 2048] [--out report.json]

The model is Llama shaped, in bfloat16, written block by block; its size on disk, the limit, planned and measured
peak are printed.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from auto_round import AutoRound
from auto_round.models.load import skeleton

VOCAB = 4096


def make(folder: Path, nbytes: float, hidden: int) -> int:
    """Write the model, one file per block; its size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    per_block = 2 * (4 * hidden * hidden + 3 * hidden * 4 * hidden)
    transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=4 * hidden,
        num_hidden_layers=max(2, round(nbytes / per_block)),
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, tie_word_embeddings=False,
        dtype="bfloat16", architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    parts: dict[str, list[str]] = {}
    shapes = {}
    config = json.loads((folder / "config.json").read_text())
    tree = skeleton_of(config)
    for name, tensor in tree.state_dict().items():
        part = ".".join(name.split(".")[:3]) if ".layers." in name else "outside"
        parts.setdefault(part, []).append(name)
        shapes[name] = tensor.shape
    where, total, generator = {}, 0, torch.Generator().manual_seed(0)
    for number, names in enumerate(parts.values(), 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        tensors = {n: (torch.randn(shapes[n], generator=generator) * 0.02).bfloat16() for n in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        total += sum(t.numel() * 2 for t in tensors.values())
        where.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def skeleton_of(config: dict) -> torch.nn.Module:
    """The module tree of a configuration, without weights."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return skeleton(Path(folder), dtype="bfloat16")


def main() -> None:
    """Make, tune, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--max-ram", default="3GB")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as name:
        work = Path(name)
        size = make(work / "model", options.gigabytes * 1e9, options.hidden)
        tokens = list(torch.randint(0, VOCAB, (8, 128), generator=torch.Generator().manual_seed(1)))
        job = AutoRound(
            work / "model", dataset=tokens, nsamples=8, seqlen=128, batch_size=4, iters=2, disable_opt_rtn=True,
            max_ram=options.max_ram, report=str(work / "report.json"),
        )  # fmt: skip
        job.quantize_and_save(work / "out")
        memory = json.loads((work / "report.json").read_text())["memory"]
    planned, measured = memory["planned"]["ram"], memory["measured"]["ram"]
    line = {"checkpoint": size, "max_ram": options.max_ram, "planned": planned, "measured": measured}
    print(json.dumps({**line, "measured/planned": round(measured / planned, 3)}))
    if options.out:
        options.out.write_text(json.dumps(line, indent=1) + "\n")


if __name__ == "__main__":
    main()
