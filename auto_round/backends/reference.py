"""The `torch` backend: reads any layout through its format, dequantizes through its codec, multiplies with torch.

It covers every format and data type with no further code and is the oracle of all other backends.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from auto_round.backends.base import Backend, Kernel, Site
from auto_round.codecs.base import codec_of
from auto_round.core.errors import AutoRoundError, FormatError
from auto_round.formats.base import planned_tensors


class QuantLinear(Kernel):
    """x @ W'.T + bias, with W' made from the packed buffers in the dtype of x."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.backend, self.site = "torch", site
        self.in_features, self.out_features = site.shape[1], site.shape[0]
        for suffix, tensor in planned_tensors(site.format, site.spec, site.shape, site.act).items():
            self.register_buffer(suffix, torch.empty_like(tensor))
        self._packed = tuple(name for name, _ in self.named_buffers())
        bias = None if site.bias is None else torch.empty(site.shape[0], dtype=site.bias, device="meta")
        self.bias: Tensor | None
        self.register_buffer("bias", bias)
        self._cached: Tensor | None = None
        self.cache = False

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight (O, I) in `dtype`."""
        if self._cached is not None and self._cached.dtype == dtype:
            return self._cached
        tensors = {name: self.get_buffer(name) for name in self._packed}
        q = self.site.format.read(tensors, self.site.spec, self.site.shape)
        weight = codec_of(self.site.spec).dequantize(q).to(dtype)
        self._cached = weight if self.cache else None
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) to (..., O), in the dtype of x."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight_in(x.dtype), bias)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """Move as modules do; integer buffers and scales keep their dtypes, and a cached weight is made anew."""
        self._cached = None
        before = {name: self.get_buffer(name) for name in self._packed}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = self.get_buffer(name)
            if moved.dtype != tensor.dtype:
                # A model cast to bfloat16 must not round its scales: the codes were made for these.
                self.register_buffer(name, tensor.to(moved.device))
        return self

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        size = f"{self.in_features}, {self.out_features}"
        return f"{size}, {self.site.spec}, format={self.site.format.name}, backend={self.backend}"


class Reference(Backend):
    """Pure torch."""

    name = "torch"
    aliases = ("auto_round:torch", "auto_round:torch_zp")
    priority = 0
    devices = ("cpu", "cuda", "xpu", "hpu", "mps")
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
        for name in module._packed:
            if module.get_buffer(name).device.type == "meta":
                raise FormatError(f"{module.site.name}.{name} is missing from the checkpoint")
        module.cache = cache
        try:
            weight = module.weight_in(module.site.dtype)
        except AutoRoundError as error:
            raise FormatError(f"{module.site.name}: {error}") from error
        if weight.device.type != "meta" and not bool(torch.isfinite(weight).all()):
            raise FormatError(
                f"{module.site.name}: scales that are NaN or Inf; copy or download the checkpoint again"
            )


ENTRIES = (Reference(),)
