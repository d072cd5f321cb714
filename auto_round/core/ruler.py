"""What values a data type can have on a given grid, in numbers: all that compiled loops need to know of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from auto_round.core.minifloat import MiniFloat


@dataclass(frozen=True, slots=True)
class Ruler:
    """The values that groups can have, as low + step * level, levels from least to most.

    Levels are the integers between, or those values of `element`. A tensor has an entry for every group.
    """

    step: Tensor
    least: Tensor | float
    most: Tensor | float
    low: Tensor | float = 0.0
    element: MiniFloat | None = None
