"""What a checkpoint's configuration says: the format of the folder and the scheme of every layer.

The inverse of `Format.config`, for folders of any origin. Nothing is read here but settings; whether the stored
tensors agree is the business of `formats/rules.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from auto_round.core.errors import FormatError
from auto_round.core.patterns import compiled
from auto_round.core.scheme import ACT_NAMES, FLOAT, FLOAT_BITS, WEIGHT_NAMES, Group, Scheme, TensorSpec
from auto_round.core.spelling import scale_dtype_of
from auto_round.formats.base import Format, format_named, formats

PACKINGS = {
    "auto_round": "auto_round:gptqmodel",
    "auto_round:gptq": "auto_round:auto_gptq",
    "auto_round:awq": "auto_round:auto_awq",
    "intel/auto-round": "auto_round:auto_gptq",
    "autoround:gptq": "auto_round:auto_gptq",
    "autoround:auto_gptq": "auto_round:auto_gptq",
    "autoround:awq": "auto_round:auto_awq",
    "autoround:auto_awq": "auto_round:auto_awq",
    "autoround:gptqmodel": "auto_round:gptqmodel",
    "mlx": "auto_round:mlx",
}
"""Packings by the names that configurations use, where they differ from ours."""
SMALL_FLOATS = "auto_round:floats"
NARROW_SCALES = {"uint8": ("mx_fp", "e8m0"), "float8_e4m3fn": ("nv_fp", "e4m3")}


@dataclass(frozen=True, slots=True)
class Described:
    """format: how quantized layers are laid out. schemes: every layer. named: modules that the settings name one by
    one, as (setting, name); each should mean something."""

    format: Format
    schemes: Mapping[str, Scheme]
    named: tuple[tuple[str, str], ...] = ()


Reader = Callable[[Mapping[str, Any], Collection[str], Collection[str]], Described]


def described(
    config: Mapping[str, Any], layers: Collection[str], inside: Collection[str]
) -> Described | None:
    """What config.json says about `layers`, of which those `inside` are in blocks; None for a plain model.

    Raises FormatError for a method or a setting that is not understood.
    """
    if "quantization" in config:
        return _mlx(config["quantization"], layers, inside)
    settings = config.get("quantization_config")
    if settings is None:
        return None
    method = settings.get("quant_method")
    if method not in READERS:
        raise FormatError(f"quant_method {method!r} is not understood. Known: {', '.join(READERS)}")
    return READERS[method](settings, layers, inside)


def flat_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a scheme among others; a float layer's inputs say nothing."""
    found = {key: settings[key] for key in (*WEIGHT_NAMES, *ACT_NAMES) if settings.get(key) is not None}
    if settings.get("weight_group_size") is not None:  # a size that transformers refuses under the usual name
        found["group_size"] = settings["weight_group_size"]
    if FLOAT_BITS in (found.get("act_bits"), found.get("bits")):
        kept = {"act_bits"} if found.get("bits") != FLOAT_BITS else set()
        found = {key: value for key, value in found.items() if key in kept or key not in ACT_NAMES}
    return found


def _auto_round(settings: Mapping[str, Any], layers: Collection[str], inside: Collection[str]) -> Described:
    # A file that is silent about inputs leaves them alone.
    base = Scheme.from_flat({"act_bits": FLOAT_BITS, **flat_settings(settings)})
    extra: Mapping[str, Any] = settings.get("extra_config") or {}
    prefixes = tuple(
        f"{part.strip()}."
        for part in str(settings.get("block_name_to_quantize") or "").split(",")
        if part.strip()
    )
    named = [("block_name_to_quantize", prefix[:-1]) for prefix in prefixes]
    patterns = [(compiled(key, "extra_config key"), value) for key, value in extra.items() if is_pattern(key)]
    schemes = {}
    for name in layers:
        own = extra.get(name) or next((value for key, value in patterns if key.search(name)), None)
        covered = name.startswith(prefixes) if prefixes else name in inside
        schemes[name] = Scheme.from_flat(flat_settings(own or {}), base) if covered or own else FLOAT
    named += [("extra_config", key) for key in extra if not is_pattern(key)]
    packing = str(settings.get("packing_format", "auto_round:auto_gptq"))
    integers = all(s.act is None and (s.weight is None or s.weight.dtype == "int") for s in schemes.values())
    name = PACKINGS.get(packing, packing) if integers else SMALL_FLOATS
    if not integers and name not in formats():
        raise FormatError(f"packing_format {packing!r} is not understood")
    return Described(format_named(name), schemes, tuple(named))


def _gptq(settings: Mapping[str, Any], layers: Collection[str], inside: Collection[str]) -> Described:
    base = Scheme.from_flat(flat_settings(settings))
    endings = [
        e
        for part in settings.get("modules_in_block_to_quantize") or []
        for e in ([part] if isinstance(part, str) else part)
    ]
    schemes = {}
    for name in layers:
        chosen = name in inside and (not endings or name.endswith(tuple(f".{e}" for e in endings)))
        scheme = base if chosen or (name not in inside and settings.get("lm_head")) else FLOAT
        for rule, changes in (settings.get("dynamic") or {}).items():
            if scheme.weight is not None and compiled(rule[2:], "rule of dynamic").match(name):
                scheme = FLOAT if rule.startswith("-:") else Scheme.from_flat(changes, scheme)
        schemes[name] = scheme
    # GPTQ's first convention stores zero points less one; the second, which has a name of its own, as they are.
    shifted = settings.get("checkpoint_format") != "gptq_v2"
    return Described(format_named("auto_gptq" if shifted else "auto_round:gptqmodel"), schemes)


