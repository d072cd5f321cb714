"""`AutoScheme`: schemes to choose from, layer by layer, and the bits per weight that they may take on average."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from auto_round.core.errors import PlanError, SchemeError
from auto_round.core.scheme import QuantizationScheme, Scheme
from auto_round.core.selection import PresetLookup

Wish = str | QuantizationScheme | Scheme | Mapping[str, object]


@dataclass(frozen=True)
class AutoScheme:
    """A budget of bits instead of a scheme: each layer gets the one of `options` that costs the predictions least.

    avg_bits: bits per weight over all layers that are quantized, with scales and zero points as they are stored.
    options: preset names ("W2A16G64,W4A16") or schemes; BF16 leaves a layer as it is.
    shared_layers: sets of names or patterns as in `layer_config`; in each block the layers of a set get one scheme.
    ignore_scale_zp_bits: count codes alone. nsamples, seqlen, dataset: what sensitivity is measured on, by default 16
    samples of 256 tokens of the job's own data. device_map, enable_torch_compile, low_gpu_mem_usage, low_cpu_mem_usage:
    as for the job. batch_size and method have one value each: gradients are taken sample by sample.
    """

    avg_bits: float
    options: Wish | Sequence[Wish]
    shared_layers: Iterable[Iterable[str]] | None = None
    method: str = "default"
    ignore_scale_zp_bits: bool = False
    batch_size: int | None = None
    nsamples: int | None = None
    seqlen: int | None = None
    dataset: Any = None
    device_map: Any = None
    enable_torch_compile: bool | None = None
    low_gpu_mem_usage: bool = True
    low_cpu_mem_usage: bool = True

    def __post_init__(self) -> None:
        if (
            isinstance(self.avg_bits, bool)
            or not isinstance(self.avg_bits, (int, float))
            or self.avg_bits <= 0
        ):
            raise PlanError(f"avg_bits must be a positive number, got {self.avg_bits!r}")
        if self.method != "default":
            raise PlanError(f"AutoScheme: method must be 'default', got {self.method!r}")
        if self.batch_size not in (None, 1):
            raise PlanError(
                f"AutoScheme: batch_size must be 1, got {self.batch_size!r}: gradients are taken sample by sample"
            )
        # Iterators would be empty the second time.
        object.__setattr__(self, "shared_layers", tuple(tuple(names) for names in self.shared_layers or ()))

    def schemes(self, preset: PresetLookup) -> dict[str, Scheme]:
        """Label -> scheme of every option, each once. Raises SchemeError or PlanError for what is none."""
        given = self.options
        words = re.split(r"[,\s]+", given.strip()) if isinstance(given, str) else given
        wishes = words if isinstance(words, Sequence) else [words]
        found: dict[str, Scheme] = {}
        for wish in wishes:
            label, scheme = _read(wish, preset)
            if scheme not in found.values():
                found[label] = scheme
        if not found:
            raise PlanError("AutoScheme: options is empty; give two schemes or more, such as W2A16G64,W4A16")
        return found


def _read(wish: Wish, preset: PresetLookup) -> tuple[str, Scheme]:
    if isinstance(wish, str):
        return wish.strip().upper(), preset(wish.strip().strip("\"'“”"))
    if isinstance(wish, Scheme):
        return str(wish), wish
    if isinstance(wish, QuantizationScheme):
        wish = {key: wish[key] for key in wish.keys()}  # noqa: SIM118 - it is no dict
    if not isinstance(wish, Mapping):
        raise SchemeError(f"AutoScheme: an option is a preset name or a scheme, got {wish!r}")
    scheme = Scheme.from_flat(wish)
    return str(scheme), scheme
