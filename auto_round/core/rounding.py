"""Straight-through rounding: the forward rounds, the backward passes the gradient on unchanged (arXiv:1308.3432)."""

from collections.abc import Callable

import torch
from torch import Tensor

STORAGE = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
"""The dtypes that scales may be stored in, by the name a scheme gives them."""


def straight_through(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function(x)` with the gradient of `x`."""
    # Exact in the forward: rounding goes to zero or stays within a factor of two, where differences have no error.
    return x + (function(x) - x).detach()


def cast_to_storage(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` rounded to what `dtype` can hold, in float32, with the gradient of `x`."""
    return straight_through(lambda value: value.to(dtype).float(), x)


def all_finite(x: Tensor) -> bool:
    """Whether `x` has neither NaN nor Inf. One pass over memory where its sum tells."""
    # A sum of finite float16 values may overflow, so an infinite one proves nothing yet.
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())
