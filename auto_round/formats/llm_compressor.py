"""The compressed-tensors checkpoint (quant_method "compressed-tensors") that vLLM, SGLang and transformers read.

`config_groups` says for each set of layers how weights and inputs are represented; `ignore` names every matrix that was
written in floating point. Both are made from what was written, never from what was asked for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from auto_round.core import bits as packing
from auto_round.core.element_layouts import read_elements, write_elements
from auto_round.core.errors import FormatError
from auto_round.core.groups import group_rows, group_size, groups_per_row, merge, split
from auto_round.core.layouts import check_shapes, middle
from auto_round.core.minifloat import E4M3
from auto_round.core.plan import Plan
from auto_round.core.quantized import Quantized, input_tensors, inputs_among
from auto_round.core.rounding import STORAGE
from auto_round.core.scheme import Scheme, TensorSpec
from auto_round.formats.base import Format, Provenance, indivisible, leave_ragged, ragged
from auto_round.models.checkpoint import natural
from auto_round.models.quirks import TRANSPOSED_ENDINGS

PACKED, PLAIN, MIXED = "pack-quantized", "int-quantized", "mixed-precision"
FLOATS = {
    ("fp", 8, ""): "float-quantized",
    ("mx_fp", 4, ""): "mxfp4-pack-quantized",
    ("mx_fp", 6, ""): "mxfp6-pack-quantized",
    ("mx_fp", 8, ""): "mxfp8-quantized",
    ("nv_fp", 4, ""): "nvfp4-pack-quantized",
}
"""Layout by data type, bits and element."""
WEIGHTS_ONLY = {"float-quantized": "naive-quantized"}
"""Layouts that go by another name when inputs stay in floating point."""
SCALES = {"e8m0": "torch.uint8", "e4m3": "torch.float8_e4m3fn"}
MX_GROUP, NV_GROUP = 32, 16
CACHE_DTYPES = ("fp8", "fp8_e4m3")
CACHE = TensorSpec(dtype="fp", bits=8, group=0, dynamic=False)


@dataclass(frozen=True)
class LLMCompressor(Format):
    """Integers packed into words along the row, or one int8 per weight where inputs are quantized too; small floats.

    plain: the specs of the layers that are stored as int8, for a plan that has been looked at.
    """

    name: str
    plain: frozenset[TensorSpec] = frozenset()

    def resolve(self, plan: Plan) -> Format:
        """The same format, knowing which layers of `plan` have quantized inputs. Raises FormatError for a clash."""
        schemes = [plan[name] for name in plan.quantized()]
        plain = frozenset(s.weight for s in schemes if s.weight is not None and s.act is not None)
        for name in plan.quantized():
            if plan[name].act is None and plan[name].weight in plain:
                raise FormatError(
                    f"{name}: {self.name} cannot tell it from layers with the same weights and quantized inputs. "
                    "Give it another group size, or quantize the inputs of all or none"
                )
        return replace(self, plain=plain)

    def reject(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Integers with a scale per row or group, symmetric with quantized inputs; floats that have a layout."""
        spec, act = scheme.weight, scheme.act
        if spec is None:
            return None
        if act is not None and act.dtype != spec.dtype:
            return (
                f"{self.name}: {spec.dtype} weights go with {spec.dtype} inputs, got {act}. Set act_data_type"
            )
        reason = self._reject_integer(spec, act) if spec.dtype == "int" else self._reject_floats(spec)
        return reason or ragged(spec, shape) or (None if act is None else _reject_inputs(self.name, act))

    def _reject_integer(self, spec: TensorSpec, act: TensorSpec | None) -> str | None:
        if spec.group == 0:
            return f"{self.name} has integers with a scale per row or group, got group size 0. Use -1"
        if spec.scale_dtype not in STORAGE:
            return f"{self.name} stores scales in {', '.join(STORAGE)}, got {spec.scale_dtype}"
        if act is not None and not spec.sym:
            return f"{self.name}: integers with quantized inputs are symmetric. Leave --asym out"
        return None

    def _reject_floats(self, spec: TensorSpec) -> str | None:
        if _kind(spec) not in FLOATS or spec.scale_dtype == "e5m3":
            known = ", ".join(f"{dtype}{bits}" for dtype, bits, _ in FLOATS)
            return (
                f"{self.name} has layouts for integers and {known}, got {spec} with {spec.scale_dtype} scales. "
                "Use --format auto_round"
            )
        wanted = {"mx_fp": MX_GROUP, "nv_fp": NV_GROUP}.get(spec.dtype, spec.group)
        if spec.group != wanted:
            return f"{self.name} has {spec.dtype} in groups of {wanted}, got {spec.group}. Use --group_size {wanted}"
        return None

    def keep_float(self, shape: tuple[int, int]) -> str | None:
        """Rows and columns must be multiples of 32."""
        return indivisible(shape)

    def check(self, plan: Plan) -> Plan:
        """As for every format; rows that are no whole number of groups stay in floating point. Raises FormatError."""
        return super().check(leave_ragged(plan))

    def adapt(self, plan: Plan, config: Mapping[str, Any]) -> Plan:
        """As it is; with a remark about layers that are no `Linear`, which transformers then leaves unread."""
        if str(config.get("model_type")) not in TRANSPOSED_ENDINGS:
            return plan
        return plan.noted(
            "llm_compressor: transformers (5.23) with compressed-tensors does not read the Conv1D layers of "
            f"{config['model_type']} and goes on with random weights; format auto_round or auto_gptq has no such gap"
        )

    def remarks(self, plan: Plan) -> Iterator[str]:
        """What compressed-tensors holds and some reader does not take."""
        specs = {s for name in plan.quantized() if (s := plan[name].weight) is not None and s.dtype == "int"}
        if any(not spec.sym for spec in specs):
            yield (
                "asymmetric layers in llm_compressor: vLLM reads them; transformers (5.23) does so with "
                "quantization_config=CompressedTensorsConfig(dequantize=True) only"
            )
        odd = sorted({spec.bits for spec in specs - self.plain if spec.bits not in (4, 8)})
        if odd:
            widths = ", ".join(map(str, odd))
            yield f"{widths} bits in llm_compressor: transformers loads them, vLLM has kernels for 4 and 8 bits only"

    def write(self, q: Quantized) -> dict[str, Tensor]:
        """Codes, `weight_scale` (O, groups per row), zero points when asymmetric, and input scales when static."""
        if q.spec.dtype != "int":
            tensors = write_elements(q)
            # A scale for the whole tensor has one dimension.
            return tensors | (
                {"weight_scale": tensors["weight_scale"].reshape(1)} if q.spec.group == 0 else {}
            )
        codes = merge(q.codes, q.shape, q.spec.group)
        scale = q.params["scale"].reshape(group_rows(q.shape, q.spec.group), -1)
        if q.spec in self.plain:
            # Through int16, as codes are unsigned bytes and go below zero here.
            signed = (codes.to(torch.int16) - middle(q.spec)).to(torch.int8)
            return {"weight": signed, "weight_scale": scale, **input_tensors(q)}
        tensors = {
            "weight_packed": packing.pack_rows(codes, q.spec.bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor(q.shape, dtype=torch.int64).to(codes.device),
        }
        if not q.spec.sym:
            zero = q.params["zero"].reshape(scale.shape)
            tensors["weight_zero_point"] = packing.pack(zero, q.spec.bits)
        return tensors

    def read(self, tensors: Mapping[str, Tensor], spec: TensorSpec, shape: tuple[int, int]) -> Quantized:
        """The inverse of `write`; which layout it is shows in the names. Raises FormatError when one does not fit."""
        if spec.dtype != "int":
            return read_elements(tensors, spec, shape)
        scales = (group_rows(shape, spec.group), groups_per_row(shape, spec.group))
        params = {"scale": tensors["weight_scale"].reshape(-1, 1)} if "weight_scale" in tensors else {}
        if "weight_packed" in tensors:
            words = shape[1] * spec.bits // packing.WORD
            expected: dict[str, tuple[int, ...]] = {
                "weight_packed": (shape[0], words),
                "weight_scale": scales,
            }
            if not spec.sym:
                expected["weight_zero_point"] = (shape[0] * spec.bits // packing.WORD, scales[1])
            check_shapes(tensors, {**expected, "weight_shape": (2,)})
            stated = tensors["weight_shape"]
            if stated.device.type != "meta" and tuple(stated.tolist()) != shape:
                raise FormatError(f"weight_shape says {tuple(stated.tolist())}, the model {shape}")
            codes = packing.unpack(tensors["weight_packed"].t(), spec.bits).t()
            if not spec.sym:
                zero = packing.unpack(tensors["weight_zero_point"], spec.bits)
                params["zero"] = zero.reshape(-1, 1)
        else:
            check_shapes(tensors, {"weight": shape, "weight_scale": scales})
            codes = (tensors["weight"].to(torch.int16) + middle(spec)).to(torch.uint8)
        grouped = split(codes.contiguous(), spec.group).contiguous()
        return Quantized(spec=spec, shape=shape, codes=grouped, params=params, inputs=inputs_among(tensors))

    def cache_scales(self, ranges: Mapping[str, tuple[Tensor, Tensor]], dtype: str) -> dict[str, Tensor]:
        """`k_scale` and `v_scale` (1,) float32 of each attention module. Raises FormatError for another dtype."""
        if dtype not in CACHE_DTYPES:
            raise FormatError(
                f"static_kv_dtype={dtype!r}: readers of {self.name} know {', '.join(CACHE_DTYPES)} only"
            )
        least, top = torch.finfo(torch.float32).tiny, E4M3.top  # never zero: readers divide by it
        return {
            f"{path}.{kind}_scale": (largest / top).clamp(min=least).reshape(1)
            for path, pair in ranges.items()
            for kind, largest in zip("kv", pair, strict=True)
        }

    def config(self, plan: Plan, provenance: Provenance) -> dict[str, object]:
        """`config_groups`, the rarest first; the last one is for every other Linear. `ignore`: the float matrices."""
        groups: dict[Scheme, list[str]] = defaultdict(list)
        blocks = tuple(f"{block}." for block in provenance.blocks)
        for name in plan.quantized():
            groups[_as_stored(plan[name], plan.shapes[name])].append(name)
        # The scheme of most layers in blocks is said once, for "Linear"; only the others are named.
        common = max(groups, key=lambda scheme: sum(name.startswith(blocks) for name in groups[scheme]))
        entries: list[tuple[Scheme, list[str]]] = []
        for scheme, names in groups.items():
            # Servers hold the head in a class of its own, which "Linear" does not mean.
            outside = [name for name in names if scheme != common or not name.startswith(blocks)]
            entries += [(scheme, sorted(outside, key=natural))] if outside else []
        entries.append((common, ["Linear"]))
        layouts = {self._layout(scheme) for scheme in groups}
        left = {name for name in plan if plan[name].weight is None}
        return {
            "config_groups": {f"group_{i}": self._group(*entry) for i, entry in enumerate(entries)},
            "format": layouts.pop() if len(layouts) == 1 else MIXED,
            "global_compression_ratio": None,
            "ignore": sorted(left.union(provenance.float_layers, provenance.float_tensors), key=natural),
            "kv_cache_scheme": _arguments(CACHE, inputs=True) if provenance.cache else None,
            "provider": "auto-round",
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
        }

    def _layout(self, scheme: Scheme) -> str:
        assert scheme.weight is not None, "groups are of quantized layers"
        if scheme.weight.dtype == "int":
            return PACKED if scheme.act is None else PLAIN
        layout = FLOATS[_kind(scheme.weight)]
        return layout if scheme.act is not None else WEIGHTS_ONLY.get(layout, layout)

    def _group(self, scheme: Scheme, targets: list[str]) -> dict[str, object]:
        assert scheme.weight is not None, "groups are of quantized layers"
        return {
            "format": self._layout(scheme),
            "input_activations": None if scheme.act is None else _arguments(scheme.act, inputs=True),
            "output_activations": None,
            "targets": targets,
            "weights": _arguments(scheme.weight, inputs=False),
        }


def _kind(spec: TensorSpec) -> tuple[str, int, str]:
    """Data type, bits and element; how a scale was found does not show in a file."""
    return spec.dtype, spec.bits, spec.variant.replace("rceil", "").strip("_")


def _reject_inputs(name: str, act: TensorSpec) -> str | None:
    if act.scale_dtype in SCALES:
        return None
    if act.dynamic == (act.group == 0):
        return (
            f"{name}: inputs have a static scale for the tensor or dynamic ones per token or group, got {act}. "
            "Use --act_group_size -1, or 0 with --disable_act_dynamic"
        )
    return None


def _as_stored(scheme: Scheme, shape: tuple[int, int]) -> Scheme:
    """`scheme` with a group larger than the row cut to the row, as the tensors have it."""
    spec = scheme.weight
    if spec is None or isinstance(spec.group, tuple) or spec.group < 1:
        return scheme
    return replace(scheme, weight=replace(spec, group=group_size(shape, spec.group)))


def _arguments(spec: TensorSpec, *, inputs: bool) -> dict[str, object]:
    """How compressed-tensors says what `spec` says."""
    two_level = spec.scale_dtype == "e4m3"
    found: dict[str, object] = {
        # Inputs with scales of two levels find the finer ones at run time.
        "dynamic": inputs and ("local" if two_level else spec.dynamic),
        "group_size": None,
        "num_bits": spec.bits,
        "strategy": "tensor",
        "symmetric": spec.sym,
        "type": "int" if spec.dtype == "int" else "float",
    }
    if isinstance(spec.group, tuple):
        found |= {"strategy": "block", "block_structure": list(spec.group)}
    elif spec.group == -1:
        found["strategy"] = "token" if inputs else "channel"
    elif spec.group > 0:
        found |= {"strategy": "tensor_group" if two_level else "group", "group_size": spec.group}
    if spec.scale_dtype in SCALES:
        found["scale_dtype"] = SCALES[spec.scale_dtype]
    return found


ENTRIES = (LLMCompressor("llm_compressor"), LLMCompressor("auto_round:llm_compressor"))
