"""The search: the count of runs, pruning, the order of what is found, kills, and the command."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

from experiments import tuning
from experiments.__main__ import main
from experiments.sweep import read_sweep
from experiments.trial import Interrupted, Result, TrialError
from experiments.tuning import Tuner
from stacey_dist.errors import SettingsError
from tests.experiments.tasks import ROOT, write_sweeps


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    return write_sweeps(tmp_path_factory.mktemp("tuning"))


@pytest.fixture
def sweep(configs):
    return read_sweep(configs / "sweeps" / "llm" / "stacey_p2.yaml")


DIVERGES = 1000


class Pretended:
    """A `Trial` that trains nothing: its loss is a function of its settings."""

    made: ClassVar[list["Pretended"]] = []
    evaluations = 4

    def __init__(self, program, config, settings, directory, threads):
        self.settings, self.directory = settings, directory
        self.made.append(self)

    def length(self):
        return self.evaluations

    def loss(self):
        return (self.settings["optimizer.tau"] - 0.01) ** 2

    def run(self, on_evaluation, stop, advance):
        advance(1.0)
        rows = [{"step": step, "eval_loss": self.loss() + 1 / step} for step in range(1, self.evaluations + 1)]
        diverged = self.settings["optimizer.p"] == DIVERGES
        for row in rows:
            if on_evaluation({**row, "eval_loss": None} if diverged else row):
                return None
        return Result(rows, diverged, 1.0, 4.0, 1)


@pytest.fixture
def pretended(monkeypatch):
    monkeypatch.setattr(tuning, "Trial", Pretended)
    monkeypatch.setattr(Pretended, "made", [])
    return Pretended


def test_as_many_runs_as_asked_for_best_first(sweep, tmp_path, pretended):
    done = []
    found = Tuner(sweep, tmp_path, trials=20, advance=done.append).run()
    assert len(found) == len(pretended.made) == 20
    assert sum(done) == pytest.approx(20)
    states = [row["state"] for row in found]
    assert states == sorted(states, key=["complete", "pruned", "diverged"].index)
    assert {"complete", "pruned", "diverged"} == set(states)
    complete = [row["value"] for row in found if row["state"] == "complete"]
    assert complete == sorted(complete)
    assert all((row["value"] is None) == (row["state"] == "diverged") for row in found)
    for row in found:
        assert row["settings"].keys() == sweep.space.keys()
        tau = sweep.space["optimizer.tau"]
        assert tau.low <= row["settings"]["optimizer.tau"] <= tau.high
        assert (row["settings"]["optimizer.p"] == DIVERGES) == (row["state"] == "diverged")
    settings = pretended.made[0].settings
    assert (settings["optimizer.name"], settings["optimizer.variant"]) == ("stacey", "p2")
    more = Tuner(sweep, tmp_path, trials=25).run()
    assert len(pretended.made) == 25  # five more
    assert [row for row in more if row["number"] < 20] == found


def test_the_first_third_is_dealt_out_evenly(sweep, tmp_path, pretended):
    found = sorted(Tuner(sweep, tmp_path, trials=9).run(), key=lambda row: row["number"])[:3]
    assert len({str(row["settings"]["optimizer.betas"]) for row in found}) == 3
    lr = sweep.space["optimizer.lr"]
    parts = [3 * math.log(row["settings"]["optimizer.lr"] / lr.low) / math.log(lr.high / lr.low) for row in found]
    assert sorted(map(int, parts)) == [0, 1, 2]
    other = Tuner(sweep, tmp_path / "other", trials=9, seed=1).run()
    assert not {str(row["settings"]) for row in found} & {str(row["settings"]) for row in other}


def test_ranges_of_all_kinds_are_dealt_evenly(configs, tmp_path, pretended):
    content = yaml.safe_load((configs / "sweeps" / "llm" / "stacey_p2.yaml").read_text())
    content["parameters"] |= {
        "optimizer.tau": {"min": 0.0, "max": 0.9},
        "schedule.warmup_steps": {"min": 1, "max": 3},
        "optimizer.p": {"values": [2, 2.0, 3, 4]},  # three, one of them twice
    }
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(content))
    found = Tuner(read_sweep(file), tmp_path / "out", trials=9).run()
    dealt = [row["settings"] for row in sorted(found, key=lambda row: row["number"])[:3]]
    assert sorted(int(settings["optimizer.tau"] / 0.3) for settings in dealt) == [0, 1, 2]
    assert sorted(settings["schedule.warmup_steps"] for settings in dealt) == [1, 2, 3]
    assert sorted(settings["optimizer.p"] for settings in dealt) == [2, 3, 4]
    assert {row["settings"]["schedule.warmup_steps"] for row in found} == {1, 2, 3}


def test_it_finds_better_settings_than_chance(sweep, tmp_path, pretended):
    """TPE's suggestions are nearer to the minimum than the even start."""
    found = sorted(Tuner(sweep, tmp_path, trials=30).run(), key=lambda row: row["number"])
    apart = [abs(row["settings"]["optimizer.tau"] - 0.01) for row in found]
    assert sorted(apart[20:])[5] < sorted(apart[:10])[5]


