"""Callbacks, which are called during training, and `Training`, the state of the run that they receive."""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from stacey_dist.training.engine import Engine
from stacey_dist.training.progress import Outcome, Outcomes, Progress
from stacey_dist.training.run import Run
from stacey_dist.training.task import Task

T = TypeVar("T")


class Clock:
    """Counts the seconds of training, without evaluations and saves.

    Attributes:
        waited: seconds in which this process waited for its data.
    """

    def __init__(self) -> None:
        self.waited = 0.0
        self._before = 0.0
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        """The seconds of training since this process began to train."""
        return self._before + (time.perf_counter() - self._since if self._since is not None else 0.0)

    def pause(self) -> None:
        """Stop the clock."""
        self._before, self._since = self.seconds, None

    def resume(self) -> None:
        """Start the clock, or start it again."""
        self._since = time.perf_counter()

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches; the time that the process waits for them is counted."""
        batches = iter(batches)
        while True:
            begun = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - begun
            if batch is None:
                return
            yield batch


class Training:
    """A run as one of its processes sees it while it trains: for a callback to read, not to change.

    Attributes:
        run: the run: its settings, its directory, its processes.
        task: what it trains on.
        engine: the model and its optimizer. `engine.module` is the model as it was built.
        progress: how far the run is.
        lr: the learning rate of the last update.
        outcome: loss, gradient norm and whether it was skipped, of the last update, the same on every process. They are
            read where a line of the log is due, and where a callback says that it needs them; elsewhere it is None.
        clock: the seconds of training.
    """

    def __init__(self, run: Run[Any], task: Task, engine: Engine, progress: Progress) -> None:
        self.run, self.task, self.engine, self.progress = run, task, engine, progress
        self.lr = 0.0
        self.outcome: Outcome | None = None
        self.clock = Clock()
        self.outcomes = Outcomes(progress, run.config.train.max_skipped_steps)

    @property
    def step(self) -> int:
        """How many updates the run has made."""
        return self.progress.step

    def wait_for_outcome(self) -> Outcome:
        """Wait for the device, and return the outcome of the last update."""
        self.outcomes.read()
        return self.outcomes.last


class Callback:
    """Observes a run while it trains. Its methods do nothing; a subclass overrides those that it needs.

    Every process calls each of them at the same update, but for `on_checkpoint_saved`: so they may use collectives.
    Work for one process only, such as writing a file, begins with `training.run.accelerator.is_main_process`. If it
    may take longer than `train.collective_timeout_seconds`, after which processes give up waiting for each other, all
    call `training.run.call_on_main(work)`. Training waits for a callback. An error in one ends the run as an error in
    the task does; the run resumes from its newest checkpoint. After SIGTERM or Ctrl-C, a callback that takes longer
    than 20 seconds (or twice the longest recent micro-batch) ends the run without a save; a long one should call
    `stacey_dist.training.processes.signals.progress()` at intervals.
    """

    def on_run_begin(self, training: Training) -> None:
        """Called before the first update of this start, after a resumed run's checkpoint was loaded."""

    def on_update_begin(self, training: Training) -> None:
        """Called before update `training.step + 1`."""

    def needs_outcome(self, step: int) -> bool:
        """Return whether `on_update_end` of update `step` needs its loss, for which the host waits for the device.

        The same on every process.
        """
        return False

    def on_update_end(self, training: Training) -> None:
        """Called after update `training.step`, which may still be under way on the device: see `Training.outcome`."""

    def on_evaluation_end(self, training: Training, figures: dict[str, float]) -> None:
        """Called after an evaluation with its figures; the model is in training mode again."""

    def on_checkpoint_saved(self, training: Training, path: Path) -> None:
        """Called on the main process alone, once the checkpoint at `path` is complete; it may take hours.

        It is not called for a checkpoint that `checkpoint.keep_last` has deleted already. Training may be some updates
        ahead of the checkpoint. The other processes wait: do not use collectives. With several processes it runs in a
        thread.
        """

    def on_run_end(self, training: Training) -> None:
        """Called after the last update, evaluation and checkpoint; also where a signal ends the run before."""
