"""Calls that all ranks make together: if one rank fails, all of them raise.

Messages are small: success or failure is one number, and a result is sent only to the ranks that need it. All messages
go through host memory.
"""

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


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
        _cpu_groups[default] = dist.new_group(backend="gloo")
    return _cpu_groups[default]


def together(call: Callable[[], T], group: Any = None) -> T:
    """Call `call` on every rank and return this rank's result.

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
    _raise(error, _first(None if error is None else _describe(error), group))
    return result


def first_result(call: Callable[[], T | None], group: Any = None) -> T | None:
    """Call `call` on every rank and return, on each, the first result by rank that is not None.

    Raises as `together` does.
    """
    return _first(together(call, group), group)


def rank0_call(call: Callable[[], T], group: Any = None) -> T:
    """Call `call` on rank 0 and return its result on all ranks. Raises as `together` does."""
    if world_size() == 1:
        return call()
    error, result, failure = None, None, None
    if rank() == 0:
        try:
            result = call()
        except Exception as raised:
            error, failure = raised, _describe(raised)
    failure, result = _broadcast((failure, result), 0, group)
    _raise(error, failure)
    return result  # type: ignore[return-value]


def all_gather_call(call: Callable[[], T], group: Any = None) -> list[T]:
    """Call `call` on every rank and return all results, by rank, on each of them: for results that are small.

    Raises as `together` does.
    """
    result = together(call, group)
    results: list[Any] = [result] * world_size()
    if world_size() > 1:
        dist.all_gather_object(results, result, group=cpu_group(group))
    return results


def gather_bytes(record: bytes, group: Any = None) -> list[bytes]:
    """Return the records of all ranks, which have one length, by rank, on rank 0; other ranks get an empty list."""
    if world_size() == 1:
        return [record]
    mine = _as_tensor(record)
    everyone = mine.new_empty(world_size(), len(record)) if rank() == 0 else None
    rows = None if everyone is None else list(everyone.unbind())
    dist.gather(mine, rows, dst=0, group=cpu_group(group))
    return [] if everyone is None else [row.tobytes() for row in everyone.numpy()]


def send_bytes(message: bytes, group: Any = None) -> None:
    """Send a message, which is not empty, to rank 0."""
    dist.send(_as_tensor(message), dst=0, group=cpu_group(group))


def receive_bytes(length: int, sender: int, group: Any = None) -> bytes:
    """Return the message of this length that another rank sends to rank 0."""
    message = torch.empty(length, dtype=torch.uint8, device="cpu")
    dist.recv(message, src=sender, group=cpu_group(group))
    return message.numpy().tobytes()


def _describe(error: Exception) -> str:
    return f"on rank {rank()}: {type(error).__name__}: {error}"


def _raise(error: Exception | None, failure: str | None) -> None:
    """Raise this rank's error, or that which another one has described, if there is any."""
    if error is not None:
        raise error
    if failure is not None:
        raise FailedOnAnotherRankError(failure)


def _first(value: T | None, group: Any) -> T | None:
    """Return, on every rank, the value of the first rank whose value is not None; None if there is none."""
    if world_size() == 1:
        return value
    lowest = torch.tensor(world_size() if value is None else rank(), device="cpu")
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN, group=cpu_group(group))
    source = int(lowest)
    return _broadcast(value, source, group) if source < world_size() else None


def _broadcast(value: T, source: int, group: Any) -> T:
    """Return a rank's value on every rank. Each of them takes room for one message, whatever their number."""
    values: list[Any] = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, src=source, group=cpu_group(group))
    return values[0]


def _as_tensor(message: bytes) -> Tensor:
    return torch.frombuffer(bytearray(message), dtype=torch.uint8)


def rank() -> int:
    """Return this process's rank; 0 if there is no process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes; 1 if there is no process group."""
    return dist.get_world_size() if dist.is_initialized() else 1
