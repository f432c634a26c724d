"""Save in the background: training waits only for the copy to host memory."""

import datetime
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from stacey_dist.checkpoint.collectives import world_size
from stacey_dist.checkpoint.replicas import compare_once
from stacey_dist.checkpoint.shares import Ledger
from stacey_dist.checkpoint.snapshot import snapshot
from stacey_dist.checkpoint.write import write

# How long a rank waits for the one with the slowest disk.
_TIMEOUT = datetime.timedelta(hours=6)


class BackgroundSaver:
    """Saves checkpoints beside training, one after the other; all ranks make the same calls.

    A thread of each rank writes the copy and talks to the other ranks' threads over a gloo group of its own. The
    copy's memory is kept for the next one.

    Attributes:
        failed_in_a_row: how many of the last saves failed; equal on all ranks after `wait`.
    """

    def __init__(self) -> None:
        self.failed_in_a_row = 0
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT) if world_size() > 1 else None
        self._ledger = Ledger()
        self._host_memory: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def save(
        self,
        path: str | os.PathLike[str],
        model: nn.Module,
        optimizer: Any,
        extra: dict[str, Any] | None = None,
        then: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy what this rank holds and start a thread that writes it, after an earlier save has ended.

        See `save_checkpoint`. `then` is called on each rank when the checkpoint is complete. `failure` returns what
        went wrong.
        """
        path = Path(path)
        self.wait()
        compare_once(model, optimizer, self._group)
        copies = snapshot(model, optimizer, self._host_memory)

        def work() -> None:
            try:
                write(path, copies, extra or {}, self._group, self._ledger)
                then()
                self.failed_in_a_row = 0
            except Exception as error:  # `failure` tells the training thread
                self.failed_in_a_row += 1
                self._failure = error

        self._thread = threading.Thread(target=work, name=f"writes {path.name}", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the last save has ended, also if it fails."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def failure(self) -> OSError | None:
        """Return why the last save failed, the first time only; None if it did not. Raises what is no OSError."""
        failure, self._failure = self._failure, None
        if failure is None or isinstance(failure, OSError):
            return failure
        raise failure
