"""Back from a loaded checkpoint to plain weights, and adapters on top of quantized ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from auto_round.backends.base import Kernel
from auto_round.core.errors import ModelError


def dequantized(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """`model` with a plain layer in the place of every quantized one: what `model.dequantize()` does.

    dtype: of all weights afterwards; None keeps that of each layer. One layer is in memory twice at a time.
    """
    for name, module in list(model.named_modules()):  # a list, since the tree changes under the walk
        if isinstance(module, Kernel):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, _plain(module))
    return model if dtype is None else model.to(dtype)


def _plain(layer: Kernel) -> nn.Module:
    """The layer as it was before quantization, in kind."""
    weight = layer.plain_weight()
    if layer.transposed:
        # Empty, as its own constructor would fill a weight of full size with random numbers.
        plain: nn.Module = Conv1D(0, 0)
        plain.nf, plain.nx = layer.out_features, layer.in_features  # type: ignore[assignment]
    else:
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(weight)
    plain.bias = None if layer.bias is None else nn.Parameter(layer.bias)  # type: ignore[assignment]
    return plain


def lora_config(**settings: Any) -> Any:
    """peft's `LoraConfig(**settings)`, taught that quantized layers take adapters.

    Adapters train and run; merging one would need plain weights, and raises ModelError.
    """
    from peft import LoraConfig
    from peft.tuners import lora

    class LoraLinear(lora.Linear):
        """An adapter next to a quantized layer."""

        def merge(self, *args: Any, **kwargs: Any) -> None:
            """Refuse."""
            layer: Any = self.get_base_layer()
            raise ModelError(
                f"{layer.site.name}: an adapter cannot be merged into quantized weights. "
                "Call model.dequantize() before adding it, or leave it unmerged"
            )

    config = LoraConfig(**settings)
    config._register_custom_module(
        {Kernel: LoraLinear}
    )  # the documented way to new kinds of layers (peft 0.21)
    return config
