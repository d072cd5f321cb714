"""Calibrated input ranges: before any other step looks at a block, its layers' inputs get their grids.

From then on the block quantizes them whenever it runs with other weights than its own, and the ranges go to the files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from auto_round.codecs.base import codec_of, stored_inputs
from auto_round.core.errors import DataError
from auto_round.core.plan import Plan
from auto_round.core.quantized import Knobs
from auto_round.sources.base import Block, Needs
from auto_round.steps.base import BlockReport, Step

Limits = tuple[Tensor, Tensor]


class InputRanges(Step):
    """Tells each block how the inputs of its layers are quantized.

    calibrated: some need a range from data. percentile: share of the inputs, in per cent, that a range has to hold.
    """

    def __init__(self, *, calibrated: bool, percentile: float = 100.0) -> None:
        self.percentile = percentile
        self.needs = self.requires = Needs.STATISTICS if calibrated else Needs.NOTHING

    def block(
        self, block: Block, plan: Plan, knobs: dict[str, Knobs], report: BlockReport
    ) -> dict[str, Knobs]:
        """`knobs` as they are."""
        acts = {name: plan[name].act for name in block.weights if name in plan}
        chosen = {name: act for name, act in acts.items() if act is not None}
        static = [name for name, act in chosen.items() if codec_of(act).needs_range(act)]
        limits = shared_limits(
            {name: block.input_limits(name, self.percentile) for name in static}, plan.fused
        )
        nothing = torch.zeros(())  # for inputs whose range is found at run time: it is not looked at
        stored = {
            name: stored_inputs(act, *limits.get(name, (nothing, nothing))) for name, act in chosen.items()
        }
        block.quantize_inputs({name: (act, stored[name]) for name, act in chosen.items()})
        return knobs


def needs_calibration(plan: Plan) -> bool:
    """Whether any layer of `plan` has inputs whose range comes from data."""
    acts = {scheme.act for scheme in plan.values() if scheme.act is not None}
    return any(codec_of(act).needs_range(act) for act in acts)


def shared_limits(found: dict[str, Limits | None], fused: Iterable[frozenset[str]]) -> dict[str, Limits]:
    """Limits of every layer: those of its fused set together; of its siblings where it saw no token itself.

    Siblings are layers of the same name but for numbers: the experts of a block. Raises DataError when none saw any.
    """
    limits = {name: own for name, own in found.items() if own is not None}
    for name in found.keys() - limits.keys():
        kind = _kind(name)
        siblings = [own for other, own in found.items() if own is not None and _kind(other) == kind]
        if not siblings:
            raise DataError(
                f"{name}: no calibration token reached it, so its inputs have no range. Use more or other samples, or "
                f"keep the layer in floating point with ignore_layers={name!r}"
            )
        limits[name] = _widest(siblings)
    for members in fused:
        # Servers multiply one input by the merged matrix, so its layers must have the same scale for it.
        together = [limits[name] for name in members if name in limits]
        limits.update(
            dict.fromkeys((name for name in members if name in limits), _widest(together)) if together else {}
        )
    return limits


def _kind(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def _widest(limits: list[Limits]) -> Limits:
    return torch.stack([low for low, _ in limits]).amin(), torch.stack([high for _, high in limits]).amax()
