"""The outcomes of updates. They stay on the device until they are read, because reading makes the host wait for it."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from stacey_dist.training.saving import Progress


class Outcome(NamedTuple):
    """The outcome of an update."""

    loss: float
    grad_norm: float
    skipped: float
    """1 where loss or gradient is not finite and nothing was changed, else 0."""


class Outcomes:
    """The outcomes of a run's updates.

    Args:
        progress: of the run; skipped updates are counted there as they are read.
        limit: how many updates may be skipped in a row.
    """

    def __init__(self, progress: Progress, limit: int) -> None:
        self._progress, self._limit = progress, limit
        self._unread: list[Tensor] = []
        self.last = Outcome(math.nan, math.nan, 0.0)
        """The last one that was read; not a number before the first."""
        self.skipped_in_a_row = 0
        self.too_many = ""
        """Which updates were skipped in a row, for people, where they are more than the limit."""

    @property
    def unread(self) -> int:
        """How many were not read yet."""
        return len(self._unread)

    def add(self, outcome: Tensor) -> None:
        """Take what `Engine.finish_update` returned; `progress` counts the update already."""
        self._unread.append(outcome)

    def read(self) -> None:
        """Wait for the device and read all outcomes."""
        if not self._unread:
            return
        first = self._progress.step - self.unread + 1
        for step, values in enumerate(torch.stack(self._unread).tolist(), first):
            self.last = Outcome(*values)
            self._progress.skipped_steps += int(self.last.skipped)
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if self.last.skipped else 0
            if self.skipped_in_a_row > self._limit:
                first_skipped = step - self.skipped_in_a_row + 1
                self.too_many = (
                    f"{self.skipped_in_a_row} updates in a row, {first_skipped} to {step}, had a loss or gradient that "
                    f"is not finite (loss {self.last.loss}, gradient norm {self.last.grad_norm})"
                )
        self._unread.clear()
