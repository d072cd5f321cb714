"""Models with rotations: weights that take them up as they are read, and layers whose inputs are turned at run time.

Either way the model computes what it did before, in other coordinates: x W' = (x R)(W R)'.
"""

from __future__ import annotations

import hashlib
import inspect
import re
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
from auto_round.core.rotation import Rotations, SpinQuantConfig, head_dim
from auto_round.models import quirks
from auto_round.models.checkpoint import Place, TensorInfo, TensorStore, View
from auto_round.models.experts import ExpertStore
from auto_round.models.load import ModelFiles

Change = Callable[[Tensor], Tensor]
"""Of a tensor in float32."""

EMBEDDING, HEAD, LAST_NORM = "embed_tokens.weight", "lm_head.weight", "model.norm.weight"
NORM_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Norm of a block -> the layers that read it."""
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
"""Layers of a block that write into the stream."""
INDIFFERENT = ("self_attn.q_norm", "self_attn.k_norm", "self_attn.sinks", "self_attn.rotary_emb.inv_freq")
"""Tensors of a block that never meet the stream."""


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
        changed = found.float()
        for change in self._changes[name]:
            changed = change(changed)
        return changed.to(found.dtype)

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


def fused(files: ModelFiles, tree: nn.Module, wish: Rotations, seed: int) -> ModelFiles:
    """`files` and `tree` with the rotations of `wish` that weights take up: R1 of the stream, R2 of values.

    A live `tree` is changed in place. Raises PlanError where the architecture has no room for them.
    """
    if not isinstance(wish, SpinQuantConfig) or not (wish.fused_stream or wish.r2):
        return files
    kind = getattr(getattr(tree, "config", None), "model_type", None)
    for used, place, known in (
        (wish.fused_stream, "R1", quirks.PLAIN_STREAMS),
        (wish.r2, "R2", quirks.PLAIN_VALUES),
    ):
        if used and kind not in known:
            raise PlanError(
                f"rotation_config: {kind!r} models are not among those whose weights are known to take up {place}: "
                f"{', '.join(sorted(known))}. SpinQuantConfig(r1=True, r2=False) turns inputs at run time, in any "
                "architecture"
            )
    live = files.folder is None
    added: dict[str, str] = {}
    config = dict(files.config)
    if wish.fused_stream:
        _untie(tree)
        config["tie_word_embeddings"] = False
        if not live and HEAD not in files.store.infos:
            added[HEAD] = next(name for name in files.store.infos if name.endswith(EMBEDDING))
    state = dict(tree.state_dict()) if live else {}
    infos = (
        {name: t.shape for name, t in state.items()}
        if live
        else {n: i.shape for n, i in files.store.infos.items()}
    )
    infos |= {name: infos[source] for name, source in added.items()}
    get = state.__getitem__ if live else files.store.get
    changes: dict[str, list[Change]] = {}
    if wish.fused_stream:
        _turn_stream(infos, get, config, wish, seed, changes)
    if wish.r2:
        _turn_values(infos, config, wish, seed, changes)
    if not live:
        return replace(
            files, store=turned_store(files.store, changes, repr((wish, seed)), added), config=config
        )
    with torch.no_grad():
        # All before any is put back: readers take up the weights of norms.
        values = {name: _changed(state[name], steps) for name, steps in changes.items()}
        for name, value in values.items():
            state[name].copy_(value)
    return replace(files, config=config)


def _changed(tensor: Tensor, steps: Iterable[Change]) -> Tensor:
    found = tensor.detach().float()
    for step in steps:
        found = step(found)
    return found


def _untie(tree: nn.Module) -> None:
    """Give the head a weight of its own if it has none."""
    embedding, head = tree.get_input_embeddings(), tree.get_output_embeddings()  # type: ignore[operator]
    name = next((n for n, module in tree.named_modules() if module is head), None)
    tied = head is not None and (
        head.weight is embedding.weight
        or f"{name}.weight" in (getattr(tree, "all_tied_weights_keys", None) or {})
    )
    if tied:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
        tree.config.tie_word_embeddings = False  # type: ignore[union-attr]
        if getattr(tree, "all_tied_weights_keys", None):
            tree.all_tied_weights_keys.pop(f"{name}.weight", None)  # type: ignore[union-attr, operator]


def _turn_stream(
    shapes: Mapping[str, Any],
    get: Callable[[str], Tensor],
    config: Mapping[str, Any],
    wish: SpinQuantConfig,
    seed: int,
    changes: dict[str, list[Change]],
) -> None:
    """R1, taken up by all that reads or writes the residual stream. Norms hand their weights to their readers."""
    hidden = int(config["hidden_size"])
    turn = wish.rotation("r1", hidden, seed)
    if turn is None:
        raise PlanError(f"rotation_size={wish.rotation_size}: {hidden} channels cannot be divided by it")
    done: set[str] = set()

    def read(name: str, norm: str) -> None:
        gain = get(norm)
        if name in shapes:
            changes.setdefault(name, []).append(lambda w, gain=gain: turn(w * gain.float()))  # type: ignore[misc]
            done.add(name)

    for norm in [n for n in shapes if n.endswith(".weight")]:
        block, _, last = norm.removesuffix(".weight").rpartition(".")
        if norm.endswith(LAST_NORM):
            for name in [n for n in shapes if n.endswith(HEAD)]:
                read(name, norm)
        elif last in NORM_READERS:
            for reader in NORM_READERS[last]:
                read(f"{block}.{reader}.weight", norm)
        else:
            continue
        changes[norm] = [torch.ones_like]
        done.add(norm)
    for name in shapes:
        if name.endswith(EMBEDDING):
            changes.setdefault(name, []).append(turn)
            done.add(name)
        elif name.endswith(tuple(f"{writer}.weight" for writer in WRITERS)):
            changes.setdefault(name, []).append(turn.down)
            done.add(name)
        elif name.endswith(tuple(f"{writer}.bias" for writer in WRITERS)):
            changes.setdefault(name, []).append(turn)
            done.add(name)
    biases = tuple(f"{reader}.bias" for readers in NORM_READERS.values() for reader in readers)
    for name in shapes:
        known = (
            name in done
            or name.endswith(biases)
            or re.sub(r"\.(weight|bias)$", "", name).endswith(INDIFFERENT)
        )
        if not known:
            raise PlanError(
                f"rotation_config: {name} is no tensor that a fused R1 is known to leave right. Use "
                "online_r1_rotation=True, which turns inputs at run time"
            )


def _turn_values(
    shapes: Mapping[str, Any],
    config: Mapping[str, Any],
    wish: SpinQuantConfig,
    seed: int,
    changes: dict[str, list[Change]],
) -> None:
    """R2: the values of each head, from the rows of v_proj to the columns of o_proj."""
    width = head_dim(config)
    turn = replace(wish, rotation_size=None).rotation("r2", width, seed)
    if turn is None:
        raise PlanError(f"rotation_config: heads of {width} channels cannot be turned; leave r2 out")
    for name in shapes:
        if name.endswith(".v_proj.weight"):
            changes.setdefault(name, []).append(turn.down)
        elif name.endswith((".v_proj.bias", ".o_proj.weight")):
            changes.setdefault(name, []).append(turn)


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
