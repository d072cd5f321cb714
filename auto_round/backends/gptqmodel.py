"""The `gptqmodel:*` backends: kernels of GPTQModel for GPTQ and AWQ checkpoints, most of them for NVIDIA GPUs."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from auto_round.backends.base import (
    AWQ,
    GPTQ,
    GPTQ_PLAIN,
    Backend,
    Kernel,
    LibraryLinear,
    Limits,
    Site,
)
from auto_round.core.groups import group_size
from auto_round.core.layouts import write_awq, write_gptq
from auto_round.core.quantized import Quantized

HALVES = (torch.bfloat16, torch.float16)
SMALL_GROUPS = (-1, 16, 32, 64, 128)
GROUPS = (-1, 32, 64, 128)


def gptq_tensors(q: Quantized, zero_offset: int) -> dict[str, Tensor]:
    """The GPTQ layout with the group of each column, as GPTQModel's modules start from."""
    tensors = write_gptq(q, zero_offset=zero_offset)
    index = torch.arange(q.shape[1], device=q.codes.device) // group_size(q.shape, q.spec.group)
    return {**tensors, "g_idx": index.to(torch.int32)}


class GptqModel(Backend):
    """One linear class of GPTQModel."""

    requires = ("gptqmodel>=2.0",)

    def __init__(
        self, name: str, priority: int, module: str, limits: Limits, *, aliases: tuple[str, ...] = ()
    ) -> None:
        self.name, self.priority, self.aliases, self.limits = name, priority, aliases, (limits,)
        self.module = module  # "file.Class" below gptqmodel.nn_modules.qlinear
        self.awq = limits.packings == AWQ
        self.summary = f"GPTQModel's {module.rpartition('.')[2]}"
        if self.awq:
            self.requires = ("gptqmodel>=5.6",)

    def build(self, site: Site) -> Kernel:
        """The checkpoint's buffers; GPTQModel's module comes in `finish`."""
        return LibraryLinear(site, self.name)

    def finish(self, module: Kernel, *, cache: bool) -> None:
        """Hand the tensors over in the layout that the class starts from."""
        assert isinstance(module, LibraryLinear), "built by this backend"
        file, _, name = self.module.rpartition(".")
        kind: Any = getattr(importlib.import_module(f"gptqmodel.nn_modules.qlinear.{file}"), name)
        q, spec = module.checked(), module.site.spec
        inner = kind(
            bits=spec.bits,
            group_size=spec.group,
            sym=spec.sym,
            desc_act=False,  # our groups are runs of neighbours
            in_features=module.site.shape[1],
            out_features=module.out_features,
            bias=module.bias is not None,
            register_buffers=False,  # it gets ours, instead of empty ones of the full size
        )
        if self.awq:
            tensors = write_awq(q)
        else:
            # Its classes differ in which convention of zero points they multiply with, and say so.
            tensors = gptq_tensors(q, 0 if kind.REQUIRES_FORMAT_V2 else 1)
        module.adopt(inner.eval(), tensors)


ENTRIES = (
    GptqModel(
        "marlin",
        6,
        "marlin.MarlinLinear",
        Limits(
            devices=("cuda",),
            bits=(4, 8),
            dtypes=HALVES,
            packings=(*GPTQ_PLAIN, *GPTQ),
            groups=GROUPS,
            symmetric=(True,),
            multiple_of=(64, 1),
        ),
        aliases=("gptqmodel:marlin", "gptqmodel:marlin_zp", "gptqmodel"),
    ),
    GptqModel(
        "gptqmodel:exllamav2",
        5,
        "exllamav2.ExllamaV2Linear",
        Limits(
            devices=("cuda",),
            bits=(4,),
            dtypes=HALVES,
            packings=(*GPTQ_PLAIN, *GPTQ),
            groups=GROUPS,
            multiple_of=(32, 32),
        ),
        aliases=("exllamav2", "gptqmodel"),
    ),
    GptqModel(
        "gptqmodel:awq_exllamav2",
        6,
        "exllamav2_awq.AwqExllamaV2Linear",
        Limits(
            devices=("cuda",), bits=(4,), dtypes=HALVES, packings=AWQ, groups=GROUPS, multiple_of=(32, 32)
        ),
        aliases=("gptqmodel:awq", "gptqmodel"),
    ),
    GptqModel(
        "gptqmodel:awq_marlin",
        5,
        "marlin_awq.AwqMarlinLinear",
        Limits(
            devices=("cuda",),
            bits=(4, 8),
            dtypes=(torch.float16,),
            packings=AWQ,
            groups=GROUPS,
            symmetric=(True,),
            multiple_of=(64, 1),
        ),
        aliases=("gptqmodel:awq", "gptqmodel"),
    ),
    GptqModel(
        "gptqmodel:awq_gemm",
        3,
        "gemm_awq.AwqGEMMLinear",
        Limits(devices=("cuda",), bits=(4,), dtypes=(torch.float16,), packings=AWQ, groups=SMALL_GROUPS),
        aliases=("gptqmodel:awq", "gptqmodel"),
    ),
    GptqModel(
        "gptqmodel:awq_torch",
        2,
        "torch_awq.AwqTorchLinear",
        Limits(
            devices=("cuda", "cpu"), bits=(4,), dtypes=(torch.float16,), packings=AWQ, groups=SMALL_GROUPS
        ),
        aliases=("gptqmodel:awq", "gptqmodel"),
    ),
    GptqModel(
        "gptqmodel:torch",
        1,
        "torch.TorchLinear",
        Limits(
            devices=("cuda", "cpu"),
            bits=(2, 3, 4, 8),
            dtypes=HALVES,  # it rounds weights to float16 in float32 models too
            packings=(*GPTQ_PLAIN, *GPTQ),
            groups=GROUPS,
        ),
        aliases=("gptqmodel",),
    ),
)
