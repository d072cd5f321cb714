"""Fitting the grids of blocks of weights: one scale per block, with or without an offset, and two-level grids.

Everything is laid out (K, N): K values of one block down a column, N blocks side by side, so that sums over a block and
products with a number per block run along memory. No data type is named here; bounds come in as numbers.
The error throughout is sum(weight * (fake - x)^2) per block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

TINY = 1e-30  # a divisor for sums over blocks of zeros: 0 / TINY is 0, and no other sum is near it
CHUNK = 1 << 16  # values handled at once: what fits the second-level cache with its temporaries

Storage = Callable[[Tensor], Tensor]
"""Rounds a parameter to what the file can hold, as float32."""


def half(x: Tensor) -> Tensor:
    """`x` as float16 stores it."""
    return x.to(torch.float16).float()


@dataclass(slots=True)
class Moments:
    """What least squares need of the values `x` (K, N) and of levels `q` of the same shape, one number per block."""

    w: Tensor
    wx: Tensor
    wxx: Tensor
    wq: Tensor
    wqq: Tensor
    wqx: Tensor

    def error(self, scale: Tensor, low: Tensor | float) -> Tensor:
        """Error of scale * q + low."""
        # Expanded square of scale * q + low - x: six sums stand for all values, whatever the grid.
        return (
            self.wxx
            + scale * (scale * self.wqq - 2 * self.wqx)
            + low * (low * self.w + 2 * scale * self.wq - 2 * self.wx)
        )

    def best_scale(self, low: Tensor | float) -> Tensor:
        """The scale of least error for a given offset."""
        return (self.wqx - low * self.wq) / self.wqq.clamp(min=TINY)

    def line(self, highest: float | None) -> tuple[Tensor, Tensor]:
        """Scale and offset of least error; the offset is at most `highest` when that is given."""
        determinant = self.w * self.wqq - self.wq.square()
        # Equal levels throughout make it zero, up to the rounding of float32, about 1e-7 of either product.
        solvable = determinant > 1e-7 * self.w * self.wqq
        divisor = torch.where(solvable, determinant, torch.ones_like(determinant))
        scale = (self.w * self.wqx - self.wx * self.wq) / divisor
        low = (self.wqq * self.wx - self.wq * self.wqx) / divisor
        scale = torch.where(solvable, scale, torch.zeros_like(scale))
        low = torch.where(solvable, low, self.wx / self.w.clamp(min=TINY))  # one level for all: the mean
        if highest is not None:
            # The error is convex, so the best grid below the bound lies on it; only the scale is still free.
            capped = low > highest
            low = low.clamp(max=highest)
            scale = torch.where(capped, self.best_scale(highest), scale)
        return scale, low


class Blocks:
    """Values `x` (K, N) with weights of the same shape (or None), and buffers for levels."""

    def __init__(self, x: Tensor, weight: Tensor | None) -> None:
        self.x, self.weight = x, weight
        # Every call writes into these two: a sweep over ranges allocates nothing of the size of `x`.
        self._q, self._p = torch.empty_like(x), torch.empty_like(x)
        wx = x if weight is None else weight * x
        self._wx = wx
        count = torch.full((x.shape[1],), float(x.shape[0]), dtype=torch.float32, device=x.device)
        self.w = count if weight is None else weight.sum(0)
        self.wx, self.wxx = wx.sum(0), (wx * x).sum(0)

    def levels(self, scale: Tensor, low: Tensor | float, bounds: tuple[int, int]) -> Tensor:
        """The levels nearest to `x` on the grid scale * q + low. The tensor is reused by the next call."""
        # One division per block, not per value. Blocks of zeros have scale 0 and get level 0, not NaN.
        inverse = torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)
        if isinstance(low, Tensor):
            torch.sub(self.x, low, out=self._q).mul_(inverse)
        else:
            torch.mul(self.x, inverse, out=self._q)
        return self._q.round_().clamp_(*bounds)

    def moments(self, q: Tensor) -> Moments:
        """Sums over each block for the levels `q`."""
        wqx = torch.mul(q, self._wx, out=self._p).sum(0)
        if self.weight is None:
            wq, wqq = q.sum(0), torch.mul(q, q, out=self._p).sum(0)
        else:
            wq = torch.mul(q, self.weight, out=self._p).sum(0)
            wqq = self._p.mul_(q).sum(0)
        return Moments(self.w, self.wx, self.wxx, wq, wqq, wqx)

    def error(self, scale: Tensor, low: Tensor | float, bounds: tuple[int, int]) -> Tensor:
        """Exact error per block of the grid scale * q + low."""
        # From the values, not from moments: their difference of large sums would hide small errors.
        difference = self.levels(scale, low, bounds).mul_(scale).sub_(self.x)
        if isinstance(low, Tensor):
            difference.add_(low)
        squared = torch.mul(difference, difference, out=self._p)
        return (squared if self.weight is None else squared.mul_(self.weight)).sum(0)


def fit_line(
    blocks: Blocks, bounds: tuple[int, int], *, deltas: Iterable[float], highest: float | None, refits: int
) -> tuple[Tensor, Tensor]:
    """(scale, low), each (N,): the grid scale * q + low of least error, before any rounding to storage.

    deltas: the range of a block is spread over so many levels more or fewer than there are. refits: rounds of
    "levels from the grid, grid from the levels".
    """
    bottom, top = blocks.x.amin(0), blocks.x.amax(0)
    if highest is not None:
        bottom = bottom.clamp(max=highest)  # the file has no offset above it
    spread = (top - bottom).clamp(min=0)
    scale, low = spread / (bounds[1] - bounds[0]), bottom
    error = torch.full_like(scale, torch.inf)

    def offer(start: Tensor, offset: Tensor) -> None:
        nonlocal scale, low, error
        moments = blocks.moments(blocks.levels(start, offset, bounds))
        fitted, moved = moments.line(highest)
        # For the levels of `start`; the levels nearest to the fitted grid can only be better.
        found = moments.error(fitted, moved)
        better = found < error
        error = torch.where(better, found, error)
        scale, low = torch.where(better, fitted, scale), torch.where(better, moved, low)

    for delta in deltas:
        offer(spread / (bounds[1] - bounds[0] + delta), bottom)
    for _ in range(refits):
        offer(scale, low)
    return scale, low


def fit_scale(
    blocks: Blocks, bounds: tuple[int, int], *, deltas: Iterable[float], refits: int, both_signs: bool = True
) -> Tensor:
    """(N,): the scale of least error of the grid scale * q, before any rounding to storage."""
    high, low = blocks.x.amax(0), blocks.x.amin(0)
    # The value of largest magnitude, with its sign: the scale is negative when a positive one sits at a lower bound.
    extreme = torch.where(high > -low, high, low)
    scale, error = torch.zeros_like(extreme), torch.full_like(extreme, torch.inf)

    def offer(start: Tensor) -> None:
        nonlocal scale, error
        moments = blocks.moments(blocks.levels(start, 0.0, bounds))
        fitted = moments.best_scale(0.0)
        found = moments.error(fitted, 0.0)
        better = found < error
        error, scale = torch.where(better, found, error), torch.where(better, fitted, scale)

    for delta in deltas:
        # Signed levels reach one further down (-8 against 7): the extreme goes there first, then to the upper end.
        offer(extreme / (bounds[0] + delta))
        if both_signs:
            offer(extreme / (bounds[1] - delta))
    for _ in range(refits):
        offer(scale)
    return scale


@dataclass(frozen=True, slots=True)
class Ladder:
    """Bounds of a two-level grid: levels q, integer sub-scales and, where there are offsets, integer sub-offsets.

    fake = (d * s) * q - dmin * m; `blocks` sub-blocks share d and dmin, which are float16.
    """

    blocks: int
    levels: tuple[int, int]
    scales: tuple[int, int]
    offsets: tuple[int, int] | None


@dataclass(slots=True)
class TwoLevel:
    """A two-level grid. d, dmin: (B,); s, m: (N,) integers as float32, N = B * ladder.blocks."""

    d: Tensor
    dmin: Tensor
    s: Tensor
    m: Tensor
    ladder: Ladder

    def scale(self) -> Tensor:
        """(N,): step between levels."""
        return self.d.repeat_interleave(self.ladder.blocks) * self.s

    def low(self) -> Tensor | float:
        """(N,): where level 0 lies."""
        if self.ladder.offsets is None:
            return 0.0
        return -(self.dmin.repeat_interleave(self.ladder.blocks) * self.m)


def per_super(x: Tensor, ladder: Ladder) -> Tensor:
    """(N,) summed over the sub-blocks of each super-block: (B,)."""
    return x.view(-1, ladder.blocks).sum(1)


def _extreme(x: Tensor, bounds: tuple[int, int]) -> Tensor:
    """(B,): the super-scale at which the largest of each row of `x` (B, blocks) just fits `bounds`."""
    if bounds[0] < 0:
        high, low = x.amax(1), x.amin(1)
        return torch.where(high > -low, high, low) / bounds[0]
    return x.amax(1) / bounds[1]


def _codes(x: Tensor, step: Tensor, bounds: tuple[int, int]) -> Tensor:
    inverse = torch.where(step == 0, torch.zeros_like(step), 1 / step)
    return (x * inverse).round_().clamp_(*bounds)


def quantize_scales(moments: Moments, scale: Tensor, low: Tensor | float, ladder: Ladder) -> TwoLevel:
    """The two-level grid nearest to per-block grids (scale, low), by the error of the levels behind `moments`.

    A sweep over super-scales; sub-scales follow the offsets as rounded. Costs little: no value is looked at again.
    """
    shape = (-1, ladder.blocks)
    scales = scale.view(shape)
    # The largest sub-scale just fits; the sweep around it trades that one's error for the others'.
    widest = _extreme(scales, ladder.scales)
    offsets = None if ladder.offsets is None or not isinstance(low, Tensor) else -low.view(shape)
    lowest = None if offsets is None else _extreme(offsets, ladder.offsets or (0, 1))
    best: TwoLevel | None = None
    error = torch.full_like(widest, torch.inf)
    for dmin, m in _offset_candidates(offsets, lowest, ladder):
        below = 0.0 if m is None else -(dmin.unsqueeze(1) * m).reshape(-1)
        # The offsets have moved by rounding, and each block's best scale with them.
        wanted = moments.best_scale(below).view(shape)
        for factor in SUPER_FACTORS:
            d = half(widest * factor)  # as stored, before integers are made of it
            s = _codes(wanted, d.unsqueeze(1), ladder.scales)
            found = per_super(moments.error((d.unsqueeze(1) * s).reshape(-1), below), ladder)
            if best is None:
                best = TwoLevel(d, dmin, s, torch.zeros_like(s) if m is None else m, ladder)
                error = found
                continue
            better = found < error
            wide = better.unsqueeze(1)
            error = torch.where(better, found, error)
            best.d, best.dmin = torch.where(better, d, best.d), torch.where(better, dmin, best.dmin)
            best.s = torch.where(wide, s, best.s)
            if m is not None:
                best.m = torch.where(wide, m, best.m)
    assert best is not None, "there is at least one factor"
    best.s, best.m = best.s.reshape(-1), best.m.reshape(-1)
    return best


SUPER_FACTORS = (1.0, 0.86, 0.9, 0.94, 0.97, 1.03, 1.07)  # below 1 the largest sub-scales saturate


def _offset_candidates(
    offsets: Tensor | None, lowest: Tensor | None, ladder: Ladder
) -> Iterator[tuple[Tensor, Tensor | None]]:
    if offsets is None or lowest is None:
        yield torch.zeros(()), None  # dmin of a type without offsets is never read
        return
    assert ladder.offsets is not None, "offsets come with bounds"
    for factor in SUPER_FACTORS:
        dmin = half(lowest * factor)
        yield dmin, _codes(offsets, dmin.unsqueeze(1), ladder.offsets)


def refine(blocks: Blocks, grid: TwoLevel, *, rounds: int) -> TwoLevel:
    """`grid` improved on the exact error, in storage precision; never worse.

    In turn: neighbouring integers of sub-scale and sub-offset, block by block, then least squares of both super-scales.
    """
    ladder = grid.ladder
    error = blocks.error(grid.scale(), grid.low(), ladder.levels)
    for round_ in range(rounds):
        error = _neighbours(blocks, grid, error)
        if round_ + 1 < rounds or rounds == 1:
            error = _refit_super(blocks, grid, error)
    return grid


def _neighbours(blocks: Blocks, grid: TwoLevel, error: Tensor) -> Tensor:
    ladder = grid.ladder
    d, dmin = (x.repeat_interleave(ladder.blocks) for x in (grid.d, grid.dmin.expand_as(grid.d)))
    # All moves start from here, not from the best so far: each goes to a direct neighbour.
    s0, m0 = grid.s, grid.m
    moves = [(-1, 0), (1, 0)] if ladder.offsets is None else MOVES
    for ds, dm in moves:
        s = (s0 + ds).clamp(*ladder.scales)
        m = m0 if ladder.offsets is None else (m0 + dm).clamp(*ladder.offsets)
        low = 0.0 if ladder.offsets is None else -(dmin * m)
        found = blocks.error(d * s, low, ladder.levels)
        better = found < error
        error = torch.where(better, found, error)
        grid.s, grid.m = torch.where(better, s, grid.s), torch.where(better, m, grid.m)
    return error


MOVES = [(-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (1, 1), (-1, 1), (1, -1)]


def _refit_super(blocks: Blocks, grid: TwoLevel, error: Tensor) -> Tensor:
    """Least squares of (d, dmin) for the current integers; kept per super-block where the exact error falls."""
    ladder, moments = grid.ladder, blocks.moments(blocks.levels(grid.scale(), grid.low(), grid.ladder.levels))
    s, m = grid.s, grid.m
    # Normal equations of x ~ d * (s * q) + dmin * (-m), over all values of a super-block.
    dd, dx = per_super(s * s * moments.wqq, ladder), per_super(s * moments.wqx, ladder)
    if ladder.offsets is None:
        d, dmin = dx / dd.clamp(min=TINY), grid.dmin
    else:
        mm, mx = per_super(m * m * moments.w, ladder), -per_super(m * moments.wx, ladder)
        dm = -per_super(s * m * moments.wq, ladder)
        determinant = dd * mm - dm * dm
        solvable = determinant > 1e-6 * dd * mm
        divisor = torch.where(solvable, determinant, torch.ones_like(determinant))
        d = torch.where(solvable, (mm * dx - dm * mx) / divisor, dx / dd.clamp(min=TINY))
        # Not negative, as the sub-offsets are not: no block's level 0 lies above zero.
        dmin = torch.where(solvable, (dd * mx - dm * dx) / divisor, grid.dmin).clamp(min=0)
    # Rounding to float16 may undo what the fit gained, so it is measured afterwards.
    new = TwoLevel(half(d), half(dmin), s, m, ladder)
    found = blocks.error(new.scale(), new.low(), ladder.levels)
    better = per_super(found, ladder) < per_super(error, ladder)
    grid.d = torch.where(better, new.d, grid.d)
    grid.dmin = torch.where(better, new.dmin, grid.dmin)
    return torch.where(better.repeat_interleave(ladder.blocks), found, error)


def settled_scale(blocks: Blocks, scale: Tensor, bounds: tuple[int, int], *, rounds: int = 2) -> Tensor:
    """(N,): `scale` in float16, refitted there by least squares as long as the exact error falls."""
    scale = half(scale)
    error = blocks.error(scale, 0.0, bounds)
    for _ in range(rounds):
        fitted = half(blocks.moments(blocks.levels(scale, 0.0, bounds)).best_scale(0.0))
        found = blocks.error(fitted, 0.0, bounds)
        better = found < error
        error, scale = torch.where(better, found, error), torch.where(better, fitted, scale)
    return scale


def settled_line(
    blocks: Blocks, scale: Tensor, low: Tensor, bounds: tuple[int, int], *, rounds: int = 2
) -> tuple[Tensor, Tensor]:
    """(scale, low), each (N,), in float16: the offset first, then the scale that suits the offset as rounded."""
    scale, low = half(scale), half(low)
    error = blocks.error(scale, low, bounds)
    for _ in range(rounds):
        moments = blocks.moments(blocks.levels(scale, low, bounds))
        moved = half(moments.line(None)[1])
        fitted = half(moments.best_scale(moved))
        found = blocks.error(fitted, moved, bounds)
        better = found < error
        error = torch.where(better, found, error)
        scale, low = torch.where(better, fitted, scale), torch.where(better, moved, low)
    return scale, low
