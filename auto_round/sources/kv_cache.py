"""Ranges of the keys and values that a model keeps in its cache, found by running it over calibration text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from auto_round.core.errors import ModelError
from auto_round.sources.dataset import Calibration


class _Ranges(DynamicCache):
    """A cache that keeps nothing but the largest magnitudes of what it is given, after rotary embedding.

    The models ask a cache for its length and for masks, so it has to be one of transformers' own.
    """

    def __init__(self, valid: Tensor | None) -> None:
        super().__init__()
        self.valid = valid
        self.largest: dict[int, Tensor] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """(B, H, T, D) each, given back as they are."""
        found = torch.stack([self._largest(key_states), self._largest(value_states)])
        self.largest[layer_idx] = torch.maximum(self.largest.get(layer_idx, found), found)
        return key_states, value_states

    def _largest(self, states: Tensor) -> Tensor:
        if self.valid is not None:
            # Padding may be far out, and a server never stores it.
            states = states.transpose(1, 2)[self.valid.to(states.device)]
        return states.abs().amax().float().cpu()  # one number per layer: nothing stays on the device


@torch.inference_mode()
def cache_ranges(model: nn.Module, data: Calibration, batch_size: int) -> Mapping[str, tuple[Tensor, Tensor]]:
    """Attention module -> largest magnitude of its keys and of its values, 0-dim each.

    Raises ModelError for a model that does not keep keys and values in a cache of transformers.
    """
    largest: dict[int, Tensor] = {}
    device = next(model.parameters()).device
    for start in range(0, data.tokens.shape[0], batch_size):
        part = slice(start, start + batch_size)
        valid = None if data.valid is None else data.valid[part]
        mask = None if data.attention_mask is None else data.attention_mask[part].to(device)
        cache = _Ranges(valid)
        model(
            input_ids=data.tokens[part].to(device), attention_mask=mask, past_key_values=cache, use_cache=True
        )
        for index, found in cache.largest.items():
            largest[index] = torch.maximum(largest.get(index, found), found)
    paths = _attention(model)
    if not largest or not largest.keys() <= paths.keys():
        raise ModelError(
            f"static_kv_dtype: {type(model).__name__} keeps no keys and values in a cache that can be watched. "
            "Leave it out"
        )
    return {paths[index]: (found[0], found[1]) for index, found in sorted(largest.items())}


def _attention(model: nn.Module) -> dict[int, str]:
    """Index of a layer in the cache -> name of its attention module."""
    found = {}
    for name, module in model.named_modules():
        # transformers numbers attention modules so, and the cache goes by that number.
        index = vars(module).get("layer_idx")
        if isinstance(index, int) and "att" in name.rsplit(".", 1)[-1]:
            found[index] = name
    return found
