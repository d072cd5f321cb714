"""How tensors are represented: `TensorSpec` for one tensor, `Scheme` for a layer.

The flat names of configuration files and of the command line ("group_size", "act_bits", ...) are known here only; how
they spell data types is in `core/spelling.py`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from auto_round.core.errors import NotYetError, SchemeError, nearest
from auto_round.core.spelling import scale_dtype_of, spell, spelled

FLOAT_BITS = 16  # from so many on, a layer is left alone: upstream's word for it is bits 16
SCALE_DTYPES = {
    "fp16": "float16",
    "float16": "float16",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp32": "float32",
    "float32": "float32",
}
STORED_SCALES = frozenset(SCALE_DTYPES.values())


Group = int | tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """How the values of one tensor are represented. Says nothing about how they are found.

    dtype: name of a codec. group: values that share a scale (-1 per row, 0 per tensor, (r, c) per block of the matrix).
    scale_dtype: torch name, or "e8m0", "e4m3", "e5m3" where the data type has scales of its own. dynamic: for layer
    inputs, whether the range is found at run time. variant: a codec's own dialect ("rceil", "e5m2").
    """

    dtype: str = "int"
    bits: int = 4
    group: Group = 128
    sym: bool = True
    scale_dtype: str = "float16"
    dynamic: bool = True
    variant: str = ""

    def __str__(self) -> str:
        group = "x".join(map(str, self.group)) if isinstance(self.group, tuple) else self.group
        words = (
            f"{self.dtype}{self.bits} g{group} {'sym' if self.sym else 'asym'}",
            self.variant,
            "" if self.dynamic else "static",
        )
        return " ".join(word for word in words if word)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How one layer is represented. `weight` None keeps it in floating point; `act` None leaves its inputs alone."""

    weight: TensorSpec | None
    act: TensorSpec | None = None

    @classmethod
    def from_flat(cls, flat: Mapping[str, object], base: Scheme | None = None) -> Scheme:
        """Read the flat names; what `flat` leaves out (or gives as None) is taken from `base`.

        Raises SchemeError for an unknown name, an impossible value, or settings that contradict each other.
        """
        # Configurations in the wild list every setting of a layer outside the blocks, as null where it does not apply.
        given = {key: value for key, value in flat.items() if value is not None}
        for key in given:
            if key not in FLAT_NAMES:
                raise SchemeError(
                    f"{key!r} is no setting of a scheme.{nearest(key, FLAT_NAMES)} Known: {_listing()}"
                )
        if WHOLE_MODEL in given:
            raise SchemeError(
                f"{WHOLE_MODEL}={given[WHOLE_MODEL]!r}: rotations are the whole model's, not a layer's: "
                f"AutoRound(..., {WHOLE_MODEL}=...)"
            )
        for key in LATER_NAMES:
            if key in given:
                raise NotYetError(f"{key}={given[key]!r} is not there yet; leave it out")
        # Both are ways in which checkpoints say that a layer was left alone.
        if _whole("bits", given.get("bits", 0)) >= FLOAT_BITS or given.get("data_type") == "float":
            if _whole("act_bits", given.get("act_bits", FLOAT_BITS)) < FLOAT_BITS:
                raise SchemeError(
                    f"act_bits={given['act_bits']} with bits 16: inputs are quantized along with weights only; "
                    "leave act_bits out"
                )
            return FLOAT
        start = base.weight if base is not None and base.weight is not None else TensorSpec()
        weight = replace(start, **_changes(given, WEIGHT_NAMES))
        return cls(weight=weight, act=_act(given, weight, None if base is None else base.act))

    def to_flat(self) -> dict[str, object]:
        """The flat names, as checkpoint configurations store them."""
        if self.weight is None:
            return {"bits": FLOAT_BITS, "data_type": "float"}
        w = self.weight
        flat: dict[str, object] = {"bits": w.bits, "group_size": _flat_group(w.group), "sym": w.sym}
        # Scales of MX and NVFP4 follow from the word; plain float ones are said only where they are not the usual.
        flat["data_type"] = spell(w.dtype, w.bits, w.variant, w.scale_dtype)
        if w.scale_dtype in STORED_SCALES and w.scale_dtype != scale_dtype_of(w.dtype):
            flat["scale_dtype"] = w.scale_dtype
        if self.act is not None:
            a = self.act
            flat |= {"act_bits": a.bits, "act_group_size": _flat_group(a.group), "act_sym": a.sym}
            flat |= {"act_data_type": spell(a.dtype, a.bits, a.variant, a.scale_dtype)}
            flat |= {"act_dynamic": a.dynamic}
        return flat

    def __str__(self) -> str:
        if self.weight is None:
            return "float"
        return str(self.weight) if self.act is None else f"{self.weight}, inputs {self.act}"


FLOAT = Scheme(weight=None)
WEIGHT_NAMES = {
    "bits": "bits",
    "group_size": "group",
    "sym": "sym",
    "data_type": "dtype",
    "scale_dtype": "scale_dtype",
}
ACT_NAMES = {
    "act_bits": "bits",
    "act_group_size": "group",
    "act_sym": "sym",
    "act_data_type": "dtype",
    "act_dynamic": "dynamic",
}
LATER_NAMES = ("super_bits", "super_group_size")
WHOLE_MODEL = "rotation_config"
"""A field of the public form that no layer has for itself."""
FLAT_NAMES = (*WEIGHT_NAMES, *ACT_NAMES, *LATER_NAMES, WHOLE_MODEL)


def _listing() -> str:
    return ", ".join(FLAT_NAMES)


