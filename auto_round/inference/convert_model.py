"""What transformers imports to load a quantized checkpoint: `infer_target_device`, `convert_hf_model`, `post_init`.

transformers builds the model on the meta device, calls `convert_hf_model`, fills the buffers from the file and calls
`post_init`. The same three serve `auto_round`, GPTQ and AWQ checkpoints.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from auto_round.backends.base import Choice, Kernel, Site, backends, choose
from auto_round.core.errors import FormatError, SchemeError
from auto_round.core.patterns import compiled
from auto_round.core.scheme import FLOAT_BITS, Scheme, TensorSpec
from auto_round.core.settings import settings
from auto_round.formats.base import Format, format_named
from auto_round.formats.reading import PACKINGS, SMALL_FLOATS, flat_settings, is_pattern
from auto_round.inference.plain import dequantized
from auto_round.inference.rotations import make_room, start_turning
from auto_round.models import quirks
from auto_round.models.anatomy import block_lists, is_conv1d, is_matrix, shape_of, shared_matrices
from auto_round.models.expert_modules import separate
from auto_round.models.experts import SavedNames, find_experts
from auto_round.models.memory import available_memory

logger = logging.getLogger("auto_round")


def infer_target_device(device_map: Any = None) -> str:
    """The device kind that layers will run on: the first accelerator of `device_map`, else the CPU."""
    if device_map is None:
        return "cpu"
    values = list(device_map.values()) if isinstance(device_map, Mapping) else [device_map]
    for value in values:
        kind = f"cuda:{value}" if isinstance(value, int) else str(value)
        if kind in ("auto", "balanced", "balanced_low_0", "sequential"):
            kind = "cuda" if torch.cuda.is_available() else "cpu"
        if kind.split(":")[0] not in ("cpu", "disk", "meta"):  # offloaded parts do not decide
            return kind.split(":")[0]
    return "cpu"


def convert_hf_model(model: nn.Module, target_device: str = "cpu") -> tuple[nn.Module, list[str]]:
    """Replace every quantized layer of `model`, on the meta device, by an empty module of the best backend.

    Returns the model and the names of the backends in use. Raises FormatError naming the layer, the packing or the
    setting that cannot be loaded.
    """
    config = _as_dict(model.config.quantization_config)  # type: ignore[union-attr]
    schemes, prefixes = _schemes(model, config), _prefixes(model, config)
    fmt = _format_of(config, schemes.values())
    wanted = str(config.get("backend", "auto"))
    choices: dict[str, Choice] = {}
    counts: Counter[str] = Counter()
    _separate_experts(model, schemes)
    for name, scheme in schemes.items():
        spec = scheme.weight
        if spec is None:
            continue
        old = model.get_submodule(name)
        reason = fmt.reject(scheme, shape_of(old))
        if reason:
            raise FormatError(f"{name}: {reason}")
        bias = old._parameters.get("bias")
        padding = _padding(spec, shape_of(old)[1]) if config.get("model_free") else 0
        site = Site(
            name=name,
            format=fmt,
            spec=spec,
            shape=(shape_of(old)[0], shape_of(old)[1] + padding),
            device=target_device,
            dtype=old.weight.dtype,  # type: ignore[arg-type]
            bias=None if bias is None else bias.dtype,
            act=scheme.act,
            padding=padding,
        )
        choice = choose(site, wanted)
        parent, _, last = name.rpartition(".")
        owner = model.get_submodule(parent)
        try:
            # On meta like the layer it replaces: transformers fills its buffers by name.
            built = choice.backend.build(site)
        except ValueError as error:  # SchemeError, and codes that do not fill whole words
            raise FormatError(f"{name}: {error}") from error
        built.transposed = is_conv1d(old)
        setattr(owner, last, built)
        kind = f"{site.kind} run on {choice.backend.name} ({choice.backend.summary})"
        choices[kind] = choice  # one line in the log for layers alike, not one per layer
        counts[kind] += 1
    make_room(model, config, prefixes)
    if not choices:
        raise FormatError(
            f"quantization_config names no layer of {type(model).__name__}; block_name_to_quantize may be wrong"
        )
    for kind, choice in choices.items():
        better = "".join(f"; {name} would be faster: {what}" for name, what in choice.better.items())
        logger.info("%d layers %s%s", counts[kind], kind, better)
    return model, sorted({choice.backend.name for choice in choices.values()})


def _padding(spec: TensorSpec, columns: int) -> int:
    """Columns that auto-round 0.16 adds to a row in model-free mode, so that its last group is whole."""
    whole = isinstance(spec.group, int) and 0 < spec.group < columns and spec.dtype == "int"
    return -columns % spec.group if whole else 0  # type: ignore[operator]


def _separate_experts(model: nn.Module, schemes: Mapping[str, Scheme]) -> None:
    """One layer per matrix for every module of fused experts that has a quantized one."""
    for experts in find_experts(model):
        own = [schemes[layer] for layer, _ in experts.pieces() if layer in schemes]
        if any(scheme.weight is not None for scheme in own):
            separate(model, experts)


def post_init(model: nn.Module, used_backends: list[str]) -> None:
    """After loading: every backend checks and prepares its layers. Raises FormatError for a damaged layer."""
    ours = [module for module in model.modules() if isinstance(module, Kernel)]
    by_torch = [m for m in ours if m.backend == "torch"]
    # Plain copies of all weights are kept, or of none: first layers must not crowd out later ones.
    needed = sum(m.site.shape[0] * m.site.shape[1] * m.site.dtype.itemsize for m in by_torch)
    cache = needed <= settings().cache_weights_share * available_memory()
    if by_torch:
        kept = "kept" if cache else "made anew at each call"
        logger.info("dequantized weights of backend torch take %.1f GB: %s", needed / 1e9, kept)
    _check_complete(ours)
    start_turning(model, ours)
    for module in ours:
        backends()[module.backend].finish(module, cache=cache)
        module.ready = True
    join_layers(model)
    # transformers has no other place for it: its quantizer asks itself, and answers that nobody has written it.
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer._dequantize = dequantized


def join_layers(model: nn.Module) -> None:
    """Tell backends which layers read the same input: query, key, value, and gate, up."""
    for parent in model.modules():
        for names in quirks.FUSED_NAMES:
            found = [child for name, child in parent.named_children() if name in names]
            layers = [child for child in found if isinstance(child, Kernel)]
            # Each would turn the input that they are to read together.
            turned = any(layer.rotation is not None for layer in layers)
            if len(layers) > 1 and not turned and len({layer.backend for layer in layers}) == 1:
                backends()[layers[0].backend].join(layers)


def _check_complete(ours: Iterable[Kernel]) -> None:
    """Raise FormatError for a tensor that the files lack: transformers leaves whatever the memory held in its place."""
    # transformers >= 5 marks what it loaded; older versions mark nothing and leave the rest on the meta device.
    loaded = {
        f"{m.site.name}.{n}": getattr(t, "_is_hf_initialized", False)
        for m in ours
        for n, t in m.named_buffers()
        if n != "hadamard_matrix"  # upstream stores one for all layers
    }
    for name, marked in loaded.items():
        if not marked and any(loaded.values()):
            raise FormatError(f"{name} is missing from the checkpoint; copy or download it again")


def _as_dict(config: Any) -> dict[str, Any]:
    """Settings of a quantization config, an object of transformers or a dict."""
    return dict(config) if isinstance(config, Mapping) else dict(vars(config))


def _format_of(config: Mapping[str, Any], schemes: Iterable[Scheme]) -> Format:
    used = [scheme for scheme in schemes if scheme.weight is not None]
    if any(scheme.act is not None or (scheme.weight and scheme.weight.dtype != "int") for scheme in used):
        return format_named(SMALL_FLOATS)
    packing = str(config.get("packing_format", "auto_round:auto_gptq"))
    if config.get("checkpoint_format") == "gptq_v2":
        packing = "auto_round:gptqmodel"
    elif "desc_act" in config and packing in ("auto_round:gptq", "auto_round:auto_gptq"):
        packing = "auto_gptq"  # the original checkpoint, which has a g_idx too
    return format_named(PACKINGS.get(packing, packing))


def _schemes(model: nn.Module, config: Mapping[str, Any]) -> dict[str, Scheme]:
    """Layer -> scheme, from what a configuration says globally, by name and by expression."""
    flat = flat_settings({"act_bits": FLOAT_BITS, **config})
    if "zero_point" in config:  # how AWQ says it
        flat["sym"] = not config["zero_point"]
    base = Scheme.from_flat(flat)
    extra, patterns = _extra_config(config)
    prefixes = _prefixes(model, config)
    renamed = SavedNames(model).renamed
    found = {}
    # What several blocks share a checkpoint holds once, in floating point.
    shared = shared_matrices(model)
    for name in _matrices(model):
        if name in shared:
            continue
        # The configuration may speak of layers as the checkpoint does, or as the module tree does.
        stored = renamed(f"{name}.weight").removesuffix(".weight")
        settings_of_layer = _layer_settings(name, extra, patterns)
        if settings_of_layer is None:
            settings_of_layer = _layer_settings(stored, extra, patterns)
        if settings_of_layer is None and name.endswith(quirks.ROUTER_ENDINGS):
            continue
        inside = any(n.startswith(f"{prefix}.") for prefix in prefixes for n in (name, stored))
        if not inside and settings_of_layer is None and not (config.get("lm_head") and name == "lm_head"):
            continue
        if _left_alone((name, stored), inside, config):
            continue
        try:
            scheme = Scheme.from_flat(flat_settings(settings_of_layer or {}), base)
            found[name] = _dynamic(name, scheme, config.get("dynamic") or {})
        except SchemeError as error:
            raise FormatError(f"{name}: {error}") from error
    return found


def _matrices(model: nn.Module) -> list[str]:
    """Names, in checkpoints, of everything that may be quantized."""
    plain = [name for name, module in model.named_modules() if is_matrix(module)]
    return plain + [layer for experts in find_experts(model) for layer, _ in experts.pieces()]


def _extra_config(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[re.Pattern[str], Any]]:
    """(all settings by layer, those whose key is an expression). Raises FormatError for what cannot be read."""
    extra = config.get("extra_config") or {}
    if not isinstance(extra, Mapping):
        raise FormatError(f"extra_config must map layers to settings, got {extra!r}")
    for key, value in extra.items():
        if not isinstance(value, Mapping):
            raise FormatError(f"extra_config {key!r}: expected settings such as {{'bits': 8}}, got {value!r}")
    patterns = {compiled(key, "extra_config key"): value for key, value in extra.items() if is_pattern(key)}
    return extra, patterns


def _layer_settings(
    name: str, extra: Mapping[str, Any], patterns: Mapping[re.Pattern[str], Any]
) -> Mapping[str, Any] | None:
    if name in extra:
        return dict(extra[name])
    return next(
        # The last pattern counts, as when the checkpoint was made.
        (dict(value) for key, value in reversed(list(patterns.items())) if key.search(name)),
        None,
    )


def _prefixes(model: nn.Module, config: Mapping[str, Any]) -> list[str]:
    named = config.get("block_name_to_quantize") or config.get("to_quant_block_names")
    if not named:
        return [blocks[0].rsplit(".", 1)[0] for blocks in block_lists(model)]
    parts = named.split(",") if isinstance(named, str) else [str(part) for part in named]
    return [part.strip() for part in parts]


def _left_alone(names: tuple[str, ...], inside: bool, config: Mapping[str, Any]) -> bool:
    """Whether a GPTQ or AWQ configuration keeps the layer called `names` in floating point."""
    listed = config.get("modules_in_block_to_quantize")
    if listed and inside:
        endings = [ending for group in listed for ending in ([group] if isinstance(group, str) else group)]
        if not any(name.endswith(f".{ending}") for ending in endings for name in names):
            return True
    excluded = config.get("modules_to_not_convert") or []
    return any(
        name == entry or name.endswith(f".{entry}") or f".{entry}." in f".{name}"
        for entry in excluded
        for name in names
    )


def _dynamic(name: str, scheme: Scheme, rules: Mapping[str, Any]) -> Scheme:
    """GPTQModel's rules: "-:regex" leaves a layer alone, "+:regex" overrides its settings; the first match counts."""
    for rule, override in rules.items():
        sign, _, pattern = rule.partition(":") if rule[:2] in ("+:", "-:") else ("+", ":", rule)
        if compiled(pattern, "rule of dynamic").match(name):
            return Scheme(weight=None) if sign == "-" else Scheme.from_flat(flat_settings(override), scheme)
    return scheme
