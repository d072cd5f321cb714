"""Trained rotations: R1, R2 and factors behind norms with which the rounded model predicts like the original.

SpinQuant (arXiv:2405.16406), section 3.2: the weights stay, and what is trained are orthogonal matrices that they take
up, by Cayley SGD (Li, Fuxin and Todorovic, arXiv:2002.01113, algorithm 1). The loss is the Kullback-Leibler divergence
of the predictions on calibration samples, so nothing but token ids is needed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from auto_round.codecs.base import fake, fake_inputs, stored_inputs
from auto_round.core.hadamard import Learned, Rotation
from auto_round.core.rotation import SpinQuantConfig
from auto_round.core.scheme import Scheme, TensorSpec
from auto_round.models.absorbing import Fusion, Turns, check_known, untie
from auto_round.models.turning import changed
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
    """model: the original. layers: those to quantize -> (their weight's name, scheme). config: the model's."""

    model: nn.Module
    layers: Mapping[str, tuple[str, Scheme]]
    config: Mapping[str, Any]
    device: torch.device


class Student:
    """The model as a function of its tensors, and these as a function of rotations."""

    def __init__(self, task: Task) -> None:
        self._task, model = task, task.model
        parts = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
        self._tensors = {name: self._ready(tensor) for name, tensor in chain(*parts)}
        self.names = list(model.state_dict())

    def _ready(self, tensor: Tensor) -> Tensor:
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to(self._task.device, dtype)

    def norms(self) -> dict[str, int]:
        """Norm of the stream that rounded layers read -> its channels."""
        found = Fusion(self.names, self._tensors.__getitem__, Turns()).norms(
            [weight for weight, _ in self._task.layers.values()]
        )
        return {name: self._tensors[name].numel() for name in found}

    def rounded(self, turns: Turns) -> dict[str, Tensor]:
        """The tensors that change when `turns` are taken up and layers rounded, with gradients as if not rounded."""
        steps = Fusion(self.names, self._tensors.__getitem__, turns).changes
        tensors = {name: changed(self._tensors[name], own) for name, own in steps.items()}
        for name, scheme in self._task.layers.values():
            whole = tensors.get(name, self._tensors[name])
            if scheme.weight is not None:
                # The value is the rounded weight's, the gradient that of the weight.
                tensors[name] = whole + (fake(whole.detach(), scheme.weight) - whole.detach())
        return tensors

    def loss(self, tensors: Mapping[str, Tensor], sample: Calibration) -> Tensor:
        """Mean divergence of the model with `tensors` and rounded inputs from the original, nats per token."""
        with torch.no_grad():
            wanted = self._run({}, sample)
        with self._rounded_inputs():
            found = self._run(tensors, sample)
        each = nn.functional.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
        valid = sample.valid
        return each.mean() if valid is None else each[valid.to(each.device)].mean()

    def gradients(self, tensors: Mapping[str, Tensor], samples: Sequence[Calibration]) -> dict[str, Tensor]:
        """Of the mean loss over `samples`, in those of `tensors` that need them.

        Sample by sample: predictions of a large vocabulary are what takes the memory.
        """
        leaves = {
            name: tensor.detach().requires_grad_() for name, tensor in tensors.items() if tensor.requires_grad
        }
        for sample in samples:
            (self.loss({**tensors, **leaves}, sample) / len(samples)).backward()
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    def _run(self, tensors: Mapping[str, Tensor], sample: Calibration) -> Tensor:
        """Log-probabilities, (N, T, V)."""
        device = self._task.device
        given = {"input_ids": sample.tokens.to(device), "use_cache": False}
        if sample.attention_mask is not None:
            given["attention_mask"] = sample.attention_mask.to(device)
        every = {**self._tensors, **tensors}
        logits: Tensor = functional_call(self._task.model, every, (), given, tie_weights=False).logits
        return logits.float().log_softmax(-1)

    @contextmanager
    def _rounded_inputs(self) -> Iterator[None]:
        def rounded(act: TensorSpec, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            limits = stored_inputs(act, *torch.aminmax(args[0].detach()))
            return (fake_inputs(args[0], act, limits), *args[1:])

        with ExitStack() as stack:
            for layer, (_, scheme) in self._task.layers.items():
                if scheme.act is not None:
                    module = self._task.model.get_submodule(layer)
                    stack.callback(module.register_forward_pre_hook(partial(rounded, scheme.act)).remove)
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

    def __init__(self, task: Task, student: Student, wish: SpinQuantConfig, seed: int) -> None:
        self._wish, fixed = wish, Turns.fixed(task.config, wish, seed)
        self.stream = None
        if fixed.stream is not None:
            self.stream = Orthogonal(fixed.stream, int(task.config["hidden_size"]), task.device)
        self.values: dict[str, Orthogonal] = {}
        if fixed.values is not None:
            ending = ".v_proj.weight"
            for path in (name.removesuffix(ending) for name in student.names if name.endswith(ending)):
                start = fixed.values(path)
                self.values[path] = Orthogonal(start, start.size, task.device)
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

    def step(self, student: Student, samples: Sequence[Calibration], left: float) -> None:
        """One step down the loss over `samples`; `left` of the way is before us."""
        matrices = [*([] if self.stream is None else [self.stream]), *self.values.values()]
        trained = [*(matrix.value for matrix in matrices), *self.factors.values()]
        tensors = student.rounded(self.turns())
        gradients = student.gradients(tensors, samples)
        found = torch.autograd.grad([tensors[name] for name in gradients], trained, list(gradients.values()))
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
    trained = Trained(task, student, wish, seed)
    generator = torch.Generator().manual_seed(seed)
    samples = [_sample(data, row) for row in torch.randperm(len(data.tokens), generator=generator).tolist()]
    held = min(JUDGED, len(samples) // 4)
    judges, rest = samples[:held] or samples, samples[held:]
    best, start, began = trained.kept(), _judged(student, trained, judges), time.monotonic()
    least = start
    for i in range(wish.iters):
        chosen = torch.randint(len(rest), (wish.batch_size,), generator=generator).tolist()
        trained.step(student, [rest[row] for row in chosen], 1 - i / wish.iters)
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


def _sample(data: Calibration, row: int) -> Calibration:
    mask = data.attention_mask
    return Calibration(data.tokens[row : row + 1], None if mask is None else mask[row : row + 1])


@torch.no_grad()
def _judged(student: Student, trained: Trained, samples: Sequence[Calibration]) -> float:
    """Divergence on samples that train nothing."""
    tensors = student.rounded(trained.turns())
    return float(torch.stack([student.loss(tensors, sample) for sample in samples]).mean())


def bytes_needed(model: nn.Module, length: int) -> int:
    """Of memory, to train on samples of `length` tokens: each weight in float32, turned, rounded and as a gradient, and
    what one sample leaves behind in the blocks and in five tables of predictions."""
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    weights = sum(parameter.numel() for parameter in model.parameters())
    block = 16 * config.hidden_size + 6 * config.intermediate_size
    return int(4 * (5 * weights + length * (5 * config.vocab_size + config.num_hidden_layers * block)))
