"""What a checkpoint format must offer. A format lays out `Quantized` as named tensors, reads them back, and describes
the result in a configuration; it rounds nothing and owns no file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from auto_round.core.errors import FormatError, nearest
from auto_round.core.groups import group_size
from auto_round.core.plan import Plan
from auto_round.core.quantized import Quantized
from auto_round.core.registry import discover
from auto_round.core.scheme import FLOAT, FLOAT_BITS, Scheme, TensorSpec

SHAPE_UNIT = 32  # kernels and readers of integer checkpoints expect both sides to be multiples of this


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What a configuration tells about how the checkpoint came to be.

    blocks: name prefixes of the quantized block lists ("model.layers"). tuning: settings that differ from defaults.
    float_layers: matrices outside the plan that stay in floating point ("lm_head").
    float_tensors: every matrix that was written in floating point, routers and embeddings too. cache: dtype of stored
    keys and values, empty when nothing is said about them. importance: where the importance of inputs came from, in the
    words of llama.cpp: "file", "dataset", "entries_count", "chunks_count".
    """

    version: str
    blocks: tuple[str, ...]
    tuning: Mapping[str, object] = field(default_factory=dict)
    float_layers: tuple[str, ...] = ()
    float_tensors: tuple[str, ...] = ()
    cache: str = ""
    importance: Mapping[str, object] = field(default_factory=dict)


