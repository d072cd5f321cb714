"""Our own CPU kernels."""

from auto_round.backends.cpu.linear import ENTRIES

__all__ = ["ENTRIES"]
