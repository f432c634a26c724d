"""Calls that all ranks make together: if one rank fails, all of them raise.

Messages are small, and go through host memory.
"""

import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from stacey_dist.checkpoint.manifest import DamagedCheckpointError
from stacey_dist.errors import SettingsError

T = TypeVar("T")

# How long a rank waits for the one with the slowest disk, or with the largest file to verify.
TIMEOUT = timedelta(hours=6)


class FailedOnAnotherRankError(OSError):
    """A call failed on another rank; the message is that rank's."""


_cpu_groups: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def cpu_group(group: Any = None) -> Any:
    """Return `group`; for None, a group of all ranks that sends what is in host memory. All ranks call it together.

    It is the default group, or a gloo group that is made at the first call where the default one is NCCL alone.
    """
    if group is not None or world_size() == 1:
        return group
    default = dist.group.WORLD
    if any(pair.startswith("cpu:") for pair in dist.get_backend_config(default).split(",")):
        return default
    if default not in _cpu_groups:
        _cpu_groups[default] = dist.new_group(backend="gloo", timeout=TIMEOUT)
    return _cpu_groups[default]


def together(call: Callable[[], T], group: Any = None) -> T:
    """Call `call` on every rank and return this rank's result.

    Raises:
        Exception: `call` raised it on this rank.
        SettingsError, DamagedCheckpointError: `call` raised it on another rank.
        FailedOnAnotherRankError: `call` raised something else on another rank.
    """
    error: Exception | None = None
    result: Any = None
    try:
        result = call()
    except Exception as raised:
        error = raised
    if world_size() > 1:
        first = torch.tensor(world_size() if error is None else rank(), device="cpu")
        dist.all_reduce(first, op=dist.ReduceOp.MIN, group=cpu_group(group))
        if first < world_size():
            theirs = _broadcast(None if error is None else _for_other_ranks(error), int(first), group)
            error = theirs if error is None else error
    if error is not None:
        raise error
    return result


def _for_other_ranks(error: Exception) -> Exception:
    if isinstance(error, SettingsError | DamagedCheckpointError):
        return error
    return FailedOnAnotherRankError(f"on rank {rank()}: {type(error).__name__}: {error}")


def rank0_call(call: Callable[[], T], group: Any = None) -> T:
    """Call `call` on rank 0 and return its result on all ranks. Raises as `together` does."""
    result: Any = together(lambda: call() if rank() == 0 else None, group)
    return _broadcast(result, 0, group)


def gather(value: T, group: Any = None) -> list[T]:
    """Return the values of all ranks, by rank, on rank 0; an empty list on other ranks."""
    if world_size() == 1:
        return [value]
    values: Any = [None] * world_size() if rank() == 0 else None
    # Rank 0 needs no message from itself. All messages are made as long as the longest one.
    dist.gather_object(None if rank() == 0 else value, values, dst=0, group=cpu_group(group))
    return [value, *values[1:]] if rank() == 0 else []


def _broadcast(value: T, source: int, group: Any) -> T:
    """Return a rank's value on every rank. Each of them takes room for one message, whatever their number."""
    values: list[Any] = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, src=source, group=cpu_group(group))
    return values[0]


def rank() -> int:
    """Return this process's rank; 0 if there is no process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes; 1 if there is no process group."""
    return dist.get_world_size() if dist.is_initialized() else 1
