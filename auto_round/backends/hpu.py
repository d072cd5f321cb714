"""The `hpu` backend: Intel Gaudi's conversion of packed 4-bit weights, followed by its matrix product."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from auto_round.backends.base import GPTQ, GPTQ_PLAIN, Backend, Kernel, Limits, Site
from auto_round.core import bits as packing
from auto_round.core.groups import groups_per_row, merge, split
from auto_round.core.layouts import zeros_of
from auto_round.core.quantized import Quantized

BITS = 4


class HpuLinear(Kernel):
    """x @ W' + bias with words of eight rows' codes: qweight [I, O / 8], zeros [groups, O / 8], scales [groups, O]."""

    def settle(self, q: Quantized) -> None:
        """Pack along the rows of the weight, lowest bits first, zero points as they are."""
        count = groups_per_row(q.shape, q.spec.group)
        zeros = zeros_of(q).reshape(-1, count)
        self.replace(
            words=packing.pack(merge(q.codes, q.shape, q.spec.group), BITS).t().contiguous(),
            scales=q.params["scale"].reshape(-1, count).t().contiguous(),
            zeros=packing.pack(zeros, BITS).t().contiguous(),
        )

    def quantized(self) -> Quantized:
        """As loaded, or read back from the words."""
        if self.packed:
            return super().quantized()
        spec, shape = self.site.spec, self.site.shape
        params = {"scale": self.get_buffer("scales").t().reshape(-1, 1).contiguous()}
        if not spec.sym:
            params["zero"] = packing.unpack(self.get_buffer("zeros").t(), BITS).reshape(-1, 1)
        codes = split(packing.unpack(self.get_buffer("words").t(), BITS), spec.group)
        return Quantized(spec=spec, shape=shape, codes=codes.contiguous(), params=params)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) to (..., O), in the dtype of x."""
        weight = torch.ops.hpu.convert_from_uint4(self.words, self.scales.to(x.dtype), self.zeros, x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, weight.t(), bias)


class Hpu(Backend):
    """Intel Gaudi."""

    name = "hpu"
    aliases = ("hpu_zp",)
    priority = 0.5  # above torch, which the guide's table gives the same rank
    limits = (
        Limits(
            devices=("hpu",), bits=(4,), dtypes=(torch.bfloat16,), packings=(*GPTQ_PLAIN, *GPTQ),
            multiple_of=(8, 1),
        ),
    )  # fmt: skip
    requires = ("habana-torch-plugin",)
    summary = "Intel Gaudi's 4-bit conversion"

    def build(self, site: Site) -> Kernel:
        """An `HpuLinear` on the meta device."""
        return HpuLinear(site, self.name)

    def finish(self, module: Kernel, *, cache: bool) -> None:
        """Repack."""
        assert isinstance(module, HpuLinear), "built by this backend"
        module.settle(module.checked())


ENTRIES = (Hpu(),)
