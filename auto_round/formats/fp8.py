"""The FP8 checkpoint in blocks (quant_method "fp8") as DeepSeek publishes it, read by transformers, vLLM and SGLang.

`weight` E4M3 (O, I) and `weight_scale_inv`, one factor per block; inputs are quantized at run time, in groups as wide
as a block. Despite its name the scale is what codes are multiplied by.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from auto_round.core.element_layouts import read_elements, write_elements
from auto_round.core.errors import FormatError
from auto_round.core.plan import Plan
from auto_round.core.quantized import Quantized
from auto_round.core.scheme import Scheme, TensorSpec
from auto_round.formats.base import Format, Provenance

SCALE = "weight_scale_inv"
REMEDY = "Use --scheme FP8_BLOCK, or --format llm_compressor"


class FP8(Format):
    """E4M3 in blocks; one block size for the whole model."""

    name = "fp8"

    def reject(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """FP8 E4M3 in blocks, inputs dynamic in groups of a block's width."""
        spec, act = scheme.weight, scheme.act
        if spec is None:
            return None
        if spec.dtype != "fp" or spec.variant or not isinstance(spec.group, tuple):
            return f"fp8 stores E4M3 weights in blocks, got {spec}. {REMEDY}"
        # The file says nothing about inputs but "dynamic": readers take groups as wide as a block.
        if act is None or act.dtype != "fp" or not act.dynamic or act.group != spec.group[1]:
            return f"fp8 means dynamic FP8 inputs in groups of {spec.group[1]}, got {act}. {REMEDY}"
        return None

    def check(self, plan: Plan) -> Plan:
        """As for every format; the one block size allows no second scheme. Raises FormatError."""
        plan = super().check(plan)
        first, *others = plan.quantized() or [""]
        for name in others:
            if plan[name] != plan[first]:
                raise FormatError(
                    f"{name}: fp8 has one setting for all, got {plan[name]}, but {first} has {plan[first]}"
                )
        return plan

    def write(self, q: Quantized) -> dict[str, Tensor]:
        """weight, weight_scale_inv."""
        tensors = write_elements(q)
        return {"weight": tensors["weight"], SCALE: tensors["weight_scale"]}

    def read(self, tensors: Mapping[str, Tensor], spec: TensorSpec, shape: tuple[int, int]) -> Quantized:
        """The inverse of `write`. Raises FormatError when a tensor does not fit."""
        if SCALE not in tensors:  # under the name that the file has, not the one `read_elements` knows
            raise FormatError(f"tensor {SCALE} is missing; this layer needs weight, {SCALE}")
        return read_elements({"weight": tensors["weight"], "weight_scale": tensors[SCALE]}, spec, shape)

    def config(self, plan: Plan, provenance: Provenance) -> dict[str, object]:
        """The block size, and the names of the float matrices under both names that readers know."""
        spec = next(spec for name in plan.quantized() if (spec := plan[name].weight) is not None)
        assert isinstance(spec.group, tuple), "checked by reject"
        left = {name for name in plan if plan[name].weight is None}
        kept = sorted({*left, *provenance.float_layers, *provenance.float_tensors})
        return {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "ignored_layers": kept,
            "modules_to_not_convert": kept,
            "provider": "auto-round",
            "quant_method": "fp8",
            "weight_block_size": list(spec.group),
        }


ENTRIES = (FP8(),)
