"""What a server would refuse or misread in a checkpoint: one function per rule, from a `Sheet` to its findings.

Rules look at names, shapes, dtypes and settings; those in `DEEP` read the codes too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from auto_round.core.errors import AutoRoundError
from auto_round.core.groups import group_size
from auto_round.core.plan import Plan
from auto_round.core.rotation import is_told
from auto_round.core.rounding import STORAGE
from auto_round.core.scheme import Scheme, TensorSpec
from auto_round.formats.base import planned_tensors
from auto_round.formats.reading import Described
from auto_round.models.anatomy import Anatomy, Layer
from auto_round.models.checkpoint import TensorInfo

SCALES = ("scales", "weight_scale", "weight_scale_inv")
ACROSS = ("o_proj", "out_proj", "down_proj", "w2", "fc2", "dense", "dense_4h_to_h", "c_proj")
"""Last words of the layers whose rows are cut under tensor parallelism; of all others, the output features are."""
CODES = frozenset(
    {"qweight", "qzeros", "scales", "biases", "weight_packed", "weight_scale", "weight_scale_inv"}
)
CACHE_SCALES = (".k_scale", ".v_scale", ".q_scale")
SIGNED = ("scales", "biases", "weight_scale")  # of integers: full-range symmetric scales may be negative


@dataclass(frozen=True, slots=True)
class Finding:
    """rule: name of the rule. where: file, setting or tensor. words: what is wrong and what it should be."""

    rule: str
    where: str
    words: str

    def __str__(self) -> str:
        return f"{self.where}: {self.words} [{self.rule}]"


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A checkpoint laid open.

    config: config.json. infos, get: the stored tensors. body: the model that config.json describes. prefix: layer ->
    what its stored tensors begin with. plain: stored name -> shape of every other parameter of that model. modules:
    names of all its modules. unlisted: matrices of it that are no layers (routers). said: what the settings say. tp:
    degrees of tensor parallelism to divide by.
    """

    config: Mapping[str, Any]
    infos: Mapping[str, TensorInfo]
    get: Callable[[str], Tensor]
    body: Anatomy
    prefix: Mapping[str, str]
    plain: Mapping[str, tuple[int, ...]]
    modules: frozenset[str]
    unlisted: tuple[str, ...]
    said: Described
    tp: tuple[int, ...] = ()

    def stored(self, module: str) -> dict[str, TensorInfo]:
        """The tensors of a module by suffix, its bias left out."""
        found = self._by_module.get(self.prefix.get(module, module), {})
        return {suffix: info for suffix, info in found.items() if suffix != "bias"}

    @cached_property
    def _by_module(self) -> dict[str, dict[str, TensorInfo]]:
        # Once for all: a mixture of experts has ten thousands of layers, each of which asks several times.
        found: dict[str, dict[str, TensorInfo]] = {}
        for name, info in self.infos.items():
            module, _, suffix = name.rpartition(".")
            found.setdefault(module, {})[suffix] = info
        return found

    def scheme(self, layer: str) -> Scheme:
        """What the settings say about `layer`, with the dtype in which its scales are in fact stored."""
        scheme, stored = self.said.schemes[layer], self.stored(layer)
        info = next((stored[suffix] for suffix in SCALES if suffix in stored), None)
        names = {dtype: name for name, dtype in STORAGE.items()}
        if scheme.weight is None or info is None or scheme.weight.scale_dtype not in STORAGE:
            return scheme
        return replace(
            scheme, weight=replace(scheme.weight, scale_dtype=names.get(info.dtype, str(info.dtype)))
        )


def quantized_layers(sheet: Sheet) -> Iterator[tuple[str, Layer, TensorSpec]]:
    """Every layer that the settings call quantized, with its spec."""
    for name, layer in sheet.body.layers.items():
        spec = sheet.scheme(name).weight
        if spec is not None:
            yield name, layer, spec


def layers_as_described(sheet: Sheet) -> Iterator[Finding]:
    """Each layer has the tensors, shapes and dtypes that its settings mean, and no others."""
    for name, layer in sheet.body.layers.items():
        if layer.piece is not None and layer.piece.tensor in sheet.infos:
            continue  # fused experts in floating point
        stored, scheme = sheet.stored(name), sheet.scheme(name)
        if not stored and sheet.body.tied and name == sheet.body.head:
            continue
        if scheme.weight is None:
            yield from _float_layer(name, layer, stored)
            continue
        fmt = sheet.said.format
        reason = fmt.reject(scheme, layer.shape)
        if reason:
            yield Finding("held", name, reason)
            continue
        expected = planned_tensors(fmt, scheme.weight, layer.shape, scheme.act)
        for suffix, tensor in expected.items():
            yield from _one_tensor(f"{name}.{suffix}", stored.pop(suffix, None), tensor, suffix)
        for suffix in stored:
            if is_told(suffix):  # about its inputs, whatever its weight is
                continue
            yield Finding("extra", f"{name}.{suffix}", f"not a tensor of a layer stored as {scheme}")


