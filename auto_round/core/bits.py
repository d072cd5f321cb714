"""Dense bit packing of unsigned codes of 2 to 8 bits into int32 words, least significant bits first.

Value k of a column occupies bits [k * bits, (k + 1) * bits) of the column's bit stream; codes of 3, 5, 6 and 7 bits
may straddle two words. For 3 bits this is the layout that GPTQ checkpoints use.
"""

import ctypes
import math
from pathlib import Path

import torch
from torch import Tensor

from auto_round.core.buffers import buffer
from auto_round.core.native import EXACT, address, library

WORD = 32
PAIRED = (2, 4, 8)
"""Widths that divide a byte: neighbours are joined two at a time, which takes few passes over memory."""
SOURCE = Path(__file__).with_name("bits.c")


def values_per_cycle(bits: int) -> int:
    """The smallest number of `bits`-wide values that fill whole 32-bit words."""
    return WORD // math.gcd(bits, WORD)  # 3 bits: 32 codes in 3 words; 4 bits: 8 in one


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack along the first axis: (N, M) codes, any integer dtype, to (N * bits / 32, M) int32.

    N must be a multiple of `values_per_cycle(bits)`. Works on the meta device. Raises ValueError otherwise.
    Fastest for the transpose of a contiguous matrix.
    """
    packed = _packed(codes.t(), bits, transposed=True)
    if packed is not None:
        return packed
    # One bit stream per row of memory, so that neighbours can be joined where they lie.
    rows = codes.to(torch.uint8).t().contiguous()
    return (_join_pairs if bits in PAIRED else _pack_cycles)(rows, bits).t().contiguous()


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack along the last axis: (M, N) codes to (M, N * bits / 32) int32. Otherwise as `pack`."""
    packed = _packed(codes, bits, transposed=False)
    return pack(codes.t(), bits).t().contiguous() if packed is None else packed


def _packed(rows: Tensor, bits: int, *, transposed: bool) -> Tensor | None:
    """(M, N) codes as words by C, (M, W) or `transposed` (W, M); None where torch has to."""
    count, length = rows.shape
    cycle = values_per_cycle(bits)
    if length % cycle:
        raise ValueError(f"{length} codes of {bits} bits do not fill whole words: need a multiple of {cycle}")
    rows, functions = rows.to(torch.uint8), _functions(rows)
    if functions is None:
        return None
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    each = length * bits // WORD
    words = buffer((each, count) if transposed else (count, each), torch.int32)
    sizes = map(ctypes.c_ssize_t, (count, length, rows.stride(0)))
    steps = map(ctypes.c_ssize_t, (1, count) if transposed else (each, 1))
    functions.pack(address(rows), *sizes, bits, address(words), *steps)
    return words


def _functions(tensor: Tensor) -> ctypes.CDLL | None:
    return library(SOURCE, EXACT) if tensor.device.type == "cpu" else None


def _join_pairs(rows: Tensor, bits: int) -> Tensor:
    """(M, N) uint8 to (M, N * bits / 32) int32."""
    # Flat, for a view as another dtype needs a last stride of 1.
    count, rows = rows.shape[0], rows.reshape(-1)
    while bits < 8:
        pairs = rows.view(torch.int16)
        # The right neighbour, 8 bits up, comes down next to the left one; the rest falls away with the upper byte.
        # 4 bits: the bytes 03 0A are the int16 0x0A03; shifted, 0x00A0; joined, 0x0AA3, of which a byte keeps A3.
        rows = ((pairs >> (8 - bits)) | pairs).to(torch.uint8)
        bits *= 2
    return rows.view(torch.int32).reshape(count, -1)  # little-endian: the first byte lies lowest


