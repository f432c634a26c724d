"""A run: its processes, its directory, and the values on which processes agree before the first update."""

import math
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import torch
from accelerate import Accelerator

from stacey_dist import yaml_files
from stacey_dist.checkpoint.manifest import DamagedCheckpointError, find_checkpoints, read_manifest
from stacey_dist.errors import SettingsError
from stacey_dist.files import replace_file
from stacey_dist.models.export_directory import check_output, output_directory
from stacey_dist.training.continuing import checkpoint_before_decay, command_to_continue
from stacey_dist.training.reports.card import PROCESSOR
from stacey_dist.training.run_lock import acquire_run_lock
from stacey_dist.training.settings.command_line import to_dict
from stacey_dist.training.settings.config import RunConfig, check_schedule, split_batch

T = TypeVar("T")
C = TypeVar("C", bound=RunConfig)


def print_line(text: str, end: str = "\n") -> None:
    """Print text on standard output; a log file on a full disk is no reason to end a run."""
    with suppress(OSError):
        print(text, end=end, flush=True)


class Run(Generic[C]):
    """One training run as seen by one of its processes.

    Args:
        config: the checked configuration.
        accelerator: Accelerate's view of the processes and the device.

    Attributes:
        config: the configuration.
        accelerator: the Accelerator.
        directory: `run_dir`.
        process_batch_size: samples of an update on this process.
        micro_batch_size: samples of a micro-batch.

    Raises:
        SettingsError: the global batch does not divide over processes and micro-batches; run_dir cannot be written, or
            another process trains there; checkpoint.resume_from is no checkpoint.
    """

    def __init__(self, config: C, accelerator: Accelerator) -> None:
        self.config = config
        self.accelerator = accelerator
        self.directory = Path(config.run_dir)
        self.tracker_ids: dict[str, str] = {}
        """The run's names in the trackers, under which a resumed run continues there."""
        self.save_processor: Callable[[Path], object] | None = None
        """Writes what belongs to the run's models besides weights, as a tokenizer, into the directory that it gets."""
        self.process_batch_size, self.micro_batch_size = split_batch(config.train, accelerator.num_processes)
        self.call_on_main(self._prepare_directory)

    def _lock_directory(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = acquire_run_lock(self.directory)
            # While it is open, no other directory gets its inode number, by which `directory_is_gone` knows it.
            self._descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise SettingsError(f"run_dir: {self.directory} cannot be written: {error}") from error

    def directory_is_gone(self) -> bool:
        """Return whether run_dir was renamed or removed while this process trains there. False on other processes."""
        if not self.accelerator.is_main_process:
            return False
        try:
            return not os.path.samestat(os.stat(self.directory), os.fstat(self._descriptor))
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:  # a file system that fails for a moment
            return False

    def recreate_directory(self) -> None:
        """Make run_dir again after it was renamed or removed, for a last checkpoint. All processes call it together.

        Raises SettingsError if it cannot be written, or another process trains there by now.
        """
        self.say(
            f"run_dir: {self.directory} was renamed or removed during the run; it is made again for a last "
            "checkpoint, then the run stops"
        )

        def lock_again() -> None:
            os.close(self._descriptor)
            self._lock_directory()

        self.call_on_main(lock_again)
        self.write_config()

    def _prepare_directory(self) -> None:
        self._lock_directory()
        try:  # the export is written at the end of the run, too late to learn that it can't be
            check_output(self.directory / "model", unlisted=True)
            check_output(self.directory / PROCESSOR)
        except SettingsError as error:
            raise SettingsError(f"run_dir: {error}") from error
        source = self.config.checkpoint.resume_from
        if source is not None and not find_checkpoints(self.directory / "checkpoints"):
            try:  # what it holds is checked when it is loaded; that it is a checkpoint, before data are prepared
                read_manifest(Path(source))
            except DamagedCheckpointError as error:
                raise SettingsError(f"checkpoint.resume_from: {error}") from error

    def resolve_max_steps(self, samples_per_epoch: int, step: int, position: int) -> None:
        """Set `train.max_steps` from `train.epochs`, where that is given, and `schedule.warmup_steps` to updates.

        So config.yaml has the warm-up in updates, and it stays as it was where the run is made longer.

        Args:
            samples_per_epoch: samples of the training data.
            step: the updates made so far.
            position: the samples they had, with whatever batch.

        Raises SettingsError if the run is over before the warm-up is.
        """
        train, schedule = self.config.train, self.config.schedule
        if train.epochs is not None:
            if position == step * train.global_batch_size:
                step = position = 0
            # Rounded: 1.1 * 100 is more than 110 in floating point, which would be one update too many.
            left = round(train.epochs * samples_per_epoch, 3) - position
            train.max_steps = step + max(0, math.ceil(left / train.global_batch_size))
            check_schedule(self.config)
        schedule.warmup_steps = schedule.warmup_updates(train.max_steps)

    def write_config(self) -> None:
        """Write config.yaml. Called when the settings are known to be this run's."""
        if self.accelerator.is_main_process:
            comments = {f"optimizer.{name}": text for name, text in self.config.optimizer.origins().items()}
            replace_file(self.directory / "config.yaml", yaml_files.dump(to_dict(self.config), comments).encode())

    def write_processor(self) -> None:
        """Write what `save_processor` writes into run_dir/processor, for exports of checkpoints."""
        if self.accelerator.is_main_process and self.save_processor is not None:
            with output_directory(self.directory / PROCESSOR) as new:
                self.save_processor(new)

    def say(self, message: str) -> None:
        """Print a line, once for all processes."""
        if self.accelerator.is_main_process:
            print_line(message)

    def fail(self, message: str, error: type[SettingsError] = SettingsError) -> NoReturn:
        """End the run with a SettingsError, raised on one process. All processes call it together."""
        if self.accelerator.is_main_process:
            raise error(message)
        sys.exit(2)

    def report(self, exported: str) -> None:
        """Print where everything is, with the line `exported`, and the command that trains longer."""
        config = self.config
        kept = checkpoint_before_decay(config, self.directory / "checkpoints")
        self.say(
            f"in {self.directory}/: config.yaml  metrics.jsonl  loss.png  checkpoints/\n"
            f"{exported}\n"
            f"{command_to_continue(config, kept)}"
        )

    def call_on_main(self, work: Callable[[], T]) -> T:
        """Call `work` on the main process and return its result (anything picklable) on all of them.

        The others wait without a time limit: the main process tells them every second that it still works, so hours of
        preparation do not run into the process group's timeout. If `work` raises, the main process raises that error
        and the others exit with status 2.
        """
        if self.accelerator.num_processes == 1:
            return work()
        outcome: dict[str, Any] = {}
        if self.accelerator.is_main_process:
            worker = threading.Thread(target=_record, args=(work, outcome), daemon=True)
            worker.start()
        status: list[Any] = [None]
        while status[0] is None:
            if self.accelerator.is_main_process:
                worker.join(timeout=1.0)
                if not worker.is_alive():  # the others learn of an error, and not what it is: it may not be picklable
                    status = [{key: value for key, value in outcome.items() if key == "result"}]
            torch.distributed.broadcast_object_list(status, src=0)
        if "error" in outcome:
            raise outcome["error"]
        if "result" not in status[0]:
            sys.exit(2)
        return status[0]["result"]


def _record(work: Callable[[], Any], outcome: dict[str, Any]) -> None:
    try:
        outcome["result"] = work()
    except BaseException as error:  # every error goes to the main thread, which raises it
        outcome["error"] = error
