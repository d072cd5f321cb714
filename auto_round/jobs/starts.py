"""What comes before tuning, or is all there is: lists of steps that go by the inputs of single layers."""

from __future__ import annotations

from auto_round.steps.base import Step
from auto_round.steps.gptq import Gptq
from auto_round.steps.refit import Refit
from auto_round.steps.search import Search


def start(kind: str) -> list[Step]:
    """The steps of the start called "none", "search" (ranges) or "gptq" (codes and scales in turn, twice)."""
    if kind == "gptq":
        return [Search(brief=True), Gptq(), Refit(), Gptq(), Refit()]
    return [Search()] if kind == "search" else []
