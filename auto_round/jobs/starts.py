"""What comes before tuning, or is all there is: lists of steps that go by the inputs of single layers."""

from __future__ import annotations

from auto_round.steps.base import Step
from auto_round.steps.gptq import Gptq
from auto_round.steps.search import Search

ROUNDS = 2  # of codes and scales in turn


def start(kind: str) -> list[Step]:
    """The steps of the start called "none", "search" (ranges) or "gptq" (codes and scales in turn, twice).

    "rounding" is for what is not tuned afterwards: ranges, and codes too for the data types that ask for it.
    """
    if kind == "gptq":
        return [Search(brief=True), Gptq(rounds=ROUNDS, refits=True)]
    if kind == "rounding":
        return [Search(selective=True), Gptq(rounds=ROUNDS, refits=True, selective=True)]
    return [Search()] if kind == "search" else []
