"""Everything that the outcome of a run depends on, as data, so that two runs can be compared and told apart."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from importlib.metadata import version
from typing import Any

import torch

from auto_round.core.plan import Plan
from auto_round.models.subject import Subject
from auto_round.steps.base import Step
from auto_round.version import __version__

SAMPLES = 16  # values by which a schedule is known
SHOWN = 3  # changed settings that a refusal spells out


def manifest(
    subject: Subject,
    plan: Plan,
    steps: Sequence[Step],
    source: Mapping[str, object],
) -> dict[str, Any]:
    """What is to be done, to what, with what. source: what `Source.describe` says."""
    return {
        "model": {
            "configuration": _hash(json.dumps(dict(subject.files.config), sort_keys=True, default=str)),
            "weights": subject.files.store.fingerprint(),
        },
        "plan": {name: {"shape": list(plan.shapes[name]), **_plain(plan[name])} for name in plan},
        "recipe": {f"{i} {type(step).__name__}": _plain(step) for i, step in enumerate(steps)},
        "source": {key: str(value) for key, value in source.items()},
        "versions": {
            "auto_round": __version__,
            # Other kernels sum in another order, and the last bit of a loss may decide which state is kept.
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "machine": platform.machine(),  # as do other processors
        },
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two manifests, in words: the first few settings, then how many more there are."""
    old, new = dict(_flat(before)), dict(_flat(now))
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    said = [f"{key} was {old.get(key, 'absent')}, is {new.get(key, 'absent')}" for key in changed[:SHOWN]]
    return said + ([f"and {len(changed) - SHOWN} more settings differ"] if len(changed) > SHOWN else [])


def _flat(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        name = f"{path} {key}".strip()
        if isinstance(value, Mapping):
            yield from _flat(value, name)
        else:
            yield name, value


def _plain(thing: Any) -> dict[str, Any]:
    """The fields of a dataclass as JSON can hold them; its text for anything else."""
    fields = asdict(thing) if is_dataclass(thing) and not isinstance(thing, type) else {}
    return dict(json.loads(json.dumps(fields, default=_said)))


def _said(value: object) -> object:
    # A function's text is its address in memory. Those of steps are schedules, which their values tell apart.
    return [value(i / SAMPLES) for i in range(SAMPLES)] if callable(value) else str(value)


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
