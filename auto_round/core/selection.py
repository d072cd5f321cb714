"""From the user's words to a `Plan`: base scheme, `layer_config`, ignored layers, in that order. Pure functions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from auto_round.core.errors import NotYetError, PlanError, SchemeError, nearest
from auto_round.core.plan import Plan
from auto_round.core.scheme import QuantizationScheme, Scheme

REGEX_MARKS = re.compile(r"[*+?^$\[\]()|{}\\]")

Setting = str | Mapping[str, object] | QuantizationScheme | Scheme
PresetLookup = Callable[[str], Scheme]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What the user asked for, layer by layer. own: schemes of single layers in the place of `base`."""

    base: Scheme
    layer_config: Mapping[str, Setting]
    own: Mapping[str, Scheme] = field(default_factory=dict)
    ignore_layers: tuple[str, ...] = ()


def matches(pattern: str, name: str) -> bool:
    """Whether the `layer_config` key `pattern` means the layer `name`.

    A full name means itself; a word without regular-expression marks means every name that contains it; anything else
    is searched as a regular expression in which a bare dot is a dot and ``.*`` is anything.
    Raises PlanError for a broken expression.
    """
    if pattern == name:
        return True
    if not REGEX_MARKS.search(pattern):  # a dot is no mark: nearly every name has one
        return pattern in name
    expression = re.sub(r"(?<![\\])\.(?![*+?])", r"\\.", pattern)
    # A leading bare star, as in "*.k_proj", is how shells spell "anything".
    expression = re.sub(r"^\*", ".*", expression)
    try:
        return re.search(expression, name) is not None
    except re.error as error:
        raise PlanError(f"layer_config key {pattern!r} is no valid regular expression: {error}") from error


def ignored(entry: str, name: str) -> bool:
    """Whether the `ignore_layers` entry means the layer `name`; "layers.1" does not mean "layers.10"."""
    if entry[-1:].isdigit():
        return name == entry or f"{entry}." in f"{name}."
    return entry in name


def parse_ignore(text: str | Iterable[str] | None) -> tuple[str, ...]:
    """``"a,b"`` or a list of names, as a tuple without blanks."""
    if not text:
        return ()
    parts = text.split(",") if isinstance(text, str) else list(text)
    return tuple(part.strip() for part in parts if part.strip())


def parse_layer_config(text: str | Mapping[str, Setting] | None) -> dict[str, Setting]:
    """A dict, JSON, or the unquoted ``{k_proj:{bits:8},v_proj:{bits:8}}``. Raises PlanError when it is none of them."""
    if not text:
        return {}
    if not isinstance(text, str):
        return dict(text)
    # As JSON first: quoting the words of what is JSON already would spoil strings with colons or commas.
    for candidate in (text, _quote_bare_words(text)):
        try:
            parsed = json.loads(candidate)
        except json.JSONDecodeError:
            continue
        if isinstance(parsed, dict):
            return parsed
    raise PlanError(
        f'layer_config {text!r} cannot be read. Write it as {{k_proj:{{bits:8}}}} or {{"k_proj": {{"bits": 8}}}}'
    )


def _quote_bare_words(text: str) -> str:
    """``{a.*b:{bits:8,sym:True}}`` to JSON: everything between braces, colons and commas becomes a JSON value."""
    return re.sub(r"[^{}:,]+", lambda found: _json_value(found[0]), text)


def _json_value(word: str) -> str:
    bare = word.strip().strip("'\"")  # shells and copied Python leave quotes of either kind
    if not bare:
        return ""
    if bare.casefold() in ("true", "false", "none", "null"):
        return {"none": "null"}.get(bare.casefold(), bare.casefold())
    return bare if re.fullmatch(r"-?\d+(\.\d+)?", bare) else json.dumps(bare)


