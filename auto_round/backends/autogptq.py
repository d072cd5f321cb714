"""The `gptq:*` backends: kernels of AutoGPTQ, which is no longer maintained and needs transformers 4."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from auto_round.backends.base import GPTQ, Backend, Kernel, LibraryLinear, Limits, Site
from auto_round.core.groups import group_size
from auto_round.core.layouts import write_gptq


class AutoGptq(Backend):
    """One linear class of AutoGPTQ, which stores zero points less one."""

    requires = ("auto-gptq>=0.7.1", "transformers<5.0.0")

    def __init__(
        self, name: str, priority: int, module: str, limits: Limits, aliases: tuple[str, ...]
    ) -> None:
        self.name, self.priority, self.module, self.aliases = name, priority, module, aliases
        self.limits, self.summary = (limits,), f"AutoGPTQ's {module}"

    def build(self, site: Site) -> Kernel:
        """The checkpoint's buffers; AutoGPTQ's module comes in `finish`."""
        return LibraryLinear(site, self.name)

    def finish(self, module: Kernel, *, cache: bool) -> None:
        """Hand the tensors over."""
        assert isinstance(module, LibraryLinear), "built by this backend"
        library: Any = importlib.import_module(f"auto_gptq.nn_modules.qlinear.{self.module}")
        q, spec = module.checked(), module.site.spec
        size = group_size(q.shape, spec.group)  # the row, where one group is all of it
        tensors = write_gptq(q, zero_offset=1)
        # Its kernels look the group of a column up, also where groups are runs.
        tensors["g_idx"] = (torch.arange(q.shape[1], device=q.codes.device) // size).to(torch.int32)
        sizes = (*module.site.shape[::-1], module.bias is not None)
        module.adopt(library.QuantLinear(spec.bits, size, *sizes), tensors)


ENTRIES = (
    AutoGptq(
        "gptq:exllamav2",
        3,
        "qlinear_exllamav2",
        Limits(devices=("cuda",), bits=(4,), dtypes=(torch.float16,), packings=GPTQ, multiple_of=(32, 32)),
        ("auto_gptq:exllamav2", "exllamav2", "gptq", "auto_gptq"),
    ),
    AutoGptq(
        "gptq:cuda",
        1,
        "qlinear_cuda",
        Limits(devices=("cuda",), bits=(2, 3, 4, 8), dtypes=(torch.float16,), packings=GPTQ),
        ("auto_gptq:cuda", "gptq", "auto_gptq"),
    ),
    AutoGptq(
        "gptq:tritonv2",
        0,
        "qlinear_tritonv2",
        Limits(devices=("cuda",), bits=(2, 4, 8), dtypes=(torch.float16,), packings=GPTQ),
        ("auto_gptq:tritonv2", "gptq", "auto_gptq"),
    ),
)
