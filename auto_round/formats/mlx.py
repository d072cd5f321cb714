"""The MLX checkpoint that mlx-lm reads: w = scale * code + bias, groups of 32, 64 or 128 along the row.

`mlx` describes itself in MLX's own words; `auto_round:mlx` tells transformers with auto-round as well. A scale and a
bias are stored in the dtype of the scale, so a symmetric layer is exact (bias = -scale * 2^(bits - 1)) and the bias of
an asymmetric one is rounded to storage; its zero point is always recovered
(docs/decisions/0030-mlx-biases-are-rounded-zero-points.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from auto_round.core import bits as packing
from auto_round.core.errors import FormatError
from auto_round.core.groups import group_size, groups_per_row, merge, split
from auto_round.core.layouts import bias_of, check_shapes, middle, zero_from_bias
from auto_round.core.plan import Plan
from auto_round.core.quantized import Quantized
from auto_round.core.rounding import STORAGE
from auto_round.core.scheme import Scheme, TensorSpec
from auto_round.formats.base import (
    Format,
    Provenance,
    auto_round_config,
    base_of,
    leave_ragged,
    ragged,
    reject_integer,
)

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)


class MLX(Format):
    """`weight` uint32 (O, I * bits / 32), `scales` and `biases` (O, groups per row)."""

    merged = False

    def __init__(self, name: str, *, own_loader: bool) -> None:
        self.name, self.own_loader, self.turns_inputs = name, own_loader, own_loader
        self.holds_embedding = not own_loader  # transformers has no module for one

    def reject(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Integers of MLX's widths and group sizes, whose zero points survive in the dtype of the scale."""
        remedy = "Give this layer other bits, or use --format fake"
        reason = reject_integer(self.name, scheme, BITS, remedy, scale_dtypes=tuple(STORAGE))
        if reason or scheme.weight is None:
            return reason
        spec, size = scheme.weight, group_size(shape, scheme.weight.group)
        if size not in GROUPS:
            return f"{self.name} has groups of 32, 64 or 128, got {size}. Use --group_size 64, say"
        if not spec.sym and (1 << spec.bits) * torch.finfo(STORAGE[spec.scale_dtype]).eps > 1:
            return (
                f"{self.name}: a {spec.bits}-bit zero point does not survive in a {spec.scale_dtype} bias. "
                "Use --scale_dtype float16, or leave --asym out"
            )
        return ragged(spec, shape)

    def check(self, plan: Plan) -> Plan:
        """As for every format; rows that are no whole number of groups stay in floating point. Raises FormatError."""
        return super().check(leave_ragged(plan))

    def write(self, q: Quantized) -> dict[str, Tensor]:
        """weight, scales, biases. Raises FormatError when a bias overflows the dtype of the scales."""
        codes = merge(q.codes, q.shape, q.spec.group)
        scale = q.params["scale"]
        bias = bias_of(q)
        # The bias is up to 2^bits times the scale, which itself fitted.
        if bias.device.type != "meta" and not bool(torch.isfinite(bias).all()):
            raise FormatError(f"a bias overflows {q.spec.scale_dtype}. Use --scale_dtype float32")
        return {
            "weight": packing.pack_rows(codes, q.spec.bits).view(torch.uint32),
            "scales": scale.reshape(q.shape[0], -1),
            "biases": bias.reshape(q.shape[0], -1),
        }

    def read(self, tensors: Mapping[str, Tensor], spec: TensorSpec, shape: tuple[int, int]) -> Quantized:
        """The inverse of `write`. Raises FormatError when a tensor does not fit, or a symmetric layer is none."""
        groups = groups_per_row(shape, spec.group)
        expected = {"weight": (shape[0], shape[1] * spec.bits // packing.WORD)}
        check_shapes(tensors, expected | dict.fromkeys(("scales", "biases"), (shape[0], groups)))
        codes = packing.unpack(tensors["weight"].view(torch.int32).t(), spec.bits).t()
        scale = tensors["scales"].reshape(-1, 1)
        zero = zero_from_bias(scale, tensors["biases"].reshape(-1, 1))
        params = {"scale": scale}
        if not spec.sym:
            params["zero"] = zero
        elif zero.device.type != "meta" and not bool((zero == middle(spec)).all()):
            raise FormatError(f"a symmetric {spec.bits}-bit layer has zero points other than {middle(spec)}")
        return Quantized(
            spec=spec, shape=shape, codes=split(codes.contiguous(), spec.group).contiguous(), params=params
        )

    def config(self, plan: Plan, provenance: Provenance) -> dict[str, object]:
        """MLX's own description, or that of an `auto-round` checkpoint."""
        if not self.own_loader:
            return quantization(plan, provenance)
        return auto_round_config(plan, provenance, base_of(plan), packing_format=self.name)

    def describe(self, config: Mapping[str, Any], plan: Plan, provenance: Provenance) -> dict[str, Any]:
        """config.json with `quantization`, where mlx-lm looks, and the rotary settings under the names it knows."""
        described = super().describe(config, plan, provenance)
        rotary = config.get("rope_parameters") or {}
        if isinstance(rotary.get("rope_theta"), (int, float)):
            # transformers 5 moved it below rope_parameters, where mlx-lm does not look.
            described.setdefault("rope_theta", rotary["rope_theta"])
            if rotary.get("rope_type", "default") != "default":
                described.setdefault("rope_scaling", rotary)
        return {**described, "quantization": quantization(plan, provenance)}


def quantization(plan: Plan, provenance: Provenance) -> dict[str, object]:
    """Bits and group size of the most layers, and of every layer by name; False for the float ones."""
    layers: dict[str, object] = dict.fromkeys(provenance.float_layers, False)
    for name, scheme in plan.items():
        spec = scheme.weight
        layers[name] = (
            {"group_size": group_size(plan.shapes[name], spec.group), "bits": spec.bits} if spec else False
        )
    named = [entry for entry in layers.values() if entry]
    most = max(named, key=named.count)  # entries are few kinds of dicts, compared by value
    assert isinstance(most, dict), "entries are settings or False"
    return {**most, "mode": "affine", **layers}


ENTRIES = (MLX("mlx", own_loader=False), MLX("auto_round:mlx", own_loader=True))
