"""Save a run's checkpoints: when to save, what to keep, and what to do after a failed save."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from stacey_dist.checkpoint.background import BackgroundSaver
from stacey_dist.checkpoint.manifest import (
    DamagedCheckpointError,
    directory_name,
    read_manifest,
    says_finite,
    step_of,
)
from stacey_dist.checkpoint.retention import newest_usable, retain
from stacey_dist.models.export import describe_model
from stacey_dist.training import loss_scale
from stacey_dist.training.continuing import checkpoint_before_decay, updates_before_decay
from stacey_dist.training.engine import Engine
from stacey_dist.training.processes import signals
from stacey_dist.training.progress import Progress
from stacey_dist.training.run import Run, print_line
from stacey_dist.training.settings.command_line import to_dict

_GIVE_UP_AFTER = 2


def checkpoint_path(run: Run, step: int) -> Path:
    """Return the path of the run's checkpoint after `step` updates."""
    return run.directory / "checkpoints" / directory_name(step)


class Saver:
    """Saves a run's checkpoints as `checkpoint.*` says. All processes make the same calls.

    Args:
        data_identity: a text that differs where the data differ. A resumed run compares it.

    Attributes:
        complete: the checkpoints that callbacks are still to be told of, on the main process.
    """

    def __init__(self, run: Run, engine: Engine, data_identity: str) -> None:
        self.run, self.engine, self.data_identity = run, engine, data_identity
        self.settings = run.config.checkpoint
        self._background = BackgroundSaver()
        self._since = time.monotonic()
        self._has_saved = False
        self.complete: deque[Path] = deque()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not KeyboardInterrupt:
            with signals.writing():
                self._background.wait()

    @property
    def is_due_by_the_clock(self) -> bool:
        """Whether the main process's clock asks for a checkpoint."""
        minutes = self.settings.every_minutes
        due = minutes is not None and time.monotonic() - self._since >= 60 * minutes
        return due and self.run.accelerator.is_main_process

    @property
    def has_to_succeed(self) -> bool:
        """Whether so many saves in a row have failed that the next one has to succeed."""
        return self._background.failed_in_a_row >= _GIVE_UP_AFTER

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint is due after `step` updates: by `checkpoint.every_steps`, or for wsd's decay."""
        by_count = self.settings.every_steps is not None and step % self.settings.every_steps == 0
        return by_count or step in updates_before_decay(self.run.config)[:1]

    def save(self, progress: Progress, *, delete_older: bool = True, must_succeed: bool = False) -> Path:
        """Start a save and return its path. With `checkpoint.asynchronous`, a failure is reported later.

        Args:
            progress: of the run.
            delete_older: have the settings decide which older checkpoints are deleted afterwards; else none is.
            must_succeed: wait for it, and raise SettingsError if it cannot be written.
        """
        with signals.writing():  # an earlier save may be waited for
            path = self._begin(progress, delete_older)
            if must_succeed or not self.settings.asynchronous:
                self._background.wait()
        if must_succeed and (error := self._background.failure()) is not None:
            self.run.fail(f"run_dir: the checkpoint after update {progress.step} failed: {error}")
        if not self.settings.asynchronous:
            self.report()
        return path

    def describe_resume_point(self) -> str:
        """Return a sentence on what the same command would resume from, after a save in progress has ended."""
        self._background.wait()
        usable = newest_usable(self.run.directory / "checkpoints")
        if usable is None:
            return "there is no checkpoint with finite weights and states to resume from"
        return f"the same command resumes from {usable}, the newest checkpoint with finite weights and states"

    def take_complete(self) -> Iterator[Path]:
        """Remove each checkpoint from `complete`, and yield those that are still there."""
        while self.complete:
            path = self.complete.popleft()
            if path.exists():
                yield path

    def report(self) -> None:
        """Print why the last save failed, if it did and this was not printed yet."""
        if (error := self._background.failure()) is not None:
            self.run.say(f"a checkpoint failed, training continues: {error}")

    def _begin(self, progress: Progress, delete_older: bool) -> Path:
        self._background.wait()
        self.report()
        self._since = time.monotonic()
        extra = {
            **asdict(progress),
            "config": to_dict(self.run.config),
            "data_identity": self.data_identity,
            "engine": self.engine.name,
            "model": describe_model(self.engine.module),
            "scaler": loss_scale.state_of(self.engine.scaler) if self.engine.scaler else None,
            "trackers": self.run.tracker_ids,
        }
        path = checkpoint_path(self.run, progress.step)
        if self._has_saved and not path.parent.is_dir():
            self.run.say(f"{path.parent} was renamed or removed during the run; it is made again")
        self._has_saved = True
        best = progress.best_step if self.settings.keep_best else None

        def on_complete() -> None:
            if self.run.accelerator.is_main_process:
                _warn_unless_finite(path)
                self._retain(path, best, progress, delete_older)
                self.complete.append(path)

        self._background.save(path, self.engine.model, self.engine.optimizer, extra, on_complete)
        return path

    def _retain(self, saved: Path, best: int | None, progress: Progress, delete_older: bool = True) -> None:
        try:
            # If the save of a new best checkpoint failed, keep the previous best until the next one is complete.
            if best is not None and checkpoint_path(self.run, best).exists():
                progress.kept_best_step = best
            if delete_older:
                kept = [] if progress.kept_best_step is None else [progress.kept_best_step]
                if (before_decay := checkpoint_before_decay(self.run.config, saved.parent)) is not None:
                    kept.append(step_of(before_decay))
                retain(saved, self.settings.keep_last, self.settings.keep_every, kept)
        except OSError as error:
            print_line(f"an older checkpoint could not be deleted, training continues: {error}")


def is_finite(saved: Path) -> bool | None:
    """Return whether a checkpoint's weights and states are finite; None if that is not known or cannot be read now.

    A manifest that was just written is not damaged: a read that fails has met a limit or an outage, and resuming reads
    it again.
    """
    with suppress(DamagedCheckpointError):
        return says_finite(read_manifest(saved))
    return None


def _warn_unless_finite(saved: Path) -> None:
    if is_finite(saved) is False:
        usable = newest_usable(saved.parent)
        print_line(
            f"warning: {saved} holds weights or optimizer states that are not finite; a resumed run skips it, "
            + (f"and resumes from {usable}" if usable else "and there is no other")
        )
