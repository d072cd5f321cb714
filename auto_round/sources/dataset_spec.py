"""The grammar of `--dataset`: ``name:option=value:...,name``, with quotes around what holds a colon or a comma."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from auto_round.core.errors import DataError, nearest

OPTIONS = ("num", "split", "concat", "apply_chat_template", "system_prompt")
SPLITS = ("train", "validation", "test")
"""Splits that may stand alone, as in ``NeelNanda/pile-10k:train``."""


@dataclass(frozen=True, slots=True)
class Part:
    """One data set of a specification, with its options."""

    name: str
    num: int | None = None
    split: tuple[str, ...] = ()
    concat: bool = False
    chat: bool = False
    system_prompt: str | None = None


def split_outside_quotes(text: str, mark: str) -> list[str]:
    """`text` cut at each `mark` that is not inside single or double quotes."""
    pattern = rf"""((?:"[^"]*"|'[^']*'|[^{re.escape(mark)}"'])+)"""
    return [piece.strip() for piece in re.findall(pattern, text) if piece.strip()]


def parse_spec(text: str) -> list[Part]:
    """The parts of ``name:option=value:...,name``. Raises DataError for an unknown option or value."""
    parts = []
    for item in split_outside_quotes(text, ","):
        name, *options = split_outside_quotes(item, ":")
        if re.fullmatch("[A-Za-z]", name) and options and options[0][0] in "\\/":
            name = f"{name}:{options.pop(0)}"  # the drive of a path on Windows
        part = Part(name.strip("\"'"))
        for option in options:
            part = _with_option(part, option, text)
        parts.append(part)
    if not parts:
        raise DataError(f"dataset {text!r} names nothing")
    return parts


def _with_option(part: Part, option: str, text: str) -> Part:
    key, has_value, value = (piece.strip() for piece in option.partition("="))
    on = not has_value or value.casefold() not in ("false", "0", "no")  # "concat" alone means yes
    if key == "num":
        if not value.isdigit() or int(value) == 0:
            raise DataError(f"dataset {text!r}: num={value!r} must be a positive number")
        return replace(part, num=int(value))
    if key == "split":
        return replace(part, split=tuple(value.split("+")))
    if key == "concat":
        return replace(part, concat=on)
    if key == "apply_chat_template":
        return replace(part, chat=on)
    if key == "system_prompt":
        return replace(part, system_prompt=value.strip("\"'"), chat=True)
    if not has_value and key in SPLITS:
        return replace(part, split=(key,))
    raise DataError(
        f"dataset {text!r}: option {key!r} is unknown.{nearest(key, OPTIONS)} Known: {', '.join(OPTIONS)}"
    )
