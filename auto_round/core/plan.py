"""`Plan`: which layer gets which scheme, and why. Made before any weight is touched; never changed afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

from auto_round.core.errors import PlanError
from auto_round.core.scheme import FLOAT, Scheme


class Plan(Mapping[str, Scheme]):
    """Layer name -> Scheme, in model order. Immutable: every producer returns a new one.

    shapes: (O, I) of each layer. fused: sets of layers that servers merge into one matrix. why: the reason of each
    entry that differs from the base scheme. notes: remarks about the whole plan, to be shown once.
    """

    def __init__(
        self,
        schemes: Mapping[str, Scheme],
        *,
        shapes: Mapping[str, tuple[int, int]],
        base: Scheme,
        fused: Iterable[frozenset[str]] = (),
        why: Mapping[str, str] | None = None,
        notes: Iterable[str] = (),
    ) -> None:
        self._schemes = MappingProxyType(dict(schemes))
        # Copies behind read-only views: whoever made the plan cannot change it afterwards either.
        self.shapes = MappingProxyType({name: shapes[name] for name in schemes})
        self.base = base
        self.fused = tuple(fused)  # may be a generator, and is read more than once
        self.why = MappingProxyType(dict(why or {}))
        self.notes = tuple(notes)

    def __reduce__(self) -> tuple[object, ...]:
        # For other processes: the views themselves cannot be pickled.
        return _restored, (
            dict(self._schemes),
            dict(self.shapes),
            self.base,
            self.fused,
            dict(self.why),
            self.notes,
        )

    def __getitem__(self, name: str) -> Scheme:
        return self._schemes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._schemes)

    def __len__(self) -> int:
        return len(self._schemes)

    def override(self, changes: Mapping[str, Scheme | None], why: str) -> Plan:
        """A plan with `changes` (None means floating point), each recorded with the reason `why`.

        Raises PlanError when a name is not in the plan.
        """
        for name in changes:
            if name not in self:
                raise PlanError(f"layer {name!r} is not in the plan")
        # FLOAT stays in the plan: a layer that is left alone keeps its reason, too.
        new = {name: scheme or FLOAT for name, scheme in changes.items()}
        return self._copy(schemes={**self._schemes, **new}, why={**self.why, **dict.fromkeys(new, why)})

    def only(self, names: Iterable[str], fused: Iterable[frozenset[str]] = ()) -> Plan:
        """The part about the layers `names`, for work that is done on them alone."""
        schemes = {name: self[name] for name in names}
        return Plan(schemes, shapes=self.shapes, base=self.base, fused=fused)

    def noted(self, *notes: str) -> Plan:
        """The same plan with further remarks."""
        return self._copy(notes=(*self.notes, *notes))

    def _copy(
        self,
        *,
        schemes: Mapping[str, Scheme] | None = None,
        why: Mapping[str, str] | None = None,
        notes: Iterable[str] | None = None,
    ) -> Plan:
        return Plan(
            self._schemes if schemes is None else schemes,
            shapes=self.shapes,
            base=self.base,
            fused=self.fused,
            why=self.why if why is None else why,
            notes=self.notes if notes is None else notes,
        )

    def quantized(self) -> list[str]:
        """The layers that will be quantized, in model order."""
        return [name for name, scheme in self.items() if scheme.weight is not None]

    def mixed_fused_sets(self) -> list[tuple[str, ...]]:
        """Fused sets whose layers have different schemes; servers that merge them refuse such a model."""
        present = [tuple(name for name in self if name in group) for group in self.fused]
        return [names for names in present if len({self[name] for name in names}) > 1]

    def flat(self) -> dict[str, dict[str, object]]:
        """Layer -> flat settings, the form users get back as `layer_config`."""
        return {name: scheme.to_flat() for name, scheme in self.items()}


def _restored(
    schemes: Mapping[str, Scheme],
    shapes: Mapping[str, tuple[int, int]],
    base: Scheme,
    fused: Iterable[frozenset[str]],
    why: Mapping[str, str],
    notes: Iterable[str],
) -> Plan:
    """A plan that came from another process."""
    return Plan(schemes, shapes=shapes, base=base, fused=fused, why=why, notes=notes)
