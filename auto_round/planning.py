"""From options to decisions that need no weights: numbers, scheme, formats, and the plan of a model."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from types import MappingProxyType

from auto_round.codecs.base import codec_of, preset
from auto_round.core.auto_scheme import AutoScheme
from auto_round.core.errors import FormatError, PlanError, SchemeError
from auto_round.core.plan import Plan
from auto_round.core.rotation import rotations_of
from auto_round.core.scheme import FLAT_NAMES, WHOLE_MODEL, QuantizationScheme, Scheme
from auto_round.core.selection import Selection, make_plan, parse_ignore, parse_layer_config, schemes_of
from auto_round.formats.base import Format, parse_formats
from auto_round.models.anatomy import Anatomy, experts_of
from auto_round.models.subject import Subject, check_sources
from auto_round.options import DEFAULT_SCHEME, Options
from auto_round.recipes import BEFOREHAND, ROTATING, algorithm_named

logger = logging.getLogger("auto_round")
MIXED_SCHEME = "W4A16_MIXED"
NOTHING: Mapping[str, Scheme] = MappingProxyType({})


def settled(options: Options) -> Options:
    """`options` with what `alg_configs` and `algorithm` say. Raises PlanError when they contradict each other."""
    if isinstance(options.scheme, (QuantizationScheme, dict)) and options.rotation_config is None:
        options = replace(options, rotation_config=options.scheme.get(WHOLE_MODEL))
        options.check()
    configs = options.alg_configs
    if configs is not None:
        if options.algorithm is not None:
            raise PlanError("give algorithm or alg_configs, not both")
        for config in configs if isinstance(configs, (list, tuple)) else [configs]:
            if isinstance(config, str):
                earlier = f"{options.algorithm}," if options.algorithm else ""
                options = replace(options, algorithm=earlier + config)
            else:
                options = config.merged(options)
    if options.algorithm is not None:
        options = _with_rotations(options)
    if options.algorithm is not None:
        names = {algorithm_named(part) for part in options.algorithm.split(",") if part.strip()}
        before, rounding = names & set(BEFOREHAND), names - set(BEFOREHAND)
        if len(rounding) > 1 or not names:
            raise PlanError(
                f"algorithm {options.algorithm!r}: give one that rounds, {', '.join(BEFOREHAND)} before it if wanted"
            )
        alone = "sign_round" if options.iters else "opt_rtn"
        chosen = rounding.pop() if rounding else alone
        options = replace(options, algorithm=chosen, enable_awq=options.enable_awq or "awq" in before)
    options.check_awq()
    return _with_auto_scheme(options)


def _with_rotations(options: Options) -> Options:
    """`options` with a rotation that `algorithm` names, "quarot,auto_round", as `rotation_config`."""
    assert options.algorithm is not None, "there is an algorithm"
    parts = [part.strip() for part in options.algorithm.split(",") if part.strip()]
    words = [part for part in parts if part.casefold().replace("-", "_") in ROTATING]
    if not words:
        return options
    if options.rotation_config is not None or len(words) > 1:
        raise PlanError(f"algorithm {options.algorithm!r}: give one rotation, here or as rotation_config")
    rest = ",".join(part for part in parts if part not in words) or None
    options = replace(options, algorithm=rest, rotation_config=words[0])
    options.check_rotations()
    return options


def _with_auto_scheme(options: Options) -> Options:
    """`options` with one `AutoScheme` for `schemes` and `bits`, or one that single settings do not contradict."""
    if options.schemes is not None:
        if options.bits is None:
            raise PlanError(
                "schemes are what a budget chooses from: give bits, the bits per weight on average, too"
            )
        scheme = AutoScheme(avg_bits=options.bits, options=options.schemes)
        options = replace(options, scheme=scheme, schemes=None, bits=None)
    elif isinstance(options.bits, float) and not options.bits.is_integer():
        raise PlanError(
            f"bits={options.bits}: an average number of bits needs schemes to choose from (AutoScheme)"
        )
    if isinstance(options.scheme, AutoScheme) and (said := _single_settings(options)):
        raise PlanError(
            f"{', '.join(said)}: with AutoScheme the options say it all; give schemes as QuantizationScheme(...)"
        )
    return options


def _single_settings(options: Options) -> dict[str, object]:
    """The settings of a scheme that were given one by one."""
    given = {f.name: getattr(options, f.name) for f in fields(options)}
    return {name: given[name] for name in FLAT_NAMES if given.get(name) is not None and name != WHOLE_MODEL}


def base_scheme(options: Options) -> Scheme:
    """The scheme for all layers: `scheme` by name or object, with the single settings on top.

    Raises SchemeError.
    """
    given = options.scheme
    if isinstance(given, str):
        start = preset(given)
    elif isinstance(given, Scheme):
        start = given
    elif isinstance(given, QuantizationScheme):
        start = Scheme.from_flat({f.name: given[f.name] for f in fields(given) if f.name != WHOLE_MODEL})
    elif isinstance(given, dict):
        start = Scheme.from_flat({key: value for key, value in given.items() if key != WHOLE_MODEL})
    elif isinstance(given, AutoScheme):
        return next(iter(given.schemes(preset).values()))  # until layers have theirs
    else:
        raise SchemeError(
            f"scheme of type {type(given).__name__}: give a name, a dict, QuantizationScheme or AutoScheme"
        )
    said = _single_settings(options)
    scheme = Scheme.from_flat(said, start) if said else start
    _check_codecs(scheme)
    return scheme


COMPRESSED_WHEN_STREAMED = ("MXFP4", "MXFP8")


def formats_for(options: Options, base: Scheme, given: str | None = None) -> list[Format]:
    """The formats given here or in the options, or what the scheme stands for: a GGUF scheme is a format too."""
    scheme = options.scheme
    meant = scheme.lower() if isinstance(scheme, str) and scheme.upper().startswith("GGUF:") else None
    # What the guide promises for model-free mode; other flows write these schemes as auto_round.
    served = options.model_free and base in map(preset, COMPRESSED_WHEN_STREAMED)
    formats = parse_formats(
        given or options.format or meant or ("llm_compressor" if served else "auto_round")
    )
    for fmt in formats:
        if meant is not None and fmt.name != meant and (fmt.whole_model or fmt.holds_codes):
            raise PlanError(
                f"scheme {scheme} is written by format {meant}, got format {fmt.name}. Leave one of them out"
            )
        # The default scheme counts as not said: nothing tells it from one that was typed in.
        if fmt.whole_model and meant is None and base != preset(DEFAULT_SCHEME):
            raise PlanError(
                f"format {fmt.name} has a scheme of its own, got scheme {base}. "
                "Leave scheme, bits, group_size and sym out; single layers can be changed with layer_config"
            )
    return formats


def selected(
    body: Anatomy, options: Options, base: Scheme, own: Mapping[str, Scheme] = NOTHING, *, whole: bool = False
) -> Plan:
    """Which layers of `body` get which scheme by the user's words; a layer that these name has a reason.

    own: schemes in the place of `base`. whole: whether embedding and head are quantized too.
    """
    selection = Selection(
        base=base,
        layer_config=parse_layer_config(options.layer_config),
        own=own,
        ignore_layers=parse_ignore(options.ignore_layers),
    )
    default = body.in_blocks()
    if options.quant_lm_head:
        if body.head is None:
            raise PlanError("quant_lm_head: this model has no output head")
        default.append(body.head)
    if whole:
        outside = [body.embedding, None if body.tied else body.head]
        default += [name for name in outside if name is not None and name not in default]
    return make_plan(body.shapes(), selection, preset, default=default, fused=body.fused())


def plan_for(
    subject: Subject, options: Options, base: Scheme, formats: Sequence[Format], chosen: Mapping[str, Scheme]
) -> Plan:
    """The plan for a model, options and formats; nothing is read but headers and configuration.

    chosen: what an `AutoScheme` has become, layer by layer.
    Raises PlanError, SchemeError or FormatError for what cannot be carried out.
    """
    whole = any(fmt.whole_model for fmt in formats)
    _check_rotations(options, formats)
    base, body = formats[0].scheme or base, subject.anatomy
    plan = selected(body, options, base, _beside_experts(subject, options, base), whole=whole)
    plan = plan.override({name: chosen[name] for name in plan if name in chosen}, "AutoScheme")
    for fmt in formats:
        # Formats with mixtures choose first; what is checked below is what will be done.
        plan = fmt.adapt(plan, subject.files.config)
    for name in plan.quantized():
        _check_spec(name, plan[name])
    if body.embedding in plan.quantized():
        _check_embedding(body.embedding, formats)
    for fmt in formats:
        plan = fmt.resolve(plan).check(plan)
    if not plan.quantized() and base.weight is not None:
        raise PlanError(
            f"no layer is left to quantize: {'; '.join(sorted(set(plan.why.values()))) or 'no layer found'}"
        )
    if body.tied and body.head in plan.quantized():
        plan = plan.noted(f"{body.head} is tied to the embedding: untied, since it is to be quantized")
    plan = plan.noted(*body.notes, *(_mixed(plan) if any(fmt.merged for fmt in formats) else ()))
    for note in plan.notes:
        logger.warning(note)
    check_sources(subject, plan)
    return plan


def _check_rotations(options: Options, formats: Sequence[Format]) -> None:
    """Raise FormatError when inputs are to be turned at run time, and readers of one of `formats` would not."""
    wish = rotations_of(options.rotation_config)
    for fmt in formats:
        if wish is not None and wish.online and not fmt.turns_inputs:
            raise FormatError(
                f"rotation_config: readers of {fmt.name} do not turn inputs at run time "
                f"({', '.join(wish.online)}). Use --format auto_round, or what weights take up: "
                "SpinQuantConfig(r1=True, r2=True, online_r1_rotation=False)"
            )


def _check_embedding(name: str | None, formats: Sequence[Format]) -> None:
    """Raise FormatError when one of `formats` has no readers for a quantized embedding."""
    for fmt in formats:
        if not (fmt.whole_model or fmt.holds_embedding):
            raise FormatError(
                f"{name}: readers of {fmt.name} keep the embedding in floating point. Use --format mlx or a gguf type, "
                "or leave it out of layer_config"
            )


def _beside_experts(subject: Subject, options: Options, base: Scheme) -> dict[str, Scheme]:
    """W4A16_MIXED: in a model with experts, the layers that are none, which all tokens go through, have 8 bits."""
    asked = isinstance(options.scheme, str) and options.scheme.strip().upper() == MIXED_SCHEME
    layers = subject.anatomy.in_blocks()
    if not asked or all(experts_of(name) is None for name in layers):
        return {}
    others = Scheme.from_flat({"bits": 8}, base)  # group and symmetry as the experts have them
    return {name: others for name in layers if experts_of(name) is None}


def weights_alone(options: Options, base: Scheme) -> bool:
    """Whether weights are all that this job will look at, whatever data there is."""
    numbers = options.numbers()
    plain = options.model_free or (numbers.iters == 0 and numbers.disable_opt_rtn)
    if options.save_imatrix is not None or (options.enable_awq and not options.model_free):
        return False
    given = schemes_of(parse_layer_config(options.layer_config), base, preset).values()
    acts = [scheme.act for scheme in (base, *given) if scheme.act is not None]
    if any(codec_of(act).needs_range(act) for act in acts):
        return False
    return plain and not options.disable_model_free


def _check_spec(name: str, scheme: Scheme) -> None:
    """Raise SchemeError, naming the layer, when its data type cannot do its settings."""
    try:
        _check_codecs(scheme)
    except SchemeError as error:
        raise SchemeError(f"{name}: {error}") from error


def _check_codecs(scheme: Scheme) -> None:
    if scheme.weight is not None:
        codec_of(scheme.weight)
    if scheme.act is not None:
        codec_of(scheme.act)


def _mixed(plan: Plan) -> Iterator[str]:
    """One remark per kind of fused set whose layers differ, with the number of blocks it is so in."""
    kinds: Counter[tuple[str, str]] = Counter()
    for names in plan.mixed_fused_sets():
        experts = experts_of(names[0])
        place = names[0].rpartition(".")[0] if experts is None else experts
        settings = ", ".join(f"{name.rsplit('.', 1)[-1]}: {plan[name]}" for name in names)
        if experts is not None:
            counts = Counter(str(plan[name]) for name in names)
            settings = ", ".join(f"{count} layers {scheme}" for scheme, count in counts.items())
        kinds[re.sub(r"\.\d+\.", ".*.", place), settings] += 1  # one remark for all blocks
    for (place, settings), count in kinds.items():
        yield f"{place} ({count} times): servers merge these layers and refuse different settings ({settings})"
