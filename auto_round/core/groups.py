"""Cutting a matrix into the groups that share a scale, and putting it together again.

`group` is -1 for one group per row, 0 for one group per tensor, and K > 0 for runs of K values along a row; rows are
zero-padded to a multiple of K. A K larger than the row means one group per row, as checkpoint readers expect.
"""

import torch
from torch import Tensor

from auto_round.core.errors import SchemeError


def group_size(shape: tuple[int, int], group: int) -> int:
    """Values per group, K, for a matrix of `shape` (O, I). Raises SchemeError for a size below -1."""
    if not isinstance(group, int) or group < -1:
        raise SchemeError(
            f"group size {group!r} is not possible: use a positive number, -1 (one per row) or 0 (one per tensor)"
        )
    rows, columns = shape
    if group == 0:
        return rows * columns
    return columns if group == -1 or group > columns else group


def groups_per_row(shape: tuple[int, int], group: int) -> int:
    """Groups in a row of a matrix of `shape` (O, I); 1 also when the whole tensor is one group."""
    return 1 if group == 0 else -(-shape[1] // group_size(shape, group))


def split(w: Tensor, group: int) -> Tensor:
    """Cut `w` (O, I) into its groups: (G, K), in row order; the last group of a row is padded with zeros."""
    size = group_size((w.shape[0], w.shape[1]), group)
    if group != 0 and w.shape[1] % size:
        w = torch.nn.functional.pad(w, (0, -w.shape[1] % size))
    return w.reshape(-1, size)


def merge(groups: Tensor, shape: tuple[int, int], group: int) -> Tensor:
    """The inverse of `split`: (G, K) back to `shape` (O, I), without the padding."""
    if group == 0:
        return groups.reshape(shape)
    return groups.reshape(shape[0], -1)[:, : shape[1]]
