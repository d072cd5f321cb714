"""The `torch` backend: reads any layout through its format, dequantizes through its codec, multiplies with torch.

It covers every format and data type with no further code and is the oracle of all other backends.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from auto_round.backends.base import AWQ, FLOATS, GPTQ, GPTQ_PLAIN, Backend, Kernel, Limits, Site
from auto_round.codecs.base import fake_inputs
from auto_round.core.quantized import inputs_among


class QuantLinear(Kernel):
    """x @ W'.T + bias, with W' made from the packed buffers in the dtype of x."""

    def __init__(self, site: Site) -> None:
        super().__init__(site, "torch")
        self._cached: Tensor | None = None
        self.cache = False

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight (O, I) in `dtype`."""
        if self._cached is not None and self._cached.dtype == dtype:
            return self._cached
        weight = self.dequantized(dtype)
        # A tensor made in inference mode could never be used in training again.
        self._cached = weight if self.cache and not torch.is_inference_mode_enabled() else None
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) to (..., O), in the dtype of x."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.site.act is not None:
            ranges = inputs_among({name: self.get_buffer(name) for name in self.packed})
            x = fake_inputs(x, self.site.act, ranges)
        return nn.functional.linear(x, self.weight_in(x.dtype), bias)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """As every kernel moves; a cached weight is made anew."""
        self._cached = None
        return super()._apply(fn, recurse)


class Reference(Backend):
    """Pure torch."""

    name = "torch"
    aliases = ("auto_round:torch", "auto_round:torch_zp")
    priority = 0
    # What the guide's table promises; `reject` allows more, whatever a format can read.
    limits = (
        Limits(
            devices=("cpu", "cuda", "xpu", "hpu", "mps"),
            bits=(2, 3, 4, 8),
            dtypes=FLOATS,
            packings=(*GPTQ, *GPTQ_PLAIN, *AWQ),
        ),
    )
    summary = "reference: every format and data type, dequantizes in torch"

    def reject(self, site: Site) -> str | None:
        """Everything that a format can read."""
        if not site.format.holds_codes:
            return f"format {site.format.name} stores plain weights"
        return None

    def build(self, site: Site) -> Kernel:
        """A `QuantLinear` on the meta device."""
        return QuantLinear(site)

    def finish(self, module: Kernel, *, cache: bool) -> None:
        """Read the layer once, so that a damaged one is an error at load and not garbage at use."""
        assert isinstance(module, QuantLinear), "built by this backend"
        module.checked()
        module.cache = cache
        if cache:
            module.weight_in(module.site.dtype)


ENTRIES = (Reference(),)
