"""The `awq` backend: the GEMM kernel of AutoAWQ, which is no longer maintained and needs transformers below 4.57."""

from __future__ import annotations

from typing import Any

import torch

from auto_round.backends.base import AWQ, Backend, Kernel, LibraryLinear, Limits, Site
from auto_round.core.groups import group_size
from auto_round.core.layouts import write_awq


class AutoAwq(Backend):
    """AutoAWQ's WQLinear_GEMM."""

    name = "awq"
    aliases = ("auto_awq:gemm", "auto_awq")
    priority = 5
    limits = (
        Limits(devices=("cuda",), bits=(4,), dtypes=(torch.float16,), packings=AWQ, multiple_of=(8, 1)),
    )
    requires = ("autoawq", "transformers<4.57.0")
    summary = "AutoAWQ's WQLinear_GEMM"

    def build(self, site: Site) -> Kernel:
        """The checkpoint's buffers; AutoAWQ's module comes in `finish`."""
        return LibraryLinear(site, self.name)

    def finish(self, module: Kernel, *, cache: bool) -> None:
        """Hand the tensors over: they already lie as this kernel reads them."""
        assert isinstance(module, LibraryLinear), "built by this backend"
        from awq.modules.linear import WQLinear_GEMM

        q, spec = module.checked(), module.site.spec
        size = group_size(q.shape, spec.group)
        sizes = (*module.site.shape[::-1], module.bias is not None)
        inner: Any = WQLinear_GEMM(spec.bits, size, *sizes, str(q.codes.device))
        module.adopt(inner, write_awq(q))


ENTRIES = (AutoAwq(),)
