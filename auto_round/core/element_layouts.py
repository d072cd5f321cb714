"""How small-float codes lie in checkpoints: the tensors of compressed-tensors and DeepSeek-style FP8, written and read.

Codes of 8 bits: `weight` (O, I) in the matching float8 dtype. Codes of 4 and 6 bits: `weight_packed` uint8, a stream of
bits along I, least significant first (so the low nibble of a byte is the even column). Scales: `weight_scale`, one row
per row of groups; `weight_global_scale` (1,) float32 where there is one. Ranges of inputs: `input_scale` and the like.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from auto_round.core import bits as packing
from auto_round.core.errors import FormatError
from auto_round.core.groups import group_rows, groups_per_row, merge, split
from auto_round.core.quantized import Quantized, input_tensors, inputs_among
from auto_round.core.scheme import TensorSpec

BYTE = 8


def float8_of(spec: TensorSpec) -> torch.dtype:
    """The torch dtype of 8-bit elements of `spec`."""
    return torch.float8_e5m2 if spec.variant.startswith("e5m2") else torch.float8_e4m3fn


def write_elements(q: Quantized) -> dict[str, Tensor]:
    """The tensors of `q`; `weight_scale` is (rows of groups, groups in a row), in the dtype readers expect."""
    codes = merge(q.codes, q.shape, q.spec.group).contiguous()  # padding is never stored
    rows = group_rows(q.shape, q.spec.group)
    scale = q.params["scale"].reshape(rows, -1)
    # compressed-tensors expects E4M3 scales in that dtype, and bytes for E8M0 and E5M3.
    tensors = {"weight_scale": scale.view(torch.float8_e4m3fn) if q.spec.scale_dtype == "e4m3" else scale}
    if q.spec.bits == BYTE:
        tensors["weight"] = codes.view(float8_of(q.spec))
    else:
        tensors["weight_packed"] = _pack(codes, q.spec.bits)
    if "global_scale" in q.params:
        tensors["weight_global_scale"] = q.params["global_scale"]
    return {**tensors, **input_tensors(q)}


def read_elements(tensors: Mapping[str, Tensor], spec: TensorSpec, shape: tuple[int, int]) -> Quantized:
    """The inverse of `write_elements`; `weight_scale` may have any shape with one entry per group.

    Raises FormatError when a tensor is missing or has another size than `spec` and `shape` (O, I) ask for.
    """
    name = "weight" if spec.bits == BYTE else "weight_packed"
    width = shape[1] if spec.bits == BYTE else shape[1] * spec.bits // BYTE
    groups = group_rows(shape, spec.group) * groups_per_row(shape, spec.group)
    _check(tensors, {name: shape[0] * width, "weight_scale": groups})
    stored = tensors[name].view(torch.uint8).reshape(shape[0], width)
    codes = stored if spec.bits == BYTE else _unpack(stored, spec.bits)
    scale = tensors["weight_scale"]
    # Bits again: torch compares float8 tensors badly (docs/decisions/0020).
    scale = scale.view(torch.uint8) if spec.scale_dtype == "e4m3" else scale
    params = {"scale": scale.reshape(-1, 1)}
    if spec.scale_dtype == "e4m3":
        _check(tensors, {"weight_global_scale": 1})
        params["global_scale"] = tensors["weight_global_scale"].reshape(1)
    codes = split(codes, spec.group).contiguous()
    return Quantized(spec=spec, shape=shape, codes=codes, params=params, inputs=inputs_among(tensors))


def _pack(codes: Tensor, bits: int) -> Tensor:
    """(O, I) codes to (O, I * bits / 8) bytes."""
    # Two nibbles fill a byte, so rows need not fill the whole words that `packing` asks for; the bytes are the same.
    if bits == 4 and codes.shape[1] % 8:
        return codes[:, 0::2] | (codes[:, 1::2] << 4)
    return packing.pack_rows(codes, bits).view(torch.uint8)


def _unpack(stored: Tensor, bits: int) -> Tensor:
    if bits == 4:
        return torch.stack([stored & 0xF, stored >> 4], dim=-1).flatten(1)
    return packing.unpack(stored.contiguous().view(torch.int32).t(), bits).t()


def _check(tensors: Mapping[str, Tensor], expected: Mapping[str, int]) -> None:
    for name, count in expected.items():
        if name not in tensors:
            raise FormatError(f"tensor {name} is missing; this layer needs {', '.join(expected)}")
        if tensors[name].numel() != count:
            raise FormatError(
                f"tensor {name} has shape {tuple(tensors[name].shape)}, expected {count} entries"
            )
