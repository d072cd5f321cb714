"""Cutting a matrix into the groups that share a scale, and putting it together again.

`group` is -1 for one group per row, 0 for one group per tensor, K > 0 for runs of K values along a row, and (r, c) for
blocks of r rows and c columns. Rows and columns are zero-padded to whole groups. A group larger than the matrix is cut
to its size, as checkpoint readers expect.
"""

import torch
from torch import Tensor

from auto_round.core.errors import SchemeError
from auto_round.core.scheme import Group


def _block(shape: tuple[int, int], group: tuple[int, int]) -> tuple[int, int]:
    """Sides of a block, cut to the matrix. Raises SchemeError for sides below 1."""
    if len(group) != 2 or min(group) < 1:
        raise SchemeError(f"group size {group!r} is not possible: a block has two positive sides")
    return min(group[0], shape[0]), min(group[1], shape[1])  # DeepSeek's 128 x 128 on a matrix of 96 rows


def group_size(shape: tuple[int, int], group: Group) -> int:
    """Values per group, K, for a matrix of `shape` (O, I). Raises SchemeError for a size below -1."""
    if isinstance(group, tuple):
        rows, columns = _block(shape, group)
        return rows * columns
    if not isinstance(group, int) or group < -1:
        raise SchemeError(
            f"group size {group!r} is not possible: use a positive number, -1 (one per row), 0 (one per tensor) or a "
            "block of two numbers"
        )
    rows, columns = shape
    if group == 0:
        return rows * columns
    return columns if group == -1 or group > columns else group


def groups_per_row(shape: tuple[int, int], group: Group) -> int:
    """Groups in a row of a matrix of `shape` (O, I); 1 also when the whole tensor is one group."""
    if isinstance(group, tuple):
        return -(-shape[1] // _block(shape, group)[1])  # rounded up
    return 1 if group == 0 else -(-shape[1] // group_size(shape, group))


def group_rows(shape: tuple[int, int], group: Group) -> int:
    """Rows of groups in a matrix of `shape` (O, I): O, or 1 for the whole tensor, or O / r for blocks."""
    if isinstance(group, tuple):
        return -(-shape[0] // _block(shape, group)[0])
    return 1 if group == 0 else shape[0]


def group_count(shape: tuple[int, int], group: Group) -> int:
    """All groups, G, of a matrix of `shape` (O, I)."""
    return group_rows(shape, group) * groups_per_row(shape, group)


def split(w: Tensor, group: Group) -> Tensor:
    """Cut `w` (O, I) into its groups: (G, K), in row order; what is missing to whole groups is filled with zeros."""
    shape = (w.shape[0], w.shape[1])
    size = group_size(shape, group)
    if isinstance(group, tuple):
        rows, columns = _block(shape, group)
        # Zeros are in every group's range, so padding never widens one.
        w = torch.nn.functional.pad(w, (0, -shape[1] % columns, 0, -shape[0] % rows))
        # (rows of blocks, r, blocks in a row, c): the middle two change places, so that a block is contiguous.
        return w.reshape(w.shape[0] // rows, rows, -1, columns).transpose(1, 2).reshape(-1, size)
    if group != 0 and shape[1] % size:
        w = torch.nn.functional.pad(w, (0, -shape[1] % size))
    return w.reshape(-1, size)


def merge(groups: Tensor, shape: tuple[int, int], group: Group) -> Tensor:
    """The inverse of `split`: (G, K) back to `shape` (O, I), without the padding."""
    if isinstance(group, tuple):
        rows, columns = _block(shape, group)
        blocks = groups.reshape(-1, groups_per_row(shape, group), rows, columns).transpose(1, 2)
        # Padding was below and on the right.
        return blocks.flatten(2, 3).flatten(0, 1)[: shape[0], : shape[1]]
    if group == 0:
        return groups.reshape(shape)
    return groups.reshape(shape[0], -1)[:, : shape[1]]
