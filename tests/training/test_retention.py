"""Which checkpoints of a run stay, and where runs are."""

from types import SimpleNamespace

import pytest

from stacey_dist.training.continuing import checkpoint_before_decay
from stacey_dist.training.optimizers import lr_share
from stacey_dist.training.progress import Progress
from stacey_dist.training.saving import Saver, checkpoint_path
from stacey_dist.training.settings.config import RunConfig, ScheduleConfig
from stacey_dist.training.start import separate_runs_of_a_sweep


def make_saver(directory):
    config = RunConfig(run_dir=str(directory))
    config.checkpoint.keep_last = 1
    run = SimpleNamespace(config=config, directory=directory, accelerator=SimpleNamespace(is_main_process=True))
    return run, Saver(run, None, "data")


def left(run):
    return sorted(int(path.name[5:]) for path in (run.directory / "checkpoints").iterdir())


@pytest.mark.parametrize("skipped", [False, True])
def test_the_checkpoint_before_wsds_decay_stays_if_it_came_an_update_later(tmp_path, skipped):
    run, saver = make_saver(tmp_path)
    run.config.schedule = ScheduleConfig("wsd", decay_steps=4)
    run.config.train.max_steps = 10
    assert [step for step in range(1, 11) if saver.is_due(step)] == [6]
    for step in (5, 7, 9, 10) if skipped else (5, 6, 7, 9, 10):
        checkpoint_path(run, step).mkdir(parents=True)
        saver._retain(checkpoint_path(run, step), None, Progress())
    before_decay = 7 if skipped else 6
    assert left(run) == [before_decay, 10]
    assert lr_share(before_decay - 1, run.config.schedule, 10) == 1.0
    assert checkpoint_before_decay(run.config, tmp_path / "checkpoints") == checkpoint_path(run, before_decay)


def test_callbacks_hear_of_no_checkpoint_that_is_deleted_already(tmp_path):
    run, saver = make_saver(tmp_path)
    checkpoint_path(run, 2).mkdir(parents=True)
    saver.complete.extend([checkpoint_path(run, 1), checkpoint_path(run, 2)])
    assert list(saver.take_complete()) == [checkpoint_path(run, 2)]
    assert not saver.complete


def test_the_best_checkpoint_stays_when_a_better_one_cannot_be_saved(tmp_path):
    run, saver = make_saver(tmp_path)
    progress = Progress()  # a run that goes on has it from its checkpoint
    for step, best in ((1, 1), (2, 1), (4, 3), (5, 5)):  # the best after update 3 was not saved
        checkpoint_path(run, step).mkdir(parents=True)
        saver._retain(checkpoint_path(run, step), best, progress)
        assert left(run) == {1: [1], 2: [1, 2], 4: [1, 4], 5: [5]}[step]


def test_runs_of_a_wandb_sweep_have_directories_of_their_own(monkeypatch):
    def directory(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        config = RunConfig(run_dir="runs")
        separate_runs_of_a_sweep(config)
        return config.run_dir

    assert directory() == "runs"
    assert directory(WANDB_SWEEP_ID="s1", WANDB_RUN_ID="a") == "runs/sweep-s1/a"
    assert directory(WANDB_SWEEP_ID="s1", WANDB_RUN_ID="b") == "runs/sweep-s1/b"
