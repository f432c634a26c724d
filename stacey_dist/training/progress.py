"""How far a run has come: its updates, its samples, and the outcomes of updates.

Outcomes stay on the device until they are read, because reading makes the host wait for it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stacey_dist.checkpoint.schema import is_count, wrong_entry
from stacey_dist.training import loss_scale


@dataclass
class Progress:
    """How far a run has come: what a checkpoint's `extra` says, under these names."""

    step: int = 0
    """Updates made, with those that were skipped."""
    position: int = 0
    """Samples that all processes together have trained on: the next one is the sample at this global position."""
    skipped_steps: int = 0
    """Updates that changed nothing, for a loss or gradient that was not finite."""
    best_step: int | None = None
    """After which update the evaluation was best."""
    best_score: float | None = None
    """How good it was: higher is better."""
    kept_best_step: int | None = None
    """With `checkpoint.keep_best`: the best update that has a checkpoint."""
    evaluated_step: int = 0
    """After which update it was last evaluated."""

    def improves(self, score: float) -> bool:
        """Return whether an evaluation is the best so far, and remember it if it is."""
        better = math.isfinite(score) and (self.best_score is None or score > self.best_score)
        if better:
            self.best_step, self.best_score = self.step, score
        return better


def _is_count_or_null(value: Any) -> bool:
    return value is None or is_count(value)


def _is_config(value: Any) -> bool:
    """Return whether a value is the settings of a run, as far as resuming reads them without a check."""
    checkpoint = value.get("checkpoint", {}) if isinstance(value, dict) else None
    return isinstance(checkpoint, dict) and isinstance(checkpoint.get("resume_from"), str | None)


# What a run resumes from, as a manifest's `extra` has it.
_ENTRIES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "step": (is_count, "a count"),
    "position": (is_count, "a count"),
    "skipped_steps": (is_count, "a count"),
    "evaluated_step": (is_count, "a count"),
    "best_step": (_is_count_or_null, "a count"),
    "kept_best_step": (_is_count_or_null, "a count"),
    "best_score": (lambda value: type(value) in (int, float, type(None)), "a number"),
    "config": (_is_config, "settings"),
    "trackers": (lambda value: isinstance(value, dict | None), "entries by name"),
    "scaler": (lambda value: value is None or loss_scale.is_state(value), "the state of a loss scaler"),
}


def check_progress(extra: dict[str, Any]) -> None:
    """Raise ValueError if an entry of a manifest's `extra` is not one that a run resumes from."""
    for key, (is_right, expected) in _ENTRIES.items():
        if key in extra and not is_right(extra[key]):
            raise wrong_entry(f"extra.{key}", extra[key], expected)


class Outcome(NamedTuple):
    """The outcome of an update."""

    loss: float
    grad_norm: float
    skipped: float
    """1 where loss or gradient is not finite and nothing was changed, else 0."""


class Outcomes:
    """The outcomes of a run's updates. Skipped updates are counted in `progress` as the outcomes are read.

    More than `limit` skipped updates in a row are too many.
    """

    def __init__(self, progress: Progress, limit: int) -> None:
        self._progress, self._limit = progress, limit
        self._unread: list[Tensor] = []
        self.last = Outcome(math.nan, math.nan, 0.0)
        """The last one that was read; not a number before the first."""
        self.skipped_in_a_row = 0
        self.too_many = ""
        """Text that says which updates were skipped in a row, where they are more than the limit."""

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
