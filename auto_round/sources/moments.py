"""Second moments of the inputs of a layer, gathered while it runs: what optimised rounding goes by."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

DOUBT = 3
"""Tokens per channel that make correlations half as good as known. 1 to 8 are alike on texts like the calibration's; on
others, 3 to 4 are a tenth better than 1 at two bits (decision 101)."""

RUN = 256
"""Channels whose sums with all that follow are one product of matrices."""


class Moments:
    """X'X of the inputs X (N, I) that were added: (I, I), or its diagonal (I,) when not `whole`."""

    def __init__(self, width: int, *, whole: bool, like: Tensor) -> None:
        """like: a tensor of the dtype and device that the sums are to have."""
        self._sum = like.new_zeros((width, width) if whole else (width,))
        self._tokens = 0
        self._settled = False

    def add(self, x: Tensor) -> None:
        """Add inputs `x` (N, I)."""
        assert not self._settled, "the sums have been looked at"
        self._tokens += len(x)
        with torch.autocast(x.device.type, enabled=False):
            if self._sum.ndim == 2:
                # From the diagonal on: the rest is the same mirrored, and is filled in when the sums are looked at.
                for rows in self._runs():
                    self._sum[rows, rows.start :].addmm_(x[:, rows].t(), x[:, rows.start :])
            else:
                self._sum.add_(x.square().sum(0))

    def divide(self, factors: Tensor) -> None:
        """Go on as if every channel of X had been divided by `factors` (I,)."""
        self._sum.div_(factors.outer(factors) if self._sum.ndim == 2 else factors.square())

    def shrunk(self) -> Tensor:
        """The sums, with what is beside the diagonal times N / (N + 3 I); nothing can be added afterwards.

        N tokens show correlations between I channels that are not there, the more the smaller N / I is, and rounding
        that relies on them is worse on other texts than plain rounding. Shrinking towards the diagonal is the
        remedy of Ledoit and Wolf (J. Multivariate Analysis 88, 2004), here with a weight that needs no second pass.
        """
        if not self._settled and self._sum.ndim == 2 and self._tokens:
            own = self._sum.diagonal().clone()
            weight = self._tokens / (self._tokens + DOUBT * len(own))
            for rows in self._runs():
                self._sum[rows.stop :, rows] = self._sum[rows, rows.stop :].t()
            self._sum.mul_(weight).diagonal().copy_(own)
        self._settled = True
        return self._sum

    def _runs(self) -> list[slice]:
        """The rows of the sums, some at a time."""
        width = len(self._sum)
        return [slice(start, min(start + RUN, width)) for start in range(0, width, RUN)]


def sharing(moments: Mapping[str, Moments]) -> list[tuple[str, ...]]:
    """The layers in sets with the very same inputs, and so the same moments, in order."""
    found: dict[int, list[str]] = {}
    for name, own in moments.items():
        found.setdefault(id(own), []).append(name)
    return [tuple(names) for names in found.values()]
