"""Requests of processes to each other during a run. They are combined on the CPU, without waiting for a device."""

from collections.abc import Callable
from dataclasses import astuple, dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Requests:
    """Requests of one process to all processes, or those of all processes combined, equal on each."""

    stop: bool = False
    """It was told to stop by a signal."""
    save: bool = False
    """It is time for a checkpoint."""
    save_and_wait: bool = False
    """Checkpoints keep failing: the next one has to succeed."""
    directory_gone: bool = False
    """run_dir is gone."""
    saved: bool = False
    """A checkpoint is complete, and the callbacks do not know of it."""


class Agreement:
    """Combines the requests of all processes by all-reduces on the CPU, in a gloo group of its own.

    All processes create it together. They wait `timeout` seconds for each other.
    """

    def __init__(self, processes: int, timeout: float) -> None:
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) if processes > 1 else None

    def ask(self, requests: Requests) -> Callable[[], Requests]:
        """Start to combine the requests of all processes. Return a function that waits for the result.

        All processes call it together.
        """
        if self._group is None:
            return lambda: requests
        asked = torch.tensor(astuple(requests), dtype=torch.uint8, device="cpu")
        work = dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group, async_op=True)

        def answer() -> Requests:
            work.wait()
            return Requests(*map(bool, asked.numpy()))

        return answer