def make_plan(
    shapes: Mapping[str, tuple[int, int]],
    selection: Selection,
    preset: PresetLookup,
    *,
    default: Iterable[str],
    fused: Iterable[frozenset[str]] = (),
) -> Plan:
    """The plan for layers of `shapes`.

    `default` names the layers that get the base scheme; the others (lm_head, say) stay in floating point unless
    `layer_config` names them. A full name in `layer_config` wins over patterns, a later pattern over an earlier one.
    Raises PlanError or SchemeError for a setting that cannot be carried out.
    """
    wanted = set(default)
    plan = Plan(
        {name: selection.own.get(name, selection.base) for name in shapes if name in wanted},
        shapes=shapes,
        base=selection.base,
        fused=fused,
    )
    settings = schemes_of(selection.layer_config, selection.base, preset)
    extra: dict[str, Scheme] = {}
    why: dict[str, str] = {}
    unused = set(settings)
    for exact in (False, True):  # full names in a second round, so that they win
        for key, scheme in settings.items():
            named = [name for name in shapes if _applies(key, name, exact=exact, selectable=wanted)]
            extra.update(dict.fromkeys(named, scheme))
            why.update(dict.fromkeys(named, f"layer_config {key!r}"))
            # Only a note: the guide's own examples name layers of another model (docs/decisions/0009).
            unused -= {key} if named else set()
    plan = _with_layers(plan, shapes, extra, why)
    for key in sorted(unused):
        plan = plan.noted(f"layer_config {key!r} matches no layer.{nearest(key, shapes)}")
    return _ignore(plan, selection.ignore_layers)


def schemes_of(layer_config: Mapping[str, Setting], base: Scheme, preset: PresetLookup) -> dict[str, Scheme]:
    """The scheme that each key of `layer_config` stands for. Raises PlanError or SchemeError naming the key."""
    return {key: _scheme_of(key, value, base, preset) for key, value in layer_config.items()}


def _applies(key: str, name: str, *, exact: bool, selectable: set[str]) -> bool:
    """Patterns speak of the layers that are quantized by default; a full name may add any other layer."""
    if exact:
        return key == name
    return key != name and name in selectable and matches(key, name)


def _with_layers(
    plan: Plan, shapes: Mapping[str, tuple[int, int]], extra: Mapping[str, Scheme], why: Mapping[str, str]
) -> Plan:
    schemes = {name: extra.get(name, plan.get(name)) for name in shapes if name in extra or name in plan}
    return Plan(
        {name: scheme for name, scheme in schemes.items() if scheme is not None},
        shapes=shapes,
        base=plan.base,
        fused=plan.fused,
        why={**plan.why, **why},
        notes=plan.notes,
    )


def _ignore(plan: Plan, entries: Iterable[str]) -> Plan:
    for entry in entries:
        named = [name for name in plan if ignored(entry, name)]
        if not named:
            plan = plan.noted(f"ignore_layers {entry!r} matches no layer.{nearest(entry, plan)}")
        plan = plan.override(dict.fromkeys(named), f"ignore_layers {entry!r}")
    return plan


def _scheme_of(key: str, value: Setting, base: Scheme, preset: PresetLookup) -> Scheme:
    """The scheme that one `layer_config` value asks for; errors say which key it was."""
    try:
        return _read_setting(key, value, base, preset)
    except (SchemeError, NotYetError) as error:
        raise type(error)(f"layer_config {key!r}: {error}") from error


def _read_setting(key: str, value: Setting, base: Scheme, preset: PresetLookup) -> Scheme:
    if isinstance(value, Scheme):  # a plan's own entries can be given back
        return value
    if isinstance(value, str):
        return preset(value)
    if isinstance(value, QuantizationScheme):
        return Scheme.from_flat({k: value[k] for k in value.keys()})  # noqa: SIM118 - it is no dict
    if not isinstance(value, Mapping):
        raise PlanError(
            f"layer_config {key!r}: expected a preset name or settings such as {{'bits': 8}}, got {value!r}"
        )
    # "fixed_by_user" is a mark that upstream leaves in its own results; it says nothing about the layer.
    settings = {k: v for k, v in value.items() if k not in ("scheme", "fixed_by_user")}
    start = preset(str(value["scheme"])) if "scheme" in value else base
    return Scheme.from_flat(settings, start) if settings else start