def test_overrides_win_and_larger_can_be_better(configs, tmp_path, pretended, monkeypatch):
    sweep = read_sweep(configs / "sweeps" / "cifar" / "stacey_p2.yaml")
    monkeypatch.setattr(
        pretended, "run", lambda self, *told: Result([{"step": 1, "eval_top1": self.loss()}], False, 1.0, 4.0, 1)
    )
    found = Tuner(sweep, tmp_path, trials=5, overrides={"seed": 3, "optimizer.p": 7}).run()
    assert all(trial.settings["seed"] == 3 and trial.settings["optimizer.p"] == 7 for trial in pretended.made)
    assert [row["value"] for row in found] == sorted((row["value"] for row in found), reverse=True)


def test_suggestions_are_a_function_of_what_was_found_before(sweep, tmp_path, pretended, monkeypatch):
    whole = Tuner(sweep, tmp_path / "whole", trials=12).run()
    run = pretended.run

    def dies(self, on_evaluation, stop, advance):
        if len(self.made) == 9:
            on_evaluation({"step": 1, "eval_loss": 3.0})
            raise SystemExit
        return run(self, on_evaluation, stop, advance)

    pretended.made.clear()
    monkeypatch.setattr(pretended, "run", dies)
    with pytest.raises(SystemExit):
        Tuner(sweep, tmp_path / "killed", trials=12).run()
    half_done = pretended.made[-1]
    monkeypatch.setattr(pretended, "run", run)
    assert Tuner(sweep, tmp_path / "killed", trials=12).run() == whole
    assert pretended.made[9].directory == half_done.directory  # it goes on where it was
    assert pretended.made[9].settings == half_done.settings
    assert Tuner(sweep, tmp_path / "other", trials=12, seed=1).run() != whole


def test_killed_between_suggestions(sweep, tmp_path, pretended):
    """A trial that was begun and has no settings yet gets those that it would have had."""
    whole = Tuner(sweep, tmp_path / "whole", trials=6).run()
    Tuner(sweep, tmp_path / "killed", trials=6).study.ask()
    assert Tuner(sweep, tmp_path / "killed", trials=6).run() == whole
    assert all(row["settings"].keys() == sweep.space.keys() for row in whole)
    assert all(row["settings"]["optimizer.betas"] in sweep.space["optimizer.betas"] for row in whole)


def test_a_last_figure_that_is_not_finite(sweep, tmp_path, pretended, monkeypatch):
    """Too few bad updates before the end for the run to have been given up."""
    run = pretended.run

    def ends_badly(self, *told):
        result = run(self, *told)
        if result is not None and len(self.made) == 1:
            result.evaluations[-1]["eval_loss"] = None
        return result

    monkeypatch.setattr(pretended, "run", ends_badly)
    found = Tuner(sweep, tmp_path, trials=4, overrides={"optimizer.p": 7}).run()
    assert (found[-1]["number"], found[-1]["state"], found[-1]["value"]) == (0, "diverged", None)
    json.dumps(found, allow_nan=False)


def test_workers_share_the_runs(sweep, tmp_path, pretended, monkeypatch):
    together = threading.Barrier(2, timeout=20)
    run = pretended.run
    monkeypatch.setattr(pretended, "run", lambda self, *told: (together.wait(), run(self, *told))[1])
    found = Tuner(sweep, tmp_path, trials=8, workers=2).run()
    assert sorted(row["number"] for row in found) == list(range(8))
    assert len({trial.directory for trial in pretended.made}) == 8


def test_nothing_complete(configs, tmp_path, pretended, monkeypatch):
    monkeypatch.setattr(
        pretended, "run", lambda self, *told: Result([{"step": 1, "eval_loss": None}], True, 1.0, 4.0, 1)
    )
    file = configs / "sweeps" / "llm" / "stacey_p2.yaml"
    with pytest.raises(SettingsError, match="none of 3 runs was completed; look at the ranges"):
        tuning.search(file, tmp_path, trials=3, workers=1, seed=0)
    assert [row["state"] for row in json.loads((tmp_path / "trials.json").read_text())] == ["diverged"] * 3


def test_a_run_that_fails_again_is_passed_over(sweep, tmp_path, pretended, monkeypatch):
    run = pretended.run

    def breaks(self, *told):
        if self.directory.name == "trial-001":
            raise TrialError("exit status 1")
        return run(self, *told)

    monkeypatch.setattr(pretended, "run", breaks)
    with pytest.raises(TrialError):  # the user is told, and may mend what it was
        Tuner(sweep, tmp_path, trials=4).run()
    found = Tuner(sweep, tmp_path, trials=4).run()
    assert [trial.directory.name for trial in pretended.made].count("trial-001") == 2
    assert (found[-1]["number"], found[-1]["state"], found[-1]["value"]) == (1, "failed", None)
    assert len(found) == 4


