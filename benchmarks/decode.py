"""Tokens per second and share of the memory bandwidth of quantized layers on the CPU, kernels taking turns.

    python benchmarks/decode.py --shapes 1b 8b --threads 1 --batch 1 8 --out benchmarks/results/decode.jsonl

One line of JSON per kernel, shape, setting and batch: the least CPU time of a call over all rounds. Kernels alternate
within a round, so that a busy machine hurts all of them alike. Small layers may stay in the caches: their share of the
bandwidth can exceed 1.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from auto_round.backends.base import Site, backends
from auto_round.codecs.base import codec_of
from auto_round.core.scheme import TensorSpec
from auto_round.formats.base import format_named

SHAPES = {
    "1b": {"qkv": (3072, 2048), "o": (2048, 2048), "gate_up": (16384, 2048), "down": (2048, 8192)},
    "8b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
    "70b": {"qkv": (10240, 8192), "o": (8192, 8192)},
}
"""(O, I) of the layers of Llama 3.2 1B, 3.1 8B and 70B, as servers fuse them."""
SETTINGS = {"W4G128": (4, 128), "W8G128": (8, 128), "W2G64": (2, 64), "W3G128": (3, 128)}
KERNELS = ("cpu", "cpu:int8", "ark", "gptqmodel:torch")


def layer(name, spec, shape, dtype):
    """A random layer on backend `name`, or None where it cannot be."""
    backend = backends()[name]
    site = Site(
        name="layer", format=format_named("auto_round:auto_gptq"), spec=spec, shape=shape, device="cpu", dtype=dtype,
        bias=None,
    )  # fmt: skip
    if backend.reject(site) or backend.missing() or backend.prepare():
        return None
    module = backend.build(site)
    q = codec_of(spec).quantize(torch.randn(shape) * 0.02, spec)
    for key, tensor in site.format.write(q).items():
        module._buffers[key] = tensor
    backend.finish(module, cache=False)
    return module


def bandwidth():
    """Bytes per second of reading 256 MB once, by torch's sum."""
    x = torch.zeros(64 << 20)
    return 4 * x.numel() / min(timed(x.sum) for _ in range(5))


def timed(call):
    """CPU seconds of `call` per thread."""
    start = time.process_time()
    call()
    return (time.process_time() - start) / torch.get_num_threads()


def measure(shape, batch, rounds):
    """{(kernel, setting): (seconds, bytes of weights)} of one shape."""
    x = {dtype: torch.randn(batch, shape[1], dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    calls, sizes = {}, {}
    for dtype in x:
        weight = (torch.randn(shape) * 0.02).to(dtype)
        key = ("torch", str(dtype).removeprefix("torch."))
        calls[key] = lambda w=weight, d=dtype: torch.nn.functional.linear(x[d], w)
        sizes[key] = weight.numel() * weight.element_size()
    for setting, (bits, group) in SETTINGS.items():
        for kernel in KERNELS:
            module = layer(kernel, TensorSpec(bits=bits, group=group), shape, torch.bfloat16)
            if module is not None:
                calls[kernel, setting] = lambda m=module: m(x[torch.bfloat16])
                sizes[kernel, setting] = shape[0] * shape[1] * bits / 8
    best = dict.fromkeys(calls, float("inf"))
    with torch.inference_mode():
        for _ in range(rounds):
            for key, call in calls.items():
                best[key] = min(best[key], timed(call))
    return {key: (seconds, sizes[key]) for key, seconds in best.items()}


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1b", "8b"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decode.jsonl"))
    given = parser.parse_args()
    with given.out.open("a") as out:
        for threads in given.threads:
            torch.set_num_threads(threads)
            top = bandwidth()
            for model in given.shapes:
                for name, shape in SHAPES[model].items():
                    for batch in given.batch:
                        found = measure(shape, batch, given.rounds if batch < 64 else 2)
                        plain = found["torch", "bfloat16"][0]
                        for (kernel, setting), (seconds, size) in found.items():
                            row = {"model": model, "layer": name, "batch": batch, "threads": threads}
                            row |= {"kernel": kernel, "setting": setting, "ms": round(seconds * 1e3, 3)}
                            row["speedup"] = round(plain / seconds, 2)
                            row["bandwidth"] = round(size / seconds / top, 2)
                            print(row, flush=True)
                            out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
