"""The `auto_round` checkpoint (quant_method "auto-round"), with the packings of GPTQ and AWQ inside.

`auto_round` chooses: symmetric integers take the GPTQ packing, uniform 4-bit asymmetric ones the AWQ packing, any
other asymmetric ones the GPTQ packing with unshifted zero points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from auto_round.core.groups import group_size
from auto_round.core.layouts import AWQ_BITS, read_awq, read_gptq, write_awq, write_gptq
from auto_round.core.plan import Plan
from auto_round.core.quantized import Quantized
from auto_round.core.scheme import FLOAT, Scheme, TensorSpec
from auto_round.formats.base import (
    Format,
    Provenance,
    asymmetric_eight_bits,
    departures,
    format_named,
    indivisible,
    reject_integer,
)

GPTQ_BITS = (2, 3, 4, 8)
PLAIN, GPTQ, AWQ = "auto_round:gptqmodel", "auto_round:auto_gptq", "auto_round:auto_awq"


@dataclass(frozen=True)
class Packing(Format):
    """One way of laying out the integers, and the name that readers know it by."""

    name: str
    packing_format: str
    bits: tuple[int, ...]
    writer: Callable[[Quantized], dict[str, Tensor]]
    reader: Callable[[dict[str, Tensor], TensorSpec, tuple[int, int]], Quantized]
    dtype: str | None = None

    def reject(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Integers of the widths this packing has; a group for at least every row."""
        reason = reject_integer(
            self.name, scheme, self.bits, "Give this layer other bits, or use --format fake"
        )
        if reason or self.packing_format != AWQ or _divides(scheme, shape):
            return reason
        return f"{self.name} needs groups that divide the row of {shape[1]}, got {scheme}. Use another group size"

    def keep_float(self, shape: tuple[int, int]) -> str | None:
        """Rows and columns must be multiples of 32."""
        return indivisible(shape)

    def remarks(self, plan: Plan) -> Iterator[str]:
        """Asymmetric layers that few readers know."""
        yield from asymmetric_eight_bits(plan)
        specs = [plan[name].weight for name in plan.quantized()]
        if self.name == PLAIN and any(spec is not None and not spec.sym for spec in specs):
            yield "asymmetric layers in this packing are loaded by transformers with auto-round, not by vLLM or SGLang"

    def write(self, q: Quantized) -> dict[str, Tensor]:
        """qweight, qzeros, scales."""
        return self.writer(q)

    def read(self, tensors: Mapping[str, Tensor], spec: TensorSpec, shape: tuple[int, int]) -> Quantized:
        """The inverse of `write`."""
        return self.reader(dict(tensors), spec, shape)

    def config(self, plan: Plan, provenance: Provenance) -> dict[str, object]:
        """Global settings, and `extra_config` for every layer that departs from them."""
        base = _base(plan)
        extra = departures(plan, base, provenance.blocks)
        inside = tuple(f"{block}." for block in provenance.blocks)
        for name in provenance.float_layers:
            if name.startswith(inside):
                extra[name] = {key: FLOAT.to_flat()[key] for key in ("bits", "data_type")}
        config = {
            **base.to_flat(),
            "quant_method": "auto-round",
            "packing_format": self.packing_format,
            "autoround_version": provenance.version,
            "block_name_to_quantize": ",".join(provenance.blocks),
            **provenance.tuning,
        }
        if extra:
            config["extra_config"] = extra
        return dict(sorted(config.items()))


class Chooser(Format):
    """`auto_round`: stands for the packing that suits the plan."""

    name = "auto_round"

    def resolve(self, plan: Plan) -> Format:
        """The packing for `plan`."""
        specs = {spec for name in plan.quantized() if (spec := plan[name].weight) is not None}
        if all(spec.sym for spec in specs):
            return format_named(GPTQ)
        divides = all(_divides(plan[name], plan.shapes[name]) for name in plan.quantized())
        if divides and all(not spec.sym and spec.bits == AWQ_BITS for spec in specs):
            return format_named(AWQ)
        return format_named(PLAIN)

    def reject(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """What no packing can hold."""
        return format_named(PLAIN).reject(scheme, shape)

    def keep_float(self, shape: tuple[int, int]) -> str | None:
        """Rows and columns must be multiples of 32."""
        return indivisible(shape)

    def write(self, q: Quantized) -> dict[str, Tensor]:
        """The packing that one layer alone would take."""
        return format_named(GPTQ if q.spec.sym else PLAIN).write(q)

    def read(self, tensors: Mapping[str, Tensor], spec: TensorSpec, shape: tuple[int, int]) -> Quantized:
        """The inverse of `write`."""
        return format_named(GPTQ if spec.sym else PLAIN).read(tensors, spec, shape)

    def config(self, plan: Plan, provenance: Provenance) -> dict[str, object] | None:
        """That of the packing chosen for `plan`."""
        return self.resolve(plan).config(plan, provenance)


def _divides(scheme: Scheme, shape: tuple[int, int]) -> bool:
    """Whether the last group of a row of `shape` (O, I) is a whole one."""
    return scheme.weight is None or shape[1] % group_size(shape, scheme.weight.group) == 0


def _base(plan: Plan) -> Scheme:
    """The scheme to state globally: the user's, or that of the first quantized layer when nothing has the user's."""
    used = [plan[name] for name in plan.quantized()]
    return plan.base if plan.base in used or not used else used[0]


ENTRIES = (
    Chooser(),
    Packing(
        name=GPTQ,
        packing_format=GPTQ,
        bits=GPTQ_BITS,
        writer=partial(write_gptq, zero_offset=1),
        reader=partial(read_gptq, zero_offset=1),
    ),
    Packing(
        name=PLAIN,
        packing_format="auto_round",  # readers know the unshifted packing by this name
        bits=GPTQ_BITS,
        writer=partial(write_gptq, zero_offset=0),
        reader=partial(read_gptq, zero_offset=0),
    ),
    Packing(
        name=AWQ, packing_format=AWQ, bits=(AWQ_BITS,), writer=write_awq, reader=read_awq, dtype="float16"
    ),
)
