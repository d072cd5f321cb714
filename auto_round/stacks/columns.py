"""Column after column of a stack of layers: rounding in turn, and the normal equations of its scales.

Compiled (columns.c) where there is a compiler and the stack is in main memory; the torch code is its twin and its
specification. The two differ by the order of sums, and where a weight lies in the middle between two codes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from auto_round.core.native import address, in_threads, library
from auto_round.core.ruler import Ruler
from auto_round.stacks.stack import Stack

SOURCE = Path(__file__).with_name("columns.c")
TILE = 64  # rows that the C code works on side by side
PART = 64  # columns that the torch code takes from the sums of one product of matrices
VALUES = 1 << 24  # of the products that the torch code has in memory at once
INTEGERS = -1  # in the place of an element's bits of mantissa


def in_turn(stack: Stack, order: Tensor, takes: Tensor, start: Tensor | None = None) -> Tensor:
    """What each weight is when it is its turn to be rounded, (R, I); columns go in `order` (I,).

    With j and i places in that order, column j is w_j + sum_i takes[j, i] (w_i - what column i is rounded to), w as it
    was. start: what all are rounded to before their turn; the diagonal of `takes` (I, I) is then 0. Without it, none is
    rounded before, and nothing of `takes` from the diagonal on is looked at.
    """
    ruler = stack.ruler() if _served(stack) else None
    if ruler is not None:
        return _compiled_turns(stack, ruler, order, takes, start)
    grids, places = stack.columns(), (order // stack.size).tolist()
    # Columns as rows of memory, since they are worked on one at a time.
    weight = stack.weight.t()[order]
    errors = torch.zeros_like(weight) if start is None else weight - start.t()[order]
    wanted = torch.empty_like(weight)
    for first in range(0, len(order), PART):
        end = min(first + PART, len(order))
        known = first if start is None else len(order)
        # Once per part: a matrix product in place of many passes over all errors.
        sums = weight[first:end] + takes[first:end, :known] @ errors[:known]
        moves = torch.empty_like(sums)
        for j in range(first, end):
            torch.addmv(sums[j - first], moves[: j - first].t(), takes[j, first:j], out=wanted[j])
            now = weight[j] - stack.snap(wanted[j], grids[places[j]])
            moves[j - first], errors[j] = now - errors[j], now
    return wanted[order.argsort()].t()


@dataclass(frozen=True, slots=True)
class Part:
    """What of fake weights is in proportion to one parameter.

    values: (R, I / span), each for `span` columns side by side. gram: (I, I / span), with such columns added up.
    """

    values: Tensor
    gram: Tensor
    span: int


def parts_of(stack: Stack) -> dict[str, Part]:
    """The parts of the stack's fake weight by the parameter they are in proportion to."""
    found = {}
    for key, values in stack.parts(stack.fake).items():
        # Where it is the same throughout a group, sums over the group's columns are all that matters.
        span = 1 if values.shape[1] == len(stack.gram) else stack.size
        found[key] = Part(values, stack.gram if span == 1 else _by_group(stack.gram, span), span)
    return found