def _flat_group(group: Group) -> int | list[int]:
    return list(group) if isinstance(group, tuple) else group


def _changes(given: Mapping[str, object], names: Mapping[str, str]) -> dict[str, Any]:
    """The fields of a `TensorSpec` that `given` sets; a data type brings its dialect, scales and maybe bits along."""
    changes = {ours: _checked(key, given[key]) for key, ours in names.items() if key in given}
    if "dtype" in changes:
        word = spelled(changes["dtype"])
        # "mx_fp4" says the bits, "mx_fp" does not.
        if word.bits and changes.setdefault("bits", word.bits) != word.bits:
            raise SchemeError(
                f"data type {changes['dtype']!r} has {word.bits} bits, but bits={changes['bits']} is given"
            )
        changes |= {"dtype": word.dtype, "variant": word.variant}
        # Last and only if missing: a scale_dtype that was given is the user's.
        changes.setdefault("scale_dtype", word.scale_dtype)
    return changes


def _act(given: Mapping[str, object], weight: TensorSpec, base: TensorSpec | None) -> TensorSpec | None:
    """The spec of the inputs: what is not said is as for the weights, and the range is found at run time."""
    # Upstream writes act_data_type "float" where inputs are not quantized: that is no data type.
    changes = _changes({k: v for k, v in given.items() if k != "act_data_type" or v != "float"}, ACT_NAMES)
    if changes.get("bits", 0) >= FLOAT_BITS:
        return None
    if base is None and "bits" not in changes:
        if changes:
            said = ", ".join(f"{key}={given[key]!r}" for key in ACT_NAMES if key in given)
            raise SchemeError(f"{said}, but inputs are not quantized: give act_bits too, or leave it out")
        return None
    # Inputs have no blocks of rows: 128 x 128 blocks of weights go with runs of 128 inputs, as in DeepSeek-V3.
    group = weight.group[1] if isinstance(weight.group, tuple) else weight.group
    start = base or replace(weight, group=group)
    spec = replace(start, **changes)
    if base is None or changes:
        spec = replace(spec, scale_dtype=scale_dtype_of(spec.dtype, spec.scale_dtype, run_time=spec.dynamic))
    return spec


def _checked(key: str, value: Any) -> Any:
    """`value` of the flat name `key` in our own form, or a SchemeError that says what is allowed."""
    if key in ("sym", "act_sym", "act_dynamic"):
        if not isinstance(value, bool):
            raise SchemeError(f"{key} must be true or false, got {value!r}")
        return value
    if key == "scale_dtype":
        name = str(value).removeprefix("torch.")
        if name not in SCALE_DTYPES:
            raise SchemeError(f"scale_dtype {value!r} is unknown. Known: {', '.join(SCALE_DTYPES)}")
        return SCALE_DTYPES[name]
    if key in ("data_type", "act_data_type"):
        return str(value)
    if key in ("group_size", "act_group_size"):
        return _group(key, value)
    return _whole(key, value)


def _group(key: str, value: Any) -> Group:
    """A number, or a block (rows, columns) given as a list of two or as "128,128"."""
    parts = re.split("[, x]+", value.strip()) if isinstance(value, str) else value
    if isinstance(parts, (list, tuple)) and len(parts) != 1:  # a list of one is a plain number
        sizes = tuple(_whole(key, part) for part in parts)
        if len(sizes) != 2 or min(sizes) < 1:
            raise SchemeError(
                f"{key} {value!r} is not possible: a block has two positive sides, such as [128, 128]"
            )
        return sizes[0], sizes[1]
    number = _whole(key, parts[0] if isinstance(parts, (list, tuple)) else parts)
    if number < -1:
        raise SchemeError(
            f"{key} {number} is not possible: positive, -1 (one per row), 0 (one per tensor) or a block of two"
        )
    return number


def _whole(key: str, value: object) -> int:
    """`value` as a number, or a SchemeError that names `key`."""
    # True is an int to Python; digits alone let "4" from a command line pass and 4.5 fail.
    if isinstance(value, bool) or not str(value).removeprefix("-").isdecimal():
        raise SchemeError(f"{key} must be a whole number, got {value!r}")
    return int(str(value))


@dataclass
class QuantizationScheme:
    """The flat, public form of a scheme, a mapping too: ``QuantizationScheme(bits=2, group_size=64)["bits"]``."""

    bits: int = 4
    group_size: int | tuple[int, int] = 128
    sym: bool = True
    data_type: str = "int"
    act_bits: int | None = None
    act_group_size: int | tuple[int, int] | None = None
    act_sym: bool | None = None
    act_data_type: str | None = None
    act_dynamic: bool | None = None
    super_bits: int | None = None
    super_group_size: int | None = None
    rotation_config: object | None = None

    @classmethod
    def from_dict(cls, flat: Mapping[str, Any]) -> QuantizationScheme:
        """Build one from a mapping. Raises SchemeError for a name that is no field."""
        names = [f.name for f in fields(cls)]
        for key in flat:
            if key not in names:
                raise SchemeError(
                    f"{key!r} is no setting of a scheme.{nearest(key, names)} Known: {', '.join(names)}"
                )
        return cls(**flat)

    def keys(self) -> Iterator[str]:
        """The names of all settings."""
        return (f.name for f in fields(self))

    def __getitem__(self, key: str) -> Any:
        return dataclasses.asdict(self)[key]

    def get(self, key: str, default: Any = None) -> Any:
        """The setting `key`, or `default` when there is no such setting."""
        return dataclasses.asdict(self).get(key, default)
