"""The only reader of environment variables. Each setting is typed, has a default and one line of explanation."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from auto_round.core.errors import PlanError

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


@dataclass(frozen=True, slots=True)
class Settings:
    """What the environment can change. Read anew at each call of `settings`, so tests may set variables."""

    log_level: str
    use_modelscope: bool
    cache_weights_share: float
    cxx: str
    kernel_cache: Path
    triton_interpret: bool
    cuda_devices: tuple[str, ...]


def settings() -> Settings:
    """Read the environment. Raises PlanError for a value that means nothing, naming the variable.

    AR_LOG_LEVEL (INFO): level of the `auto_round` logger used by the command line.
    AR_USE_MODELSCOPE (0): fetch models from ModelScope instead of the Hugging Face hub.
    AR_CACHE_WEIGHTS_SHARE (0.25): the torch backend keeps dequantized weights of a loaded model when they need at
        most this share of the free memory, else it dequantizes at each call.
    CXX (none): the C++ compiler for the CPU kernels, tried before c++, g++ and clang++.
    TRITON_INTERPRET (0): Triton's own; the backend triton:interpreter then runs on the CPU.
    CUDA_VISIBLE_DEVICES (all): CUDA's own; vLLM evaluates on as many cards as it names.
    AR_KERNEL_CACHE (~/.cache/auto_round): where compiled CPU kernels are kept.
    """
    return Settings(
        log_level=_level("AR_LOG_LEVEL", "INFO"),
        # Only words that mean yes: AR_USE_MODELSCOPE=0 must not be true for being set.
        use_modelscope=os.environ.get("AR_USE_MODELSCOPE", "0").casefold() in ("1", "true", "yes"),
        cache_weights_share=_share("AR_CACHE_WEIGHTS_SHARE", "0.25"),
        cxx=os.environ.get("CXX", ""),
        kernel_cache=Path(os.environ.get("AR_KERNEL_CACHE", "~/.cache/auto_round")).expanduser(),
        triton_interpret=os.environ.get("TRITON_INTERPRET", "0") == "1",
        cuda_devices=tuple(part for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part),
    )


def show_cuda_devices(names: Iterable[str]) -> None:
    """Let this process and its children see only these cards: libraries that start workers look nowhere else."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names)


def _level(name: str, default: str) -> str:
    level = os.environ.get(name, default).strip().upper()
    if level not in LEVELS:
        raise PlanError(f"environment variable {name}={level!r}: use one of {', '.join(LEVELS)}")
    return level


def _share(name: str, default: str) -> float:
    text = os.environ.get(name, default)
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    # Also not NaN, which compares false with everything and would switch the cache off without a word.
    if not 0 <= share <= 1:
        raise PlanError(f"environment variable {name}={text!r}: use a number from 0 to 1")
    return share
