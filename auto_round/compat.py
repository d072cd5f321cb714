"""Names that existing code imports: documented module paths and legacy classes. Two tables; no folders of shims."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from auto_round.options import Options


@dataclass(frozen=True, kw_only=True)
class SignRoundConfig:
    """Settings of SignRound for ``alg_configs``; None leaves a setting to the recipe."""

    iters: int | None = None
    lr: float | None = None
    minmax_lr: float | None = None
    momentum: float = 0.0
    enable_minmax_tuning: bool = True
    enable_quanted_input: bool = True
    gradient_accumulate_steps: int = 1
    not_use_best_mse: bool = False
    enable_adam: bool = False
    enable_alg_ext: bool = False
    enable_norm_bias_tuning: bool = False
    enable_lfq: bool = False
    nblocks: int = 1
    dynamic_max_gap: int = -1
    lr_scheduler: Any = None

    def merged(self, options: Options) -> Options:
        """`options` with these settings."""
        given = {key: value for key, value in vars(self).items() if value is not None}
        return replace(options, algorithm="sign_round", **given)


@dataclass(frozen=True, kw_only=True)
class RTNConfig:
    """Settings of round-to-nearest for ``alg_configs``."""

    disable_opt_rtn: bool | None = None

    def merged(self, options: Options) -> Options:
        """`options` with no tuning."""
        return replace(options, iters=0, algorithm="opt_rtn", disable_opt_rtn=self.disable_opt_rtn)


@dataclass(frozen=True, kw_only=True)
class AWQConfig:
    """Settings of AWQ for ``alg_configs``, which may have those of the rounding beside it."""

    duo_scaling: bool | str = True
    n_grid: int = 20

    def merged(self, options: Options) -> Options:
        """`options` with AWQ before the rounding they say, or before optimised rounding."""
        return replace(
            options,
            enable_awq=True,
            algorithm=options.algorithm or "opt_rtn",
            duo_scaling=self.duo_scaling,
            n_grid=self.n_grid,
        )


PATHS = {
    "auto_round.auto_scheme": {"AutoScheme": "auto_round.core.auto_scheme:AutoScheme"},
    "auto_round.schemes": {
        "QuantizationScheme": "auto_round.core.scheme:QuantizationScheme",
        "PRESET_SCHEMES": "auto_round.compat:preset_schemes()",
    },
    "auto_round.algorithms.quantization.sign_round.config": {
        "SignRoundConfig": "auto_round.compat:SignRoundConfig"
    },
    # The guide's path and upstream's.
    "auto_round.algorithms.quantization.awq.config": {"AWQConfig": "auto_round.compat:AWQConfig"},
    "auto_round.algorithms.transforms.awq.config": {"AWQConfig": "auto_round.compat:AWQConfig"},
    "auto_round.algorithms.transforms.spinquant": {
        "SpinQuantConfig": "auto_round.core.rotation:SpinQuantConfig"
    },
    "auto_round.algorithms.transforms.hadamard": {
        "RotationConfig": "auto_round.core.rotation:RotationConfig"
    },
    "auto_round.algorithms.quantization.rtn.config": {"RTNConfig": "auto_round.compat:RTNConfig"},
}
"""Documented module path -> name in it -> where the name lives; "()" means: the result of calling it."""


def preset_schemes() -> dict[str, Any]:
    """Preset name -> QuantizationScheme."""
    from auto_round.codecs.base import presets
    from auto_round.core.scheme import QuantizationScheme

    return {name: QuantizationScheme.from_dict(scheme.to_flat()) for name, scheme in presets().items()}


def AutoRoundAdam(model: Any, tokenizer: Any = None, **options: Any) -> Any:
    """`AutoRound` with ``enable_adam=True``."""
    from auto_round.api import AutoRound

    return AutoRound(model, tokenizer, **{**options, "enable_adam": True})


def register_paths() -> None:
    """Make the documented deep paths importable, parents included. Their names are looked up on first use."""
    for path, table in PATHS.items():
        _module(path).__getattr__ = _lookup(path, table)  # type: ignore[method-assign]  # PEP 562


def _lookup(path: str, table: dict[str, str]) -> Callable[[str], Any]:
    def find(name: str) -> Any:
        if name not in table:
            raise AttributeError(f"module {path!r} has no attribute {name!r}")
        module, _, attribute = table[name].partition(":")
        found = getattr(importlib.import_module(module), attribute.removesuffix("()"))
        return found() if attribute.endswith("()") else found

    return find


def _module(path: str) -> types.ModuleType:
    if path in sys.modules:
        return sys.modules[path]
    module = types.ModuleType(path, "A documented path; see auto_round.compat.")
    module.__path__ = []  # makes a package of it, so that paths below it import
    sys.modules[path] = module
    parent, _, last = path.rpartition(".")
    if parent != "auto_round":
        setattr(_module(parent), last, module)
    return module
