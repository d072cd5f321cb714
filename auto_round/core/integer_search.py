"""Searches for the integer grids of least error: a sweep over range factors, then refinement on a Gram matrix.

Compiled (integer_search.c) where there is a compiler; the torch functions here are its twin and its specification.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from auto_round.core.integer_grid import (
    LEAST_ZERO,
    SMALLEST_SCALE,
    Grid,
    codes_on,
    ends,
    spanning,
    stored,
    top,
)
from auto_round.core.layouts import middle
from auto_round.core.native import KINDS, address, in_threads, library
from auto_round.core.quantized import NEUTRAL
from auto_round.core.rounding import STORAGE
from auto_round.core.scheme import TensorSpec

KERNELS = Path(__file__).with_name("integer_search.c")
WIDEST, LANES = (
    256,
    8,
)  # values of a group that `refine` of the C file can take, and what their number divides by


def _spaced(low: float, high: float, count: int) -> list[float]:
    """Evenly spaced numbers from `low` to `high`, of float32 whatever the default dtype of the process."""
    numbers: list[float] = torch.linspace(low, high, count, dtype=torch.float32).tolist()
    return numbers


# Factors on the end of a symmetric range, 1/32 apart, and steps between the neighbours of the best of them.
WIDTHS, AROUND = _spaced(0.3, 1.3, 33), _spaced(-1 / 32, 1 / 32, 9)
# Factors on either end of an asymmetric range, then finer steps of each end in turn.
TABLE, FINER = _spaced(0.4, 1.1, 8), [0.05, 0.025, 0.0125]
REFITS = 3  # rounds of least squares for the codes that there are
GRAM_SWEEPS, SPAN = 2, 512  # passes over all columns, and how many have their gradients taken at once
RESCALED = _spaced(0.82, 1.18, 13)  # factors on the scale that are tried against the Gram matrix


class _Spec(ctypes.Structure):
    """`Spec` of the C file."""

    _fields_ = (
        ("top", ctypes.c_float),
        ("least", ctypes.c_float),
        ("least_zero", ctypes.c_float),
        ("sym", ctypes.c_int32),
        ("storage", ctypes.c_int32),
    )


def swept(groups: Tensor, weight: Tensor | None, spec: TensorSpec) -> Grid:
    """The grid of least squared error of `groups` (G, K), weighted by `weight` (G, K); never worse than plain rounding.

    A coarse sweep of range factors, a finer one around each group's best, then alternating least squares of the scale
    for fixed codes. The error is measured with the scale in storage dtype.
    """
    kernels = _kernels(groups)
    if kernels is None:
        best = _Best(groups, weight, spec)
        (_sweep_symmetric if spec.sym else _sweep_asymmetric)(best, *ends(groups, spec, NEUTRAL))
        best.refit()
        return Grid(best.scale, _zero(best.zero, spec))
    groups, weight = groups.contiguous(), None if weight is None else weight.contiguous()
    # float32 by name: C takes addresses, and torch's default dtype is the caller's to set.
    scale, zero = (torch.empty(len(groups), 1, dtype=torch.float32) for _ in range(2))
    steps = [_floats(WIDTHS), _floats(AROUND)] if spec.sym else [_floats(TABLE), _floats(FINER)]
    counted = [argument for array in steps for argument in (array, len(array))]

    def run(part: slice) -> None:
        kernels.sweep(
            address(groups[part]), None if weight is None else address(weight[part]),
            *map(ctypes.c_ssize_t, groups[part].shape), ctypes.byref(_described(spec)), *counted, REFITS,
            address(scale[part]), address(zero[part]),
        )  # fmt: skip

    in_threads(run, len(groups))
    return Grid(scale, _zero(zero, spec))


def refined(grid: Grid, groups: Tensor, shape: tuple[int, int], gram: Tensor, spec: TensorSpec) -> Grid:
    """`grid` after coordinate descent of its scales on tr(D gram D'), D = fake - w, a column of groups after the other.

    All rows move at once; each takes the candidate that lowers its output error given the errors of its other groups.
    """
    rows, size, columns = shape[0], groups.shape[1], groups.shape[0] // shape[0]
    gram = torch.nn.functional.pad(gram, (0, columns * size - shape[1], 0, columns * size - shape[1]))
    # By column of groups: each is then one piece of memory.
    weights = groups.reshape(rows, columns, size).transpose(0, 1).contiguous()
    scales = grid.scale.reshape(rows, columns, 1).transpose(0, 1).contiguous()
    zeros = torch.as_tensor(grid.zero, dtype=scales.dtype).expand_as(grid.scale)
    zeros = zeros.reshape(rows, columns, 1).transpose(0, 1).contiguous()
    error = torch.cat([_error(w, Grid(s, z), spec) for w, s, z in zip(weights, scales, zeros)], 1)
    descend, together = _descent(groups), max(1, SPAN // size)
    for first in [*range(0, columns, together)] * GRAM_SWEEPS:
        last = min(first + together, columns)
        span = gram[:, first * size : last * size]
        slope = (
            error @ span
        )  # half the gradient; one wide product, as many narrow ones take several times longer
        for j in range(first, last):
            here, own = slice(j * size, (j + 1) * size), slice((j - first) * size, (j - first + 1) * size)
            before, inner = error[:, here].contiguous(), span[here, own].contiguous()
            # What the other groups of each row contribute; they stay while this one moves.
            outside = slope[:, own] - before @ inner
            scales[j], error[:, here] = descend(
                weights[j], inner, outside, Grid(scales[j], zeros[j]), before.clone(), spec
            )
            slope[:, own.stop :] += (error[:, here] - before) @ span[here, own.stop :]
    return Grid(scales.transpose(0, 1).reshape(-1, 1), grid.zero)


Descent = Callable[[Tensor, Tensor, Tensor, Grid, Tensor, TensorSpec], tuple[Tensor, Tensor]]
"""(w (R, K), own (K, K), outside (R, K), grid (R, 1), error (R, K), spec) -> better scale (R, 1) and its error."""


def _descent(groups: Tensor) -> Descent:
    """What finds the scales of one column of groups."""
    kernels = _kernels(groups) if groups.shape[1] <= WIDEST and groups.shape[1] % LANES == 0 else None
    if kernels is None:
        return _descended

    def compiled(
        w: Tensor, own: Tensor, outside: Tensor, grid: Grid, error: Tensor, spec: TensorSpec
    ) -> tuple[Tensor, Tensor]:
        zero = torch.as_tensor(grid.zero)

        def run(part: slice) -> None:
            kernels.refine(
                address(w[part]), address(own), address(outside[part]),
                *map(ctypes.c_ssize_t, w[part].shape), ctypes.byref(_described(spec)), _floats(RESCALED),
                len(RESCALED), address(zero[part]), address(grid.scale[part]), address(error[part]),
            )  # fmt: skip

        in_threads(run, len(w))
        return grid.scale, error

    return compiled


def _kernels(groups: Tensor) -> ctypes.CDLL | None:
    """The compiled functions, for float32 in main memory."""
    return library(KERNELS) if groups.device.type == "cpu" and groups.dtype == torch.float32 else None


def _described(spec: TensorSpec) -> _Spec:
    return _Spec(
        top(spec), SMALLEST_SCALE[spec.scale_dtype], LEAST_ZERO, spec.sym, KINDS[STORAGE[spec.scale_dtype]]
    )


def _floats(values: list[float]) -> ctypes.Array[ctypes.c_float]:
    return (ctypes.c_float * len(values))(*values)


def _zero(zero: Tensor, spec: TensorSpec) -> Tensor | float:
    return float(middle(spec)) if spec.sym else zero


class _Best:
    """The best grid of each group so far."""

    def __init__(self, groups: Tensor, weight: Tensor | None, spec: TensorSpec) -> None:
        self.groups, self.weight, self.spec = groups, weight, spec
        # Infinite, so that the first offer is taken everywhere.
        self.error = groups.new_full((groups.shape[0], 1), torch.inf)
        self.scale = torch.zeros_like(self.error)
        self.zero = torch.zeros_like(self.error)
        self.factors = [torch.ones_like(self.error), torch.ones_like(self.error)]

    def offer(self, grid: Grid, *factors: Tensor | float) -> None:
        """Keep `grid` in the groups where it has less error than the best; `factors` are remembered along with it."""
        level = codes_on(self.groups, grid, self.spec, None).sub_(grid.zero)
        difference = level.mul_(grid.scale).sub_(self.groups).square_()
        if self.weight is not None:
            difference.mul_(self.weight)
        error = difference.sum(1, keepdim=True)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, grid.scale, self.scale)
        self.zero = torch.where(better, torch.as_tensor(grid.zero, dtype=error.dtype), self.zero)
        for i, factor in enumerate(factors):
            self.factors[i] = torch.where(better, torch.as_tensor(factor, dtype=error.dtype), self.factors[i])

    def refit(self) -> None:
        """Least-squares scale for the current codes, rounded to storage, kept where it helps; a few times over."""
        weight = torch.ones_like(self.groups) if self.weight is None else self.weight
        for _ in range(REFITS):
            zero = float(middle(self.spec)) if self.spec.sym else self.zero
            level = codes_on(self.groups, Grid(self.scale, zero), self.spec, None).sub_(zero)
            power = (weight * level.square()).sum(1, keepdim=True)
            scale = (weight * level * self.groups).sum(1, keepdim=True) / power.clamp(min=1e-30)
            # Where every code is the zero point, any scale fits as well: the old one stays.
            usable = (power > 0) & (scale != 0)
            self.offer(Grid(stored(torch.where(usable, scale, self.scale), self.spec), zero))


def _sweep_symmetric(best: _Best, low: Tensor, high: Tensor) -> None:
    """Shrunken and widened ranges from either end: a scale of the other sign holds the other side better."""
    magnitude = torch.maximum(-low, high)
    positive = high >= -low  # a tie goes to the high end, as in `spanning`
    own = torch.where(positive, magnitude, -magnitude)
    best.offer(spanning(low, high, best.spec), 1.0)  # plain rounding, so that a search is never worse
    for sign in (1.0, -1.0):
        for factor in WIDTHS:
            extreme = own * (sign * factor)
            best.offer(spanning(extreme.clamp(max=0), extreme.clamp(min=0), best.spec), sign * factor)
    center = best.factors[0]  # one for each group
    for shift in AROUND:
        extreme = own * (center + shift)
        best.offer(spanning(extreme.clamp(max=0), extreme.clamp(min=0), best.spec), center + shift)


def _sweep_asymmetric(best: _Best, low: Tensor, high: Tensor) -> None:
    """Both ends shrunk independently: a coarse table, then finer steps of each end in turn."""
    best.offer(spanning(low, high, best.spec), 1.0, 1.0)  # plain rounding first
    for a in TABLE:
        for b in TABLE:
            best.offer(spanning(low * a, high * b, best.spec), a, b)
    for step in FINER:
        for moves in ((-step, 0.0), (step, 0.0), (0.0, -step), (0.0, step)):
            left, right = best.factors[0] + moves[0], best.factors[1] + moves[1]
            best.offer(spanning(low * left, high * right, best.spec), left, right)


def _error(groups: Tensor, grid: Grid, spec: TensorSpec) -> Tensor:
    """fake - w of grouped weights."""
    return (codes_on(groups, grid, spec, None) - grid.zero) * grid.scale - groups


def _descended(
    w: Tensor, own: Tensor, outside: Tensor, grid: Grid, error: Tensor, spec: TensorSpec
) -> tuple[Tensor, Tensor]:
    """The scales (R, 1) of least output error of one column of groups, and the errors (R, K) that they leave."""

    def cost(difference: Tensor) -> Tensor:
        return ((difference @ own + 2 * outside) * difference).sum(1, keepdim=True)

    scale, lowest = grid.scale, cost(error)
    level = (error + w) / scale  # the codes less their zero point, as floats
    power = ((level @ own) * level).sum(1, keepdim=True).clamp(min=1e-30)
    fitted = (((w @ own) - outside) * level).sum(1, keepdim=True) / power
    for candidate in (fitted, *(grid.scale * factor for factor in RESCALED)):
        # A fitted scale of zero or of the other sign would turn all codes around: the old one stands in for it.
        usable = stored(torch.where(candidate * grid.scale > 0, candidate, grid.scale), spec)
        difference = _error(w, Grid(usable, grid.zero), spec)
        total = cost(difference)
        better = total < lowest
        lowest = torch.where(better, total, lowest)
        scale = torch.where(better, usable, scale)
        error = torch.where(better, difference, error)
    return scale, error
