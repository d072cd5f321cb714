"""What rotations were asked for, which layers they turn the inputs of, and how a checkpoint says so.

QuaRot (arXiv:2404.00456) turns the residual stream (R1), values per head (R2), queries and keys (R3) and the inputs of
the MLP's last layer (R4); the older kind turns the inputs of every layer in small blocks. A rotation is *fused* when
neighbouring weights take it up, so that any reader runs the result, and *online* when a layer's inputs are turned at
run time, which the loader of `auto_round` checkpoints does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from auto_round.core.errors import FormatError, PlanError, nearest
from auto_round.core.hadamard import Rotation, hadamard, power_of_two

READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""Layers whose inputs an online R1 turns."""
MLP_OUTPUTS = ("down_proj",)
"""Layers whose inputs R4 turns."""
DETERMINISTIC, RANDOM = 0, 1
EXPERTS = ".experts."
"""Part of the names of layers whose inputs stay as they are: experts lie in one tensor and are run as one module."""
SMALLEST = 4
"""Channels that a rotation must at least mix to be worth anything."""


UNTOLD = ("trainable_smooth", "whole", "iters", "lr", "smooth_lr", "batch_size")
"""Fields of the class below that no configuration has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpinQuantConfig:
    """Rotations at certain places of the architecture, with the names of the user guide.

    r1 to r4: which of them. rotation_size: channels that are turned together, None for the largest power of two that
    divides a dimension. random_r1 to random_r4: Hadamard matrices with random signs. online_r1_rotation: R1 at run
    time, else fused into embedding, blocks and head, for readers that know nothing of rotations.

    trainable_rotation: R1 and R2 start from Hadamard's and are trained; both are fused then, whatever
    online_r1_rotation says. trainable_smooth: factors per channel behind each norm are trained along. iters, lr,
    smooth_lr, batch_size: of that training.
    """

    r1: bool = True
    r2: bool = True
    r3: bool = False
    r4: bool = False
    rotation_size: int | None = None
    random_r1: bool = False
    random_r2: bool = False
    random_r3: bool = False
    random_r4: bool = False
    online_r1_rotation: bool = True
    trainable_rotation: bool = False
    trainable_smooth: bool = False
    iters: int = 100
    lr: float = 1.0
    smooth_lr: float = 0.01
    batch_size: int = 8
    whole: bool = False
    """Whether a dimension that is no power of two is turned as a whole, as auto-round before 1.0 does: for reading."""

    def __post_init__(self) -> None:
        if not (self.r1 or self.r2 or self.r3 or self.r4):
            raise PlanError("rotation_config turns nothing: set one of r1, r2, r3, r4, or leave it out")
        _check_size("rotation_size", self.rotation_size)
        self._check_training()

    def _check_training(self) -> None:
        if self.trainable_rotation and not (self.r1 or self.r2):
            raise PlanError(
                "rotation_config: trainable_rotation trains R1 and R2; set one of them, or leave it out"
            )
        if self.trainable_smooth and not (self.trainable_rotation and self.r1):
            raise PlanError(
                "rotation_config: trainable_smooth goes with trainable_rotation and r1; leave it out"
            )
        for name in ("iters", "lr", "smooth_lr", "batch_size"):
            if getattr(self, name) <= 0:
                raise PlanError(f"rotation_config: {name} must be positive, got {getattr(self, name)!r}")

    @property
    def fused_stream(self) -> bool:
        """Whether R1 is taken up by the weights around the residual stream."""
        return self.r1 and (self.trainable_rotation or not self.online_r1_rotation)

    @property
    def online(self) -> tuple[str, ...]:
        """The rotations that a reader has to carry out."""
        every = {"r1": self.r1 and not self.fused_stream, "r3": self.r3, "r4": self.r4}
        return tuple(name for name, used in every.items() if used)

    def size(self, channels: int) -> int:
        """Of the blocks that `channels` are turned in; 0 when they cannot be divided."""
        size = self.rotation_size or (channels if self.whole else power_of_two(channels))
        return size if channels % size == 0 and size >= SMALLEST else 0

    def rotation(self, place: str, channels: int, seed: int) -> Rotation | None:
        """The rotation at `place` ("r1" to "r4") of so many channels, None when they cannot be divided."""
        size = self.size(channels)
        if not size:
            return None
        if not getattr(self, f"random_{place}"):
            return Rotation(size)
        if power_of_two(size) != size:  # read, not made: the matrix is the file's
            return Rotation(size, torch.empty(size, size, dtype=torch.int8, device="meta"))
        return Rotation.random(size, torch.Generator().manual_seed(seed + int(place[1])))

    def of_layer(self, name: str, columns: int, hidden: int, seed: int = 0) -> tuple[str, Rotation] | None:
        """Place and rotation of the inputs of layer `name`, or None when they stay as they are."""
        last = name.rpartition(".")[2]
        if self.r1 and not self.fused_stream and last in READERS and columns == hidden:
            place = "r1"
        elif self.r4 and last in MLP_OUTPUTS:
            place = "r4"
        else:
            return None
        found = self.rotation(place, columns, seed)
        return None if found is None else (place, found)

    def described(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The entry of a quantization configuration, for a model of the configuration `config`."""
        said = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in UNTOLD}
        said |= {key: config.get(key) for key in ("hidden_size", "intermediate_size")}
        said["online_r1_rotation"] = self.online_r1_rotation and not self.fused_stream
        return {"spinquant_config": {**said, "head_dim": head_dim(config), "algorithm": "spinquant"}}


