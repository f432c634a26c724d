"""Steps that all ranks take together: if one fails, all of them know."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class FailedOnAnotherRankError(OSError):
    """A step failed on another rank; the message is that rank's."""


def each(work: Callable[[], T], group: Any = None) -> list[T]:
    """Do `work` on every rank and give all results, by rank, to each of them.

    Raises:
        OSError: `work` raised it on this rank, or on another (FailedOnAnotherRankError with its message).
    """
    error: Exception | None = None
    result: Any = None
    try:
        result = work()
    except Exception as raised:
        error = raised
    outcomes: list[Any] = [(None if error is None else f"{type(error).__name__}: {error}", result)]
    if dist.is_initialized() and dist.get_world_size() > 1:
        mine, outcomes = outcomes[0], [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, mine, group=group)
    if error is not None:
        raise error
    for rank, (message, _) in enumerate(outcomes):
        if message is not None:
            raise FailedOnAnotherRankError(f"on rank {rank}: {message}")
    return [result for _, result in outcomes]


def gathered(work: Callable[[], T], group: Any = None) -> list[T]:
    """Do `work` on every rank and give all results, by rank, to rank 0 alone (nothing to others); raises as `each`."""
    results: list[T] = []
    each(lambda: results.append(work()), group)
    if world_size() == 1:
        return results
    found: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(results[0], found, group=group)
    return found or []


def on_first(work: Callable[[], T], group: Any = None) -> T:
    """Do `work` on rank 0 and give its result to all ranks; raises as `each` does."""
    return each(work if rank() == 0 else lambda: None, group)[0]  # type: ignore[return-value]


def rank() -> int:
    """This process's rank; 0 alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1