def _awq(settings: Mapping[str, Any], layers: Collection[str], inside: Collection[str]) -> Described:
    if settings.get("version", "gemm") != "gemm":
        raise FormatError(f"version {settings['version']!r} of AWQ is not understood. Known: gemm")
    base = Scheme.from_flat({**flat_settings(settings), "sym": not settings.get("zero_point", True)})
    left = settings.get("modules_to_not_convert") or []
    schemes = {name: FLOAT if any(part in name for part in left) else base for name in layers}
    return Described(format_named("auto_awq"), schemes, tuple(("modules_to_not_convert", n) for n in left))


def _compressed(settings: Mapping[str, Any], layers: Collection[str], inside: Collection[str]) -> Described:
    ignore, schemes = settings.get("ignore") or [], dict.fromkeys(layers, FLOAT)
    named = [("ignore", entry) for entry in ignore if not entry.startswith("re:")]
    # Last to first, so that of several groups that mean a layer the first one counts.
    for group in reversed((settings.get("config_groups") or {}).values()):
        targets = group.get("targets") or []
        named += [
            ("targets", entry) for entry in targets if not entry.startswith("re:") and entry != "Linear"
        ]
        act = group.get("input_activations")
        scheme = Scheme(
            weight=_compressed_spec(group["weights"], inputs=False),
            act=None if act is None else _compressed_spec(act, inputs=True),
        )
        meant = (name for name in layers if any(_hits(t, name) for t in targets))
        schemes.update(dict.fromkeys(meant, scheme))
    schemes.update({name: FLOAT for name in layers if any(_hits(entry, name) for entry in ignore)})
    return Described(format_named("llm_compressor"), schemes, tuple(named))


def _fp8(settings: Mapping[str, Any], layers: Collection[str], inside: Collection[str]) -> Described:
    rows, columns = settings.get("weight_block_size") or (0, 0)
    if not rows or settings.get("activation_scheme") != "dynamic":
        raise FormatError(
            "quant_method fp8 is understood with weight_block_size and dynamic activations only"
        )
    scheme = Scheme(
        weight=TensorSpec(dtype="fp", bits=8, group=(rows, columns), scale_dtype="bfloat16"),
        act=TensorSpec(dtype="fp", bits=8, group=columns, scale_dtype="float32"),
    )
    left = settings.get("modules_to_not_convert") or settings.get("ignored_layers") or []
    # Readers never take the head for quantized, whether the settings name it or not.
    schemes = {
        name: scheme if name in inside and not any(part in name for part in left) else FLOAT
        for name in layers
    }
    return Described(format_named("fp8"), schemes, tuple(("modules_to_not_convert", name) for name in left))


def _compressed_spec(args: Mapping[str, Any], *, inputs: bool) -> TensorSpec:
    """The spec of compressed-tensors' arguments. Raises FormatError for a strategy that is not understood."""
    strategy, size = args.get("strategy"), args.get("group_size")
    groups: dict[Any, Group | None] = {
        "tensor": 0,
        "channel": -1,
        "token": -1,
        "group": size,
        "tensor_group": size,
    }
    block = args.get("block_structure")
    group = (block[0], block[1]) if strategy == "block" and block else groups.get(strategy)
    if group is None:
        raise FormatError(f"strategy {strategy!r} with group size {size} is not understood")
    narrow = NARROW_SCALES.get(str(args.get("scale_dtype")).removeprefix("torch."))
    dtype = narrow[0] if narrow else "int" if args.get("type", "int") == "int" else "fp"
    run_time = inputs and args.get("dynamic") is not False
    variant = "static_gs" if inputs and args.get("dynamic") == "local" else ""
    return TensorSpec(
        dtype=dtype,
        bits=int(args["num_bits"]),
        group=group,
        sym=bool(args.get("symmetric", True)),
        scale_dtype=narrow[1] if narrow else scale_dtype_of(dtype, run_time=run_time),
        dynamic=not inputs or run_time,
        variant=variant,
    )


def _mlx(settings: Mapping[str, Any], layers: Collection[str], inside: Collection[str]) -> Described:
    """MLX stores biases, so that symmetric layers look like the others."""
    schemes = {}
    for name in layers:
        own = settings.get(name, settings if name in inside else False)
        if own:
            # What its biases can say.
            own = {"bits": own["bits"], "group_size": own["group_size"], "sym": False}
        schemes[name] = Scheme.from_flat(own) if own else FLOAT
    named = tuple(("quantization", key) for key, value in settings.items() if isinstance(value, (dict, bool)))
    return Described(format_named("mlx"), schemes, named)


READERS: dict[str, Reader] = {
    "auto-round": _auto_round,
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
    "fp8": _fp8,
}


def is_pattern(key: str) -> bool:
    """Whether a key of `extra_config` is a regular expression and no name."""
    return re.search(r"[*+?^$|\\]", key) is not None


def _hits(entry: str, name: str) -> bool:
    """Whether a `targets` or `ignore` entry of compressed-tensors means the Linear module `name`."""
    if entry.startswith("re:"):
        return compiled(entry[3:], "targets or ignore").match(name) is not None
    return entry in ("Linear", name)
