"""Whether our files have the tensor types that llama.cpp's own quantizer chooses, for every architecture and mixture.

python benchmarks/gguf/mixtures.py --llama /path/to/python [--only llama,gemma2] [--out FILE.jsonl]

Models are random, with as many blocks as the choices by block need to show. Both sides start from the same bfloat16
file; llama.cpp gets an importance of ones, without which it refuses q2_k_s.
"""

import argparse
import json
import logging
import subprocess
import tempfile
from pathlib import Path

import architectures
import gguf
import numpy as np

from auto_round import AutoRound
from auto_round.formats.base import formats

HERE = Path(__file__).parent
BLOCKS = 16
OURS_ALONE = ("gguf:q2_k_mixed",)
MORE = {
    "llama-gqa4": ("Llama", {**architectures.LIKE, "num_attention_heads": 8}),
    "mixtral-8": ("Mixtral", {**architectures.LIKE, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "llama-narrow": ("Llama", {**architectures.LIKE, "hidden_size": 320, "num_attention_heads": 5,
                               "num_key_value_heads": 5, "intermediate_size": 608}),
    "llama-tied": ("Llama", {**architectures.LIKE, "tie_word_embeddings": True}),
    "bloom-narrow": ("Bloom", {**architectures.BLOOM, "hidden_size": 288, "pad_token_id": 3}),
}  # fmt: skip
"""Models beside those of architectures.py: many queries per key, 8 experts, rows of no multiple of 256, a tied head."""


def deeper(settings):
    """The same model with more blocks."""
    found = dict(settings)
    for key in ("num_hidden_layers", "n_layer", "n_layers"):
        if key in found:
            found[key] = BLOCKS
    if "layer_types" in found:
        found["layer_types"] = found["layer_types"][:2] * (BLOCKS // 2)
    return found


def types(path):
    """Tensor -> type of a file."""
    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}


def ones(path):
    """An importance of ones for all matrices of a file."""
    shapes = {t.name: t.shape.tolist() for t in gguf.GGUFReader(path).tensors}  # the row's length comes first
    return {
        name: np.ones(shape[0] * (shape[2] if len(shape) > 2 else 1), dtype=np.float32)
        for name, shape in shapes.items()
        if len(shape) > 1
    }


def compared(python, folder, place):
    """Mixture -> tensors whose types differ, as (name, ours, llama.cpp's)."""
    wanted = {f.name: f for f in formats().values() if f.whole_model and f.scheme.weight is not None}
    names = [name for name in wanted if name not in OURS_ALONE]
    _, folders = AutoRound(folder, format="gguf:bf16," + ",".join(names), model_free=True).quantize_and_save(
        place
    )
    files = [next(Path(out).glob("*.gguf")) for out in folders]
    np.savez(place / "ones.npz", **ones(files[0]))
    numbers = [str(wanted[name].file_type) for name in names]
    command = [python, str(HERE / "llama.py"), "mixtures", files[0], place, place / "ones.npz", *numbers]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "crashed")
    found = {}
    for name, number, path in zip(names, numbers, files[1:], strict=True):
        ours, theirs = types(path), types(place / f"{number}.gguf")
        found[name] = [(t, ours.get(t), theirs[t]) for t in theirs if ours.get(t) != theirs[t]]
    return found


def main():
    """One row per architecture; the differences are printed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama", required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    logging.getLogger("auto_round").setLevel(logging.ERROR)
    architectures.KINDS.update(MORE)
    rows = []
    for kind in options.only.split(",") if options.only else list(architectures.KINDS):
        prefix, settings = architectures.KINDS[kind]
        architectures.KINDS[kind] = prefix, deeper(settings)
        with tempfile.TemporaryDirectory() as place:
            architectures.random_model(kind, Path(place) / "m")
            try:
                found = compared(options.llama, Path(place) / "m", Path(place))
            except (RuntimeError, ValueError, AssertionError) as error:
                rows.append({"model": kind, "error": f"{type(error).__name__}: {error}"[:300]})
            else:
                differ = {name: len(tensors) for name, tensors in found.items() if tensors}
                rows.append({"model": kind, "mixtures": len(found), "differ": differ})
                for name in differ:
                    print(f"  {kind} {name}: {found[name][:4]}", flush=True)
        print(json.dumps(rows[-1]), flush=True)
    if options.out:
        options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
