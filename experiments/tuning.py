"""The search for an optimizer's settings, with Optuna: resumable, with pruning, in parallel.

The first third of the runs is spread evenly over all ranges and choices, for eight runs drawn at random may well
miss one of three choices; the others are suggested by Optuna's multivariate TPE. Runs whose best so far is worse than
the median of the completed ones at the same evaluation are ended early. What is suggested is a function of the study's
seed, the trial's number and the trials finished before, so one worker that is killed resumes to the same result; with
several workers it depends on who is faster.
"""

import itertools
import math
import os
import shlex
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import PartialFixedSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from scipy.stats.qmc import LatinHypercube

from experiments.framework import (
    claimed,
    digest,
    dump,
    identity_of_data,
    launchers_defaults,
    progress,
    together,
    versions,
    write,
)
from experiments.sweep import INFINITY, Range, Sweep, read_sweep
from experiments.trial import Interrupted, Trial, TrialError, data_settings, threads_each, users_data
from stacey_dist import yaml_files
from stacey_dist.errors import SettingsError

_SHOWN = 5
_STARTUP_SHARE = 1 / 3  # of the trials are spread evenly, before TPE suggests
_LAST_SEED = 1_000_000  # a trial's is a thousand times it and has 32 bits
_FIRST_PRUNED = 3  # the evaluation before which no run is ended


class Tuner:
    """A search in a directory of its own.

    Args:
        sweep: what is searched, and how it is judged.
        directory: holds Optuna's journal and a directory for each run.
        trials: how many runs in all, those ended early included.
        seed: of the suggestions.
        overrides: settings of every run that win over the sweep's.
        workers: runs at a time.
        threads: of the CPU, for each of them.
        stop: once set, runs save and end.
        advance: called with what was done since its last call, in runs.
    """

    def __init__(
        self,
        sweep: Sweep,
        directory: Path,
        *,
        trials: int,
        seed: int = 0,
        overrides: dict[str, Any] | None = None,
        workers: int = 1,
        threads: int = 1,
        stop: threading.Event | None = None,
        advance: Callable[[float], object] = lambda share: None,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.sweep, self.directory, self.trials, self.seed = sweep, directory, trials, seed
        self.overrides, self.workers, self.threads = overrides or {}, workers, threads
        self.stop, self.advance = stop or threading.Event(), advance
        directory.mkdir(parents=True, exist_ok=True)
        _repair(directory / "journal.log")
        self.study = optuna.create_study(
            study_name="study",
            storage=JournalStorage(JournalFileBackend(str(directory / "journal.log"))),
            direction="maximize" if sweep.maximize else "minimize",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=_FIRST_PRUNED),
            load_if_exists=True,
        )
        self._lock = threading.Lock()
        unfinished = [trial for trial in self.study.trials if not trial.state.is_finished()]
        self._left = [optuna.trial.Trial(self.study, trial._trial_id) for trial in unfinished]

    def run(self) -> list[dict[str, Any]]:
        """Make the trials that are not made yet; returns all of them, best first: number, state, value, settings.

        `state` is "complete", "pruned" (ended early, with its last value), "diverged" or "failed" (without one).

        Raises:
            Interrupted: `stop` was set.
            SettingsError: the launcher refused the settings.
            TrialError: a run ended with an error. Started again, it is made once more, then counts as failed.
        """
        self.advance(float(sum(trial.state.is_finished() for trial in self.study.trials)))
        together([self._work] * self.workers, self.workers, self.stop)
        found = [self._row(trial) for trial in self.study.trials]
        sign = -1 if self.sweep.maximize else 1
        order = ["complete", "pruned", "diverged", "failed"]
        return sorted(found, key=lambda row: (order.index(row["state"]), sign * (row["value"] or 0.0), row["number"]))

    def _work(self) -> None:
        while not self.stop.is_set():
            with self._lock:
                trial = self._next()
            if trial is None:
                return
            self._try(trial)
        raise Interrupted

    def _next(self) -> optuna.trial.Trial | None:
        if not self._left and len(self.study.trials) >= self.trials:
            return None
        number = self._left[0].number if self._left else len(self.study.trials)
        startup = max(1, round(_STARTUP_SHARE * self.trials))
        seed = 1000 * self.seed + number
        sampler: optuna.samplers.BaseSampler = TPESampler(n_startup_trials=1, multivariate=True, seed=seed)
        if number < startup:
            with warnings.catch_warnings():  # it is called experimental; so far it has changed little
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                sampler = PartialFixedSampler(self._spread_settings(number, startup), sampler)
        self.study.sampler = sampler
        trial = self._left.pop(0) if self._left else self.study.ask()  # one that was begun has what was suggested
        for name, values in self.sweep.space.items():
            if not isinstance(values, Range):
                trial.suggest_categorical(name, list(_choices(values)))
            elif values.whole:
                trial.suggest_int(name, int(values.low), int(values.high))
            else:
                trial.suggest_float(name, values.low, values.high, log=values.log)
        return trial

    def _spread_settings(self, number: int, count: int) -> dict[str, Any]:
        """Return the settings of one of the `count` points of a Latin hypercube over the space."""
        space = self.sweep.space
        place = LatinHypercube(len(space), rng=self.seed).random(count)[number]
        return {name: _at(values, share) for (name, values), share in zip(space.items(), place.tolist(), strict=True)}

    def _try(self, trial: optuna.trial.Trial) -> None:
        settings = {**self.sweep.fixed, **self._settings(trial.params), **self.overrides}
        directory = self.directory / f"trial-{trial.number:03}"
        run = Trial(self.sweep.program, self.sweep.config, settings, directory, self.threads)
        known = self.study.trials[trial.number].intermediate_values  # of a run that was killed
        evaluation = itertools.count(1)

        def judge(row: dict[str, Any]) -> bool:
            value, number = row[self.sweep.metric], next(evaluation)
            if value is None:
                return False
            with self._lock:
                if number not in known:
                    trial.report(value, step=number)
                return row["step"] < run.length() and trial.should_prune()  # not one that is at its end

        try:
            result = run.run(judge, self.stop, self.advance)
        except TrialError:
            with self._lock:
                if not trial.user_attrs.get("failed_once"):  # it may have been the machine's fault
                    trial.set_user_attr("failed_once", True)
                    raise
                self.study.tell(trial, state=TrialState.FAIL)
                return
        with self._lock:
            if result is None and self.stop.is_set():
                raise Interrupted
            final = None if result is None else result.final(self.sweep.metric)
            if final is None:
                trial.set_user_attr("diverged", result is not None)
                self.study.tell(trial, state=TrialState.PRUNED)
            else:
                self.study.tell(trial, final)

    def _row(self, trial: FrozenTrial) -> dict[str, Any]:
        diverged = trial.user_attrs.get("diverged", False)
        state = "diverged" if diverged else {"FAIL": "failed"}.get(trial.state.name, trial.state.name.lower())
        value = None if diverged else trial.value
        return {"number": trial.number, "state": state, "value": value, "settings": self._settings(trial.params)}

    def _settings(self, suggested: dict[str, Any]) -> dict[str, Any]:
        """Return what Optuna suggested, with the values of choices in place of their labels."""
        space = self.sweep.space.items()
        choices = {name: _choices(values) for name, values in space if not isinstance(values, Range)}
        return {name: choices[name][value] if name in choices else value for name, value in suggested.items()}


