"""The `ark` backend: the kernels of auto-round-lib for Intel and AMD CPUs and for Intel GPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from auto_round.backends.base import AWQ, FLOATS, GPTQ, GPTQ_PLAIN, Backend, Kernel, Limits, Site
from auto_round.core.groups import group_size, merge, split
from auto_round.core.layouts import middle
from auto_round.core.quantized import Quantized

COMPUTE = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
SCALES = "fp32"  # float16 scales give NaN (auto-round-lib 0.16.0)


def _library() -> Any:
    import auto_round_kernel

    return auto_round_kernel


class ArkLinear(Kernel):
    """x @ W'.T + bias on a weight in the library's own packing; scales and zero points are kept to undo it."""

    def __init__(self, site: Site) -> None:
        super().__init__(site, "ark")
        size = group_size(site.shape, site.spec.group)
        self.settings = (size, COMPUTE[site.dtype], f"int{site.spec.bits}", SCALES, not site.spec.sym)

    def settle(self, q: Quantized) -> None:
        """Repack `q` for the library."""
        rows, middle_code = q.shape[0], middle(q.spec)
        # The library takes signed codes; zero points move along.
        codes = (merge(q.codes, q.shape, q.spec.group).to(torch.int16) - middle_code).to(torch.int8)
        scale = q.params["scale"].float().reshape(rows, -1).t().contiguous()
        zero = torch.empty(0, dtype=torch.int8, device=codes.device)
        kept = {"scale": q.params["scale"]}
        if "zero" in q.params:
            zero = (q.params["zero"].to(torch.int16) - middle_code).to(torch.int8)
            zero = zero.reshape(rows, -1).t().contiguous()
            kept["zero"] = q.params["zero"]
        blob = _library().repack_quantized_weight(codes.t().contiguous(), scale, zero, *self.settings)
        self.replace(blob=blob, **kept)

    def quantized(self) -> Quantized:
        """As loaded, or read back from the library's packing: its float32 weights are (code - zero) * scale exactly."""
        if self.packed:
            return super().quantized()
        rows, columns = self.site.shape
        weight = _library().unpack_weight(self.blob, torch.float32, rows, columns, *self.settings)
        scale = self.get_buffer("scale")
        params = {"scale": scale}
        zero: Tensor | float = float(middle(self.site.spec))
        if not self.site.spec.sym:
            params["zero"] = self.get_buffer("zero")
            zero = params["zero"].float()
        # A scale of 0 has lost its codes, but every code of it means 0.
        steps = split(weight, self.site.spec.group) / torch.where(scale == 0, 1, scale).float()
        codes = (steps.round() + zero).to(torch.uint8)
        return Quantized(spec=self.site.spec, shape=self.site.shape, codes=codes, params=params)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) to (..., O), in the dtype of x."""
        rows, columns = self.site.shape
        # How it is told of none.
        bias = torch.empty(0, dtype=x.dtype, device=x.device) if self.bias is None else self.bias.to(x.dtype)
        flat = x.reshape(-1, columns).contiguous()
        size, _, *rest = self.settings
        settings = (size, COMPUTE[x.dtype], *rest)
        y = _library().woqgemm_linear(flat, self.blob, bias, rows, columns, *settings)
        return y.reshape(*x.shape[:-1], rows)


class Ark(Backend):
    """auto-round-lib."""

    name = "ark"
    aliases = (
        "auto_round_kernel",
        "auto_round_kernel_zp",
        "auto_round_kernel_awq",
        "auto_round_kernel_xpu",
        "auto_round_kernel_zp_xpu",
        "auto_round_kernel_awq_xpu",
    )
    priority = 6
    limits = (
        Limits(devices=("cpu",), bits=(2, 4, 8), dtypes=FLOATS, packings=(*GPTQ_PLAIN, *GPTQ)),
        Limits(devices=("cpu",), bits=(4,), dtypes=FLOATS, packings=AWQ),
        Limits(
            devices=("xpu",), bits=(4, 8), dtypes=FLOATS, packings=(*GPTQ_PLAIN, *GPTQ), symmetric=(True,)
        ),
        Limits(devices=("xpu",), bits=(4,), dtypes=FLOATS, packings=AWQ, symmetric=(True,)),
    )
    requires = ("auto-round-lib", "torch>=2.8.0")
    summary = "kernels of auto-round-lib"

    def reject(self, site: Site) -> str | None:
        """Its limits, and whole groups: the library has no short last group."""
        size = group_size(site.shape, site.spec.group)
        if site.shape[1] % size:
            return f"rows of {site.shape[1]} are not divided by groups of {size}"
        return super().reject(site)

    def build(self, site: Site) -> Kernel:
        """An `ArkLinear` on the meta device."""
        return ArkLinear(site)

    def finish(self, module: Kernel, *, cache: bool) -> None:
        """Repack."""
        assert isinstance(module, ArkLinear), "built by this backend"
        module.settle(module.checked())


ENTRIES = (Ark(),)
