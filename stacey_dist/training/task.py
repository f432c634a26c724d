"""The interface of a task, which the loop trains on and a program of your own implements."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import Tensor, nn


class Task(Protocol):
    """The data of each update, its loss, and how to judge the result.

    The data of an update are a function of its position, which counts the samples of all updates before it. So a run
    resumes from one number, on any number of processes.

    A task whose data have parts with epochs of their own can have a method ``epochs(position)``, too. It returns the
    passes over each part up to there, as in ``{"epoch_of.web": 0.4}``, which are reported.
    """

    unit: str
    """What the data is counted in, in the plural, as in "tokens"."""

    flops_per_unit: float
    """Floating-point operations of forward and backward on one unit, for the share of the device's peak speed."""

    data_identity: str
    """Differs where the data do: a run does not resume on other data."""

    batch_size: int
    """Samples of one update, over all processes."""

    samples_per_epoch: int
    """Samples of the training data."""

    def micro_batches(self, position: int) -> Iterable[Any]:
        """Return this process's micro-batches of the update at this position, on its device.

        There are `run.process_batch_size / run.micro_batch_size` of them. Each is passed to `loss` as it is.
        """
        ...

    def units(self, position: int) -> int:
        """Return how many units all processes together train on in the update at this position."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the micro-batch's share of the update's loss, a scalar.

        The shares of all micro-batches and processes sum to the mean: divide by what the whole update holds.
        """
        ...

    def evaluate(self, model: nn.Module, stopping: Callable[[], bool]) -> dict[str, float] | None:
        """Return held-out figures, the same on every process, under names that begin with "eval_".

        Args:
            model: the model in evaluation mode; gradients are off.
            stopping: to be called after each batch, as often on every process. Where it returns true, return None.
        """
        ...

    def score(self, figures: dict[str, float]) -> float:
        """Return how good the figures of an evaluation are: higher is better."""
        ...

    def close(self) -> None:
        """End what the task has started, as processes that read data. Called after the last update."""
        ...


def epochs_of_parts(task: Task, position: int) -> dict[str, float]:
    """Return the passes over each part of the data up to a position; empty for data without parts."""
    epochs: Callable[[int], dict[str, float]] | None = getattr(task, "epochs", None)
    return {} if epochs is None else epochs(position)
