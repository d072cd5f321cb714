"""Rotations that weights take up, tensor by tensor: R1 of the residual stream, R2 of the values of each head.

The rotated model computes the same, and readers need not know of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor, nn

from auto_round.core.errors import PlanError
from auto_round.core.hadamard import Rotation
from auto_round.core.rotation import SpinQuantConfig, head_dim
from auto_round.models import quirks
from auto_round.models.anatomy import ties
from auto_round.models.load import ModelFiles
from auto_round.models.turning import Change, changed, turned_store

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


class Turns(NamedTuple):
    """The rotations that weights are to take up.

    stream: R1. values: R2, by the path of an attention module. smooth: norm of the stream -> factors (n,) by which its
    readers' columns are multiplied, and its own weight divided.
    """

    stream: Rotation | None = None
    values: Callable[[str], Rotation] | None = None
    smooth: Mapping[str, Tensor] = {}

    @classmethod
    def fixed(cls, config: Mapping[str, Any], wish: SpinQuantConfig, seed: int) -> Turns:
        """Hadamard's, as `wish` has them for a model of the configuration `config`.

        Raises PlanError when they do not divide its dimensions.
        """
        stream = values = None
        if wish.fused_stream:
            stream = _possible(wish, "r1", int(config["hidden_size"]), seed)
        if wish.r2:
            found = _possible(replace(wish, rotation_size=None), "r2", head_dim(config), seed)

            def values(_: str) -> Rotation:
                return found

        return cls(stream, values)


class Fusion:
    """What `turns` do to each tensor of a model.

    names: of all its tensors. get: reads one. changes: name -> what is done, one after the other.
    """

    def __init__(self, names: Collection[str], get: Callable[[str], Tensor], turns: Turns) -> None:
        self._names, self._get = names, get
        self.changes: dict[str, list[Change]] = {}
        # First the stream: what it does to rows and columns does not meet what values do to the others.
        if turns.stream is not None:
            self._turn_stream(turns.stream)
        for norm, factors in turns.smooth.items():
            self._smooth(norm, factors)
        if turns.values is not None:
            self._turn_values(turns.values)

    def norms(self, layers: Collection[str]) -> list[str]:
        """The norms of the stream that are read by weights of `layers`."""
        return [name for name in self._names if not set(layers).isdisjoint(self._readers(name))]

    def _add(self, name: str, change: Change) -> None:
        if name in self._names:
            self.changes.setdefault(name, []).append(change)

    def _turn_stream(self, turn: Rotation) -> None:
        """R1, taken up by all that reads or writes the residual stream; norms give their weights to their readers."""
        for norm in self._names:
            readers = self._readers(norm)
            if readers:
                gain = self._get(norm).float().clone()  # of a live model it will be ones
                for reader in readers:
                    self._add(reader, lambda w, gain=gain: turn(w * gain))  # type: ignore[misc]
                self._add(norm, torch.ones_like)
        for name in self._names:
            module, _, kind = name.rpartition(".")
            if name.endswith(EMBEDDING) or (kind == "bias" and module.endswith(WRITERS)):
                self._add(name, turn)
            elif module.endswith(WRITERS):
                self._add(name, turn.down)
        for name in self._names:
            if name not in self.changes and not self._is_indifferent(name):
                raise PlanError(
                    f"rotation_config: {name} is no tensor that a fused R1 is known to leave right. Use "
                    "online_r1_rotation=True, which turns inputs at run time"
                )

    def _smooth(self, norm: str, factors: Tensor) -> None:
        """`factors` between a norm and its readers."""
        self._add(norm, lambda w: w / factors)
        for reader in self._readers(norm):
            self._add(reader, lambda w: w * factors)

    def _readers(self, norm: str) -> list[str]:
        """The weights that take up that of `norm`; none when it is no norm of the stream."""
        block, _, last = norm.removesuffix(".weight").rpartition(".")
        if norm.endswith(LAST_NORM):
            return [name for name in self._names if name.endswith(HEAD)]
        return [f"{block}.{reader}.weight" for reader in NORM_READERS.get(last, ())]

    def _is_indifferent(self, name: str) -> bool:
        biases = tuple(f"{reader}.bias" for readers in NORM_READERS.values() for reader in readers)
        return name.endswith(biases) or re.sub(r"\.(weight|bias)$", "", name).endswith(INDIFFERENT)

    def _turn_values(self, turn_of: Callable[[str], Rotation]) -> None:
        """R2, from the rows of v_proj to the columns of o_proj."""
        for name in self._names:
            module, _, kind = name.rpartition(".")
            attention, _, layer = module.rpartition(".")
            if (layer, kind) == ("v_proj", "weight"):
                self._add(name, turn_of(attention).down)
            elif (layer, kind) in (("v_proj", "bias"), ("o_proj", "weight")):
                self._add(name, turn_of(attention))


def _possible(wish: SpinQuantConfig, place: str, channels: int, seed: int) -> Rotation:
    found = wish.rotation(place, channels, seed)
    if found is None:
        raise PlanError(
            f"rotation_config: {channels} channels cannot be turned by {place} (rotation_size={wish.rotation_size}); "
            f"leave {place} out, or give another size"
        )
    return found


def fused(
    files: ModelFiles, tree: nn.Module, wish: SpinQuantConfig, seed: int, trained: Turns | None = None
) -> ModelFiles:
    """`files` and `tree` with the rotations of `wish` that weights take up; a live `tree` is changed in place.

    trained: in the place of Hadamard's. Raises PlanError where the architecture has no room for them.
    """
    check_known(str(tree.config.model_type), wish)  # type: ignore[union-attr]
    config = dict(files.config)
    turns = Turns.fixed(config, wish, seed) if trained is None else trained
    if wish.fused_stream:
        untie(tree)
        config["tie_word_embeddings"] = False
    if files.folder is None:
        _change_live(tree, turns)
        return replace(files, config=config)
    names, added = files.store.infos, {}
    if wish.fused_stream and HEAD not in names:
        added[HEAD] = next(name for name in names if name.endswith(EMBEDDING))
    changes = Fusion([*names, *added], files.store.get, turns).changes
    told = repr((wish, seed)) if trained is None else f"{wish} {_told(trained, changes)}"
    store = turned_store(files.store, changes, told, added)
    return replace(files, store=store, config=config)


def _told(turns: Turns, names: Iterable[str]) -> str:
    """What tells trained rotations from others, for fingerprints."""
    parts = [] if turns.stream is None else [turns.stream.told()]
    if turns.values is not None:
        parts += [turns.values(name.rpartition(".v_proj.")[0]).told() for name in names if ".v_proj." in name]
    parts += [str(crc32(factors.numpy().tobytes())) for factors in turns.smooth.values()]
    return " ".join(parts)


@torch.no_grad()
def _change_live(tree: nn.Module, turns: Turns) -> None:
    state = tree.state_dict()
    for name, steps in Fusion(state, state.__getitem__, turns).changes.items():
        state[name].copy_(changed(state[name].detach(), steps))


def check_known(kind: str, wish: SpinQuantConfig) -> None:
    """Raise PlanError for an architecture that was not seen to take up the rotations of `wish`."""
    tables = (
        (wish.fused_stream, "R1", quirks.PLAIN_STREAMS),
        (wish.r2, "R2", quirks.PLAIN_VALUES),
    )
    for used, place, known in tables:
        if used and kind not in known:
            raise PlanError(
                f"rotation_config: {kind!r} models are not among those whose weights are known to take up {place}: "
                f"{', '.join(sorted(known))}. SpinQuantConfig(r1=True, r2=False) turns inputs at run time, in any "
                "architecture"
            )


def untie(tree: nn.Module) -> None:
    """Give the head a weight of its own if it has none."""
    embedding, head = tree.get_input_embeddings(), tree.get_output_embeddings()  # type: ignore[operator]
    name = next(name for name, module in tree.named_modules() if module is head)
    if head.weight is embedding.weight or f"{name}.weight" in ties(tree):
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
        tree.config.tie_word_embeddings = False  # type: ignore[union-attr]
        if ties(tree):
            tree.all_tied_weights_keys.pop(f"{name}.weight", None)  # type: ignore[union-attr, operator]
