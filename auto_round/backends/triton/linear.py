"""Layers on our own Triton kernels: repacked into words, multiplied by kernels.py, read back for saving."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from auto_round.backends.base import AWQ, FLOATS, GPTQ, GPTQ_PLAIN, Backend, Kernel, Limits, Site
from auto_round.core import bits as packing
from auto_round.core.groups import group_size, groups_per_row, merge, split
from auto_round.core.quantized import Quantized
from auto_round.core.settings import settings

INTERPRETER = "triton:interpreter"


class TritonLinear(Kernel):
    """x @ W'.T + bias on int32 words [I / per word, O]."""

    def __init__(self, site: Site, backend: str) -> None:
        super().__init__(site, backend)
        self.group = group_size(site.shape, site.spec.group)

    def settle(self, q: Quantized) -> None:
        """Repack `q`; 3 bits become a plane of 2 and a plane of 1."""
        codes = merge(q.codes, q.shape, q.spec.group).t()
        count = groups_per_row(q.shape, q.spec.group)
        plane = 2 if q.spec.bits == 3 else q.spec.bits  # fields of 3 bits would run over the ends of words
        words = packing.pack(codes & ((1 << plane) - 1), plane)
        high = packing.pack(codes >> 2, 1) if q.spec.bits == 3 else words.new_empty(0)
        tensors = {
            "codes": words,
            "high": high,
            "scales": q.params["scale"].reshape(-1, count).t().contiguous(),
        }
        if "zero" in q.params:
            tensors["zeros"] = q.params["zero"].reshape(-1, count).t().contiguous()
        self.replace(**tensors)

    def quantized(self) -> Quantized:
        """As loaded, or read back from the words."""
        if self.packed:
            return super().quantized()
        spec, shape = self.site.spec, self.site.shape
        plane = 2 if spec.bits == 3 else spec.bits
        codes = packing.unpack(self.get_buffer("codes"), plane)
        if spec.bits == 3:
            codes = codes | packing.unpack(self.get_buffer("high"), 1) << 2
        params = {"scale": self.get_buffer("scales").t().reshape(-1, 1).contiguous()}
        if not spec.sym:
            params["zero"] = self.get_buffer("zeros").t().reshape(-1, 1).contiguous()
        grouped = split(codes.t(), spec.group).contiguous()
        return Quantized(spec=spec, shape=shape, codes=grouped, params=params)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) to (..., O), in the dtype of x. Differentiable in x."""
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        zeros = None if self.site.spec.sym else self.zeros
        y = _Product.apply(flat, self, zeros, self.bias)
        return y.reshape(*x.shape[:-1], self.out_features)


class _Product(torch.autograd.Function):
    """The product; its backward dequantizes the weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layer: TritonLinear, zeros: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        ctx.layer = layer
        sizes = (layer.site.spec.bits, layer.group)
        y: Tensor = torch.ops.auto_round_triton.linear(
            x, layer.codes, layer.high, layer.scales, zeros, bias, *sizes
        )
        return y

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        (grad,) = upstream
        return grad @ ctx.layer.dequantized(grad.dtype), None, None, None


@cache
def _register() -> str | None:
    """Define the kernels. Why that failed, or None."""
    try:
        import auto_round.backends.triton.kernels  # noqa: F401
    except (ImportError, RuntimeError) as error:  # RuntimeError: triton found no driver
        return f"triton cannot be used: {error}"
    return None


def _limits(*devices: str) -> tuple[Limits, ...]:
    row = Limits(devices=devices, bits=(2, 3, 4, 8), dtypes=FLOATS, packings=(*GPTQ_PLAIN, *GPTQ, *AWQ))
    return (row,)


class Triton(Backend):
    """Our own kernels for GPUs, or for the CPU in Triton's interpreter."""

    requires = ("triton",)

    def __init__(self, name: str, priority: float, limits: tuple[Limits, ...], summary: str) -> None:
        self.name, self.priority, self.limits, self.summary = name, priority, limits, summary
        self.interpreted = name == INTERPRETER
        self.aliases = (
            () if self.interpreted else ("auto_round:tritonv2", "auto_round:tritonv2_zp", "tritonv2")
        )

    def missing(self) -> str | None:
        """The library, and the interpreter where that is meant."""
        if self.interpreted and not settings().triton_interpret:
            return "needs TRITON_INTERPRET=1 in the environment before Python starts"
        return super().missing()

    def prepare(self) -> str | None:
        """Import triton."""
        return _register()

    def build(self, site: Site) -> Kernel:
        """A `TritonLinear` on the meta device."""
        return TritonLinear(site, self.name)

    def finish(self, module: Kernel, *, cache: bool) -> None:
        """Repack."""
        assert isinstance(module, TritonLinear), "built by this backend"
        module.settle(module.checked())


ENTRIES = (
    Triton("triton", 2, _limits("cuda", "xpu"), "our own Triton kernels"),
    Triton(INTERPRETER, -2, _limits("cpu"), "the same in Triton's interpreter, on request: slow, for tests"),
)
