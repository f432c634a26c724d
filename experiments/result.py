"""The result that is kept of a training run: written by its process, read by the experiment that started it."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stacey_dist.training.reports.rows import read_rows


@dataclass(frozen=True)
class Result:
    """What is kept of a complete training run."""

    evaluations: list[dict[str, Any]]
    """The rows of metrics.jsonl that hold held-out figures, in order of their `step`."""
    diverged: bool
    """It was given up, because losses or gradients were not finite."""
    seconds_per_update: float
    """Median over its progress rows."""
    state_bytes_per_parameter: float
    """Of the optimizer's state tensors."""
    threads: int
    """Of the CPU, which it had."""

    def final(self, metric: str) -> float:
        """Return the last value of a held-out figure; infinity if the run diverged."""
        value = None if self.diverged else self.evaluations[-1][metric]
        return math.inf if value is None else float(value)


def evaluations(directory: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics.jsonl that hold held-out figures, so far."""
    return [row for row in read_rows(directory / "metrics.jsonl") if "eval_loss" in row]
