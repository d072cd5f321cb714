"""Trained rotations: R1, R2 and factors behind norms with which the rounded model predicts like the original.

SpinQuant (arXiv:2405.16406), section 3.2: the weights stay, and what is trained are orthogonal matrices that they take
up, by Cayley SGD (Li, Fuxin and Todorovic, arXiv:2002.01113, algorithm 1). The loss is the Kullback-Leibler divergence
of the predictions on calibration samples, so nothing but token ids is needed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from auto_round.codecs.base import fake, fake_inputs, stored_inputs
from auto_round.core.hadamard import Learned, Rotation
from auto_round.core.rotation import SpinQuantConfig
from auto_round.core.scheme import Scheme
from auto_round.models.absorbing import Fusion, Turns, check_known, untie
from auto_round.sources.dataset import Calibration

logger = logging.getLogger("auto_round")

MOMENTUM, LONGEST = 0.9, 0.5
"""Of Cayley SGD: beta and q of the paper's algorithm 1."""
JUDGED = 16
"""Samples at most that choose the best step; no step trains on them."""
LOOKS = 10
"""How often they do."""


@dataclass(frozen=True, slots=True)
class Task:
    """model: the original. scheme: of the layers, (layer, its weight's name). config: the model's."""

    model: nn.Module
    scheme: Scheme
    layers: Sequence[tuple[str, str]]
    config: dict[str, Any]
    device: torch.device


