"""Layers on our own CPU kernels: repacked once, multiplied by kernels.cpp, read back for saving."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from auto_round.backends.base import AWQ, FLOATS, GPTQ, GPTQ_PLAIN, Backend, Kernel, Limits, Site
from auto_round.backends.cpu import build, layout
from auto_round.core.groups import group_size, groups_per_row, merge, split
from auto_round.core.quantized import Quantized

logger = logging.getLogger("auto_round")

LIMBS = {torch.float32: 3, torch.bfloat16: 2, torch.float16: 2}
"""Bytes per input value: what it takes to lose nothing that the dtype holds, see kernels.cpp."""


JOINED_ROWS = 8
"""Rows of inputs up to which layers are multiplied together; beyond, a call's own cost is lost in its work."""
PATIENCE = 3
"""Times that results may be left lying before layers are called one by one again, as in attention across models."""


class CpuLinear(Kernel):
    """x @ W'.T + bias. `limbs` None takes as many as the dtype of x needs; 1 rounds inputs to 8 bits."""

    def __init__(self, site: Site, backend: str, limbs: int | None) -> None:
        super().__init__(site, backend)
        self.limbs = limbs
        self.together: Together | None = None
        size = group_size(site.shape, site.spec.group)
        self.group = size + -size % layout.UNIT  # one group per row may end inside a unit

    def settle(self) -> None:
        """Repack what was loaded into tiles. Raises FormatError for missing or damaged tensors."""
        spec, shape, kernels = self.site.spec, self.site.shape, torch.ops.auto_round_cpu
        count, rows = groups_per_row(shape, spec.group), kernels.rows()
        params = self.checked_grid()
        if params is None:
            q = self.checked()
            words, params = layout.words_of(merge(q.codes, shape, spec.group), spec.bits), dict(q.params)
        else:
            words = self.qweight.contiguous()
        self.replace(
            codes=kernels.tile(words, spec.bits),
            **{f"{name}s": layout.tile_groups(t.reshape(-1, count), rows) for name, t in params.items()},
        )

    def quantized(self) -> Quantized:
        """As loaded, or read back from the tiles."""
        if self.packed:
            return super().quantized()
        spec, shape = self.site.spec, self.site.shape
        params = {"scale": layout.untile_groups(self.get_buffer("scales"), shape[0]).reshape(-1, 1)}
        if not spec.sym:
            params["zero"] = layout.untile_groups(self.get_buffer("zeros"), shape[0]).reshape(-1, 1)
        codes = layout.untile_codes(self.get_buffer("codes"), spec.bits, shape)
        return Quantized(spec=spec, shape=shape, codes=split(codes, spec.group), params=params)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) to (..., O), in the dtype of x. Differentiable in x."""
        if self.together is not None and self.together.serves(x):
            return self.together.result(self, x)
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        # Added to the float32 sum before it is rounded.
        bias = None if self.bias is None else self.bias.float()
        limbs = self.limbs or LIMBS[x.dtype]
        sizes = (self.site.spec.bits, self.group, self.out_features, limbs)
        y = torch.ops.auto_round_cpu.linear(
            flat, self.codes, self.scales, None if self.site.spec.sym else self.zeros, bias, *sizes
        )
        return y.reshape(*x.shape[:-1], self.out_features)


class Together:
    """Layers that read the same input: the first that is called multiplies for all, the others take their results.

    Each stays a module of its own, so names, saving, copies and adapters are as without. A result is only handed out
    for the very tensor it was made from, unchanged since; else the layer multiplies anew.
    """

    def __init__(self, layers: tuple[CpuLinear, ...]) -> None:
        self.layers = layers
        self.wasted = 0
        # (input, its version, results by place) in one attribute: another thread sees all of it or none.
        self.waiting: tuple[Tensor, int, dict[int, Tensor]] | None = None

    def serves(self, x: Tensor) -> bool:
        """Whether x is small enough that calls matter, and can be recognized."""
        return (
            x.numel() <= JOINED_ROWS * x.shape[-1]
            and not torch.compiler.is_compiling()
            and not x.is_inference()  # has no version
            and not (torch.is_grad_enabled() and x.requires_grad)
        )

    def result(self, layer: CpuLinear, x: Tensor) -> Tensor:
        """What `layer` makes of x."""
        place = next(i for i, other in enumerate(self.layers) if other is layer)
        waiting = self.waiting
        if waiting is not None and waiting[0] is x and waiting[1] == x._version:
            found = waiting[2].pop(place, None)
            if not waiting[2]:
                self.waiting = None  # the input may go
            if found is not None:
                return found
        if waiting is not None:  # results that nobody took: these layers do not read the same input after all
            self.wasted += 1
            if self.wasted > PATIENCE:
                for other in self.layers:
                    other.together = None
        results = dict(enumerate(self._multiply(x)))
        mine = results.pop(place)
        self.waiting = (x, x._version, results)
        return mine

    def _multiply(self, x: Tensor) -> list[Tensor]:
        first, flat = self.layers[0], x.reshape(-1, x.shape[-1]).contiguous()
        spec, limbs = first.site.spec, first.limbs or LIMBS[x.dtype]
        rows = [layer.out_features for layer in self.layers]
        zeros = [None if spec.sym else layer.zeros for layer in self.layers]
        biases = [None if layer.bias is None else layer.bias.float() for layer in self.layers]
        codes, scales = zip(*((layer.codes, layer.scales) for layer in self.layers))
        found = torch.ops.auto_round_cpu.linear_many(
            flat, codes, scales, zeros, biases, spec.bits, first.group, rows, limbs
        )
        return [y.reshape(*x.shape[:-1], count) for y, count in zip(found, rows)]


@cache
def ready() -> str | None:
    """Why the kernels cannot be used, or None: compiles and registers them the first time."""
    try:
        instructions = build.load()
    except build.BuildError as error:
        logger.warning("CPU kernels: %s", error)
        return str(error)
    logger.info("CPU kernels use %s and %d threads", instructions, torch.get_num_threads())
    # torch.compile asks for shapes, training for gradients; the operators in C++ give neither.
    torch.library.register_fake("auto_round_cpu::linear", _shape)
    torch.library.register_autograd("auto_round_cpu::linear", _backward, setup_context=_remember)
    return None


def _shape(x: Tensor, codes: Tensor, scales: Tensor, zeros: Any, bias: Any, *sizes: int) -> Tensor:
    return x.new_empty(x.shape[0], sizes[2])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scales, zeros, _, *sizes = inputs
    ctx.save_for_backward(codes, scales, zeros)
    ctx.sizes, ctx.columns = sizes, x.shape[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """The gradient with respect to x, from the dequantized weight."""
    codes, scales, zeros = ctx.saved_tensors
    bits, group, rows, _ = ctx.sizes
    weight = torch.ops.auto_round_cpu.weight(codes, scales, zeros, bits, group, rows, ctx.columns)
    return grad @ weight.to(grad.dtype), *(None,) * 8


class Cpu(Backend):
    """Our own kernels."""

    limits = (
        Limits(devices=("cpu",), bits=(2, 3, 4, 8), dtypes=FLOATS, packings=(*GPTQ_PLAIN, *GPTQ, *AWQ)),
    )

    def __init__(self, name: str, priority: int, limbs: int | None, summary: str) -> None:
        self.name, self.priority, self.limbs, self.summary = name, priority, limbs, summary

    def reject(self, site: Site) -> str | None:
        """Groups must end where a unit ends."""
        reason = super().reject(site)
        size = group_size(site.shape, site.spec.group)
        if reason is None and size % layout.UNIT and size != site.shape[1]:
            return f"group size {size} is no multiple of {layout.UNIT}"
        return reason

    def missing(self) -> str | None:
        """A compiler."""
        return None if build.compiler() else "needs a C++ compiler: install g++ or clang++"

    def prepare(self) -> str | None:
        """Compile the kernels."""
        return ready()

    def build(self, site: Site) -> Kernel:
        """A `CpuLinear` on the meta device."""
        return CpuLinear(site, self.name, self.limbs)

    def finish(self, module: Kernel, *, cache: bool) -> None:
        """Repack."""
        assert isinstance(module, CpuLinear), "built by this backend"
        module.settle()

    def join(self, modules: Sequence[Kernel]) -> None:
        """Multiply them in one call where all have one setting."""
        layers = tuple(module for module in modules if isinstance(module, CpuLinear))
        settings = {(m.site.spec, m.group, m.site.shape[1], m.limbs) for m in layers}
        # Padding makes a new tensor for every call.
        if len(layers) == len(modules) and len(settings) == 1 and not any(m.site.padding for m in layers):
            together = Together(layers)
            for layer in layers:
                layer.together = together


ENTRIES = (
    Cpu("cpu", 7, None, "our own kernels, compiled for this processor at first use"),
    Cpu("cpu:int8", -1, 1, "the same with inputs rounded to 8 bits: faster, less exact, on request only"),
)
