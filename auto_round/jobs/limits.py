"""Watches the main memory of a job that may only use so much of it."""

from __future__ import annotations

import logging

from auto_round.core.plan import Plan
from auto_round.jobs.quantize import BlockResult
from auto_round.models.memory import give_back, peak_memory

logger = logging.getLogger("auto_round")


class KeptWithin:
    """An observer that gives freed memory back after every block, and tells once when the peak is above the limit.

    What the allocator keeps between blocks is in no plan, and over a hundred blocks it was seen to add up to 100 MB.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._told = False

    def started(self, plan: Plan, blocks: int) -> None:
        """A peak from before the job is none of its own."""
        self._told = peak_memory() > self.limit

    def finished(self, result: BlockResult) -> None:
        """One block is done, and nothing of it is needed any more."""
        give_back()
        if not self._told and (peak := peak_memory()) > self.limit:
            self._told = True
            logger.warning(
                "%s: memory has peaked at %s bytes, above max_ram %s: libraries keep more for themselves than was "
                "planned for. The job goes on. Stopped here and resumed, a new process begins with what is planned",
                result.name, f"{peak:,}", f"{self.limit:,}",
            )  # fmt: skip
