"""The AWQ checkpoint (quant_method "awq", version "gemm") that AutoAWQ and the servers read: 4 bits only."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from auto_round.core.errors import FormatError
from auto_round.core.groups import group_size
from auto_round.core.layouts import AWQ_BITS, read_awq, write_awq
from auto_round.core.plan import Plan
from auto_round.core.quantized import Quantized
from auto_round.core.scheme import Scheme, TensorSpec
from auto_round.formats.base import Format, Provenance, indivisible, reject_integer, unplanned


class AutoAWQ(Format):
    """AWQ tensors; one width, one group size and one symmetry for the whole model."""

    name = "auto_awq"
    dtype = "float16"  # the only one that AutoAWQ's kernels compute in

    def reject(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """4-bit integers whose groups divide the row."""
        remedy = "Use --format auto_round, or give this layer 4 bits (or 16) in layer_config"
        reason = reject_integer(self.name, scheme, (AWQ_BITS,), remedy)
        if reason or scheme.weight is None:
            return reason
        size = group_size(shape, scheme.weight.group)
        if shape[1] % size:
            return f"auto_awq needs groups that divide the row of {shape[1]}, got {size}. Use another --group_size"
        return None

    def keep_float(self, shape: tuple[int, int]) -> str | None:
        """Rows and columns must be multiples of 32."""
        return indivisible(shape)

    def check(self, plan: Plan) -> Plan:
        """As for every format; the one global setting allows no second 4-bit variant. Raises FormatError."""
        plan = super().check(plan)
        first, *others = plan.quantized() or [""]  # nothing quantized: nothing to compare
        for name in others:
            if plan[name] != plan[first]:
                raise FormatError(
                    f"{name}: auto_awq has one setting for all, got {plan[name]}, but {first} has {plan[first]}. "
                    "Use --format auto_round"
                )
        return plan

    def write(self, q: Quantized) -> dict[str, Tensor]:
        """qweight, qzeros, scales."""
        return write_awq(q)

    def read(self, tensors: Mapping[str, Tensor], spec: TensorSpec, shape: tuple[int, int]) -> Quantized:
        """The inverse of `write`."""
        return read_awq(dict(tensors), spec, shape)

    def config(self, plan: Plan, provenance: Provenance) -> dict[str, object]:
        """Global settings and the names of all matrices left in floating point."""
        quantized = plan.quantized()
        base = plan[quantized[0]] if quantized else plan.base
        left = [name for name in plan if plan[name].weight is None]
        config = {
            **base.to_flat(),
            "quant_method": "awq",
            "version": "gemm",
            "zero_point": base.weight is not None and not base.weight.sym,
            "modules_to_not_convert": sorted({*left, *provenance.float_layers, *unplanned(plan, provenance)}),
            "to_quant_block_names": ",".join(provenance.blocks),
            "provider": "auto-round",
            "autoround_version": provenance.version,
            **provenance.tuning,
        }
        return dict(sorted(config.items()))


ENTRIES = (AutoAWQ(),)
