"""The rotations of one job: what weights take up when the model is opened, and inputs that are turned from then on."""

from __future__ import annotations

import logging
from collections import Counter

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from auto_round.core.errors import PlanError
from auto_round.core.hadamard import Rotation
from auto_round.core.plan import Plan
from auto_round.core.rotation import (
    EXPERTS,
    MLP_OUTPUTS,
    READERS,
    SpinQuantConfig,
    head_dim,
    rotations_of,
    turned_layers,
)
from auto_round.models.absorbing import Turns, fused
from auto_round.models.device import parse_devices
from auto_round.models.load import ModelFiles
from auto_round.models.memory import available_memory
from auto_round.models.subject import Subject
from auto_round.models.turning import turn_inputs, turn_keys
from auto_round.options import Options
from auto_round.rotation_training import Task, bytes_needed, train
from auto_round.sources.dataset import Calibration

logger = logging.getLogger("auto_round")


class Rotator:
    """Rotations as `rotation_config` has them. turns: layer -> place and rotation of its inputs, as soon as known."""

    def __init__(self, options: Options) -> None:
        self.wish, self._seed = rotations_of(options.rotation_config), options.seed
        self._devices = options.device_map
        self.turns: dict[str, tuple[str, Rotation]] = {}
        self._hooks: list[RemovableHandle] = []
        self._upright: Subject | None = None
        self._fused = False
        self._trained: Turns | None = None

    def forget(self) -> None:
        """The model is to be looked at anew."""
        self._upright = None

    def refuse(self) -> nn.Module:
        """Raise PlanError: a model was to be loaded by transformers because its tensors cannot be read by name."""
        raise PlanError(
            f"rotation_config={self.wish}: the tensors of this folder cannot be read one by one under the names that "
            "transformers' model has. Give the loaded model instead of the folder"
        )

    @property
    def untrained(self) -> bool:
        """Whether `train` has to be called before weights can take up anything."""
        wish = self.wish
        return isinstance(wish, SpinQuantConfig) and wish.trainable_rotation and self._trained is None

    def train(self, model: nn.Module, subject: Subject, plan: Plan, data: Calibration) -> None:
        """Find the rotations for the layers of `plan` in `subject`, whose original is `model`.

        Raises PlanError when the model does not fit into memory so often.
        """
        assert isinstance(self.wish, SpinQuantConfig), "only these are trained"
        device = parse_devices(self._devices).main
        needed, free = bytes_needed(model, data.tokens.shape[1]), _free(device)
        if needed > free:
            raise PlanError(
                f"rotation_config: training rotations takes about {needed / 1e9:.1f} GB for this model and samples of "
                f"{data.tokens.shape[1]} tokens, and {free / 1e9:.1f} GB are free on {device}. 'quarot' has fixed ones"
            )
        inside = {name: layer for name, layer in subject.anatomy.layers.items() if layer.block}
        layers = {name: (inside[name].parameter, plan[name]) for name in plan.quantized() if name in inside}
        logger.info("rotations: training %d steps on %d samples", self.wish.iters, len(data.tokens))
        task = Task(model, layers, subject.files.config, device)
        self._trained = train(task, self.wish, data, self._seed)

    def fuse(self, files: ModelFiles, tree: nn.Module) -> ModelFiles:
        """`files` and `tree` with what weights take up; a live model takes it up once."""
        wish = self.wish
        if not isinstance(wish, SpinQuantConfig) or not (wish.fused_stream or wish.r2) or self.untrained:
            return files
        if self._fused and files.folder is None:
            return files
        self._fused = True
        logger.info(
            "rotations: weights take up %s",
            " and ".join(place for place, used in (("R1", wish.fused_stream), ("R2", wish.r2)) if used),
        )
        return fused(files, tree, wish, self._seed, self._trained)

    def turn(self, subject: Subject, plan: Plan, live: nn.Module | None) -> Subject:
        """`subject` with the inputs of the layers of `plan` turned that rotations ask for, and `live` as well.

        Raises PlanError when there is no such layer.
        """
        if self.wish is None or not self.wish.online:
            return subject
        upright = self._upright = self._upright or subject
        tree = upright.tree if live is None else live
        assert tree is not None, "models with rotations have a module tree"
        before, self.turns = self.turns, self._turns_of(plan, upright, tree)
        places = Counter(f"{place} of {rotation.size}" for place, rotation in self.turns.values())
        if self.turns and self.turns.keys() != before.keys():
            counts = ", ".join(f"{count} by {place}" for place, count in places.items())
            logger.info("rotations: the inputs of layers are turned at run time, %s", counts)
        for handle in self._hooks:
            handle.remove()
        self._hooks = turn_inputs(tree, self.turns)
        if isinstance(self.wish, SpinQuantConfig) and self.wish.r3:
            turn_keys(tree, self.wish, head_dim(upright.files.config), self._seed)
        if live is not None:
            self._turn_weights(live, upright, before)
        if upright.files.folder is None:
            return upright
        return upright.turned({name: rotation for name, (_, rotation) in self.turns.items()})

    def _turns_of(self, plan: Plan, upright: Subject, tree: nn.Module) -> dict[str, tuple[str, Rotation]]:
        assert self.wish is not None, "there are rotations"
        layers = upright.anatomy.layers
        wanted = [(name, plan.shapes[name][1]) for name in plan.quantized() if layers[name].block]
        if experts := [name for name, _ in wanted if EXPERTS in name]:
            logger.warning(
                "rotations: the inputs of %d layers such as %s stay as they are", len(experts), experts[0]
            )
        hidden = getattr(tree.config.get_text_config(), "hidden_size", 0)  # type: ignore[union-attr, operator]
        found = turned_layers(self.wish, wanted, hidden, self._seed)
        turns = {name: (place, rotation) for name, place, rotation in found}
        if not turns and set(self.wish.online) != {"r3"}:
            raise PlanError(
                f"rotation_config: none of the layers to quantize is one that {' and '.join(self.wish.online)} would "
                f"turn the inputs of ({', '.join((*READERS, *MLP_OUTPUTS))}); 'default' turns those of all layers"
            )
        return turns

    @torch.no_grad()
    def _turn_weights(
        self, live: nn.Module, upright: Subject, before: dict[str, tuple[str, Rotation]]
    ) -> None:
        """A live model holds its weights itself: those of layers turned anew, or no more."""
        for name in {*before, *self.turns} - (before.keys() & self.turns.keys()):
            layer = upright.anatomy.layers[name]
            weight = layer.matrix(live.get_parameter(layer.parameter))
            values = weight.float()
            weight.copy_(before[name][1].back(values) if name in before else self.turns[name][1](values))


def _free(device: torch.device) -> int:
    """Free bytes of the memory of `device`."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else available_memory()