def _float_layer(name: str, layer: Layer, stored: Mapping[str, TensorInfo]) -> Iterator[Finding]:
    shape = layer.shape[::-1] if layer.transposed else layer.shape
    if set(stored) - {"weight"}:
        yield Finding(
            "described",
            name,
            f"stored as {', '.join(sorted(stored))}, but the settings leave it in floating point",
        )
    elif "weight" not in stored:
        yield Finding(
            "missing", f"{name}.weight", "missing, and the settings leave the layer in floating point"
        )
    elif stored["weight"].shape != shape:
        yield Finding("shape", f"{name}.weight", f"shape {stored['weight'].shape}, the model has {shape}")
    elif stored["weight"].dtype not in STORAGE.values():
        yield Finding(
            "dtype", f"{name}.weight", f"{stored['weight'].dtype} in a layer that is to be floating point"
        )


def _one_tensor(where: str, info: TensorInfo | None, tensor: Tensor, suffix: str) -> Iterator[Finding]:
    if info is None:
        yield Finding("missing", where, "missing")
        return
    scale = "scale" in suffix
    # Writers differ in whether a scale per row is (O,) or (O, 1); readers take both.
    shapes = [tuple(size for size in shape if size != 1 or not scale) for shape in (info.shape, tensor.shape)]
    if shapes[0] != shapes[1]:
        yield Finding("shape", where, f"shape {info.shape}, the settings mean {tuple(tensor.shape)}")
    elif not info.shape and suffix.startswith("input_"):
        yield Finding("shape", where, "has no dimension; servers expect one element")
    # Input scales are used as numbers, in whatever float dtype they come.
    loose = suffix.startswith("input_") and info.dtype in STORAGE.values()
    if info.dtype != tensor.dtype and not loose:
        yield Finding("dtype", where, f"{info.dtype}, the settings mean {tensor.dtype}")


def other_tensors(sheet: Sheet) -> Iterator[Finding]:
    """Every other parameter of the model is there in its shape, and there is nothing that no model has."""
    for name, shape in sheet.plain.items():
        if name not in sheet.infos:
            yield Finding("missing", name, "missing")
        elif sheet.infos[name].shape != shape:
            yield Finding("shape", name, f"shape {sheet.infos[name].shape}, the model has {shape}")
    owners = {*sheet.prefix.values()}
    pieces = {layer.parameter for layer in sheet.body.layers.values()}
    blocks = tuple(f"{block}." for blocks in sheet.body.block_lists for block in blocks)
    lists = tuple(f"{prefix}." for prefix in sheet.body.prefixes)
    for name in sheet.infos:
        if name in sheet.plain or name in pieces or _inside(name, owners) or name.endswith(CACHE_SCALES):
            continue
        # Layers past the last block predict further tokens; transformers leaves them alone, servers use them.
        if name.startswith(blocks) or not name.startswith(lists):
            yield Finding("extra", name, "the model has no such parameter")


def _inside(name: str, modules: Collection[str]) -> bool:
    """Whether `name` lies in one of `modules`, at any depth."""
    return any(name[:at] in modules for at, mark in enumerate(name) if mark == ".")


def scales_are_usable(sheet: Sheet) -> Iterator[Finding]:
    """No scale is NaN, infinite or zero, and none is negative where readers take roots or compare."""
    for name, _, spec in quantized_layers(sheet):
        for suffix in sheet.stored(name):
            if "scale" not in suffix and suffix != "biases":
                continue
            full = f"{sheet.prefix[name]}.{suffix}"
            values = sheet.get(full)
            if values.dtype == torch.uint8 and spec.scale_dtype == "e8m0":
                if bool((values == 255).any()):
                    yield Finding("scales", full, "a scale is 255, which means NaN")
                continue
            values = values.float()
            if not bool(torch.isfinite(values).all()):
                yield Finding("scales", full, f"{int((~torch.isfinite(values)).sum())} values are NaN or Inf")
            elif suffix != "biases" and bool((values == 0).any()):
                yield Finding("scales", full, f"{int((values == 0).sum())} scales are zero")
            elif bool((values < 0).any()) and not (spec.dtype == "int" and suffix in SIGNED):
                yield Finding("scales", full, "negative")


def fused_sets_agree(sheet: Sheet) -> Iterator[Finding]:
    """Layers that a server merges have one scheme, and one global scale."""
    for names in _plan(sheet).mixed_fused_sets():
        said = ", ".join(f"{name.rsplit('.', 1)[-1]}: {sheet.scheme(name)}" for name in names)
        yield Finding("fused", names[0], f"servers merge these layers and refuse different settings ({said})")
    for members in sheet.body.fused():
        ordered = [name for name in sheet.body.layers if name in members]
        for suffix in ("weight_global_scale", "input_global_scale"):
            having = [name for name in ordered if suffix in sheet.stored(name)]
            values = {float(sheet.get(f"{sheet.prefix[name]}.{suffix}").flatten()[0]) for name in having}
            # Routed experts see different inputs, and servers take the largest range.
            if len(values) > 1 and "expert" not in ordered[0]:
                yield Finding(
                    "fused", ordered[0], f"servers merge it with others of another {suffix}: {sorted(values)}"
                )


