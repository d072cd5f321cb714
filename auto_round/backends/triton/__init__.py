"""Our own Triton kernels."""

from auto_round.backends.triton.linear import ENTRIES

__all__ = ["ENTRIES"]
