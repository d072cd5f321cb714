"""Discovery of plug-ins: a module in a folder is an entry as soon as it defines `ENTRIES`. There is no list to edit."""

import importlib
import pkgutil
from functools import cache
from typing import Any


@cache
def discover(package: str) -> dict[str, Any]:
    """Name -> entry for every module of `package` that defines `ENTRIES`, a tuple of objects with a `name`.

    Modules without it (`base` and shared code) are passed over. Raises ValueError when two entries share a name.
    """
    found: dict[str, Any] = {}
    for module_info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        module = importlib.import_module(f"{package}.{module_info.name}")
        for entry in vars(module).get("ENTRIES", ()):
            if entry.name in found:
                raise ValueError(f"{package}: two entries are named {entry.name!r}")
            found[entry.name] = entry
    return found
