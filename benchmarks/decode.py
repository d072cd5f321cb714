"""Speed of quantized layers on the CPU: milliseconds, tokens per second and share of the memory's speed.

    python benchmarks/decode.py --also ENV/lib/python3.11/site-packages --threads 1   # adds to results/decode.jsonl
    python benchmarks/decode.py --whole --threads 1          # a whole model, see decode_model.py
    python benchmarks/decode.py --report                     # writes decode.md

One line of JSON per kernel, shape, setting and batch; an interrupted run goes on where it stopped.
Within a cell all kernels take turns, and the least time of each counts, so a busy machine hurts them alike: processor
time for one thread, wall time for more. Up to batch 8 the last-level cache is filled with other data before each call,
since a model's weights come from memory; then the same kernel multiplies a few rows, since its code does not. The
memory's speed is that of a copy in the same cell, bytes read plus bytes written. Rows carry the processor's name and
are never compared across processors.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

HERE = Path(__file__).parent
SHAPES = {
    "1b": {"qkv": (3072, 2048), "o": (2048, 2048), "gate_up": (16384, 2048), "down": (2048, 8192)},
    "8b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
    "70b": {"qkv": (10240, 8192), "o": (8192, 8192), "gate": (28672, 8192), "down": (8192, 28672)},
}
"""(O, I) of the layers of Llama 3.2 1B, 3.1 8B and 70B, as servers fuse them; 70B's gate and up stay two."""
BLOCKS = {"1b": 16, "8b": 32, "70b": 80}
SETTINGS = {"W4G128": (4, 128), "W8G128": (8, 128), "W2G64": (2, 64), "W3G128": (3, 128)}
LLAMA_CPP = {"q4_0": "W4G128", "q4_k": "W4G128", "q8_0": "W8G128", "q2_k": "W2G64", "q3_k": "W3G128"}
KERNELS = (("cpu", torch.bfloat16), ("cpu:int8", torch.bfloat16), ("ark", torch.bfloat16), ("ark", torch.float32),
           ("gptqmodel:torch", torch.bfloat16))  # fmt: skip
ROUNDS = {1: 11, 8: 7, 64: 3, 512: 1}
CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
FEW = 64  # rows of a weight that a kernel warms up on
LONG = 64  # from this batch on one layer per model stands for all


class Call(NamedTuple):
    """Something to time: what runs, how many bytes its weight has, and the same on a few rows of the weight."""

    run: Callable[[], object]
    bytes: float
    warm: Callable[[], object]


def layer(name, spec, shape, dtype):
    """A layer of random codes on backend `name`, or None where that cannot run it."""
    from auto_round.backends.base import Site, backends
    from auto_round.core.quantized import Quantized
    from auto_round.formats.base import format_named

    backend = backends()[name]
    site = Site(
        name="layer", format=format_named("auto_round:auto_gptq"), spec=spec, shape=shape, device="cpu", dtype=dtype,
        bias=None,
    )  # fmt: skip
    if backend.reject(site) or backend.missing() or backend.prepare():
        return None
    groups = shape[0] * shape[1] // spec.group
    codes = torch.randint(0, 1 << spec.bits, (groups, spec.group), dtype=torch.uint8)
    scale = (torch.rand(groups, 1) * 0.01 + 0.001).half()
    module = backend.build(site)
    q = Quantized(spec=spec, shape=shape, codes=codes, params={"scale": scale})
    for key, tensor in site.format.write(q).items():
        module._buffers[key] = tensor
    backend.finish(module, cache=False)
    return module


def calls_of(shape, batch, ggml, threads):
    """(kernel, setting) -> Call, of every kernel that runs here."""
    from auto_round.core.scheme import TensorSpec

    x = {dtype: torch.randn(batch, shape[1]).to(dtype) for dtype in (torch.float32, torch.bfloat16)}
    calls, small = {}, (FEW, shape[1])
    for dtype, given in x.items():
        weight = torch.empty(shape, dtype=dtype).uniform_(-0.03, 0.03)
        name = f"torch {str(dtype).removeprefix('torch.')}"
        run = [lambda w=w, g=given: torch.nn.functional.linear(g, w) for w in (weight, weight[:FEW].clone())]
        calls[name, "plain"] = Call(run[0], weight.nbytes, run[1])
    for setting, (bits, group) in SETTINGS.items():
        for kernel, dtype in KERNELS:
            if kernel.startswith("gptqmodel") and (setting != "W4G128" or shape[0] != shape[1]):
                continue  # torch.compile, which it calls for every layer, takes half a minute
            modules = [layer(kernel, TensorSpec(bits=bits, group=group), s, dtype) for s in (shape, small)]
            if modules[0] is not None:
                name = "ark float32" if (kernel, dtype) == ("ark", torch.float32) else kernel
                size = shape[0] * shape[1] * (bits / 8 + 2 / group)
                run = [lambda m=m, g=x[dtype]: m(g) for m in modules]
                calls[name, setting] = Call(run[0], size, run[1])
    if ggml is not None:
        from ggml_layer import GgmlLayer

        for kind in LLAMA_CPP:
            made = [GgmlLayer(ggml, kind, s, batch, threads) for s in (shape, small)]
            calls["llama.cpp", kind] = Call(made[0], made[0].bytes, made[1])
    return calls