class Format(ABC):
    """One checkpoint format."""

    name: str
    dtype: str | None = None  # what config.json must say, when readers accept one dtype only
    config_key: str = "quantization_config"
    holds_codes: bool = True  # whether `read` can give the codes back
    whole_model: bool = (
        False  # one file with embedding and head quantized too, instead of a checkpoint folder
    )
    holds_embedding: bool = False  # whether its readers take a quantized input embedding
    turns_inputs: bool = False  # whether its loader rotates inputs at run time
    merged: bool = True  # whether some readers merge layers, q, k and v for one, which must then be alike
    scheme: Scheme | None = None  # the scheme that choosing this format means

    def cache_scales(self, ranges: Mapping[str, tuple[Tensor, Tensor]], dtype: str) -> dict[str, Tensor]:
        """Tensors that tell servers how to keep keys and values, from the largest magnitudes per attention module.

        Raises FormatError when the format has no place for them.
        """
        raise FormatError(
            f"static_kv_dtype={dtype!r}: {self.name} has no place for it. Use --format llm_compressor, or leave it out"
        )

    @abstractmethod
    def reject(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Why a layer of `shape` (O, I) cannot be held with `scheme`, or None. Stops the job before it starts."""

    def keep_float(self, shape: tuple[int, int]) -> str | None:
        """Why a layer of `shape` (O, I) must stay in floating point, or None. Shown to the user, does not stop."""
        return None

    def resolve(self, plan: Plan) -> Format:
        """The concrete format for `plan`; a format with several packings chooses here."""
        return self

    @abstractmethod
    def write(self, q: Quantized) -> dict[str, Tensor]:
        """The tensors of one layer, by suffix ("qweight"). On the meta device it gives shapes and dtypes."""

    @abstractmethod
    def read(self, tensors: Mapping[str, Tensor], spec: TensorSpec, shape: tuple[int, int]) -> Quantized:
        """The inverse of `write`. Raises FormatError for tensors that do not fit."""

    def read_grid(
        self, tensors: Mapping[str, Tensor], spec: TensorSpec, shape: tuple[int, int]
    ) -> dict[str, Tensor] | None:
        """The params alone of what `read` gives, where codes lie in a `qweight` as GPTQ packs them; else None.

        Kernels that take such words as they are load faster without one byte per code in between.
        """
        return None

    @abstractmethod
    def config(self, plan: Plan, provenance: Provenance) -> dict[str, object] | None:
        """The quantization configuration of a checkpoint of the layers in `plan`, or None for a plain model."""

    def describe(self, config: Mapping[str, Any], plan: Plan, provenance: Provenance) -> dict[str, Any]:
        """config.json of a checkpoint of `plan`: that of the model, `config`, with what its readers look for."""
        described = self.config(plan, provenance)
        found = dict(config)
        if self.dtype:
            # Readers before transformers 4.56 know the older of the two names only.
            found |= {"dtype": self.dtype, "torch_dtype": self.dtype}
        return found if described is None else {**found, self.config_key: described}

    def adapt(self, plan: Plan, config: Mapping[str, Any]) -> Plan:
        """`plan` as this format would have it, for a model of the configuration `config`. Default: as it is."""
        return plan

    def remarks(self, plan: Plan) -> Iterator[str]:
        """What a user of `plan` in this format should know before the work starts."""
        yield from ()

    def check(self, plan: Plan) -> Plan:
        """`plan` with the layers that this format cannot take left in floating point, each with its reason.

        Raises FormatError naming the layer when a setting of the user's cannot be held.
        """
        for name in plan.quantized():
            # Shapes first: what cannot be cut stays float whatever its scheme, and is no reason to stop.
            reason = self.keep_float(plan.shapes[name])
            if reason:
                plan = plan.override({name: None}, reason)
        for name in plan.quantized():
            reason = self.reject(plan[name], plan.shapes[name])
            if reason:
                raise FormatError(f"{name}: {reason}")
        # Formats often remark the same.
        return plan.noted(*(remark for remark in self.remarks(plan) if remark not in plan.notes))


def indivisible(shape: tuple[int, int]) -> str | None:
    """Why integer checkpoints leave a matrix of `shape` (O, I) in floating point, or None."""
    if shape[0] % SHAPE_UNIT or shape[1] % SHAPE_UNIT:
        return f"shape {shape[0]} x {shape[1]} is not divisible by {SHAPE_UNIT}"
    return None


def ragged(spec: TensorSpec, shape: tuple[int, int]) -> str | None:
    """Why rows of `shape` (O, I) do not suit a format without partial groups, or None."""
    size = group_size(shape, spec.group)
    if isinstance(spec.group, tuple) or spec.group < 1 or shape[1] % size == 0:
        return None
    return f"rows of {shape[1]} are no whole groups of {size}"


def leave_ragged(plan: Plan) -> Plan:
    """`plan` with the layers whose rows are no whole number of groups left in floating point, each with its reason."""
    for name in plan.quantized():
        spec = plan[name].weight
        reason = None if spec is None else ragged(spec, plan.shapes[name])
        if reason:
            plan = plan.override({name: None}, reason)
    return plan


def reject_integer(
    name: str,
    scheme: Scheme,
    bits: tuple[int, ...],
    remedy: str,
    *,
    scale_dtypes: tuple[str, ...] = ("float16",),
) -> str | None:
    """The refusals that all integer layouts share: other data types, other widths, one scale for a whole tensor."""
    spec = scheme.weight
    if spec is None:
        return None
    if spec.dtype != "int":
        return f"{name} stores integers only, got {spec.dtype!r}. {remedy}"
    if scheme.act is not None:
        return f"{name} stores weights only, got quantized inputs ({scheme.act}). Leave act_bits at 16"
    if spec.bits not in bits:
        allowed = ", ".join(str(width) for width in bits)
        return f"{name} stores {allowed} bits only, got {spec.bits}. {remedy}"
    if spec.group == 0:
        return f"{name} cannot hold group size 0 (one scale per tensor). Use -1 or a positive group size"
    if spec.scale_dtype not in scale_dtypes:
        allowed = ", ".join(scale_dtypes)
        return f"{name} stores {allowed} scales only, got {spec.scale_dtype}. Leave scale_dtype at float16"
    return None


def departures(plan: Plan, base: Scheme, blocks: Iterable[str]) -> dict[str, dict[str, object]]:
    """`extra_config`: layers that differ from `base`, by their different settings; all settings outside `blocks`."""
    inside = tuple(f"{block}." for block in blocks)
    default, extra = base.to_flat(), {}
    for name, scheme in plan.items():
        if not name.startswith(inside):
            extra[name] = scheme.to_flat()
        elif scheme != base:
            flat = scheme.to_flat()
            if base.act is not None and scheme.weight is not None and scheme.act is None:
                flat["act_bits"] = FLOAT_BITS  # else a reader would take the inputs from `base`
            extra[name] = {k: v for k, v in flat.items() if v != default.get(k)}
    return extra


def base_of(plan: Plan) -> Scheme:
    """The scheme to state globally: the user's, or that of the first quantized layer when nothing has the user's."""
    used = [plan[name] for name in plan.quantized()]
    # Readers take what is stated globally for every layer without settings of its own, so some layer must have it.
    return plan.base if plan.base in used or not used else used[0]


def auto_round_config(
    plan: Plan, provenance: Provenance, base: Scheme, *, packing_format: str, **more: object
) -> dict[str, object]:
    """The configuration of an `auto_round` checkpoint: global settings, `more`, and what departs from them."""
    config = {
        **base.to_flat(),
        **more,
        "quant_method": "auto-round",
        "packing_format": packing_format,
        "autoround_version": provenance.version,
        "block_name_to_quantize": ",".join(provenance.blocks),
        **provenance.tuning,
    }
    extra = departures(plan, base, provenance.blocks)
    inside = tuple(f"{block}." for block in provenance.blocks)
    for name in (*provenance.float_layers, *unplanned(plan, provenance)):
        if name.startswith(inside):
            # Readers go by prefix: without an entry a float matrix inside the blocks would be taken for quantized.
            extra[name] = FLOAT.to_flat()
    if extra:
        config["extra_config"] = extra
    return dict(sorted(config.items()))


def unplanned(plan: Plan, provenance: Provenance) -> list[str]:
    """Matrices inside the blocks that neither the plan nor the routers name, and that readers take for quantized.

    The projections of state-space layers are such.
    """
    inside = tuple(f"{block}." for block in provenance.blocks)
    known = {*plan, *provenance.float_layers}
    return [name for name in provenance.float_tensors if name.startswith(inside) and name not in known]


def asymmetric_eight_bits(plan: Plan) -> Iterator[str]:
    """The remark that integer checkpoints with asymmetric 8-bit layers deserve."""
    specs = [plan[name].weight for name in plan.quantized()]
    if any(spec is not None and spec.bits == 8 and not spec.sym for spec in specs):
        yield (
            "asymmetric 8 bits: transformers loads them, but servers have kernels for symmetric 8 bits only; "
            "leave --asym out, or use --format llm_compressor"
        )


def meta_quantized(spec: TensorSpec, shape: tuple[int, int], act: TensorSpec | None = None) -> Quantized:
    """A `Quantized` without data, from which `write` tells the shapes and dtypes that a file or a loader needs."""
    from auto_round.codecs.base import codec_of, stored_inputs

    q = codec_of(spec).quantize(torch.empty(shape, device="meta"), spec)
    nothing = torch.empty((), device="meta")
    return replace(q, inputs=stored_inputs(act, nothing, nothing))


@cache
def planned_tensors(
    fmt: Format, spec: TensorSpec, shape: tuple[int, int], act: TensorSpec | None = None
) -> Mapping[str, Tensor]:
    """What `write` makes of a layer of `shape`, on the meta device. Models have few distinct shapes: done once each."""
    return fmt.write(meta_quantized(spec, shape, act))


ALIASES = {
    "gptqmodel": "auto_gptq",
    "gptq": "auto_gptq",
    "awq": "auto_awq",
    "auto_round:gptq": "auto_round:auto_gptq",
    "auto_round:fp8": "auto_round:floats",
}
"""Other names of formats."""


def formats() -> dict[str, Format]:
    """All formats by name."""
    return discover("auto_round.formats")


def format_named(name: str) -> Format:
    """The format called `name`. Raises FormatError with the nearest known name."""
    known = formats()
    key = name.strip().casefold()
    key = ALIASES.get(key, key)
    if key in known:
        return known[key]
    raise FormatError(f"format {name!r} is unknown.{nearest(name, known)} Available: {', '.join(known)}")


def parse_formats(text: str) -> list[Format]:
    """The formats of ``"auto_gptq,auto_round"``. Raises FormatError for an unknown or repeated one."""
    names = [part for part in text.split(",") if part.strip()]
    if not names:
        raise FormatError(f"no format given in {text!r}. Available: {', '.join(formats())}")
    found = [format_named(name) for name in names]
    if len({f.name for f in found}) < len(found):
        raise FormatError(f"format {text!r} names a format twice")
    return found


def sharing_a_plan(formats: Iterable[Format]) -> list[list[Format]]:
    """Groups of formats that are made from one plan: all checkpoints together, every whole-model file by itself."""
    folders = [fmt for fmt in formats if not fmt.whole_model]
    return [*([folders] if folders else []), *([fmt] for fmt in formats if fmt.whole_model)]
