"""Save in the background: training waits only for the copy to host memory."""

import atexit
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from stacey_dist.checkpoint.collectives import TIMEOUT, together, world_size
from stacey_dist.checkpoint.manifest import as_read
from stacey_dist.checkpoint.replicas import compare_once
from stacey_dist.checkpoint.snapshot import snapshot
from stacey_dist.checkpoint.write import write
from stacey_dist.errors import one_line
from stacey_dist.files import with_name


class BackgroundSaver:
    """Saves checkpoints in the background, one after the other; all ranks make the same calls.

    A thread of each rank writes the copy and talks to the other ranks' threads over a gloo group of its own. The
    copy's memory is kept for the next one. A program that ends waits for the last save. Call `wait` before you destroy
    the process group, and `failure` to learn how the save ended.

    Attributes:
        failed_in_a_row: how many of the last saves failed; equal on all ranks after `wait`.
    """

    def __init__(self) -> None:
        self.failed_in_a_row = 0
        self._group: Any = None
        self._make_group()
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

        See `save_checkpoint`; `extra` is copied, too. `then` is called on each rank when the checkpoint is complete; if
        it raises an error on one, the save counts as failed on all.
        `failure` returns what went wrong.
        """
        path = with_name(path).absolute()  # the program may change its directory meanwhile
        self.wait()
        self._make_group()
        copied = together(lambda: as_read(extra), self._group)
        compare_once(model, optimizer, self._group)
        copies = snapshot(model, optimizer, self._host_memory, self._group)

        def work() -> None:
            try:
                write(path, copies, copied, self._group)
                together(then, self._group)
                self.failed_in_a_row, self._failure = 0, None
            except Exception as error:  # `failure` tells the training thread
                self.failed_in_a_row += 1
                self._failure = error

        self._thread = threading.Thread(target=work, name=f"writes {path.name}")  # the interpreter waits for it
        self._thread.start()
        atexit.register(self._report_at_exit)

    def _make_group(self) -> None:
        """Make the threads' group: training uses the default one meanwhile, which may begin after this saver."""
        if self._group is None and world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)

    def wait(self) -> None:
        """Wait until the last save has ended, also if it fails."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            atexit.unregister(self._report_at_exit)

    def _report_at_exit(self) -> None:
        if self._failure is not None:
            print(f"the last checkpoint failed: {one_line(self._failure)}", file=sys.stderr, flush=True)

    def failure(self) -> OSError | None:
        """Return the OSError of the last save, and forget it; None if the save did not fail.

        Any other error is raised.
        """
        failure, self._failure = self._failure, None
        if failure is None or isinstance(failure, OSError):
            return failure
        raise failure
