"""`auto-round list format | scheme | backend | alg`: tables made from the registries."""

from __future__ import annotations

import re

import torch
from rich.console import Console, Group
from rich.table import Table

from auto_round.backends.base import AWQ, GPTQ, GPTQ_PLAIN, Backend, backends, has_device
from auto_round.codecs.base import presets
from auto_round.core.errors import PlanError, nearest
from auto_round.formats.base import formats
from auto_round.recipes import ALGORITHMS, BEFOREHAND, RECIPES, ROTATING

SHORT = {torch.float32: "FP32", torch.float16: "FP16", torch.bfloat16: "BF16"}
PACKING_WORDS = {
    **dict.fromkeys(GPTQ_PLAIN, "gptq"),
    **dict.fromkeys(GPTQ, "gptq_zp+-1"),
    **dict.fromkeys(AWQ, "awq"),
}
"""Formats, by the words of the user guide's backend table."""
PROBE = (4096, 4096)  # a layer shape that every format can divide


def show(what: str, console: Console) -> None:
    """Print the table of `what`. Raises PlanError with the nearest known word."""
    key = what.casefold().rstrip("s")  # "formats" will do
    tables = {
        "format": _formats,
        "scheme": _schemes,
        "backend": _backends,
        "alg": _algorithms,
        "algorithm": _algorithms,
        "recipe": _algorithms,
    }
    if key not in tables:
        raise PlanError(
            f"list {what!r}: unknown.{nearest(what, tables)} Known: format, scheme, backend, alg, recipe"
        )
    console.print(tables[key]())


def _formats() -> Group:
    """What each format holds; then what it refuses, with its reason."""
    held, refused = (
        Table("format", "schemes", title="checkpoint formats"),
        Table("format", "refuses", "because"),
    )
    for table in (held, refused):
        for column in table.columns:
            column.overflow = "fold"  # rich would cut long lists off
    for name, fmt in formats().items():
        reasons: dict[str, list[str]] = {}
        for scheme, value in presets().items():
            # Asked of the format itself, so the table cannot differ from what a job would be told.
            reasons.setdefault(_reason(fmt.reject(value, PROBE)), []).append(scheme)
        held.add_row(name, ", ".join(reasons.pop("", [])))
        for reason, schemes in reasons.items():
            # Two dozen names that always fall together.
            ours = [scheme for scheme in schemes if not scheme.startswith("GGUF:")]
            refused.add_row(name, ", ".join(ours + ["GGUF:*"] * (len(ours) < len(schemes))), reason)
    return Group(held, refused)


def _reason(refusal: str | None) -> str:
    """A refusal without the value that was refused, so that equal ones fall together; empty for none."""
    return re.sub(r",? got .*?(?=\. [A-Z]|$)", "", refusal or "")


def _schemes() -> Table:
    columns = ("scheme", "bits", "group size", "symmetric", "data type", "inputs", "formats")
    table = Table(*columns, title="schemes")
    for column in table.columns:
        column.overflow = "fold"
    names = {name: fmt for name, fmt in formats().items() if not name.startswith("gguf")}
    for name, scheme in presets().items():
        flat = scheme.to_flat()
        weights = (str(flat.get(key, "-")) for key in ("bits", "group_size", "sym", "data_type"))
        holders = ", ".join(n for n, fmt in names.items() if fmt.reject(scheme, PROBE) is None)
        table.add_row(name, *weights, "-" if scheme.act is None else str(scheme.act), holders)
    return table


def _backends() -> Group:
    """One row per kind of layer that a backend runs; then, per backend, whether it is usable here and why not."""
    columns = ("backend", "devices", "bits", "dtypes", "rank", "packing")
    limits = Table(*columns, title="inference backends, best first")
    here = Table("backend", "usable here", "also called", title="on this machine")
    for column in (*limits.columns, *here.columns):
        column.overflow = "fold"
    for name, backend in backends().items():
        for row in backend.limits:
            limits.add_row(
                name,
                "/".join(row.devices),
                ",".join(str(bits) for bits in row.bits),
                "/".join(SHORT.get(dtype, str(dtype)) for dtype in row.dtypes),
                str(backend.priority),
                "/".join(dict.fromkeys(PACKING_WORDS.get(packing, packing) for packing in row.packings)),
            )
        here.add_row(name, _here(backend), ", ".join(backend.aliases))
    return Group(limits, here)


def _here(backend: Backend) -> str:
    """ "yes", or what this machine lacks."""
    devices = dict.fromkeys(device for row in backend.limits for device in row.devices)
    if not any(has_device(device) for device in devices):
        return f"no: there is no {' or '.join(devices)} device"
    missing = backend.missing()
    return f"yes: {backend.summary}" if missing is None else f"no: {missing}"


def _algorithms() -> Table:
    table = Table("recipe", "iters", "nsamples", "seqlen", "batch size", "lr", "search", title="recipes")
    for name, r in RECIPES.items():
        rate = "1/iters" if r.lr is None else f"{r.lr:g}"
        table.add_row(
            name,
            str(r.iters),
            str(r.nsamples),
            str(r.seqlen),
            str(r.batch_size),
            rate,
            str(not r.disable_opt_rtn),
        )
    before = ", ".join((*BEFOREHAND, *ROTATING))
    table.caption = f"algorithms: {', '.join(ALGORITHMS)}; {before} may come before another one"
    return table