def test_a_run_is_not_ended_after_its_last_update(sweep, tmp_path, pretended, monkeypatch):
    def only_the_end(self, on_evaluation, stop, advance):
        row = {"step": self.evaluations, "eval_loss": float(len(self.made))}  # each is worse than all before
        for step in range(1, self.evaluations):
            assert not on_evaluation({"step": step, "eval_loss": 1000.0})
        assert not on_evaluation(row)
        return Result([row], False, 1.0, 4.0, 1)

    monkeypatch.setattr(pretended, "run", only_the_end)
    assert {row["state"] for row in Tuner(sweep, tmp_path, trials=8).run()} == {"complete"}


def test_infinity_among_the_choices(configs, tmp_path, pretended):
    content = yaml.safe_load((configs / "sweeps" / "llm" / "stacey_p2.yaml").read_text())
    content["parameters"]["optimizer.p"] = {"values": [float("inf")]}
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(content))
    tuning.search(file, tmp_path / "out", trials=2, workers=1, seed=0)
    assert json.loads((tmp_path / "out" / "trials.json").read_text())[0]["settings"]["optimizer.p"] == ".inf"
    assert yaml.safe_load((tmp_path / "out" / "best.yaml").read_text())["optimizer"]["p"] == float("inf")
    assert pretended.made[0].settings["optimizer.p"] == ".inf"


def test_a_journal_that_a_full_disk_cut_short(sweep, tmp_path, pretended):
    whole = Tuner(sweep, tmp_path, trials=4).run()
    with (tmp_path / "journal.log").open("a") as journal:
        journal.write('{"op_code": 4, "wor')
    assert Tuner(sweep, tmp_path, trials=4).run() == whole
    more = Tuner(sweep, tmp_path, trials=6).run()
    assert len(Tuner(sweep, tmp_path, trials=6).run()) == len(more) == 6


def test_a_lock_that_a_kill_left(sweep, tmp_path, pretended, monkeypatch):
    """Optuna's is a link to a path that is relative to the program's directory, not to the link's."""
    monkeypatch.chdir(tmp_path)
    out = Path("runs/search")
    whole = Tuner(sweep, out, trials=4).run()
    (out / "journal.log.lock").symlink_to("runs/search/journal.log")
    assert Tuner(sweep, out, trials=4).run() == whole


def test_stopped(sweep, tmp_path, pretended, monkeypatch):
    stop = threading.Event()
    monkeypatch.setattr(pretended, "run", lambda self, tell, stop, advance: stop.set())
    with pytest.raises(Interrupted):
        Tuner(sweep, tmp_path, trials=3, stop=stop).run()
    assert len(pretended.made) == 1


@pytest.fixture
def arguments(configs):
    return ["tune", str(configs / "sweeps" / "llm" / "stacey_p2.yaml"), "--trials", "3", "--out"]


@pytest.mark.slow
def test_the_command_prints_and_writes_the_best_settings(arguments, tmp_path, capsys):
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    printed = capsys.readouterr()
    assert "100%" in printed.err
    best = yaml.safe_load((tmp_path / "whole" / "best.yaml").read_text())
    trials = json.loads((tmp_path / "whole" / "trials.json").read_text())
    assert best["optimizer"]["lr"] == trials[0]["settings"]["optimizer.lr"]
    assert best["optimizer"]["name"] == "stacey"
    assert "data" not in best  # no --data, and the prepared data are the search's own
    assert f"{trials[0]['value']:.4f}" in printed.out
    assert f"--config {tmp_path / 'whole' / 'best.yaml'}" in printed.out


@pytest.mark.exhaustive
def test_the_command_killed_goes_on_to_the_same(arguments, tmp_path):
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    trials = json.loads((tmp_path / "whole" / "trials.json").read_text())
    command = [
        sys.executable,
        "-m",
        "experiments",
        *arguments,
        str(tmp_path / "killed"),
    ]
    with subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    ) as started:
        while not (tmp_path / "killed" / "trial-001" / "metrics.jsonl").exists():
            assert started.poll() is None
        os.killpg(started.pid, signal.SIGKILL)
    assert main([*arguments, str(tmp_path / "killed")]) == 0
    assert json.loads((tmp_path / "killed" / "trials.json").read_text()) == trials


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trials", "0"], "--trials 0: it must be at least 1"),
        (["--workers", "0"], "--workers 0: it must be at least 1"),
        (["--seed", "-1"], "--seed -1: it must be from 0 to 1,000,000"),
        (["--seed", "20240601"], "--seed 20240601: it must be from 0 to 1,000,000"),
        ([], "this one holds a run with sweep None, not of sha256"),
    ],
)
def test_bad_options(configs, tmp_path, capsys, options, message):
    file = configs / "sweeps" / "llm" / "lion.yaml"
    with tuning.claimed(tmp_path, {"seed": 0}):
        pass
    assert main(["tune", str(file), "--out", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_without_optuna(configs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "experiments.tuning")
    monkeypatch.delattr("experiments.tuning")
    assert main(["tune", str(configs / "sweeps" / "llm" / "lion.yaml"), "--out", str(tmp_path)]) == 2
    assert "optuna is not installed; pip install 'stacey_dist[experiments]'" in capsys.readouterr().err
