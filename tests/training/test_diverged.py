"""A run whose weights or states are ruined: it keeps what was good, says so, and goes on from there."""

import os
import shutil
import time

import pytest

from stacey_dist.checkpoint import find_checkpoints, verify
from stacey_dist.checkpoint.manifest import read_manifest, step_of
from tests.training.forked import Forked
from tests.training.helpers import training_rows, write_config

pytestmark = pytest.mark.slow
PROGRAM = "tests/training/ruined_update.py"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_config(
        tmp_path_factory.mktemp("diverged"),
        train={"max_steps": 14, "eval_every_steps": 14, "max_skipped_steps": 4},
        checkpoint={"every_steps": 2, "keep_last": 1},
    )


def start(config, run_dir, *arguments, engine="cpu_ddp", program=PROGRAM, processes=2, **variables):
    arguments = ("--config", config, "--run_dir", run_dir, *arguments)
    return Forked(*arguments, program=program, processes=processes, engine=engine, **variables)


def steps(run):
    return [step_of(path) for path in find_checkpoints(run / "checkpoints")]


@pytest.mark.parametrize(
    ("engine", "kind"),
    [
        pytest.param("cpu_ddp", "z", marks=pytest.mark.exhaustive),
        pytest.param("cpu_zero2", "weight", marks=pytest.mark.exhaustive),
        pytest.param("cpu_zero3", "m", marks=pytest.mark.exhaustive),
        ("cpu_fsdp2", "weight"),
    ],
)
def test_a_ruined_checkpoint_does_not_replace_the_last_good_one(config, tmp_path, engine, kind):
    run = tmp_path / "run"
    output, status = start(config, run, engine=engine, RUIN=f"6 {kind}").wait()
    assert status == 2, output
    assert steps(run) == [6, 4]  # 6 was due as its update was applied; nothing was saved later
    good, ruined = (run / "checkpoints" / f"step_{step:08d}" for step in (4, 6))
    assert (verify(good)["finite"], verify(ruined)["finite"]) == (True, False)
    assert f"warning: {ruined} holds weights or optimizer states that are not finite" in output
    assert "5 updates in a row, 7 to 11, had a loss" in output
    assert f"the same command resumes from {good}" in output
    output, status = start(config, run, engine=engine, program="train_llm.py").wait()
    assert status == 0, output
    assert f"warning: skipped {ruined}" in output
    assert "after 4 updates" in output
    assert steps(run) == [14]
    assert [row["step"] for row in training_rows(run)] == list(range(1, 15))


def test_a_save_that_is_due_waits_for_an_update_that_is_applied(config, tmp_path):
    run = tmp_path / "run"
    arguments = ("--checkpoint.keep_last", 9)
    output, status = start(config, run, *arguments, processes=1, engine=None, RUIN="5 none", RECOVER=8).wait()
    assert status == 0, output
    assert steps(run) == [14, 12, 10, 9, 4, 2]  # those of 6 and 8 were due in skipped updates
    assert all(read_manifest(path)["finite"] for path in find_checkpoints(run / "checkpoints"))
    assert training_rows(run)[-1]["skipped_steps"] == 3


def test_the_last_checkpoint_of_a_ruined_run_deletes_nothing(config, tmp_path):
    run = tmp_path / "run"
    output, status = start(config, run, "--train.max_steps", 9, processes=1, engine=None, RUIN="7 weight").wait()
    assert status == 2, output
    assert "after the last update, 9, the run has weights or optimizer states that are not finite" in output
    assert "Traceback" not in output
    assert steps(run) == [9, 6]
    assert read_manifest(run / "checkpoints" / "step_00000009")["finite"] is False


@pytest.mark.parametrize(
    "what",
    [
        "run_dir moved",
        pytest.param("run_dir removed", marks=pytest.mark.exhaustive),  # to the run, as if it was moved
        "checkpoints",
        pytest.param("metrics.jsonl", marks=pytest.mark.exhaustive),
    ],
)
def test_what_is_renamed_or_removed_while_the_run_goes_on(config, tmp_path, what):
    run, moved = tmp_path / "run", tmp_path / "moved"
    last = 400 if what.startswith("run_dir") else 100  # a run that is stopped must not be at its end by then
    group = start(config, run, "--train.max_steps", last, "--train.eval_every_steps", 400, program="train_llm.py")
    while group.alive() and 6 not in steps(run):
        time.sleep(0.01)
    if what == "run_dir moved":
        os.rename(run, moved)
    elif what == "run_dir removed":
        os.rename(run, moved)  # at once, as the run makes it again
        shutil.rmtree(moved, ignore_errors=True)
    elif what == "checkpoints":
        os.rename(run / what, moved)
    else:
        (run / what).unlink()
    output, status = group.wait()
    if what.startswith("run_dir"):
        assert status == 2, output
        assert f"error: run_dir: {run} was renamed or removed during the run" in output
        assert "Traceback" not in output
        newest = find_checkpoints(run / "checkpoints")[0]
        verify(newest)
        assert 6 <= step_of(newest) < 400
        assert str(newest) in output
        assert (run / "config.yaml").exists()
        more = ("--train.max_steps", step_of(newest) + 2, "--train.eval_every_steps", 400)
        output, status = start(config, run, *more, program="train_llm.py").wait()
        assert status == 0, output
        assert f"after {step_of(newest)} updates" in output
        assert training_rows(run)[-1]["step"] == step_of(newest) + 2
    else:
        assert status == 0, output
        assert f"{run / what} was renamed or removed during the run" in output
        assert steps(run)[0] == training_rows(run)[-1]["step"] == last
        assert (training_rows(run)[0]["step"] == 1) == (what == "checkpoints")