def _plan(sheet: Sheet) -> Plan:
    schemes = {name: sheet.scheme(name) for name in sheet.body.layers}
    first = next((s for s in schemes.values() if s.weight is not None), Scheme(weight=None))
    return Plan(schemes, shapes=sheet.body.shapes(), base=first, fused=sheet.body.fused())


def settings_name_modules(sheet: Sheet) -> Iterator[Finding]:
    """What the settings name exists, and what they leave out is what is stored in floating point."""
    last = {name.rsplit(".", 1)[-1] for name in sheet.modules}
    for setting, name in sheet.said.named:
        if name not in sheet.modules and name not in sheet.body.prefixes and name not in last:
            yield Finding("names", f"{setting} {name!r}", "the model has no such module")
    ignored = [name for setting, name in sheet.said.named if setting == "ignore"]
    if sheet.config.get("quantization_config", {}).get("quant_method") == "compressed-tensors":
        patterns = [e for e in sheet.config["quantization_config"].get("ignore") or [] if e.startswith("re:")]
        for name in () if patterns else sheet.unlisted:
            if name not in ignored:
                yield Finding("names", f"ignore lacks {name!r}", "servers take it for quantized")


def routers_are_float(sheet: Sheet) -> Iterator[Finding]:
    """Matrices that choose experts are plain weights."""
    for name in {*sheet.body.routers, *sheet.unlisted}:
        # Some routers have tables and scales of their own, which are no codes: DeepSeek V4, Inkling.
        if not CODES.isdisjoint(sheet.stored(name)):
            yield Finding("router", name, "quantized: servers keep routers in floating point")


def heads_are_tied_or_stored(sheet: Sheet) -> Iterator[Finding]:
    """A tied model has no head of its own in the file."""
    head = sheet.body.head
    text = sheet.config.get("text_config") or sheet.config
    if head is None or not text.get("tie_word_embeddings", sheet.body.tied):
        return
    if set(sheet.stored(head)) - {"weight"}:
        yield Finding(
            "tied", head, "quantized, but tie_word_embeddings is true: readers use the embedding in its place"
        )


def parallel_parts_are_whole(sheet: Sheet) -> Iterator[Finding]:
    """Under tensor parallelism every rank gets whole groups, whole words and whole heads."""
    text = sheet.config.get("text_config") or sheet.config
    heads = text.get("num_attention_heads")
    groups = text.get("num_key_value_heads", heads)
    for degree in sheet.tp:
        if heads and heads % degree:
            yield Finding("parallel", "num_attention_heads", f"{heads} do not divide by {degree}")
        for name, layer, spec in quantized_layers(sheet):
            last = name.rsplit(".", 1)[-1]
            if last in ("k_proj", "v_proj") and groups and groups < degree and degree % groups == 0:
                continue  # every rank gets a copy of a head
            yield from _parts(name, layer.shape, spec, degree, across=last in ACROSS)


def _parts(
    name: str, shape: tuple[int, int], spec: TensorSpec, degree: int, *, across: bool
) -> Iterator[Finding]:
    size, what = (shape[1], "input") if across else (shape[0], "output")
    if isinstance(spec.group, tuple):
        unit = min(spec.group[1 if across else 0], size)
    elif across and spec.group > 0:
        unit = group_size(shape, spec.group)
    else:
        unit = 8 if spec.bits < 8 else 1  # codes or zero points in one word
    if size % degree or (size // degree) % unit:
        yield Finding(
            "parallel", name, f"{size} {what} features do not divide into {degree} parts of whole {unit}s"
        )


def codes_are_readable(sheet: Sheet) -> Iterator[Finding]:
    """Every layer can be read: symmetric ones have the middle as zero point, groups are runs of neighbours."""
    for name, layer, spec in quantized_layers(sheet):
        stored = {suffix: sheet.get(f"{sheet.prefix[name]}.{suffix}") for suffix in sheet.stored(name)}
        try:
            sheet.said.format.read(stored, spec, layer.shape)
        except (AutoRoundError, RuntimeError, KeyError) as error:
            yield Finding("read", name, str(error))


def floats_are_finite(sheet: Sheet) -> Iterator[Finding]:
    """No plain parameter is NaN or infinite."""
    layers = (f"{sheet.prefix[name]}.weight" for name in sheet.body.layers)
    for name in (*sheet.plain, *layers):
        info = sheet.infos.get(name)
        if info is not None and info.dtype in STORAGE.values():
            values = sheet.get(name)
            if not bool(torch.isfinite(values).all()):
                bad = int((~torch.isfinite(values)).sum())
                yield Finding("finite", name, f"{bad} values are NaN or Inf")


Rule = Callable[[Sheet], Iterator[Finding]]
CHEAP: tuple[Rule, ...] = (
    layers_as_described,
    other_tensors,
    scales_are_usable,
    fused_sets_agree,
    settings_name_modules,
    routers_are_float,
    heads_are_tied_or_stored,
    parallel_parts_are_whole,
)
DEEP: tuple[Rule, ...] = (codes_are_readable, floats_are_finite)
