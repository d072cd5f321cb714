"""Recipes: names for lists of steps with their numbers, as the user guide's table has them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from auto_round.core.errors import NotYetError, PlanError, nearest

ALGORITHMS = {
    "auto_round": "sign_round",
    "autoround": "sign_round",
    "sign_round": "sign_round",
    "signround": "sign_round",
    "sign_round_published": "sign_round_published",
    "gptq": "gptq",
    "rtn": "rtn",
    "opt_rtn": "opt_rtn",
    "awq": "awq",
}
BEFOREHAND = ("awq",)
"""Algorithms that change a block before another one rounds it: "awq,auto_round"; alone, optimised rounding follows."""
ROTATING = ("hadamard", "random_hadamard", "quarot", "spinquant")
"""Algorithms that rotate the model before another one rounds it; the words of `rotation_config`."""
PLANNED = ("svdquant", "quarot_hadamard")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The numbers of one row of the guide's table. lr None means 1 / iters."""

    iters: int = 200
    nsamples: int = 128
    seqlen: int = 2048
    batch_size: int = 8
    # 1 / iters with linear decay adds up to 0.5: the farthest that a rounding offset may go.
    lr: float | None = None
    disable_opt_rtn: bool = False


RECIPES = {
    "default": Recipe(),
    "best": Recipe(iters=1000, nsamples=512),
    # Not the guide's rate of 5e-3: with it, offsets move by an eighth of a code at most in so few steps.
    "light": Recipe(iters=50),
    "opt_rtn": Recipe(iters=0),
    "rtn": Recipe(iters=0, nsamples=0, disable_opt_rtn=True),  # no samples: nothing would look at them
}


SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "constant": lambda done: 1.0,
}
"""Factors on the learning rate by the share of the steps that are done, 0 up to 1."""


def schedule_named(given: str | Callable[[float], float] | None) -> Callable[[float], float]:
    """The schedule called `given`, or `given` itself when it is a function; linear decay by default.

    Raises PlanError with the nearest known name.
    """
    if callable(given):
        return given
    name = "linear" if given is None else given
    if name not in SCHEDULES:
        raise PlanError(
            f"lr_scheduler {given!r} is unknown.{nearest(str(name), SCHEDULES)} Known: {', '.join(SCHEDULES)}, or a "
            "function from the share of the steps done (0 to 1) to a factor"
        )
    return SCHEDULES[name]


def recipe_named(name: str) -> Recipe:
    """The recipe called `name`; a dash counts as an underscore. Raises PlanError with the nearest known name."""
    key = name.strip().casefold().replace("-", "_")
    if key not in RECIPES:
        raise PlanError(f"recipe {name!r} is unknown.{nearest(name, RECIPES)} Known: {', '.join(RECIPES)}")
    return RECIPES[key]


def algorithm_named(name: str) -> str:
    """Our name of the algorithm `name`. Raises PlanError or NotYetError."""
    key = name.strip().casefold().replace("-", "_")
    if key in ALGORITHMS:
        return ALGORITHMS[key]
    if key in PLANNED:
        raise NotYetError(f"algorithm {name!r} is not there yet. Available: {', '.join(ALGORITHMS)}")
    raise PlanError(
        f"algorithm {name!r} is unknown.{nearest(name, ALGORITHMS)} Available: {', '.join(ALGORITHMS)}"
    )
