"""How tensors are represented: `TensorSpec` for one tensor, `Scheme` for a layer.

The flat names of configuration files and of the command line ("group_size", "act_bits", ...) are known here only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from auto_round.core.errors import NotYetError, SchemeError, nearest

FLOAT_BITS = 16
SCALE_DTYPES = {
    "fp16": "float16",
    "float16": "float16",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp32": "float32",
    "float32": "float32",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """How the values of one tensor are represented. Says nothing about how they are found.

    dtype: name of a codec. group: values that share a scale (-1 per row, 0 per tensor). scale_dtype: torch name.
    """

    dtype: str = "int"
    bits: int = 4
    group: int = 128
    sym: bool = True
    scale_dtype: str = "float16"

    def __str__(self) -> str:
        symmetry = "sym" if self.sym else "asym"
        return f"{self.dtype}{self.bits} g{self.group} {symmetry}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How one layer is represented. `weight` None keeps it in floating point."""

    weight: TensorSpec | None

    @classmethod
    def from_flat(cls, flat: Mapping[str, object], base: Scheme | None = None) -> Scheme:
        """Read the flat names; what `flat` leaves out (or gives as None) is taken from `base`.

        Raises SchemeError for an unknown name or an impossible value, NotYetError for activation quantization.
        """
        given = {key: value for key, value in flat.items() if value is not None}
        for key in given:
            if key not in FLAT_NAMES:
                raise SchemeError(
                    f"{key!r} is no setting of a scheme.{nearest(key, FLAT_NAMES)} Known: {_listing()}"
                )
        _refuse_later(given)
        if _whole("bits", given.get("bits", 0)) >= FLOAT_BITS or given.get("data_type") == "float":
            return FLOAT
        start = base.weight if base is not None and base.weight is not None else TensorSpec()
        changes = {ours: _checked(key, given[key]) for key, ours in WEIGHT_NAMES.items() if key in given}
        return cls(weight=replace(start, **changes))

    def to_flat(self) -> dict[str, object]:
        """The flat names, as checkpoint configurations store them."""
        if self.weight is None:
            return {"bits": FLOAT_BITS, "data_type": "float"}
        w = self.weight
        return {"bits": w.bits, "group_size": w.group, "sym": w.sym, "data_type": w.dtype}

    def __str__(self) -> str:
        return "float" if self.weight is None else str(self.weight)


FLOAT = Scheme(weight=None)
WEIGHT_NAMES = {
    "bits": "bits",
    "group_size": "group",
    "sym": "sym",
    "data_type": "dtype",
    "scale_dtype": "scale_dtype",
}
ACT_NAMES = ("act_bits", "act_group_size", "act_sym", "act_data_type", "act_dynamic")
LATER_NAMES = ("super_bits", "super_group_size", "rotation_config")
FLAT_NAMES = (*WEIGHT_NAMES, *ACT_NAMES, *LATER_NAMES)


def _listing() -> str:
    return ", ".join(FLAT_NAMES)


def _refuse_later(given: Mapping[str, object]) -> None:
    if _whole("act_bits", given.get("act_bits", FLOAT_BITS)) < FLOAT_BITS:
        raise NotYetError(
            f"act_bits={given['act_bits']}: quantized activations are not there yet; leave act_bits at 16"
        )
    for key in LATER_NAMES:
        if key in given:
            raise NotYetError(f"{key}={given[key]!r} is not there yet; leave it out")


def _checked(key: str, value: Any) -> Any:
    """`value` of the flat name `key` in our own form, or a SchemeError that says what is allowed."""
    if key == "sym":
        if not isinstance(value, bool):
            raise SchemeError(f"sym must be true or false, got {value!r}")
        return value
    if key == "scale_dtype":
        name = str(value).removeprefix("torch.")
        if name not in SCALE_DTYPES:
            raise SchemeError(f"scale_dtype {value!r} is unknown. Known: {', '.join(SCALE_DTYPES)}")
        return SCALE_DTYPES[name]
    if key == "data_type":
        return str(value)
    if isinstance(value, (list, tuple)):
        raise NotYetError(f"{key}={value!r}: two-dimensional groups are not there yet; give one number")
    number = _whole(key, value)
    if key == "group_size" and number < -1:
        raise SchemeError(
            f"group_size {number} is not possible: positive, -1 (one per row) or 0 (one per tensor)"
        )
    return number


def _whole(key: str, value: object) -> int:
    """`value` as a number, or a SchemeError that names `key`."""
    if isinstance(value, bool) or not str(value).removeprefix("-").isdigit():
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