def _repair(journal: Path) -> None:
    """Remove what a full disk or a kill left in Optuna's journal: half a last line, and the lock.

    Optuna would append to that line and wait for that lock. No other process uses them: the directory is claimed.
    """
    for lock in journal.parent.glob(f"{journal.name}.lock*"):
        lock.unlink()
    if journal.exists():
        content = journal.read_bytes()
        os.truncate(journal, content.rfind(b"\n") + 1)


def _at(values: Range | list[Any], share: float) -> Any:
    """Return what lies at a share, from 0 to below 1, of a range or of a list."""
    if not isinstance(values, Range):
        choices = list(_choices(values))
        return choices[int(share * len(choices))]
    low, high = values.low, values.high
    if values.whole:
        return int(low + (high - low + 1) * share)
    return low * (high / low) ** share if values.log else low + (high - low) * share


def _choices(values: list[Any]) -> dict[Any, Any]:
    """Return a choice's values by what Optuna knows them as: lists, which it does not take, by their text."""
    return {str(value) if isinstance(value, list) else value: value for value in values}


def search(file: Path, directory: Path, *, trials: int, workers: int, seed: int, data: str | None = None) -> None:
    """Search as a sweep file says, or resume; print the best, and leave trials.json and best.yaml in `directory`.

    Raises:
        SettingsError: the file, the counts, the data, a directory that holds another search, or no run was completed.
        TrialError: as `Tuner.run`.
    """
    for name, count in (("trials", trials), ("workers", workers)):
        if count < 1:
            raise SettingsError(f"--{name} {count}: it must be at least 1")
    if not 0 <= seed <= _LAST_SEED:
        raise SettingsError(f"--seed {seed}: it must be from 0 to {_LAST_SEED:,}")
    sweep = read_sweep(file)
    files = {"sweep": digest(file.read_bytes()), "configuration": digest(sweep.config.read_bytes())}
    files["launchers' defaults"] = digest(launchers_defaults().encode())
    identity = {"seed": seed, "data": identity_of_data(data), **files, "versions": versions()}
    with claimed(directory, identity), progress(trials) as (_, advance):
        tuner = Tuner(
            sweep,
            directory,
            trials=trials,
            seed=seed,
            overrides=data_settings(sweep.program, directory, data, {}),
            workers=workers,
            threads=threads_each(workers),
            advance=advance,
        )
        found = tuner.run()
    write(directory / "trials.json", dump(found))
    if found[0]["state"] != "complete":
        raise SettingsError(f"{directory}: none of {trials} runs was completed; look at the ranges")
    best: dict[str, Any] = {}
    for name, value in {**sweep.fixed, **found[0]["settings"], **users_data(sweep.program, data)}.items():
        section, _, setting = name.rpartition(".")
        (best.setdefault(section, {}) if section else best)[setting] = math.inf if value == INFINITY else value
    write(directory / "best.yaml", yaml_files.dump(best))
    for row in found[:_SHOWN]:
        value = "" if row["value"] is None else f"{row['value']:.4f}"
        chosen = row["settings"].items()
        settings = "  ".join(f"{name} {v:.4g}" if isinstance(v, float) else f"{name} {v}" for name, v in chosen)
        print(f"{row['state']:9} {sweep.metric} {value}  {settings}")
    command = ["accelerate", "launch", sweep.program, "--config", str(sweep.config)]
    command += ["--config", str(directory / "best.yaml"), "--run_dir", str(directory / "best")]
    print("the best:", shlex.join(command))
