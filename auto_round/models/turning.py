"""Models with rotations: weights that take them up as they are read, and layers whose inputs are turned at run time.

Either way the model computes what it did before, in other coordinates: x W' = (x R)(W R)'.
"""

from __future__ import annotations

import hashlib
import inspect
import types
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from auto_round.core.errors import PlanError
from auto_round.core.hadamard import Rotation
from auto_round.core.quantized import Quantized
from auto_round.core.rotation import SpinQuantConfig
from auto_round.models import quirks
from auto_round.models.checkpoint import Place, TensorInfo, TensorStore, View
from auto_round.models.experts import ExpertStore

Change = Callable[[Tensor], Tensor]
"""Of a tensor in float32."""


def changed(tensor: Tensor, changes: Iterable[Change]) -> Tensor:
    """`tensor` in float32 after `changes`, one after the other."""
    found = tensor.float()
    for change in changes:
        found = change(found)
    return found


class Turned(View):
    """A store whose tensors are changed as they are read.

    changes: name -> what is done to it, one after the other. added: further names -> the tensor that they show.
    told: what the changes are, for the fingerprint.
    """

    def __init__(
        self, raw: TensorStore, changes: Mapping[str, list[Change]], added: Mapping[str, str], told: str
    ) -> None:
        self.raw, self._changes, self._added, self._told = raw, changes, added, told
        more = {name: raw.infos[source] for name, source in added.items()}
        self.infos: Mapping[str, TensorInfo] = {**raw.infos, **more}

    def _source(self, name: str) -> str:
        return self._added.get(name, name)

    def _as_it_is(self, name: str) -> bool:
        return name not in self._changes and name not in self._added

    def get(self, name: str) -> Tensor:
        """The tensor called `name`, changed, in its dtype."""
        found = self.raw.get(self._source(name))
        if name not in self._changes:
            return found
        return changed(found, self._changes[name]).to(found.dtype)

    def row(self, name: str, index: int) -> Tensor:
        """One entry of the first dimension."""
        return self.raw.row(name, index) if self._as_it_is(name) else self.get(name)[index]

    def look(self, name: str, row: int | None = None) -> Tensor:
        """As `get`, but for tensors that stay as they are."""
        if self._as_it_is(name):
            return self.raw.look(name, row)
        return self.get(name) if row is None else self.row(name, row)

    def quantized(self, name: str) -> Quantized | None:
        """Only of tensors that stay as they are: a turned matrix lies on no grid."""
        return self.raw.quantized(name) if self._as_it_is(name) else None

    def place(self, name: str) -> Place | None:
        """Only of tensors that stay as they are."""
        return self.raw.place(name) if self._as_it_is(name) else None

    def announce(self, name: str) -> None:
        """To the other store."""
        self.raw.announce(self._source(name))

    def shards(self, name: str) -> tuple[int, ...]:
        """Those of the tensor that is read."""
        return self.raw.shards(self._source(name))

    def fingerprint(self) -> str:
        """That of the other store and of the changes."""
        both = f"{self.raw.fingerprint()} {self._told}"
        return hashlib.blake2b(both.encode(), digest_size=16).hexdigest()


def turned_store(
    store: TensorStore, changes: Mapping[str, list[Change]], told: str, added: Mapping[str, str] | None = None
) -> TensorStore:
    """`store` with `changes`; experts that it shows one by one stay outermost, as writers expect them."""
    if isinstance(store, ExpertStore):
        return store.over(turned_store(store.raw, changes, told, added))
    return Turned(store, changes, added or {}, told)


class InputTurn:
    """A forward hook that turns a layer's inputs. Layers with the same inputs share one, and what it made of them."""

    def __init__(self, rotation: Rotation) -> None:
        self.rotation = rotation
        self._seen: Callable[[], Tensor | None] = lambda: None
        self._made: Tensor | None = None

    def __call__(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Called before the layer."""
        if torch.compiler.is_compiling():
            return (self.rotation(args[0]), *args[1:])
        if self._made is None or self._seen() is not args[0]:
            made = self.rotation(args[0])
            if made.requires_grad:  # kept, it would hold a whole graph
                return (made, *args[1:])
            self._seen, self._made = weakref.ref(args[0]), made
        return (self._made, *args[1:])


def turn_inputs(tree: nn.Module, turns: Mapping[str, tuple[str, Rotation]]) -> list[RemovableHandle]:
    """Turn the inputs of layers, given with place and rotation. Those of one parent and place share the work."""
    shared: dict[tuple[str, str], InputTurn] = {}
    handles = []
    for name, (place, rotation) in turns.items():
        turn = shared.setdefault((name.rpartition(".")[0], place), InputTurn(rotation))
        handles.append(tree.get_submodule(name).register_forward_pre_hook(turn))
    return handles


def turn_keys(tree: nn.Module, wish: SpinQuantConfig, width: int, seed: int) -> None:
    """R3: turn the queries and keys of all heads, of `width` channels, once their positions went in, before the cache.

    Each attention module alone is changed: it gets a copy of its forward that finds another `apply_rotary_pos_emb`.
    Raises PlanError when no module calls that.
    """
    rotation = replace(wish, rotation_size=None).rotation("r3", width, seed)
    if rotation is None:
        raise PlanError(f"rotation_config: heads of {width} channels cannot be turned; leave r3 out")
    found = [m for m in tree.modules() if "apply_rotary_pos_emb" in _code_of(type(m)).co_names]
    if not found:
        raise PlanError(
            f"rotation_config: no module of {type(tree).__name__} calls apply_rotary_pos_emb, after which R3 turns "
            "queries and keys; leave r3 out"
        )
    for module in found:
        if late := [name for name in quirks.NORMS_AFTER_POSITIONS if hasattr(module, name)]:
            raise PlanError(
                f"rotation_config: {type(module).__name__} has a {late[0]} after its positions, which R3 would change; "
                "leave r3 out"
            )
        _turn_keys(module, rotation)


def _code_of(kind: type[nn.Module]) -> types.CodeType:
    return getattr(inspect.unwrap(kind.forward), "__code__", _code_of.__code__)


def _turn_keys(module: nn.Module, rotation: Rotation) -> None:
    plain = inspect.unwrap(type(module).forward)
    rotary = plain.__globals__["apply_rotary_pos_emb"]

    def turned(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        queries, keys = rotary(*args, **kwargs)
        return rotation(queries), rotation(keys)

    own = types.FunctionType(
        plain.__code__, {**plain.__globals__, "apply_rotary_pos_emb": turned}, plain.__name__, plain.__defaults__,
        plain.__closure__,
    )  # fmt: skip
    own.__kwdefaults__ = plain.__kwdefaults__
    module.forward = types.MethodType(own, module)
