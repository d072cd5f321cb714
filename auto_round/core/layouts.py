"""How integer codes lie in GPTQ and AWQ checkpoints: written and read here, used by every format that has them.

Both store the transposed matrix: I input features down, O output features across.
GPTQ: qweight int32 [I * bits / 32, O] packed along I; qzeros int32 [G, O * bits / 32]; scales [G, O].
AWQ: qweight int32 [I, O / 8] packed along O with the nibbles of a word in the order 0 2 4 6 1 3 5 7; qzeros alike.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from auto_round.core import bits as packing
from auto_round.core.errors import FormatError
from auto_round.core.groups import groups_per_row, merge, split
from auto_round.core.quantized import Quantized
from auto_round.core.scheme import TensorSpec

AWQ_BITS = packing.AWQ_BITS


def middle(spec: TensorSpec) -> int:
    """The code that means zero in a symmetric type."""
    return 1 << (spec.bits - 1)


def zeros_of(q: Quantized) -> Tensor:
    """(G, 1) zero points of `q`, also for symmetric types, uint8."""
    if "zero" in q.params:
        return q.params["zero"]
    return torch.full_like(q.params["scale"], middle(q.spec), dtype=torch.uint8)


def bias_of(q: Quantized) -> Tensor:
    """(G, 1) b of the affine form scale * code + b, rounded once to the dtype of the scale; exact when symmetric."""
    scale = q.params["scale"]
    return (-scale.float() * zeros_of(q)).to(scale.dtype)


def zero_from_bias(scale: Tensor, bias: Tensor) -> Tensor:
    """The inverse of `bias_of`: zero points, uint8."""
    # Always the zero point that was stored, as 2^bits * eps <= 1 of the dtype (docs/decisions/0030).
    return (-bias.float() / scale.float()).round().to(torch.uint8)


def _across(per_group: Tensor, shape: tuple[int, int]) -> Tensor:
    """One value per group, (G_total, 1), as a table [groups per row, O]."""
    return per_group.reshape(shape[0], -1).t().contiguous()


def _down(table: Tensor) -> Tensor:
    """The inverse of `_across`."""
    return table.t().reshape(-1, 1).contiguous()


def write_gptq(q: Quantized, *, zero_offset: int) -> dict[str, Tensor]:
    """GPTQ tensors of `q`. `zero_offset` is subtracted from the zero points (1 in the original layout)."""
    # Transposed without a copy: `pack` turns it back into rows of memory.
    codes = merge(q.codes, q.shape, q.spec.group).t()
    # A zero point of 0 wraps to the largest code, and readers wrap it back.
    zeros = _across((zeros_of(q).to(torch.int16) - zero_offset) & ((1 << q.spec.bits) - 1), q.shape)
    return {
        "qweight": packing.pack(codes, q.spec.bits),
        "qzeros": packing.pack(zeros.t(), q.spec.bits).t().contiguous(),
        "scales": _across(q.params["scale"], q.shape),
    }


def read_gptq(
    tensors: dict[str, Tensor], spec: TensorSpec, shape: tuple[int, int], *, zero_offset: int
) -> Quantized:
    """The inverse of `write_gptq`. Raises FormatError when a tensor's shape does not fit `spec` and `shape`."""
    zeros = _gptq_zeros(tensors, spec, shape, zero_offset)
    codes = packing.unpack(tensors["qweight"], spec.bits).t()
    return _quantized(codes, zeros, tensors["scales"], spec, shape)


def read_gptq_grid(
    tensors: Mapping[str, Tensor], spec: TensorSpec, shape: tuple[int, int], *, zero_offset: int
) -> dict[str, Tensor]:
    """The params that `read_gptq` gives, without unpacking codes. Raises FormatError as it does."""
    return _params(_gptq_zeros(tensors, spec, shape, zero_offset), tensors["scales"], spec)


def _gptq_zeros(
    tensors: Mapping[str, Tensor], spec: TensorSpec, shape: tuple[int, int], zero_offset: int
) -> Tensor:
    """Zero points [groups per row, O], once all shapes are right."""
    groups = groups_per_row(shape, spec.group)
    expected = {
        "qweight": (shape[1] * spec.bits // packing.WORD, shape[0]),
        "qzeros": (groups, shape[0] * spec.bits // packing.WORD),
        "scales": (groups, shape[0]),
    }
    check_shapes(tensors, expected)
    zeros = packing.unpack(tensors["qzeros"].t(), spec.bits).t()
    return (zeros + zero_offset) & ((1 << spec.bits) - 1)


def write_awq(q: Quantized) -> dict[str, Tensor]:
    """AWQ (gemm) tensors of a 4-bit `q`; zero points are stored as they are."""
    codes = merge(q.codes, q.shape, q.spec.group).t()
    return {
        "qweight": packing.pack_awq(codes),
        "qzeros": packing.pack_awq(_across(zeros_of(q), q.shape)),
        "scales": _across(q.params["scale"], q.shape),
    }


def read_awq(tensors: dict[str, Tensor], spec: TensorSpec, shape: tuple[int, int]) -> Quantized:
    """The inverse of `write_awq`. Raises FormatError when a tensor's shape does not fit."""
    groups, words = groups_per_row(shape, spec.group), shape[0] * AWQ_BITS // packing.WORD
    expected = {"qweight": (shape[1], words), "qzeros": (groups, words), "scales": (groups, shape[0])}
    check_shapes(tensors, expected)
    codes = packing.unpack_awq(tensors["qweight"]).t()
    return _quantized(codes, packing.unpack_awq(tensors["qzeros"]), tensors["scales"], spec, shape)


def _params(zeros: Tensor, scales: Tensor, spec: TensorSpec) -> dict[str, Tensor]:
    """Scales and zero points of all groups from tables [groups per row, O]."""
    params = {"scale": _down(scales)}
    if spec.sym:
        # On meta only shapes are asked for; there are no zero points to look at.
        if scales.device.type != "meta" and not bool((zeros == middle(spec)).all()):
            raise FormatError(f"a symmetric {spec.bits}-bit layer has zero points other than {middle(spec)}")
    else:
        params["zero"] = _down(zeros)
    return params


def _quantized(
    codes: Tensor, zeros: Tensor, scales: Tensor, spec: TensorSpec, shape: tuple[int, int]
) -> Quantized:
    params = _params(zeros, scales, spec)
    padded = split(codes, spec.group)
    # `split` pads with code 0, which is the lowest value and not zero.
    if spec.group != 0 and shape[1] % padded.shape[1]:
        padded = _pad_with_zero_points(codes, zeros, spec, padded.shape[1])
    return Quantized(spec=spec, shape=shape, codes=padded.contiguous(), params=params)


def _pad_with_zero_points(codes: Tensor, zeros: Tensor, spec: TensorSpec, size: int) -> Tensor:
    """Padding decodes to 0, as it was when the weight was quantized: its codes are the zero point of its group."""
    missing = -codes.shape[1] % size
    tail = zeros[-1].unsqueeze(1).expand(-1, missing).to(codes.dtype)
    return split(torch.cat([codes, tail], dim=1), spec.group)


def check_shapes(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise FormatError unless every tensor of `expected` is there and has that shape."""
    for name, shape in expected.items():
        if name not in tensors:
            raise FormatError(f"tensor {name} is missing; this layer needs {', '.join(expected)}")
        if tuple(tensors[name].shape) != shape:
            raise FormatError(f"tensor {name} has shape {tuple(tensors[name].shape)}, expected {shape}")
