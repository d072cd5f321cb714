"""`auto-round list format | scheme | backend | alg`: tables made from the registries."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from auto_round.backends.base import backends
from auto_round.codecs.base import presets
from auto_round.core.errors import PlanError, nearest
from auto_round.formats.base import formats
from auto_round.recipes import ALGORITHMS, RECIPES

PROBE = (4096, 4096)  # a layer shape that every format can divide


def show(what: str, console: Console) -> None:
    """Print the table of `what`. Raises PlanError with the nearest known word."""
    key = what.casefold().rstrip("s")
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


def _formats() -> Table:
    table = Table("format", "schemes", title="checkpoint formats")
    for name, fmt in formats().items():
        held = [scheme for scheme, value in presets().items() if fmt.reject(value, PROBE) is None]
        table.add_row(name, ", ".join(held))
    return table


def _schemes() -> Table:
    table = Table("scheme", "bits", "group size", "symmetric", "data type", title="schemes")
    for name, scheme in presets().items():
        flat = scheme.to_flat()
        table.add_row(name, *(str(flat.get(key, "-")) for key in ("bits", "group_size", "sym", "data_type")))
    return table


def _backends() -> Table:
    table = Table("backend", "aliases", "devices", "priority", "what it is", title="inference backends")
    for name, backend in backends().items():
        table.add_row(
            name,
            ", ".join(backend.aliases),
            ", ".join(backend.devices),
            str(backend.priority),
            backend.summary,
        )
    return table


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
    table.caption = f"algorithms: {', '.join(ALGORITHMS)}"
    return table
