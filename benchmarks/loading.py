"""Loading a quantized checkpoint by transformers: seconds against reading its files, peak memory against their size.

    python benchmarks/loading.py --work FOLDER    # adds a row per backend to results/loading.jsonl

The model is random and shaped like Llama 3.2 1B: W4G128, with embeddings in bfloat16, about 1 GB. It is made in FOLDER
unless it is there. Each backend loads it in a process of its own with one thread, after its imports and after the files
have been read once, so they lie in the system's cache. Memory: the most of what is the process's own (RssAnon; pages of
mapped files do not count), less what it had after its imports.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

HERE = Path(__file__).parent
BACKENDS = ("plain", "cpu", "ark", "torch")
"""The first is the bfloat16 model by transformers alone, which maps its files: what any loading costs."""


def make(folder):
    """Write the checkpoint."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from auto_round import AutoRound

    config = LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                         num_key_value_heads=8, head_dim=64, vocab_size=128256, tie_word_embeddings=True)  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder / "plain")
    AutoRound(folder / "plain", iters=0, disable_opt_rtn=True).quantize_and_save(folder / "W4G128")


def own_memory():
    """Bytes that belong to this process alone."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def load(folder, backend):
    """One row, of this process."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401  imported late otherwise
    from transformers import AutoModelForCausalLM, AutoRoundConfig

    from auto_round.backends.base import backends

    options = {}
    if backend != "plain":
        backends()[backend].prepare()
        options = {"quantization_config": AutoRoundConfig(backend=backend)}
    torch.set_num_threads(1)
    files = list(folder.glob("*.safetensors"))
    read = min(_seconds(lambda: [_read(file) for file in files]) for _ in range(3))
    before, most, done = own_memory(), 0, threading.Event()

    def watch():
        nonlocal most
        while not done.wait(0.002):
            most = max(most, own_memory())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    loaded = []
    took = _seconds(lambda: loaded.append(AutoModelForCausalLM.from_pretrained(folder, **options)))
    done.set()
    watcher.join()
    size = sum(file.stat().st_size for file in files)
    after = own_memory()
    return {"backend": backend, "file_gb": round(size / 1e9, 3), "read_s": round(read, 2), "load_s": round(took, 2),
            "peak_gb": round((most - before) / 1e9, 3), "kept_gb": round((after - before) / 1e9, 3),
            "peak_of_file": round((most - before) / size, 2)}  # fmt: skip


def _seconds(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _read(file):
    room = bytearray(1 << 24)
    with file.open("rb", buffering=0) as opened:
        while opened.readinto(room):
            pass


def main():
    """Make the checkpoint, load it by each backend."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--backend", choices=BACKENDS, help="print the row of this one only")
    given = parser.parse_args()
    folder = given.work / ("plain" if given.backend == "plain" else "W4G128")
    if given.backend:
        print(json.dumps(load(folder, given.backend)))
        return
    if not folder.is_dir():
        make(given.work)
    for backend in BACKENDS:
        command = [sys.executable, __file__, "--work", given.work, "--backend", backend]
        out = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout
        row = out.splitlines()[-1]
        print(row, flush=True)
        with (HERE / "results/loading.jsonl").open("a") as rows:
            rows.write(row + "\n")


if __name__ == "__main__":
    main()
