"""One training run of an experiment: the launchers' own loop, in a process of its own.

The processes are forked from a server that has the imports done: a run of a minute should not spend a tenth of it on
imports. A run leaves what every run leaves (config.yaml, metrics.jsonl, loss.png), what it printed in output.txt, and
result.json once it is complete. Killed, it resumes from its checkpoint; complete, it is read.
"""

import contextlib
import functools
import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from stacey_dist import yaml_files
from stacey_dist.cores import available_cores
from stacey_dist.errors import SettingsError
from stacey_dist.training.launchers import LAUNCHERS
from stacey_dist.training.reports.rows import read_rows

OnEvaluation = Callable[[dict[str, Any]], bool]
"""Told the row of metrics.jsonl of an evaluation; returns whether the run is to end there."""

_POLL_SECONDS = 0.1
_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
_OWN = {
    "checkpoint.every_steps": None,  # those by the clock are enough to resume from
    "checkpoint.every_minutes": 5,
    "checkpoint.keep_last": 1,
    "checkpoint.keep_best": False,
}


class Interrupted(KeyboardInterrupt):
    """Training was told to stop, and can resume later."""


class TrialError(RuntimeError):
    """A training run ended with an error that is not its settings'. The message has its last words."""


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

    def final(self, metric: str) -> float | None:
        """Return a held-out figure after the last update; None if the run diverged, or the figure is not finite."""
        return None if self.diverged else self.evaluations[-1][metric]


@dataclass(frozen=True)
class Trial:
    """A training run.

    Args:
        program: the launcher whose run it is.
        config: its YAML file.
        settings: what differs from the file, by the names of the launcher's options, as in "optimizer.lr".
        directory: its run_dir.
        threads: of the CPU, for it.
        watch: a callback of the run, made without arguments, as in "module:Class"; "" is none. It keeps nothing when
            the run is killed: a run that is watched begins anew.
    """

    program: str
    config: Path
    settings: Mapping[str, Any]
    directory: Path
    threads: int = 1
    watch: str = ""

    def run(
        self,
        on_evaluation: OnEvaluation = lambda row: False,
        stop: threading.Event | None = None,
        advance: Callable[[float], object] = lambda share: None,
    ) -> Result | None:
        """Train, or resume, or read what is there if it is complete. None if it was ended on the way.

        Args:
            on_evaluation: called for every evaluation, those of before included.
            stop: once set, the run saves and ends, and can resume later.
            advance: called with the share of the run done since its last call; a run that was ended early is done.

        Raises:
            SettingsError: the launcher refused the settings; with its own words.
            TrialError: the process ended with another error; with the end of its output.
        """
        done = 0.0

        def tell(row: dict[str, Any]) -> bool:
            nonlocal done
            before, done = done, row["step"] / self.length()
            advance(done - before)
            return on_evaluation(row)

        complete = self.directory / "result.json"
        finished = complete.exists()
        if finished:
            for row in evaluations(self.directory):
                tell(row)
        else:
            try:
                finished = self._train(tell, stop)
            except TrialError:
                advance(1.0 - done)
                raise
        if finished or stop is None or not stop.is_set():
            advance(1.0 - done)
            shutil.rmtree(self.directory / "checkpoints", ignore_errors=True)  # nothing resumes from them
        return Result(**json.loads(complete.read_text())) if finished else None

    def arguments(self) -> list[str]:
        """Return the options of the launcher."""
        own = {"run_dir": str(self.directory), "train.cpu_threads": self.threads, **_OWN}
        return ["--config", str(self.config), *(f"--{k}={_as_option(v)}" for k, v in {**self.settings, **own}.items())]

    def length(self) -> int:
        """Return the updates of the whole run, which are known once it has begun to train."""
        return int(yaml_files.read(self.directory / "config.yaml")["train"]["max_steps"])

    def _train(self, on_evaluation: OnEvaluation, stop: threading.Event | None) -> bool:
        """Train. Return whether the run is complete, not ended on the way."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.watch:
            shutil.rmtree(self.directory / "checkpoints", ignore_errors=True)
        output = self.directory / "output.txt"
        output.write_bytes(b"")  # not what an earlier process said, if this one cannot be started
        given = self.program, self.arguments(), str(self.directory), self.watch
        process = _server().Process(target=_train_in_process, args=given)
        process.start()
        seen, alive, size = 0, True, -1
        try:
            while alive:
                process.join(_POLL_SECONDS)
                alive = process.is_alive()
                if stop is not None and stop.is_set():
                    return False
                new: list[dict[str, Any]] = []
                with contextlib.suppress(OSError):  # what cannot be read now is read the next time; the run tells why
                    now = os.path.getsize(self.directory / "metrics.jsonl")
                    if now != size:
                        new, size = evaluations(self.directory)[seen:], now
                seen += len(new)
                if any(on_evaluation(row) for row in new):
                    _end(process, signal.SIGKILL)
                    return False
        finally:
            _end(process, signal.SIGTERM)
        if (self.directory / "result.json").exists():
            return True  # however the process ended
        said = output.read_text().strip().splitlines() or [""]
        if process.exitcode in _STOPPED:
            raise Interrupted
        if process.exitcode == 2:
            reason = next((line for line in reversed(said) if "error:" in line), said[-1])
            raise SettingsError(f"{self.directory.name}: {reason}")
        raise TrialError(f"{output}: exit status {process.exitcode}\n" + "\n".join(said[-20:]))


def evaluations(directory: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics.jsonl that hold held-out figures, so far."""
    return [row for row in read_rows(directory / "metrics.jsonl") if "eval_loss" in row]


def data_settings(program: str, directory: Path, data: str | None, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return where all runs of an experiment keep prepared data, and what the user names to train on, or `own`."""
    return {**(own if data is None else users_data(program, data)), "data.cache_dir": str(directory / "data")}


def users_data(program: str, data: str | None) -> dict[str, Any]:
    """Return the settings for what the user names to train on; none for None, which is the configuration's own."""
    own = LAUNCHERS[program].users_data
    return {} if data is None or own is None else own(data)


def threads_each(workers: int) -> int:
    """Return the threads of the CPU for one of so many runs at a time."""
    return max(1, available_cores() // workers)


def _end(process: ForkServerProcess, number: signal.Signals) -> None:
    if process.is_alive():
        os.kill(process.pid or 0, number)
    process.join()


def _as_option(value: Any) -> str:
    """Return a value as YAML, which the launchers' options are read as."""
    if isinstance(value, float):
        return ".inf" if value == math.inf else repr(value)
    return json.dumps(value) if not isinstance(value, str) else value


@functools.cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiments.trial_process"])
    return context


def _train_in_process(program: str, arguments: list[str], directory: str, watch: str) -> None:
    descriptor = os.open(Path(directory, "output.txt"), os.O_WRONLY)  # also for an import that fails
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from experiments.trial_process import train_and_report

    train_and_report(program, arguments, Path(directory), watch)
