"""Regular expressions that come from files: compiled only if matching a name cannot take forever."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from auto_round.core.errors import FormatError

if sys.version_info >= (3, 11):
    from re import _parser as parser  # type: ignore[attr-defined]
else:
    import sre_parse as parser

LONGEST_NAME = 64  # what an unbounded repeat counts for: layers have shorter names than this, but for a few
MOST_WAYS = (
    LONGEST_NAME + 1
) ** 4  # four unbounded repeats; a name takes some tenths of a second at the very worst
LONGEST_PATTERN = 2000  # characters; lists of layers by number stay below


class _TooMany(Exception):
    """The expression has more ways to match than we try."""


@cache
def compiled(pattern: str, where: str) -> re.Pattern[str]:
    """`pattern` ready to use. Raises FormatError, with `where`, for a broken expression or one that can run away.

    Python's matcher tries every way in which an expression can meet a text. `(a+)+$` has 2^n of them in n letters.
    """
    try:
        if len(pattern) > LONGEST_PATTERN:
            raise _TooMany
        _ways(parser.parse(pattern))
        return re.compile(pattern)
    except (_TooMany, RecursionError) as error:
        shown = pattern if len(pattern) <= 80 else f"{pattern[:77]}..."
        raise FormatError(
            f"{where} {shown!r}: matching this expression could take forever. Allowed are {LONGEST_PATTERN} characters "
            "and four unbounded repeats (*, + or {n,}), none around another repeat or overlapping alternatives; name "
            "the layers, or write .* for whatever lies between"
        ) from error
    except (re.error, OverflowError) as error:
        raise FormatError(f"{where} {pattern!r} is no valid regular expression: {error}") from error


def _ways(items: Sequence[Any]) -> int:
    """At most how many ways there are to match parsed `items` at one place. Raises _TooMany beyond MOST_WAYS."""
    ways = 1
    for kind, argument in items:
        count = _KINDS.get(str(kind))
        ways *= 1 if count is None else count(argument)
        if ways > MOST_WAYS:
            raise _TooMany
    return ways


def _repeat(argument: tuple[Any, Any, Sequence[Any]]) -> int:
    least, most, body = int(argument[0]), min(int(argument[1]), LONGEST_NAME), argument[2]
    each = _ways(body)
    rounds = max(1, min(most, 32))  # beyond these even two ways each are too many
    return max(1, most - least + 1) * int(each**rounds)


def _branch(argument: tuple[Any, Sequence[Sequence[Any]]]) -> int:
    alternatives = argument[1]
    first = [str(a[0]) if len(a) and str(a[0][0]) == "LITERAL" else "" for a in alternatives]
    ways = [_ways(a) for a in alternatives]
    # Where all begin with letters of their own, only one can go on.
    return max(ways) if "" not in first and len(set(first)) == len(first) else sum(ways)


_KINDS: dict[str, Callable[[Any], int]] = {
    "MAX_REPEAT": _repeat,
    "MIN_REPEAT": _repeat,
    "POSSESSIVE_REPEAT": _repeat,
    "BRANCH": _branch,
    "SUBPATTERN": lambda argument: _ways(argument[3]),
    "ATOMIC_GROUP": _ways,
    "ASSERT": lambda argument: _ways(argument[1]),
    "ASSERT_NOT": lambda argument: _ways(argument[1]),
    "GROUPREF_EXISTS": lambda argument: _ways(argument[1]) + _ways(argument[2] or ()),
}
"""By the parser's names of what can match in more than one way."""