@dataclass(frozen=True, slots=True, kw_only=True)
class RotationConfig:
    """The inputs of every layer, turned in blocks of `block_size` at run time (default: of 32).

    hadamard_type: "hadamard" or "random_hadamard". seed: of the random signs. The other fields are upstream's, for code
    that gives them: what they say is what is done anyway.
    """

    algorithm: str = "hadamard"
    block_size: int | None = None
    hadamard_type: str = "hadamard"
    seed: int | None = None
    backend: str = "auto"
    fuse_online_to_weight: bool | None = None
    allow_online_rotation: bool = True

    def __post_init__(self) -> None:
        if self.hadamard_type not in ("hadamard", "random_hadamard"):
            raise PlanError(
                f"hadamard_type {self.hadamard_type!r}: give hadamard or random_hadamard; QuaRot is "
                "rotation_config='quarot'"
            )
        if self.backend not in ("auto", "transform") or not self.allow_online_rotation:
            raise PlanError(
                f"rotation_config backend={self.backend!r}, allow_online_rotation={self.allow_online_rotation}: this "
                "kind turns inputs at run time. Fused rotations are SpinQuantConfig(r1=True, r2=True, "
                "online_r1_rotation=False)"
            )
        if self.hadamard_type == "hadamard":
            _check_size("block_size", self.block_size)
        else:
            hadamard(self.size)

    @property
    def online(self) -> tuple[str, ...]:
        """The rotations that a reader has to carry out."""
        return ("the inputs of every layer",)

    @property
    def size(self) -> int:
        """Of the blocks."""
        return self.block_size or 32

    def of_layer(self, name: str, columns: int, hidden: int, seed: int = 0) -> tuple[str, Rotation] | None:
        """Place and rotation of the inputs of layer `name`, or None when they cannot be divided."""
        if columns % self.size:
            return None
        if self.hadamard_type == "hadamard":
            return "hadamard", Rotation(self.size)
        generator = torch.Generator().manual_seed(seed if self.seed is None else self.seed)
        return "hadamard", Rotation.random(self.size, generator)

    def described(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The entry of a quantization configuration."""
        said = {key: value for key, value in asdict(self).items() if key != "seed"}
        return {"rotation_config": {**said, "block_size": self.size}}


Rotations = SpinQuantConfig | RotationConfig
NAMED: Mapping[str, Mapping[str, Any]] = {
    "quarot": {"algorithm": "spinquant"},
    "spinquant": {"algorithm": "spinquant", "trainable_rotation": True, "trainable_smooth": True},
    "default": {},
    "hadamard": {},
    "random_hadamard": {"hadamard_type": "random_hadamard"},
}
"""Short words for rotations."""


def rotations_of(given: Any) -> Rotations | None:
    """What `rotation_config` means: None, a word, JSON, a mapping, or one of the two classes.

    Raises PlanError for anything else.
    """
    if given is None or isinstance(given, (SpinQuantConfig, RotationConfig)):
        return given
    if isinstance(given, str) and given.lstrip().startswith("{"):
        try:
            given = json.loads(given)
        except json.JSONDecodeError as error:
            raise PlanError(f"rotation_config {given!r} is no JSON: {error}") from error
    if isinstance(given, str):
        key = given.strip().casefold().replace("-", "_")
        if key not in NAMED:
            raise PlanError(
                f"rotation_config {given!r} is unknown.{nearest(given, NAMED)} Known: {', '.join(NAMED)}, or "
                "SpinQuantConfig(r1=True, r2=True, ...)"
            )
        given = NAMED[key]
    if not isinstance(given, Mapping):
        raise PlanError(
            f"rotation_config of type {type(given).__name__}: give a word such as 'quarot', a dict, or a "
            "SpinQuantConfig"
        )
    places = any(key in given for key in ("r1", "r2", "r3", "r4"))
    kind = SpinQuantConfig if places or given.get("algorithm") == "spinquant" else RotationConfig
    values = {key: value for key, value in given.items() if kind is RotationConfig or key != "algorithm"}
    known = [f.name for f in fields(kind)]
    for key in values:
        if key not in known:
            raise PlanError(
                f"rotation_config: {key!r} is unknown.{nearest(key, known)} Known: {', '.join(known)}"
            )
    return kind(**values)


def _check_size(name: str, size: int | None) -> None:
    if size is not None and (size < SMALLEST or power_of_two(size) != size):
        raise PlanError(f"{name}={size}: give a power of two from {SMALLEST} on, or leave it out")


def head_dim(config: Mapping[str, Any]) -> int:
    """Channels per head in a model of the configuration `config`; 0 when it has no heads."""
    heads = config.get("num_attention_heads") or 0
    return int(config.get("head_dim") or (config.get("hidden_size", 0) // heads if heads else 0))


def stored(place: str, rotation: Rotation) -> dict[str, Tensor]:
    """The tensors by which a checkpoint tells a layer's rotation, by suffix."""
    if place == "hadamard":
        # Upstream keeps the transpose, which matters for random signs only; the plain kind is known by its size.
        return {} if rotation.signs is None else {"hadamard_matrix": rotation.matrix().t().contiguous()}
    kind = DETERMINISTIC if rotation.signs is None else RANDOM
    named = {
        "type": torch.tensor(kind, dtype=torch.int32, device="cpu"),
        "size": torch.tensor(rotation.size, dtype=torch.int32, device="cpu"),
    }
    if rotation.signs is not None:
        named["matrix"] = rotation.signs
    return {f"spinquant_{place}_{key}": tensor for key, tensor in named.items()}


def is_told(suffix: str) -> bool:
    """Whether a tensor of that suffix is one of `stored`."""
    return suffix == "hadamard_matrix" or suffix.startswith("spinquant_")


def restored(
    place: str, tensors: Mapping[str, Tensor], planned: Rotation, factor: Tensor | None = None
) -> Rotation:
    """The inverse of `stored`. planned: what the configuration says. factor: the matrix of small order that makes up a
    size which is no power of two. Raises FormatError for what nobody could turn."""
    if place == "hadamard":
        if planned.signs is None:
            return planned
        matrix = tensors["hadamard_matrix"].t()
        return Rotation(planned.size, (matrix * planned.size**0.5).round().to(torch.int8))
    kind, size = (int(tensors[f"spinquant_{place}_{key}"]) for key in ("type", "size"))
    if kind == RANDOM:
        return Rotation(size, tensors[f"spinquant_{place}_matrix"])
    if kind == DETERMINISTIC and factor is not None and power_of_two(size) != size:
        # x is turned by the transpose of factor (x) Sylvester's, which is symmetric.
        sylvester = hadamard(size // len(factor))
        return Rotation(size, torch.kron(factor.t().sign().to(torch.int8).contiguous(), sylvester))
    if kind != DETERMINISTIC or power_of_two(size) != size:
        raise FormatError(
            f"rotation {place} of type {kind} and size {size}: type {DETERMINISTIC} with a power of two, and type "
            f"{RANDOM}, can be read"
        )
    return Rotation(size)


def read_rotations(config: Mapping[str, Any]) -> Rotations | None:
    """The rotations that a quantization configuration tells of. Raises FormatError for what it tells of no reader."""
    for key in ("spinquant_config", "rotation_config"):
        said = config.get(key)
        if isinstance(said, Mapping) and said:
            known = {f.name for kind in (SpinQuantConfig, RotationConfig) for f in fields(kind)}
            try:
                found = rotations_of({name: value for name, value in said.items() if name in known})
            except PlanError as error:
                raise FormatError(f"{key} of the checkpoint: {error}") from error
            if said.get("trainable_rotation") and said.get("online_r1_rotation"):
                raise FormatError(
                    f"{key} of the checkpoint: trained rotations of inputs at run time cannot be read"
                )
            return (
                replace(found, whole=True)
                if is_earlier(config) and isinstance(found, SpinQuantConfig)
                else found
            )
    return None


def is_earlier(config: Mapping[str, Any]) -> bool:
    """Whether auto-round before 1.0, which is another program, has written that quantization configuration."""
    return str(config.get("autoround_version", "")).startswith("0.")


def turned_layers(
    wish: Rotations, shapes: Iterable[tuple[str, int]], hidden: int, seed: int = 0
) -> Iterator[tuple[str, str, Rotation]]:
    """(layer, place, rotation) of those layers, given with their columns, whose inputs are turned at run time."""
    made: dict[tuple[str, int], Rotation] = {}  # a random one of many channels takes megabytes
    for name, columns in shapes:
        if EXPERTS in name:
            continue
        found = wish.of_layer(name, columns, hidden, seed)
        if found is not None:
            place, rotation = found
            yield name, place, made.setdefault((place, rotation.size), rotation)
