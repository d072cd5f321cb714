"""Dequantize-and-multiply in Triton: a matrix-vector and a matrix-matrix kernel. Imported when a layer needs them.

Codes lie as int32 words [ceil(I / per word), O], lowest bits first; 3-bit codes as words of their low two bits and
words of their high bits. Scales [groups, O] and zeros [groups, O]. Every output is summed by one program in one order:
block sizes along the columns are fixed, and tuning changes only what is computed next to each other.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

COLUMNS_VECTOR, COLUMNS_MATRIX = 128, 64
FEW = 2  # rows of x up to which each gets a matrix-vector product of its own


@triton.jit
def _weights(codes, high, scales, zeros, k, n, inside, O, GROUP, BITS: tl.constexpr, ASYM: tl.constexpr):
    """(len(k), len(n)) float32 weights of columns k and rows n."""
    PLANE: tl.constexpr = 2 if BITS == 3 else BITS
    PER: tl.constexpr = 32 // PLANE
    words = tl.load(codes + (k // PER)[:, None] * O + n[None, :], mask=inside, other=0)
    q = (words >> ((k % PER) * PLANE)[:, None]) & ((1 << PLANE) - 1)
    if BITS == 3:
        top = tl.load(high + (k // 32)[:, None] * O + n[None, :], mask=inside, other=0)
        q = q | (((top >> (k % 32)[:, None]) & 1) << 2)
    at = (k // GROUP)[:, None] * O + n[None, :]
    scale = tl.load(scales + at, mask=inside, other=0.0).to(tl.float32)
    if ASYM:
        zero = tl.load(zeros + at, mask=inside, other=0).to(tl.float32)
        return (q.to(tl.float32) - zero) * scale
    return (q.to(tl.float32) - (1 << (BITS - 1))) * scale


@triton.jit
def vector_kernel(
    x, codes, high, scales, zeros, bias, y, I, O, GROUP,
    BITS: tl.constexpr, ASYM: tl.constexpr, BIAS: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """One row of x times BLOCK_O rows of the weight."""
    m = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    total = tl.zeros((BLOCK_O,), dtype=tl.float32)  # float32, whatever x is: thousands of terms
    for start in range(0, I, BLOCK_I):
        k = start + tl.arange(0, BLOCK_I)
        inside = (k < I)[:, None] & (n < O)[None, :]
        w = _weights(codes, high, scales, zeros, k, n, inside, O, GROUP, BITS, ASYM)
        v = tl.load(x + m * I + k, mask=k < I, other=0.0).to(tl.float32)
        total += tl.sum(w * v[:, None], axis=0)
    if BIAS:
        total += tl.load(bias + n, mask=n < O, other=0.0).to(tl.float32)
    tl.store(y + m * O + n, total.to(y.dtype.element_ty), mask=n < O)


@triton.jit
def matrix_kernel(
    x, codes, high, scales, zeros, bias, y, M, I, O, GROUP,
    BITS: tl.constexpr, ASYM: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_M: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of x times BLOCK_O rows of the weight, which is made in the dtype of x."""
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    total = tl.zeros((BLOCK_M, BLOCK_O), dtype=tl.float32)
    for start in range(0, I, BLOCK_I):
        k = start + tl.arange(0, BLOCK_I)
        inside = (k < I)[:, None] & (n < O)[None, :]
        w = _weights(codes, high, scales, zeros, k, n, inside, O, GROUP, BITS, ASYM)
        v = tl.load(x + m[:, None] * I + k[None, :], mask=(m < M)[:, None] & (k < I)[None, :], other=0.0)
        # Tensor cores take both sides in one dtype; the sum stays float32.
        w = w.to(v.dtype)
        if WIDE:  # the interpreter (triton 3.9) multiplies the bit patterns of bfloat16
            v, w = v.to(tl.float32), w.to(tl.float32)
        total += tl.dot(v, w, input_precision="ieee")
    if BIAS:
        total += tl.load(bias + n, mask=n < O, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y + m[:, None] * O + n[None, :],
        total.to(y.dtype.element_ty),
        mask=(m < M)[:, None] & (n < O)[None, :],
    )


INTERPRETED = isinstance(vector_kernel, InterpretedFunction)


def _configs(rows: int | None, blocks: tuple[int, ...]) -> list[triton.Config]:
    fixed = {} if rows is None else {"BLOCK_M": rows}
    shapes = [(block, warps, stages) for block in blocks for warps in (4, 8) for stages in (2, 4)]
    return [
        triton.Config({**fixed, "BLOCK_O": b}, num_warps=w, num_stages=s)
        for b, w, s in (shapes[:1] if INTERPRETED else shapes)  # there is no device to measure on
    ]


_vector = triton.autotune(_configs(None, (32, 64, 128)), key=["I", "O", "BITS"])(vector_kernel)
_matrix = {
    rows: triton.autotune(_configs(rows, (32, 64, 128)), key=["I", "O", "BITS"])(matrix_kernel)
    for rows in (16, 64)
}


@torch.library.custom_op("auto_round_triton::linear", mutates_args=())
def linear(
    x: Tensor, codes: Tensor, high: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None,
    bits: int, group: int,
) -> Tensor:  # fmt: skip
    """x (M, I) times the weight, plus bias: (M, O)."""
    (m, columns), rows = x.shape, scales.shape[1]
    y = x.new_empty(m, rows)
    if m == 0:
        return y
    # A pointer has to be given in any case; the flags keep the kernel from following it.
    tensors = (x, codes, high, scales, codes if zeros is None else zeros, codes if bias is None else bias, y)
    flags = {"BITS": bits, "ASYM": zeros is not None, "BIAS": bias is not None}
    if m <= FEW:
        _vector[lambda meta: (triton.cdiv(rows, meta["BLOCK_O"]), m)](
            *tensors, columns, rows, group, **flags, BLOCK_I=COLUMNS_VECTOR
        )
        return y
    _matrix[16 if m <= 16 else 64][
        lambda meta: (triton.cdiv(rows, meta["BLOCK_O"]), triton.cdiv(m, meta["BLOCK_M"]))
    ](*tensors, m, columns, rows, group, **flags, BLOCK_I=COLUMNS_MATRIX, WIDE=INTERPRETED)
    return y


@linear.register_fake
def _(x, codes, high, scales, zeros, bias, bits, group):
    return x.new_empty(x.shape[0], scales.shape[1])
