"""Every backend that runs here against the definition of the integers: relative errors on a grid of layers.

    python benchmarks/agreement.py --also ENV/lib/python3.11/site-packages ...    # writes agreement.md
    TRITON_INTERPRET=1 python benchmarks/agreement.py --only triton:interpreter

The grid: bits x group size x symmetric or not x packing x dtype x shape x bias x rows of input. A product is compared
with the one in float64 of what the codes stand for; its error is the norm of the difference over the norm of the
product. What the compute dtype explains is `explained`; no backend may be above it, "cpu:int8" apart, whose inputs
have 8 bits on purpose. `--also` names folders of further packages (auto-round-lib, mlx, gptqmodel).
"""

import argparse
import itertools
import json
import sys
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from decode import processor

HERE = Path(__file__).parent
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BITS = (2, 3, 4, 8)
GROUPS = (32, 64, 128, -1)
PACKINGS = ("auto_round:auto_gptq", "auto_round:gptqmodel", "auto_round:auto_awq")
SHAPES = ((96, 256), (64, 384), (992, 2048))
ROWS = (1, 8, 64, 400)
INTERPRETED = ((96, 256), 8)
"""Shape and most rows of input for Triton's interpreter, which runs a program per tile in Python."""


class Point(NamedTuple):
    """One layer of the grid."""

    bits: int
    group: int
    sym: bool
    packing: str
    dtype: torch.dtype
    shape: tuple[int, int]
    bias: bool


def explained(dtype, columns):
    """What rounding alone may do: weight and result to `dtype`, and a float32 sum of `columns` terms."""
    unit = torch.finfo(dtype).eps / 2
    summing = columns**0.5 * torch.finfo(torch.float32).eps / 2
    return summing + (2 * unit if dtype != torch.float32 else 4 * unit)


def grid(name):
    """The points that backend `name` is asked for."""
    axes = (BITS, GROUPS, (True, False), PACKINGS, DTYPES, SHAPES, (False, True))
    for point in itertools.starmap(Point, itertools.product(*axes)):
        if "interpreter" in name and point.shape != INTERPRETED[0]:
            continue
        yield point


def site_of(point):
    """The layer as a loader meets it."""
    from auto_round.backends.base import Site
    from auto_round.core.scheme import TensorSpec
    from auto_round.formats.base import format_named

    return Site(
        name="layer", format=format_named(point.packing),
        spec=TensorSpec(bits=point.bits, group=point.group, sym=point.sym),
        shape=point.shape, device="cpu", dtype=point.dtype, bias=point.dtype if point.bias else None,
    )  # fmt: skip


@lru_cache(maxsize=len(SHAPES))
def quantized(spec, shape):
    """A random matrix of codes, and what they stand for in float64."""
    from auto_round.codecs.base import codec_of

    codec = codec_of(spec)
    q = codec.quantize(torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.1, spec)
    return q, codec.dequantize(q).double()


def errors(backend, site, rows_of):
    """Rows of input -> relative error, of one layer."""
    q, weight = quantized(site.spec, site.shape)
    noise = torch.Generator().manual_seed(1)
    module = backend.build(site)
    for key, tensor in site.format.write(q).items():
        module._buffers[key] = tensor
    if site.bias is not None:
        module._buffers["bias"] = torch.randn(site.shape[0], generator=noise).to(site.bias)
    backend.finish(module, cache=True)
    for rows in rows_of:
        x = torch.randn(rows, site.shape[1], generator=noise)
        x[:, ::17] *= 20  # a few large channels, as activations have them
        x = x.to(site.dtype)
        want = torch.nn.functional.linear(
            x.double(), weight, None if site.bias is None else module.bias.double()
        )
        yield rows, float((module(x).double() - want).norm() / want.norm())


def measured(name, backend):
    """(point, rows, error) of everything that `backend` takes here."""
    for point in grid(name):
        site = site_of(point)
        if site.format.reject(_scheme(site), site.shape) or backend.reject(site):
            continue
        most = INTERPRETED[1] if "interpreter" in name else max(ROWS)
        for rows, error in errors(backend, site, [r for r in ROWS if r <= most]):
            yield point, rows, error