def normal_equations(stack: Stack, parts: Sequence[Part], chosen: slice) -> tuple[Tensor, Tensor]:
    """F gram F' (R, U, U) and F gram d' (R, U) of the `chosen` rows: half of curvature and slope of their loss.

    d is the error of a row, and F_u that of `parts` which is in proportion to unknown u: there is one for every part
    and group or, where groups share their parameters, for these together; those of a part are neighbours.
    """
    error = stack.fake[chosen] - stack.weight[chosen]
    if _served(stack):
        return _compiled_equations(stack, error, parts, chosen)
    size, columns = stack.size * stack.shared, len(stack.gram)
    count = -(-columns // size)
    whole = [part.values[chosen].repeat_interleave(part.span, 1)[:, :columns] for part in parts]
    systems, slopes = [], []
    for rows in torch.arange(len(error)).split(max(1, VALUES // (count * len(parts) * columns))):
        # F_u gram: F_u has values in one group alone, so the rows of gram of that group are all it meets.
        seen = error.new_empty(len(rows), count * len(parts), columns)
        for i, part in enumerate(parts):
            for g in range(count):
                here = slice(g * size // part.span, (g + 1) * size // part.span)
                seen[:, i * count + g] = part.values[chosen][rows, here] @ part.gram[:, here].t()
        systems.append(torch.cat([_by_group(seen * own[rows].unsqueeze(1), size) for own in whole], 2))
        slopes.append((seen @ error[rows].unsqueeze(-1)).squeeze(-1))
    return torch.cat(systems), torch.cat(slopes)


def _by_group(values: Tensor, size: int) -> Tensor:
    """Sums of `values` (..., I) over groups of `size` columns, of which the last may be shorter; (..., G)."""
    short = -values.shape[-1] % size
    padded = torch.nn.functional.pad(values, (0, short)) if short else values
    return padded.reshape(*padded.shape[:-1], -1, size).sum(-1)


def _served(stack: Stack) -> bool:
    """Whether the C code can do this stack's work."""
    return stack.weight.device.type == "cpu" and len(stack.weight) > 0 and library(SOURCE) is not None


def _compiled_turns(stack: Stack, ruler: Ruler, order: Tensor, takes: Tensor, start: Tensor | None) -> Tensor:
    functions = library(SOURCE)
    assert functions is not None
    rows, columns = stack.weight.shape
    # A tile more than there are rows: the last tile of a thread reads beyond its own, whatever it finds.
    numbers = (ruler.step, ruler.low, ruler.least, ruler.most)
    lines = [_lines(value, rows) for value in numbers]
    element = ruler.element
    kind = (INTEGERS, 0, 0) if element is None else (element.mantissa, element.least, element.exponent)
    weight, takes = _plain(stack.weight), _plain(takes)
    start = None if start is None else _plain(start)
    places, wanted = order // stack.size, torch.empty(rows, columns, dtype=torch.float32)

    def run(part: slice) -> None:
        room = torch.empty(2 * columns * TILE, dtype=torch.float32)
        functions.in_turn(
            address(weight[part]),
            None if start is None else address(start[part]),
            *map(ctypes.c_ssize_t, (part.stop - part.start, columns)),
            *map(address, (order, takes, places, *lines)),
            *map(ctypes.c_ssize_t, (*(line.ndim == 2 for line in lines[1:]), part.start, lines[0].shape[1])),
            *map(ctypes.c_int, kind),
            address(room),
            address(wanted[part]),
        )

    in_threads(run, rows)
    return wanted


def _compiled_equations(
    stack: Stack, error: Tensor, parts: Sequence[Part], chosen: slice
) -> tuple[Tensor, Tensor]:
    functions, error = library(SOURCE), _plain(error)
    assert functions is not None
    (rows, columns), size = error.shape, stack.size * stack.shared
    unknowns = -(-columns // size) * len(parts)
    values, matrices = [_plain(part.values[chosen]) for part in parts], [_plain(part.gram) for part in parts]
    spans = (ctypes.c_ssize_t * len(parts))(*(part.span for part in parts))
    system = torch.empty(rows, unknowns, unknowns, dtype=torch.float32)
    slope = torch.empty(rows, unknowns, dtype=torch.float32)

    def run(part: slice) -> None:
        room = torch.empty(((len(values) + 1) * columns + unknowns) * TILE, dtype=torch.float32)
        functions.normal_equations(
            address(error[part]),
            _pointers([value[part] for value in values]),
            _pointers(matrices),
            spans,
            ctypes.c_int(len(values)),
            *map(ctypes.c_ssize_t, (part.stop - part.start, columns, size)),
            *map(address, (room, system[part], slope[part])),
        )

    in_threads(run, rows)
    return system, slope


def _plain(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous()


def _pointers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def _lines(value: Tensor | float, rows: int) -> Tensor:
    """A number for each group, (G, 1), as (groups of a row, R + TILE); one for all, as (TILE,)."""
    if not isinstance(value, Tensor):
        return torch.full((TILE,), value, dtype=torch.float32)
    return torch.nn.functional.pad(value.float().reshape(rows, -1).t(), (0, TILE)).contiguous()
