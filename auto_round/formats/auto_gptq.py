"""The GPTQ checkpoint (quant_method "gptq", original zero-point convention) that AutoGPTQ, GPTQModel, optimum and the
servers read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from auto_round.core.errors import FormatError
from auto_round.core.groups import group_size
from auto_round.core.layouts import read_gptq, read_gptq_grid, write_gptq
from auto_round.core.plan import Plan
from auto_round.core.quantized import Quantized
from auto_round.core.scheme import Scheme, TensorSpec
from auto_round.formats.base import (
    Format,
    Provenance,
    asymmetric_eight_bits,
    indivisible,
    reject_integer,
    unplanned,
)

BITS = (2, 3, 4, 8)


class AutoGPTQ(Format):
    """GPTQ tensors with `g_idx`."""

    name = "auto_gptq"
    dtype = "float16"

    def reject(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Integers of 2, 3, 4 or 8 bits."""
        return reject_integer(self.name, scheme, BITS, "Give this layer other bits, or use --format fake")

    def keep_float(self, shape: tuple[int, int]) -> str | None:
        """Rows and columns must be multiples of 32."""
        return indivisible(shape)

    def remarks(self, plan: Plan) -> Iterator[str]:
        """Asymmetric 8 bits have no kernels in servers."""
        yield from asymmetric_eight_bits(plan)

    def write(self, q: Quantized) -> dict[str, Tensor]:
        """qweight, qzeros (one less than the zero point), scales, g_idx (group of each input feature)."""
        tensors = write_gptq(q, zero_offset=1)
        return {**tensors, "g_idx": _group_index(q.spec, q.shape, tensors["qweight"].device)}

    def read(self, tensors: Mapping[str, Tensor], spec: TensorSpec, shape: tuple[int, int]) -> Quantized:
        """The inverse of `write`. Raises FormatError for groups that are not runs of neighbours (act-order)."""
        _check_order(tensors, spec, shape)
        return read_gptq(dict(tensors), spec, shape, zero_offset=1)

    def read_grid(
        self, tensors: Mapping[str, Tensor], spec: TensorSpec, shape: tuple[int, int]
    ) -> dict[str, Tensor] | None:
        """Raises FormatError as `read` does."""
        _check_order(tensors, spec, shape)
        return read_gptq_grid(tensors, spec, shape, zero_offset=1)

    def config(self, plan: Plan, provenance: Provenance) -> dict[str, object]:
        """Global settings; layers that depart from them in `dynamic`, float ones in `modules_in_block_to_quantize`."""
        blocks = tuple(f"{block}." for block in provenance.blocks)
        base = plan.base if plan.base.weight is not None else plan[plan.quantized()[0]]
        config: dict[str, object] = {
            **base.to_flat(),
            "quant_method": "gptq",
            "desc_act": False,
            "true_sequential": False,
            "damp_percent": 0.01,
            "lm_head": any(not name.startswith(blocks) for name in plan.quantized()),
            "provider": "auto-round",
            "autoround_version": provenance.version,
            **provenance.tuning,
        }
        dynamic = _dynamic(plan, base)
        if dynamic:
            config["dynamic"] = dynamic
        inside = [name for name in plan if name.startswith(blocks)]
        kept = {_suffix(name, provenance.blocks) for name in inside if plan[name].weight is not None}
        floats = [name for name in inside if plan[name].weight is None] + unplanned(plan, provenance)
        left = {_suffix(name, provenance.blocks) for name in floats}
        # By endings: one that is float here and quantized there cannot be said so, and is left to `dynamic`.
        if left and not kept & left:
            config["modules_in_block_to_quantize"] = [sorted(kept)]
        return dict(sorted(config.items()))


def _group_index(spec: TensorSpec, shape: tuple[int, int], device: torch.device) -> Tensor:
    """(I,) int32: the group of each input feature."""
    size = group_size(shape, spec.group)
    return (torch.arange(shape[1], device=device) // size).to(torch.int32)


def _check_order(tensors: Mapping[str, Tensor], spec: TensorSpec, shape: tuple[int, int]) -> None:
    """Raise FormatError for groups that are not runs of neighbours."""
    index = tensors.get("g_idx")
    # Act-order permutes columns among groups: our groups are runs, and the codes would get others' scales.
    if index is not None and not torch.equal(index.cpu(), _group_index(spec, shape, torch.device("cpu"))):
        raise FormatError(
            "g_idx does not count up: this checkpoint was made with act-order (desc_act), not supported"
        )


def _suffix(name: str, blocks: Iterable[str]) -> str:
    """ "self_attn.q_proj" of "model.layers.3.self_attn.q_proj"."""
    for block in blocks:
        if name.startswith(f"{block}."):
            return name.removeprefix(f"{block}.").split(".", 1)[1]
    return name


def _dynamic(plan: Plan, base: Scheme) -> dict[str, dict[str, object]]:
    """GPTQModel's per-layer overrides: "+:regex" changes settings, "-:regex" leaves a layer alone.

    Layers of the same ending that all depart in the same way share one expression.
    """
    rules: dict[str, dict[str, object]] = {}
    endings: dict[str, set[Scheme]] = {}
    for name, scheme in plan.items():
        endings.setdefault(name.rsplit(".", 1)[-1], set()).add(scheme)
    for name, scheme in plan.items():
        if scheme == base:
            continue
        ending = name.rsplit(".", 1)[-1]
        # One expression for all blocks: a rule for each layer would make thousands of lines of a mixed model.
        uniform = len(endings[ending]) == 1
        pattern = rf".*\.{re.escape(ending)}$" if uniform and "." in name else f"^{re.escape(name)}$"
        if scheme.weight is None:
            rules[f"-:{pattern}"] = {}
        else:
            rules[f"+:{pattern}"] = {key: scheme.to_flat()[key] for key in ("bits", "group_size", "sym")}
    return rules


ENTRIES = (AutoGPTQ(),)