def _scheme(site):
    from auto_round.core.scheme import Scheme

    return Scheme(weight=site.spec)


def cells(name, rows):
    """A row of the report per dtype and bits of a backend."""
    found = defaultdict(list)
    for point, count, error in rows:
        found[point.dtype, point.bits].append(
            (error / explained(point.dtype, point.shape[1]), error, point, count)
        )
    for (dtype, bits), all_ in found.items():
        share, error, point, count = max(all_, key=lambda cell: cell[0])
        size, signs = " x ".join(map(str, point.shape)), "sym" if point.sym else "asym"
        where = (
            f"{point.packing.removeprefix('auto_round:')}, {signs}, group {point.group}, {size}, {count} rows"
        )
        kind = str(dtype).removeprefix("torch.")
        yield {"processor": processor(), "backend": name, "dtype": kind, "bits": bits, "products": len(all_),
               "error": float(f"{error:.2g}"), "share": round(share, 2), "where": where}  # fmt: skip


def report(rows, absent):
    """The page."""
    head = (
        "# Agreement of the backends\n\n"
        "Written by `agreement.py`, whose head says what is compared, from `results/agreement.jsonl`:\n"
        f"{sum(row['products'] for row in rows)} products on {rows[0]['processor']}, torch {torch.__version__}.\n"
        "The last but one column is the largest error over what rounding to the dtype explains: weights and\n"
        "result rounded once, sums in float32. `cpu:int8` rounds inputs to 8 bits, on request only; the others\n"
        "have to stay at or below 1.\n\n"
        "| backend | dtype | bits | products | largest error | of what is explained | where |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    keys = ("backend", "dtype", "bits", "products", "error", "share", "where")
    lines = "".join(f"| {' | '.join(str(row[key]) for key in keys)} |\n" for row in rows)
    missing = "".join(f"- `{name}`: {reason}\n" for name, reason in absent.items())
    return f"{head}{lines}\nNot run on this machine:\n\n{missing}"


def main():
    """Measure and write the page; end with 1 if a backend is above what is explained."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--also", nargs="+", type=Path, default=[], help="folders with further packages")
    parser.add_argument("--only", nargs="+", help="backends by name; rows of the others stay")
    parser.add_argument("--rows", type=Path, default=HERE / "results/agreement.jsonl")
    parser.add_argument("--out", type=Path, default=HERE / "agreement.md")
    given = parser.parse_args()
    sys.path.extend(map(str, given.also))
    torch.set_num_threads(1)
    torch._dynamo.config.disable = (
        True  # GPTQModel compiles each layer, which takes seconds and changes no digit
    )
    from auto_round.backends.base import backends

    lines = given.rows.read_text().splitlines() if given.rows.exists() else []
    rows = [row for row in map(json.loads, lines) if given.only and row["backend"] not in given.only]
    done, found, absent = {row["backend"] for row in rows}, {}, {}
    for name, backend in backends().items():
        if name in done:
            continue
        devices = {device for limits in backend.limits for device in limits.devices}
        reason = backend.missing() or ("" if "cpu" in devices else f"runs on {', '.join(sorted(devices))}")
        reason = reason or backend.prepare()
        if reason or (given.only and name not in given.only):
            absent[name] = reason or "not asked for"
            continue
        with torch.inference_mode():
            found[name] = list(measured(name, backend))
        rows += cells(name, found[name])
        given.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(name, len(found[name]), "products", flush=True)
    given.out.write_text(report(rows, absent))
    above = [
        (name, point, rows, error)
        for name, all_ in found.items()
        for point, rows, error in all_
        if name != "cpu:int8" and error > explained(point.dtype, point.shape[1])
    ]
    print(*above[:20], f"{len(above)} products above what is explained", sep="\n")
    sys.exit(bool(above))


if __name__ == "__main__":
    main()
