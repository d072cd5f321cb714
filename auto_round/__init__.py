"""auto-round: weight quantization of language models by signed gradient descent on rounding (arXiv:2309.05516).

Names are resolved on first use, so that importing the package needs neither torch nor transformers.
"""

import importlib
from typing import Any

from auto_round.compat import register_paths
from auto_round.version import __version__

_WHERE = {
    "AutoRound": "auto_round.api",
    "AutoRoundAdam": "auto_round.compat",
    "AutoScheme": "auto_round.core.auto_scheme",
    "QuantizationScheme": "auto_round.core.scheme",
    "SignRoundConfig": "auto_round.compat",
    "AWQConfig": "auto_round.compat",
    "RTNConfig": "auto_round.compat",
    "RotationConfig": "auto_round.core.rotation",
    "SpinQuantConfig": "auto_round.core.rotation",
    "AutoRoundConfig": "transformers",
}

__all__ = ["__version__", *_WHERE]

register_paths()  # empty modules only; what is in them is looked up when used


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'auto_round' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
