"""`auto_round` checkpoints of MX, NVFP4 and FP8 weights, and of any weights with quantized inputs.

Tensors are those of compressed-tensors (`weight_packed`, `weight_scale`, `weight_global_scale`), of DeepSeek for FP8 in
blocks (`weight_scale_inv`), and of GPTQ for integers; `input_scale` and `input_global_scale` hold calibrated ranges.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from auto_round.codecs.base import codecs
from auto_round.codecs.elements import ElementCodec
from auto_round.core.element_layouts import read_elements, write_elements
from auto_round.core.groups import group_size
from auto_round.core.layouts import read_gptq, write_gptq
from auto_round.core.plan import Plan
from auto_round.core.quantized import Quantized, input_tensors, inputs_among
from auto_round.core.scheme import Scheme, TensorSpec
from auto_round.formats.base import (
    Format,
    Provenance,
    auto_round_config,
    base_of,
    indivisible,
    reject_integer,
)

INT_BITS = (2, 3, 4, 8)
BLOCK_SCALE = "weight_scale_inv"  # DeepSeek's name: a factor to multiply by, all the same
VALUES_PER_UNIT = {4: 2, 6: 16, 8: 1}  # values that fill whole bytes, or for 6 bits whole words


class Floats(Format):
    """One layout for all data types; each layer is written in that of its own."""

    name = "auto_round:floats"
    turns_inputs = True

    def reject(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Other data types, and integers as the integer packings refuse them."""
        spec = scheme.weight
        if spec is None:
            return None
        if spec.dtype == "int":
            return reject_integer(self.name, Scheme(weight=spec), INT_BITS, "Use --format fake")
        if not isinstance(codecs().get(spec.dtype), ElementCodec):
            known = ", ".join(
                ["int", *(n for n, codec in codecs().items() if isinstance(codec, ElementCodec))]
            )
            return f"{self.name} stores {known}, got {spec.dtype!r}. Use the format made for that data type"
        return None

    def check(self, plan: Plan) -> Plan:
        """`plan`, with layers left in floating point whose rows do not divide into groups."""
        for name in plan.quantized():
            spec = plan[name].weight
            reason = None if spec is None else _uneven(spec, plan.shapes[name])
            if reason:
                plan = plan.override({name: None}, reason)
        return super().check(plan)

    def write(self, q: Quantized) -> dict[str, Tensor]:
        """Scales have one entry per row (O,) or per tensor (1,) where there are no more."""
        if q.spec.dtype == "int":
            return {**write_gptq(q, zero_offset=_zero_offset(q.spec)), **input_tensors(q)}
        tensors = write_elements(q)
        if isinstance(q.spec.group, tuple):
            tensors[BLOCK_SCALE] = tensors.pop("weight_scale")
        elif q.spec.dtype == "fp" and q.spec.group in (-1, 0):
            tensors["weight_scale"] = tensors["weight_scale"].flatten()
        return tensors

    def read(self, tensors: Mapping[str, Tensor], spec: TensorSpec, shape: tuple[int, int]) -> Quantized:
        """The inverse of `write`."""
        found = dict(tensors)
        if spec.dtype == "int":
            inputs = {name: found.pop(name) for name in list(found) if name.startswith("input_")}
            q = read_gptq(found, spec, shape, zero_offset=_zero_offset(spec))
            return Quantized(spec, shape, q.codes, q.params, inputs_among(inputs))
        if BLOCK_SCALE in found:
            found["weight_scale"] = found.pop(BLOCK_SCALE)
        return read_elements(found, spec, shape)

    def config(self, plan: Plan, provenance: Provenance) -> dict[str, object]:
        """Global settings in a form that stock transformers takes, which refuses a `group_size` of 0 or of two."""
        base = base_of(plan)
        more: dict[str, object] = {}
        spec = base.weight
        if spec is not None and spec.dtype == "fp":
            more["fmt"] = spec.variant or "e4m3"
            static = base.act is not None and not base.act.dynamic
            more["activation_scheme"] = "static" if static else "dynamic"
        if spec is not None and not (isinstance(spec.group, int) and spec.group):
            more["weight_group_size"] = base.to_flat()["group_size"]
            # Any number that transformers takes.
            more["group_size"] = -1 if spec.group == 0 else spec.group[1]
        if spec is not None and isinstance(spec.group, tuple):
            more["weight_block_size"] = list(spec.group)
        return auto_round_config(plan, provenance, base, packing_format=_packing(base), **more)


def _zero_offset(spec: TensorSpec) -> int:
    return 1 if spec.sym else 0  # as the packing that `auto_round` would choose for integers alone


def _packing(base: Scheme) -> str:
    """What other readers know the layout of `base` by."""
    spec = base.weight
    if spec is None or spec.dtype == "int":
        return "auto_round:auto_gptq" if spec is None or spec.sym else "auto_round:gptqmodel"
    if spec.dtype == "mx_int":
        return "auto_round"
    if spec.dtype == "fp":
        static = base.act is not None and not base.act.dynamic
        return "auto_round:fp8_static" if static else "auto_round:fp8"
    if spec.scale_dtype == "e5m3":
        return "auto_round:llm_compressor_nvfp4_e5m3"
    return "auto_round:llm_compressor"


def _uneven(spec: TensorSpec, shape: tuple[int, int]) -> str | None:
    """Why a matrix of `shape` (O, I) cannot be stored as `spec`, or None."""
    if spec.dtype == "int":
        return indivisible(shape)
    if spec.dtype == "fp":
        return None
    values = VALUES_PER_UNIT.get(spec.bits, 1)  # of other widths are the types that `reject` names
    unit = max(group_size(shape, spec.group), values)
    if shape[1] % unit or shape[1] % values:
        return f"rows of {shape[1]} do not divide into groups of {unit}"
    return None


ENTRIES = (Floats(),)
