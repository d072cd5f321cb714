"""The order in which the CPU kernels read codes: tiles of 8 or 16 rows, units of 32 columns, several codes to a byte.

R, the rows of a tile, is what the kernels' instructions take: 16 with AVX-512, else 8. A unit is eight vectors of 4 R
bytes; vector q holds columns 4q .. 4q+3 of row 0, then of row 1, and so on. In memory:
8 bits: the vectors. 4 bits: byte j is v[2j] | v[2j+1] << 4. 2 bits: v[4j] | v[4j+1] << 2 | ... 3 bits: the low two bits
as for 2 bits, then one vector whose bit q is the high bit of v[q]. kernels.cpp writes this order, from words as GPTQ
packs them; here it is undone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from auto_round.core.bits import pack

UNIT, VECTORS = 32, 8


def words_of(codes: Tensor, bits: int) -> Tensor:
    """(W, O) int32 from (O, I) uint8: what the kernels lay out, up to a whole unit."""
    return pack(torch.nn.functional.pad(codes, (0, -codes.shape[1] % UNIT)).t(), bits)


def untile_codes(tiled: Tensor, bits: int, shape: tuple[int, int]) -> Tensor:
    """(O, I) uint8 from (ceil(O / R), ceil(I / 32), 4 R * bits) uint8."""
    tiles, units = tiled.shape[:2]
    rows = tiled.shape[2] // (4 * bits)
    vectors = _part(tiled.reshape(tiles, units, -1, 4 * rows), bits).reshape(tiles, units, VECTORS, rows, 4)
    codes = vectors.permute(0, 3, 1, 2, 4).reshape(tiles * rows, units * UNIT)
    return codes[: shape[0], : shape[1]].contiguous()


def tile_groups(per_group: Tensor, rows: int) -> Tensor:
    """(O, groups) to (ceil(O / R), groups, R), R = `rows`, filled with 0."""
    padded = torch.nn.functional.pad(per_group, (0, 0, 0, -per_group.shape[0] % rows))
    return padded.reshape(-1, rows, per_group.shape[1]).transpose(1, 2).contiguous()


def untile_groups(tiled: Tensor, rows: int) -> Tensor:
    """The inverse of `tile_groups`: (O, groups), O = `rows`."""
    return tiled.transpose(1, 2).reshape(-1, tiled.shape[1])[:rows].contiguous()


def _part(packed: Tensor, bits: int) -> Tensor:
    """(..., bits, 4 R) bytes to (..., 8, 4 R) codes."""
    if bits == 8:
        return packed
    if bits == 4:
        return torch.stack([packed & 15, packed >> 4], dim=-2).flatten(-3, -2)
    two = packed[..., :2, :]
    low = torch.stack([two >> shift & 3 for shift in (0, 2, 4, 6)], dim=-2).flatten(-3, -2)
    if bits == 2:
        return low
    high = torch.stack([packed[..., 2, :] >> q & 1 for q in range(VECTORS)], dim=-2)
    return low | high << 2
