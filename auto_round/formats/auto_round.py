"""The `auto_round` checkpoint (quant_method "auto-round"), with the packings of GPTQ and AWQ inside.

`auto_round` chooses: symmetric integers take the GPTQ packing, uniform 4-bit asymmetric ones the AWQ packing, any
other asymmetric ones the GPTQ packing with unshifted zero points. Other data types and quantized inputs go to
`auto_round:floats`, in a file of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from auto_round.core.groups import group_size
from auto_round.core.layouts import AWQ_BITS, read_awq, read_gptq, read_gptq_grid, write_awq, write_gptq
from auto_round.core.plan import Plan
from auto_round.core.quantized import Quantized
from auto_round.core.scheme import Scheme, TensorSpec
from auto_round.formats.base import (
    Format,
    Provenance,
    asymmetric_eight_bits,
    auto_round_config,
    base_of,
    format_named,
    indivisible,
    reject_integer,
)

GPTQ_BITS = (2, 3, 4, 8)
PLAIN, GPTQ, AWQ = "auto_round:gptqmodel", "auto_round:auto_gptq", "auto_round:auto_awq"
FLOATS = "auto_round:floats"


@dataclass(frozen=True)
class Packing(Format):
    """One way of laying out the integers, and the name that readers know it by."""

    turns_inputs = True
    name: str
    packing_format: str
    bits: tuple[int, ...]
    writer: Callable[[Quantized], dict[str, Tensor]]
    reader: Callable[[dict[str, Tensor], TensorSpec, tuple[int, int]], Quantized]
    dtype: str | None = None
    grid_reader: Callable[[Mapping[str, Tensor], TensorSpec, tuple[int, int]], dict[str, Tensor]] | None = (
        None
    )

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

    def read_grid(
        self, tensors: Mapping[str, Tensor], spec: TensorSpec, shape: tuple[int, int]
    ) -> dict[str, Tensor] | None:
        """For GPTQ's packing."""
        return None if self.grid_reader is None else self.grid_reader(tensors, spec, shape)

    def config(self, plan: Plan, provenance: Provenance) -> dict[str, object]:
        """Global settings, and `extra_config` for every layer that departs from them."""
        return auto_round_config(plan, provenance, base_of(plan), packing_format=self.packing_format)


class Chooser(Format):
    """`auto_round`: stands for the packing that suits the plan."""

    name = "auto_round"
    turns_inputs = True

    def resolve(self, plan: Plan) -> Format:
        """The packing for `plan`."""
        if any(_needs_floats(scheme) for scheme in plan.values()):
            return format_named(FLOATS)
        specs = {spec for name in plan.quantized() if (spec := plan[name].weight) is not None}
        # The packing that most readers know; its shifted zero points are harmless where all are the middle code.
        if all(spec.sym for spec in specs):
            return format_named(GPTQ)
        # AWQ kernels have no short last group.
        divides = all(_divides(plan[name], plan.shapes[name]) for name in plan.quantized())
        if divides and all(not spec.sym and spec.bits == AWQ_BITS for spec in specs):
            return format_named(AWQ)
        return format_named(PLAIN)

    def reject(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """What no packing can hold."""
        return format_named(FLOATS if _needs_floats(scheme) else PLAIN).reject(scheme, shape)

    def check(self, plan: Plan) -> Plan:
        """By the packing chosen for `plan`."""
        return self.resolve(plan).check(plan)

    def write(self, q: Quantized) -> dict[str, Tensor]:
        """The packing that one layer alone would take."""
        return format_named(_alone(q.spec)).write(q)

    def read(self, tensors: Mapping[str, Tensor], spec: TensorSpec, shape: tuple[int, int]) -> Quantized:
        """The inverse of `write`."""
        return format_named(_alone(spec)).read(tensors, spec, shape)

    def config(self, plan: Plan, provenance: Provenance) -> dict[str, object] | None:
        """That of the packing chosen for `plan`."""
        return self.resolve(plan).config(plan, provenance)


def _needs_floats(scheme: Scheme) -> bool:
    """Whether a layer is more than integers: another data type, or quantized inputs."""
    return scheme.act is not None or (scheme.weight is not None and scheme.weight.dtype != "int")


def _alone(spec: TensorSpec) -> str:
    if spec.dtype != "int":
        return FLOATS
    return GPTQ if spec.sym else PLAIN


def _divides(scheme: Scheme, shape: tuple[int, int]) -> bool:
    """Whether the last group of a row of `shape` (O, I) is a whole one."""
    return scheme.weight is None or shape[1] % group_size(shape, scheme.weight.group) == 0


ENTRIES = (
    Chooser(),
    Packing(
        name=GPTQ,
        packing_format=GPTQ,
        bits=GPTQ_BITS,
        writer=partial(write_gptq, zero_offset=1),
        reader=partial(read_gptq, zero_offset=1),
        grid_reader=partial(read_gptq_grid, zero_offset=1),
    ),
    Packing(
        name=PLAIN,
        packing_format="auto_round",  # readers know the unshifted packing by this name
        bits=GPTQ_BITS,
        writer=partial(write_gptq, zero_offset=0),
        reader=partial(read_gptq, zero_offset=0),
        grid_reader=partial(read_gptq_grid, zero_offset=0),
    ),
    Packing(
        name=AWQ, packing_format=AWQ, bits=(AWQ_BITS,), writer=write_awq, reader=read_awq, dtype="float16"
    ),
)