def _pack_cycles(rows: Tensor, bits: int) -> Tensor:
    """(M, N) uint8 to (M, N * bits / 32) int32, for every width."""
    cycle = values_per_cycle(bits)
    grouped = rows.reshape(rows.shape[0], -1, cycle)
    words = torch.zeros(*grouped.shape[:2], cycle * bits // WORD, dtype=torch.int32, device=rows.device)
    for k in range(cycle):
        # 3 bits: code 10 starts at bit 30, so word 0 ends with two of its bits and word 1 begins with the third.
        word, offset = divmod(k * bits, WORD)
        value = grouped[..., k].to(torch.int32)
        words[..., word] |= value << offset
        if offset + bits > WORD:
            words[..., word + 1] |= value >> (WORD - offset)  # what the first word had no room for
    return words.flatten(1)


def unpack(words: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`: (N * bits / 32, M) int32 to (N, M) uint8. Raises ValueError for a partial cycle."""
    cycle = values_per_cycle(bits)
    per_cycle = cycle * bits // WORD
    if words.shape[0] % per_cycle:
        raise ValueError(f"{words.shape[0]} words hold no whole number of {cycle} codes of {bits} bits")
    functions = _functions(words)
    if functions is None:
        rows = words.t().contiguous()
        return (_split_pairs if bits in PAIRED else _unpack_cycles)(rows, bits).t()
    length, count = words.shape[0] * WORD // bits, words.shape[1]
    codes = buffer((count, length), torch.uint8)
    sizes = map(ctypes.c_ssize_t, (count, length, words.stride(1), words.stride(0)))
    functions.unpack(address(words), *sizes, bits, address(codes))
    return codes.t()


def _split_pairs(rows: Tensor, bits: int) -> Tensor:
    """(M, W) int32 to (M, W * 32 / bits) uint8."""
    count, rows, width = rows.shape[0], rows.reshape(-1).view(torch.uint8), 8
    while width > bits:
        width //= 2
        joined = rows.to(torch.int16)
        low = (1 << width) - 1
        # 4 bits: A3 is the int16 0x00A3; the shifted copy, 0x0A30, brings A up; the mask 0x0F0F leaves 0x0A03.
        rows = ((joined | (joined << (8 - width))) & (low | low << 8)).view(torch.uint8)
    return rows.reshape(count, -1)


def _unpack_cycles(rows: Tensor, bits: int) -> Tensor:
    """(M, W) int32 to (M, W * 32 / bits) uint8, for every width."""
    cycle = values_per_cycle(bits)
    grouped = rows.reshape(rows.shape[0], -1, cycle * bits // WORD)
    mask = (1 << bits) - 1
    codes = torch.empty(*grouped.shape[:2], cycle, dtype=torch.uint8, device=rows.device)
    for k in range(cycle):
        word, offset = divmod(k * bits, WORD)
        # The shift of a negative int32 drags the sign along; the mask removes it, except where bits cross words.
        value = grouped[..., word] >> offset
        if offset + bits > WORD:
            low = value & ((1 << (WORD - offset)) - 1)
            value = low | (grouped[..., word + 1] << (WORD - offset))
        codes[..., k] = (value & mask).to(torch.uint8)
    return codes.flatten(1)


AWQ_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)  # column held by each nibble of a word, lowest nibble first
AWQ_BITS = 4  # the gemm kernels have no other width


def pack_awq(codes: Tensor) -> Tensor:
    """(N, M) codes of 4 bits to (N, M / 8) int32, eight neighbours of the last axis in a word, in AWQ's order."""
    functions = _functions(codes)
    if functions is not None and codes.dtype == torch.uint8 and codes.stride(0) == 1:
        count, lines = codes.shape
        words = buffer((count, lines // 8), torch.int32)
        sizes = map(ctypes.c_ssize_t, (lines, count, codes.stride(1)))
        functions.pack_awq(address(codes), *sizes, address(words))
        return words
    order = torch.tensor(AWQ_NIBBLES, device=codes.device)
    # Columns a to h become the word 0xhfdbgeca: even columns in the low half, odd ones in the high half.
    return pack_rows(codes.reshape(codes.shape[0], -1, 8)[..., order].flatten(1), AWQ_BITS)


def unpack_awq(words: Tensor) -> Tensor:
    """The inverse of `pack_awq`."""
    functions = _functions(words)
    if functions is not None:
        count, lines = words.shape[0], words.shape[1] * 8
        codes = buffer((lines, count), torch.uint8)
        sizes = map(ctypes.c_ssize_t, (lines, count))
        functions.unpack_awq(address(words := words.contiguous()), *sizes, address(codes))
        return codes.t()
    order = torch.tensor(AWQ_NIBBLES, device=words.device).argsort()  # the inverse permutation
    codes = unpack(words.t(), AWQ_BITS).t()
    return codes.reshape(codes.shape[0], -1, 8)[..., order].flatten(1)
