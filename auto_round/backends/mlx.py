"""The `mlx` backend: Apple's MLX on Apple silicon, and wherever else its package runs."""

from __future__ import annotations

import torch
from torch import Tensor

from auto_round.backends.base import AWQ, FLOATS, GPTQ, GPTQ_PLAIN, Backend, Kernel, Limits, Site
from auto_round.core import bits as packing
from auto_round.core.groups import group_size, groups_per_row, merge, split
from auto_round.core.layouts import zeros_of
from auto_round.core.quantized import Quantized

MLX = ("mlx", "auto_round:mlx")
GROUPS = (32, 64, 128)  # those its kernels are compiled for (mlx 0.32)


class MlxLinear(Kernel):
    """x @ W'.T + bias on words [O, I * bits / 32], with w = scale * code + offset in float32."""

    def settle(self, q: Quantized) -> None:
        """Repack `q`; the arrays of MLX replace the buffers."""
        import mlx.core as mx

        count = groups_per_row(q.shape, q.spec.group)
        words = packing.pack(merge(q.codes, q.shape, q.spec.group).t(), q.spec.bits).t().contiguous()
        scale = q.params["scale"].float()  # numpy, by which arrays change hands, has no bfloat16
        tables = (t.reshape(-1, count).contiguous().numpy() for t in (scale, -zeros_of(q).float() * scale))
        # Held in a tuple: they are no tensors of torch.
        self._arrays = (mx.array(words.numpy()).view(mx.uint32), *(mx.array(table) for table in tables))
        self.replace(**q.params)

    def quantized(self) -> Quantized:
        """As loaded, or read back from the words."""
        if self.packed:
            return super().quantized()
        import numpy as np

        spec, shape = self.site.spec, self.site.shape
        words = torch.from_numpy(np.array(self._arrays[0]).view(np.int32))
        params = {name: self.get_buffer(name) for name in (("scale",) if spec.sym else ("scale", "zero"))}
        codes = split(packing.unpack(words.t(), spec.bits).t(), spec.group).contiguous()
        return Quantized(spec=spec, shape=shape, codes=codes, params=params)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) to (..., O), in the dtype of x, computed in float32."""
        import mlx.core as mx
        import numpy as np

        spec = self.site.spec
        values = mx.array(x.detach().float().contiguous().numpy())
        words, scales, offsets = self._arrays
        size = group_size(self.site.shape, spec.group)
        y = mx.quantized_matmul(
            values, words, scales, offsets, transpose=True, group_size=size, bits=spec.bits
        )
        out = torch.from_numpy(np.array(y))
        return (out if self.bias is None else out + self.bias.float()).to(x.dtype)


class Mlx(Backend):
    """MLX."""

    name = "mlx"
    aliases = ("auto_round:mlx",)
    priority = 5
    limits = (
        Limits(
            devices=("cpu", "mps"), bits=(2, 3, 4, 5, 6, 8), dtypes=FLOATS,
            packings=(*MLX, *GPTQ_PLAIN, *GPTQ, *AWQ),
        ),
    )  # fmt: skip
    requires = ("mlx>=0.16",)
    summary = "Apple's MLX"

    def reject(self, site: Site) -> str | None:
        """Its limits, whole groups of a size it is compiled for, and inputs that it can hold."""
        size = group_size(site.shape, site.spec.group)
        if size not in GROUPS or site.shape[1] % size:
            return f"rows of {site.shape[1]} in groups of {size}: MLX has groups of {', '.join(map(str, GROUPS))}"
        return super().reject(site)

    def build(self, site: Site) -> Kernel:
        """An `MlxLinear` on the meta device."""
        return MlxLinear(site, self.name)

    def finish(self, module: Kernel, *, cache: bool) -> None:
        """Repack."""
        assert isinstance(module, MlxLinear), "built by this backend"
        module.settle(module.checked())


ENTRIES = (Mlx(),)
