"""Calls that all ranks make together: where one fails, all of them raise."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class FailedOnAnotherRankError(OSError):
    """A call failed on another rank; the message is that rank's."""


def all_gather_call(call: Callable[[], T], group: Any = None) -> list[T]:
    """Call `call` on every rank and return all results, by rank, on each of them.

    Raises:
        Exception: `call` raised it on this rank.
        FailedOnAnotherRankError: `call` raised on another rank.
    """
    error: Exception | None = None
    result: Any = None
    try:
        result = call()
    except Exception as raised:
        error = raised
    outcomes: list[Any] = [(None if error is None else f"{type(error).__name__}: {error}", result)]
    if world_size() > 1:
        mine, outcomes = outcomes[0], [None] * world_size()
        dist.all_gather_object(outcomes, mine, group=group)
    if error is not None:
        raise error
    for rank, (message, _) in enumerate(outcomes):
        if message is not None:
            raise FailedOnAnotherRankError(f"on rank {rank}: {message}")
    return [result for _, result in outcomes]


def gather_call(call: Callable[[], T], group: Any = None) -> list[T]:
    """Call `call` on every rank and return all results, by rank, on rank 0; others get an empty list.

    Raises as `all_gather_call` does.
    """
    results: list[T] = []
    all_gather_call(lambda: results.append(call()), group)
    if world_size() == 1:
        return results
    gathered: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(results[0], gathered, group=group)
    return gathered or []


def rank0_call(call: Callable[[], T], group: Any = None) -> T:
    """Call `call` on rank 0 and return its result on all ranks. Raises as `all_gather_call` does."""
    return all_gather_call(call if rank() == 0 else lambda: None, group)[0]  # type: ignore[return-value]


def rank() -> int:
    """Return this process's rank; 0 if there is no process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes; 1 if there is no process group."""
    return dist.get_world_size() if dist.is_initialized() else 1
