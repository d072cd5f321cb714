"""Many pieces of work at once on the machines of a Ray cluster, which places them and repeats those that die."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any, TypeVar

from auto_round.core.errors import AutoRoundError, OutputError, PlanError

Item = TypeVar("Item")
Result = TypeVar("Result")
RETRIES = 3
"""Times that a piece is begun again after the process that did it died."""


def _ray() -> ModuleType:
    try:
        import ray
    except ImportError as error:
        raise PlanError(
            "distributed: Ray is not installed; pip install 'auto-round[ray]' on every machine, or use workers "
            "(--workers) on this one"
        ) from error
    return ray


def in_cluster(
    function: Callable[[bytes, Item], Result], order: bytes, items: Iterable[Item], *, address: str
) -> Iterator[Result]:
    """The results of `function(order, item)` as they come, each on one core of the cluster at `address`.

    function: importable by name on every machine. A piece whose process dies is begun again `RETRIES` times, so it
    must be one that can be repeated. The first error stops everything and is raised.
    """
    ray = _ray()
    connects = not ray.is_initialized()
    if connects:
        _connect(ray, address)
    try:
        remote = ray.remote(num_cpus=1, max_retries=RETRIES)(function)
        shared = ray.put(order)  # once per machine, not once per piece
        yield from _results(ray, [remote.remote(shared, item) for item in items])
    finally:
        if connects:
            ray.shutdown()


def _connect(ray: ModuleType, address: str) -> None:
    try:
        ray.init(address=address, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise PlanError(
            f"distributed: no Ray cluster answers at {address!r} ({error}); start one with 'ray start --head', and "
            "give ray://host:10001, host:6379 or auto"
        ) from error


def _results(ray: ModuleType, running: list[Any]) -> Iterator[Any]:
    """The results of `running`, first come first; what is left is cancelled when one fails."""
    try:
        while running:
            done, running = ray.wait(running, num_returns=1)
            yield ray.get(done[0])
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, AutoRoundError):
            raise error.cause from None  # it names what is wrong; where in the other process does not help
        raise
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError) as error:
        raise OutputError(
            f"distributed: a process of the cluster died {RETRIES + 1} times over the same file ({error}); "
            "see the machine's memory and Ray's log, then go on with resume=True (--resume)"
        ) from error
    finally:
        for left in running:
            ray.cancel(left)
