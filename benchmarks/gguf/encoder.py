"""Error and CPU time of our encoders for ggml's block types, against ggml's own in the same process.

python benchmarks/gguf/encoder.py --ggml /path/to/libggml-base.so [--types q4_k,q6_k] [--results FILE]

The library is the one inside llama-cpp-python (`llama_cpp/lib`). Weights are gaussian, the importance of the input
channels spread over three decades; both sides get the same of each, in turn, on one thread. The error is the
importance-weighted square of what gguf's reader makes of the bytes; times are CPU milliseconds for a million weights,
the median of five rounds.
"""

import argparse
import ctypes
import json
import statistics
import time
from pathlib import Path

import gguf
import numpy as np
import torch

from auto_round.codecs.base import codecs
from auto_round.codecs.blocks import BlockCodec

ROWS, COLUMNS, ROUNDS = 512, 2048, 5
FLOATS = ctypes.POINTER(ctypes.c_float)


def main() -> None:
    """One row per type and kind of importance."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ggml", type=Path, required=True)
    parser.add_argument("--types", default="")
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    library = ctypes.CDLL(str(args.ggml))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    known = {name: codec for name, codec in codecs().items() if isinstance(codec, BlockCodec)}
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(ROWS, COLUMNS, generator=generator) * 0.02
    spread = 10 ** (3 * torch.rand(COLUMNS, generator=generator) - 1.5)
    rows = []
    for name in args.types.split(",") if args.types else known:
        for importance in (spread, None):
            rows.append(compare(library, known[name], w, importance))
            print(json.dumps(rows[-1]), flush=True)
    if args.results is not None:
        args.results.write_text("".join(json.dumps(row) + "\n" for row in rows))


def compare(
    library: ctypes.CDLL, codec: BlockCodec, w: torch.Tensor, importance: torch.Tensor | None
) -> dict:
    """Errors and times of one type."""
    spec, kind = codec.spec(), gguf.GGMLQuantizationType[codec.name.upper()]

    def ours() -> np.ndarray:
        found = codec.search(w, spec, importance)
        return codec.pack(codec.quantize(w, spec, found)).numpy()

    def theirs() -> np.ndarray:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        out = np.empty((ROWS, COLUMNS // block * size), dtype=np.uint8)
        weights = None if importance is None else importance.numpy().ctypes.data_as(FLOATS)
        library.ggml_quantize_chunk(
            int(kind), w.numpy().ctypes.data_as(FLOATS), out.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_int64(0), ctypes.c_int64(ROWS), ctypes.c_int64(COLUMNS), weights,
        )  # fmt: skip
        return out

    bytes_: dict[str, np.ndarray] = {}
    times: dict[str, list[float]] = {"ours": [], "ggml": []}
    for _ in range(ROUNDS):
        for side, encode in (("ours", ours), ("ggml", theirs)):
            before = time.process_time()
            bytes_[side] = encode()
            times[side].append((time.process_time() - before) * 1e9 / w.numel())
    weight = torch.ones(COLUMNS) if importance is None else importance
    error = {}
    for side, raw in bytes_.items():
        back = torch.from_numpy(gguf.quants.dequantize(raw.reshape(ROWS, -1), kind))
        error[side] = float(((back - w).square() * weight).sum())
    return {
        "type": codec.name,
        "importance": importance is not None,
        "error": round(error["ours"] / error["ggml"], 3),
        "ours_ms": round(statistics.median(times["ours"]), 1),
        "ggml_ms": round(statistics.median(times["ggml"]), 1),
    }


if __name__ == "__main__":
    main()