class Student:
    """The model with rotations taken up and layers rounded, as a function of the rotations."""

    def __init__(self, task: Task) -> None:
        self._task, model = task, task.model
        tensors = [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
        self._tensors = {name: self._ready(tensor) for name, tensor in tensors}
        self.names = list(model.state_dict())

    def _ready(self, tensor: Tensor) -> Tensor:
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to(self._task.device, dtype)

    def norms(self) -> dict[str, int]:
        """Norm of the stream that rounded layers read -> its channels."""
        rounded = [weight for _, weight in self._task.layers]
        found = Fusion(self.names, self._tensors.__getitem__, Turns()).norms(rounded)
        return {name: self._tensors[name].numel() for name in found}

    def predictions(self, batch: Calibration) -> Tensor:
        """Log-probabilities of the original, (N, T, V)."""
        with torch.no_grad():
            return self._run(self._tensors, batch)

    def loss(self, turns: Turns, batch: Calibration, wanted: Tensor) -> Tensor:
        """Mean divergence from `wanted`, nats per token, with `turns` taken up and everything rounded."""
        tensors = dict(self._tensors)
        for name, steps in Fusion(self.names, tensors.__getitem__, turns).changes.items():
            found = self._tensors[name]
            for step in steps:
                found = step(found)
            tensors[name] = found
        spec = self._task.scheme.weight
        assert spec is not None, "rotations are trained for a scheme"
        for _, name in self._task.layers:
            rotated = tensors[name]
            # The value is the rounded weight's, the gradient that of the weight.
            tensors[name] = rotated + (fake(rotated.detach(), spec) - rotated.detach())
        with self._rounded_inputs():
            found = self._run(tensors, batch)
        each = nn.functional.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
        valid = batch.valid
        return each.mean() if valid is None else each[valid.to(each.device)].mean()

    def _run(self, tensors: dict[str, Tensor], batch: Calibration) -> Tensor:
        device = self._task.device
        given = {"input_ids": batch.tokens.to(device), "use_cache": False}
        if batch.attention_mask is not None:
            given["attention_mask"] = batch.attention_mask.to(device)
        logits: Tensor = functional_call(self._task.model, tensors, (), given, tie_weights=False).logits
        return logits.float().log_softmax(-1)

    @contextmanager
    def _rounded_inputs(self) -> Iterator[None]:
        act = self._task.scheme.act
        with ExitStack() as stack:
            for layer, _ in self._task.layers if act is not None else ():

                def rounded(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
                    assert act is not None, "else there is no hook"
                    limits = stored_inputs(act, *torch.aminmax(args[0].detach()))
                    return (fake_inputs(args[0], act, limits), *args[1:])

                handle = self._task.model.get_submodule(layer).register_forward_pre_hook(rounded)
                stack.callback(handle.remove)
            yield


class Orthogonal:
    """A trained matrix, (n, n), and its momentum."""

    def __init__(self, start: Rotation, channels: int, device: torch.device) -> None:
        self.value = start(torch.eye(channels)).to(device).requires_grad_()
        self._momentum = torch.zeros_like(self.value)

    @torch.no_grad()
    def step(self, gradient: Tensor, rate: float) -> None:
        """Go down along the manifold of orthogonal matrices."""
        x, m = self.value, self._momentum.mul_(MOMENTUM).sub_(gradient)
        moved = m @ x.t()
        skew = moved - 0.5 * x @ (x.t() @ moved)
        skew = skew - skew.t()
        m.copy_(skew @ x)
        rate = min(rate, 2 * LONGEST / (float(skew.norm()) + 1e-8))
        # Solved, not iterated as in the paper: long steps would leave the manifold.
        half, one = rate / 2 * skew, torch.eye(len(x), device=x.device)
        x.copy_(torch.linalg.solve(one - half, (one + half) @ x))

    def kept(self) -> Learned:
        """As it is now, made orthogonal to the last digit that float32 has."""
        left, _, right = torch.linalg.svd(self.value.detach().double().cpu())
        return Learned(len(left), values=(left @ right).float().contiguous())

    @property
    def turn(self) -> Learned:
        """The rotation by it, with gradients."""
        return Learned(len(self.value), values=self.value)


class Trained:
    """All that is trained."""

    def __init__(
        self, student: Student, fixed: Turns, config: dict[str, Any], wish: SpinQuantConfig, task: Task
    ) -> None:
        self._wish, hidden = wish, int(config["hidden_size"])
        self.stream = None if fixed.stream is None else Orthogonal(fixed.stream, hidden, task.device)
        self.values: dict[str, Orthogonal] = {}
        if fixed.values is not None:
            paths = [
                name.removesuffix(".v_proj.weight")
                for name in student.names
                if name.endswith(".v_proj.weight")
            ]
            starts = {path: fixed.values(path) for path in paths}
            self.values = {path: Orthogonal(start, start.size, task.device) for path, start in starts.items()}
        norms = student.norms() if wish.trainable_smooth else {}
        self.factors = {
            norm: torch.zeros(channels, device=task.device, requires_grad=True)
            for norm, channels in norms.items()
        }
        """Logarithms of them."""
        self._adam = torch.optim.Adam(self.factors.values(), lr=wish.smooth_lr) if self.factors else None

    def turns(self) -> Turns:
        """With gradients."""
        values = {path: matrix.turn for path, matrix in self.values.items()}
        return Turns(
            None if self.stream is None else self.stream.turn,
            values.__getitem__ if values else None,
            {norm: factors.exp() for norm, factors in self.factors.items()},
        )

    def kept(self) -> Turns:
        """As they are now, on the CPU."""
        values = {path: matrix.kept() for path, matrix in self.values.items()}
        return Turns(
            None if self.stream is None else self.stream.kept(),
            values.__getitem__ if values else None,
            {norm: factors.detach().exp().cpu() for norm, factors in self.factors.items()},
        )

    def step(self, loss: Tensor, left: float) -> None:
        """One step down; `left` of the way is before us."""
        matrices = [*([] if self.stream is None else [self.stream]), *self.values.values()]
        wanted = [*(matrix.value for matrix in matrices), *self.factors.values()]
        found = torch.autograd.grad(loss, wanted)
        for matrix, gradient in zip(matrices, found):
            matrix.step(gradient, self._wish.lr * left)
        if self._adam is not None:
            for factors, gradient in zip(self.factors.values(), found[len(matrices) :]):
                factors.grad = gradient
            self._adam.param_groups[0]["lr"] = self._wish.smooth_lr * left
            self._adam.step()


def train(task: Task, wish: SpinQuantConfig, data: Calibration, seed: int) -> Turns:
    """Rotations for `wish`, started from Hadamard's; the best that were met, which may be those of the start.

    The model's own tensors stay as they are, but for a head that was tied to the embedding, which becomes its own.
    Raises PlanError where the architecture has no room for them.
    """
    check_known(str(task.model.config.model_type), wish)  # type: ignore[union-attr]
    if wish.fused_stream:
        untie(task.model)
    student = Student(task)
    trained = Trained(student, Turns.fixed(task.config, wish, seed), task.config, wish, task)
    order = torch.randperm(len(data.tokens), generator=torch.Generator().manual_seed(seed))
    held = min(JUDGED, len(order) // 4)
    judges = [_part(data, rows) for rows in (order[:held] if held else order).split(wish.batch_size)]
    rows, generator = order[held:], torch.Generator().manual_seed(seed)
    best, start, began = trained.kept(), _judged(student, trained, judges), time.monotonic()
    least = start
    for i in range(wish.iters):
        chosen = rows[torch.randint(len(rows), (wish.batch_size,), generator=generator)]
        batch = _part(data, chosen)
        trained.step(student.loss(trained.turns(), batch, student.predictions(batch)), 1 - i / wish.iters)
        if (i + 1) % max(1, wish.iters // LOOKS) == 0 or i + 1 == wish.iters:
            now = _judged(student, trained, judges)
            left = (time.monotonic() - began) / (i + 1) * (wish.iters - i - 1)
            logger.info(
                "rotations: step %d of %d, divergence %.4f, %.4f at the start; about %.0f s left",
                i + 1, wish.iters, now, start, left,
            )  # fmt: skip
            if now < least:
                best, least = trained.kept(), now
    return best


def _part(data: Calibration, rows: Tensor) -> Calibration:
    mask = data.attention_mask
    return Calibration(data.tokens[rows], None if mask is None else mask[rows])


@torch.no_grad()
def _judged(student: Student, trained: Trained, batches: Sequence[Calibration]) -> float:
    """Divergence on samples that train nothing."""
    losses = [student.loss(trained.turns(), batch, student.predictions(batch)) for batch in batches]
    return float(torch.stack(losses).mean())


def bytes_needed(weights: int) -> int:
    """Of memory, for a model of so many weights: in float32, rotated, rounded, and a gradient."""
    return 4 * 4 * weights
