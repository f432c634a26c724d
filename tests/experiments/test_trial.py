"""A training run of an experiment: what it leaves, and what becomes of one that fails, diverges or is stopped."""

import json
import math
import multiprocessing
import re
import threading
import time

import pytest

from experiments.trial import Interrupted, Trial, TrialError
from stacey_dist.errors import SettingsError
from tests.experiments.tasks import SHORT, STEPS
from tests.training.helpers import launch, rows, write_config


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("trial"), train=SHORT, checkpoint={})


def test_it_is_the_launchers_run(config, tmp_path):
    trial = Trial("train_llm.py", config, {"optimizer.lr": 0.01, "optimizer.p": math.inf}, tmp_path / "trial")
    told, done = [], []
    result = trial.run(lambda row: told.append(row) or False, advance=done.append)
    launch("--config", config, "--optimizer.lr", 0.01, "--optimizer.p", "inf", "--run_dir", tmp_path / "launched")
    theirs = [row for row in rows(tmp_path / "launched") if "eval_loss" in row]
    assert result.evaluations == told == theirs
    assert [row["step"] for row in told] == [2, 4, 6]
    assert done == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    assert result.final("eval_loss") == theirs[-1]["eval_loss"]
    assert not result.diverged
    assert result.state_bytes_per_parameter == 4.0  # z and m in bfloat16
    speeds = sorted(row["tokens_per_second"] for row in rows(tmp_path / "trial") if "loss" in row)
    middle = (speeds[1] + speeds[2]) / 2  # rows at updates 1, 2, 4, 6
    assert result.seconds_per_update == pytest.approx(8 * 32 / middle)
    assert trial.length() == STEPS
    assert not (tmp_path / "trial" / "checkpoints").exists()
    before = (tmp_path / "trial" / "output.txt").stat().st_mtime_ns
    again = []
    assert trial.run(lambda row: again.append(row) or False) == result  # read, not trained
    assert again == told
    assert (tmp_path / "trial" / "output.txt").stat().st_mtime_ns == before


def test_diverged(config, tmp_path):
    settings = {"optimizer.name": "sgd", "optimizer.lr": 1e30, "train.max_skipped_steps": 1}
    result = Trial("train_llm.py", config, {**settings, "train.max_grad_norm": 0.0}, tmp_path).run()
    assert result.diverged
    assert result.final("eval_loss") is None


def test_refused_settings_are_said_in_the_launchers_words(config, tmp_path):
    with pytest.raises(SettingsError, match=re.escape("optimizer.tau: 2.0 is not allowed")):
        Trial("train_llm.py", config, {"optimizer.tau": 2.0}, tmp_path / "a").run()
    with pytest.raises(SettingsError, match=r"optimizer\.lrr"):
        Trial("train_llm.py", config, {"optimizer.lrr": 2.0}, tmp_path / "b").run()


def test_an_error_shows_the_end_of_the_output(config, tmp_path):
    # A directory is where the run's file is to be.
    (tmp_path / "config.yaml").mkdir()
    with pytest.raises(TrialError, match=r"config\.yaml"):
        Trial("train_llm.py", config, {}, tmp_path).run()


def test_an_error_before_training_is_told(config, tmp_path, monkeypatch):
    (tmp_path / "datasets.py").write_text("raise ImportError('this package is broken')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("experiments.trial._server", lambda: multiprocessing.get_context("spawn"))
    trial = Trial("train_llm.py", config, {}, tmp_path / "run")
    trial.directory.mkdir()
    (trial.directory / "output.txt").write_text("what an earlier run has said")
    with pytest.raises(TrialError, match=r"exit status 1\n(.*\n)*ImportError: this package is broken") as error:
        trial.run()
    assert "earlier" not in str(error.value)
    monkeypatch.setattr("experiments.trial._train_in_process", None)  # the process ends before it opens the file
    (trial.directory / "output.txt").unlink()
    with pytest.raises(TrialError, match=r"output.txt: exit status 0\n$"):
        trial.run()


def test_ended_early(config, tmp_path):
    trial = Trial("train_llm.py", config, {"train.max_steps": 2000}, tmp_path)
    done = []
    assert trial.run(lambda row: row["step"] >= 4, advance=done.append) is None
    assert sum(done) == pytest.approx(1)
    assert not (tmp_path / "result.json").exists()


def test_stopped_it_saves_and_goes_on(config, tmp_path):
    settings = {"train.max_steps": 60, "train.eval_every_steps": 10}
    whole = Trial("train_llm.py", config, settings, tmp_path / "whole").run()
    stop, trial = threading.Event(), Trial("train_llm.py", config, settings, tmp_path / "stopped")
    assert trial.run(lambda row: stop.set() or False, stop) is None
    (saved,) = (tmp_path / "stopped" / "checkpoints").glob("step_*")
    assert 10 <= int(saved.name[5:]) < 60
    result = trial.run()
    assert result.evaluations == whole.evaluations
    assert json.loads((tmp_path / "stopped" / "result.json").read_text())["evaluations"] == whole.evaluations


def test_a_signal_from_outside_interrupts(config, tmp_path):
    trial = Trial("train_llm.py", config, {"train.max_steps": 100_000}, tmp_path)

    def terminate():
        while not rows(tmp_path):
            time.sleep(0.01)
        for process in multiprocessing.active_children():
            process.terminate()

    threading.Thread(target=terminate).start()
    with pytest.raises(Interrupted):
        trial.run()
