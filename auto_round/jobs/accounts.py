"""Accounts of a checkpoint in the making: what became of the source's tensors, and what was written where."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from auto_round.core.scheme import TensorSpec
from auto_round.models.shards import checksum


@dataclass(slots=True)
class Account:
    """What became of every tensor of the source."""

    copied: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Written:
    """What a process that only filled places has done. sums: layer -> tensor -> checksum."""

    sums: Mapping[str, dict[str, int]]
    digests: Mapping[str, tuple[TensorSpec, tuple[int, int], str]]
    copied: Collection[str]


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Names, dtypes, shapes and checksums."""
    return "; ".join(
        f"{name.rsplit('.', 1)[-1]} {tensor.dtype} {tuple(tensor.shape)} {checksum(tensor):x}"
        for name, tensor in sorted(tensors.items())
    )
