"""Rounding of whole rows in compiled code: the range of each group, and its codes, in one pass over memory each.

Every function returns None where it cannot serve (another device or dtype, no compiler, values that are not finite);
torch then does the same, bit for bit, in the codec that asked.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from auto_round.core.buffers import buffer
from auto_round.core.groups import group_rows, group_size, groups_per_row, split
from auto_round.core.minifloat import MiniFloat
from auto_round.core.native import EXACT, KINDS, address, library
from auto_round.core.scheme import Group

SOURCE = Path(__file__).with_name("rows.c")


def ranges(w: Tensor, group: Group) -> tuple[Tensor, Tensor] | None:
    """(least, most) of every group of `w` (O, I) and of zero, float32 (G, 1) each."""
    functions, w = _functions(w), _lines(w)
    if functions is None:
        return None
    # float32 by name: C takes addresses, and torch's default dtype is the caller's to set.
    low, high = (torch.empty(w.shape[0], _across(w, group), dtype=torch.float32) for _ in range(2))
    if functions.ranges(*_described(w, group), address(low), address(high)):
        return None
    low, high = low.clamp_(max=0), high.clamp_(min=0)
    return _per_group(low, w, group, torch.amin), _per_group(high, w, group, torch.amax)


def integers(w: Tensor, group: Group, scale: Tensor, zero: Tensor | float, top: int) -> Tensor | None:
    """clamp(round(w / scale) + zero, 0, top) of `w` (O, I), uint8 (G, K), padding included; scale, zero: (G, 1)."""
    functions, w = _functions(w), _lines(w)
    if functions is None:
        return None
    codes, scales = _codes(w, group), _per_row(scale, w, group)
    zeros = _per_row(zero, w, group) if isinstance(zero, Tensor) else None
    middle = ctypes.c_float(0.0 if isinstance(zero, Tensor) else zero)
    pointers = (address(scales), None if zeros is None else address(zeros))
    functions.integers(*_described(w, group), *pointers, middle, ctypes.c_float(top), address(codes))
    return _grouped(codes, w, group)


def elements(w: Tensor, group: Group, scale: Tensor, element: MiniFloat) -> Tensor | None:
    """The codes of the values of `element` nearest to w / scale, uint8 (G, K), padding included; scale: (G, 1)."""
    functions, w = _functions(w), _lines(w)
    if functions is None or not element.signed:
        return None
    codes, scales = _codes(w, group), _per_row(scale, w, group)
    largest = int(element.encode(torch.tensor([element.top], dtype=torch.float32)))
    kind = (element.mantissa, element.least, largest, 1 << (element.bits - 1))
    functions.elements(*_described(w, group), address(scales), *kind, address(codes))
    return _grouped(codes, w, group)


def _functions(w: Tensor) -> ctypes.CDLL | None:
    served = w.device.type == "cpu" and w.dtype in KINDS and w.numel() > 0
    return library(SOURCE, EXACT) if served else None


def _lines(w: Tensor) -> Tensor:
    """`w` with the values of a row side by side; some models store their matrices transposed."""
    w = w.detach()
    return w if w.stride(1) == 1 else w.contiguous()


def _described(w: Tensor, group: Group) -> tuple[object, ...]:
    """The arguments that describe `w`, cut along its rows as `group` says."""
    sizes = (*w.shape, w.stride(0), _run(w, group))
    return (address(w), KINDS[w.dtype], *map(ctypes.c_ssize_t, sizes))


def _shape(w: Tensor) -> tuple[int, int]:
    return w.shape[0], w.shape[1]


def _run(w: Tensor, group: Group) -> int:
    """Values of a row that lie in one group."""
    if isinstance(group, tuple):
        return min(group[1], w.shape[1])
    return w.shape[1] if group == 0 else group_size(_shape(w), group)


def _across(w: Tensor, group: Group) -> int:
    return groups_per_row(_shape(w), group)


def _deep(w: Tensor, group: Group) -> int:
    """Rows that a group reaches over."""
    if isinstance(group, tuple):
        return min(group[0], w.shape[0])
    return w.shape[0] if group == 0 else 1


def _per_group(values: Tensor, w: Tensor, group: Group, reduce: Callable[..., Tensor]) -> Tensor:
    """(O, groups in a row) to (G, 1): what the rows of a group say, put together."""
    deep = _deep(w, group)
    if deep > 1:
        # Rows that are missing to a whole block are zeros, which every range has.
        values = torch.nn.functional.pad(values, (0, 0, 0, -len(values) % deep))
        values = reduce(values.view(-1, deep, values.shape[1]), dim=1)
    return values.reshape(-1, 1)


def _per_row(values: Tensor, w: Tensor, group: Group) -> Tensor:
    """One value per group, or one for all, to float32 (O, groups in a row)."""
    rows, across, deep = group_rows(_shape(w), group), _across(w, group), _deep(w, group)
    every = values.detach().float().expand(rows * across, 1).reshape(rows, 1, across)
    return every.expand(rows, deep, across).reshape(-1, across)[: w.shape[0]].contiguous()


def _codes(w: Tensor, group: Group) -> Tensor:
    return buffer((w.shape[0], _across(w, group) * _run(w, group)), torch.uint8)


def _grouped(codes: Tensor, w: Tensor, group: Group) -> Tensor:
    """Codes of rows (O, padded I) as those of groups (G, K)."""
    if isinstance(group, tuple):
        return split(codes[:, : w.shape[1]], group)
    return codes.reshape(-1, group_size(_shape(w), group))