def processor():
    """What runs here, in words: the name that Linux knows and the instructions that our kernels use."""
    from auto_round.backends.cpu import build

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{name} ({build.load()})"


def other_data():
    """More than the last-level cache holds."""
    size = int(CACHE.read_text().strip().removesuffix("K")) << 10 if CACHE.exists() else 32 << 20
    return torch.zeros(int(1.3 * size) // 4)


def timed(call):
    """(wall, processor) seconds of one call; the processor's are per thread."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, (time.process_time() - cpu) / torch.get_num_threads()


def copy_speed():
    """Bytes read plus bytes written per second by a copy of 256 MB."""
    source = torch.zeros(64 << 20)
    target = torch.empty_like(source)
    pairs = [timed(lambda: target.copy_(source)) for _ in range(5)]
    return 2 * source.nbytes / best(pairs)


def best(pairs):
    """The least time of several: of the processor for one thread, of the clock for more (waiting threads spin)."""
    return min(pair[0 if torch.get_num_threads() > 1 else 1] for pair in pairs)


def measure(cell, ggml):
    """The rows of one cell."""
    chip, model, name, batch, threads = cell
    shape = SHAPES[model][name]
    speed, other = copy_speed(), other_data()
    calls = calls_of(shape, batch, ggml, threads)
    pairs = {key: [] for key in calls}
    with torch.inference_mode():
        for _ in range(ROUNDS[batch] + 1):
            for key, call in calls.items():
                if batch < LONG:
                    other.sum()
                    call.warm()
                pairs[key].append(timed(call.run))
    seconds = {key: best(found[1:]) for key, found in pairs.items()}  # the first one may allocate
    plain = seconds["torch bfloat16", "plain"]
    where = {
        "processor": chip,
        "model": model,
        "layer": name,
        "batch": batch,
        "threads": threads,
        "copy_gb_s": round(speed / 1e9, 1),
    }
    for (kernel, setting), s in seconds.items():
        share = calls[kernel, setting].bytes / s / speed
        row = {**where, "kernel": kernel, "setting": setting, "ms": round(s * 1e3, 3)}
        yield row | {"speedup": round(plain / s, 2), "bandwidth": round(share, 2)}
    for made in (made for call in calls.values() for made in (call.run, call.warm)):
        if hasattr(made, "close"):
            made.close()


def cells(given, chip):
    """(processor, model, layer, batch, threads), small ones first; large batches on one layer per model."""
    for threads in given.threads:
        for batch in given.batch:
            for model in given.models:
                for name in SHAPES[model]:
                    if (name == "o" or batch < LONG) and name in (given.layers or SHAPES[model]):
                        yield chip, model, name, batch, threads


def read(path):
    """Rows by cell."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        row = json.loads(line)
        key = (row["processor"], row["model"], row["layer"], row["batch"], row["threads"])
        found.setdefault(key, []).append(row)
    return found


def main():
    """Measure what is missing, or report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--layers", nargs="+", help="by the names in SHAPES; all otherwise")
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--batch", nargs="+", type=int, choices=ROUNDS, default=list(ROUNDS))
    parser.add_argument(
        "--also", nargs="+", type=Path, default=[], help="site-packages with gptqmodel or llama_cpp"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results/decode.jsonl")
    parser.add_argument("--whole", action="store_true", help="time a whole model of random weights instead")
    parser.add_argument("--report", action="store_true", help="write decode.md and end")
    given = parser.parse_args()
    if given.report:
        from decode_report import report

        (HERE / "decode.md").write_text(report(read(given.out)))
        return
    sys.path.extend(map(str, given.also))
    if given.whole:
        from decode_model import rows_of

        for threads in given.threads:
            with given.out.open("a") as out:
                out.writelines(json.dumps(row) + "\n" for row in rows_of(processor(), threads))
        return
    from ggml_layer import Ggml

    folders = [folder / "llama_cpp/lib" for folder in given.also if (folder / "llama_cpp/lib").is_dir()]
    ggml = Ggml(folders[0]) if folders else None
    for cell in cells(given, processor()):
        if cell in read(given.out):
            continue
        torch.set_num_threads(cell[-1])
        rows = list(measure(cell, ggml))
        with given.out.open("a") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows)
        print(*(f"{r['kernel']} {r['setting']} {r['ms']} ms" for r in rows), sep="; ", flush=True)


if __name__ == "__main__":
    main()
