"""Dense bit packing of unsigned codes of 2 to 8 bits into int32 words, least significant bits first.

Value k of a column occupies bits [k * bits, (k + 1) * bits) of the column's bit stream; codes of 3, 5, 6 and 7 bits
may straddle two words. For 3 bits this is the layout that GPTQ checkpoints use.
"""

import math

import torch
from torch import Tensor

WORD = 32


def values_per_cycle(bits: int) -> int:
    """The smallest number of `bits`-wide values that fill whole 32-bit words."""
    return WORD // math.gcd(bits, WORD)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack along the first axis: (N, M) codes, any integer dtype, to (N * bits / 32, M) int32.

    N must be a multiple of `values_per_cycle(bits)`. Works on the meta device. Raises ValueError otherwise.
    """
    cycle = values_per_cycle(bits)
    if codes.shape[0] % cycle:
        raise ValueError(
            f"{codes.shape[0]} codes of {bits} bits do not fill whole words: need a multiple of {cycle}"
        )
    grouped = codes.reshape(-1, cycle, codes.shape[1])
    words = torch.zeros(
        grouped.shape[0], cycle * bits // WORD, grouped.shape[2], dtype=torch.int64, device=codes.device
    )
    for k in range(cycle):
        word, offset = divmod(k * bits, WORD)
        value = grouped[:, k].to(torch.int64)
        words[:, word] |= value << offset
        if offset + bits > WORD:
            words[:, word + 1] |= value >> (WORD - offset)
    words &= 0xFFFFFFFF
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).flatten(0, 1)


def unpack(words: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`: (N * bits / 32, M) int32 to (N, M) uint8. Raises ValueError for a partial cycle."""
    cycle = values_per_cycle(bits)
    per_cycle = cycle * bits // WORD
    if words.shape[0] % per_cycle:
        raise ValueError(f"{words.shape[0]} words hold no whole number of {cycle} codes of {bits} bits")
    grouped = words.reshape(-1, per_cycle, words.shape[1])
    mask = (1 << bits) - 1
    codes = torch.empty(grouped.shape[0], cycle, grouped.shape[2], dtype=torch.uint8, device=words.device)
    for k in range(cycle):
        word, offset = divmod(k * bits, WORD)
        # The shift of a negative int32 drags the sign along; the mask removes it, except where bits cross words.
        value = grouped[:, word] >> offset
        if offset + bits > WORD:
            low = value & ((1 << (WORD - offset)) - 1)
            value = low | (grouped[:, word + 1] << (WORD - offset))
        codes[:, k] = (value & mask).to(torch.uint8)
    return codes.flatten(0, 1)
