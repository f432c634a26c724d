"""Schedules, and a run that is made longer: what becomes of its learning rate is said, and it need not rise again."""

import math
import shlex

import pytest

from stacey_dist import yaml_files
from stacey_dist.training.continuing import _launch, checkpoint_before_decay, command_to_continue, lr_change
from stacey_dist.training.launchers import LLM
from stacey_dist.training.optimizers import lr_share, scheduled
from stacey_dist.training.settings.command_line import to_dict
from stacey_dist.training.settings.config import OptimizerConfig, ScheduleConfig, TrainConfig
from stacey_dist.training.settings.llm_config import LLMConfig
from tests.training.helpers import assert_equal_checkpoints, launch, training_rows, write_config


def test_wsd_warms_up_stays_and_decays():
    wsd = ScheduleConfig("wsd", warmup_steps=10, decay_steps=0.2, min_lr_ratio=0.1)
    share = [lr_share(step, wsd, 100) for step in range(101)]
    assert share[:10] == [(step + 1) / 10 for step in range(10)]
    assert share[10:81] == [1.0] * 71
    assert share[81:] == pytest.approx([1 - 0.9 * (step - 80) / 20 for step in range(81, 101)])
    root = ScheduleConfig("wsd", warmup_steps=0.1, decay_steps=20, decay_shape="1-sqrt", min_lr_ratio=0.0)
    assert lr_share(85, root, 100) == pytest.approx(0.5)  # 1 - sqrt(5/20)
    assert lr_share(100, root, 100) == 0.0
    never = ScheduleConfig("wsd", warmup_steps=0, decay_steps=0)
    assert {lr_share(step, never, 7) for step in range(8)} == {1.0}


def test_the_warm_up_fits_the_run_unless_it_is_given():
    assert [ScheduleConfig().warmup_updates(steps) for steps in (5, 40, 150, 200, 10**6)] == [0, 4, 15, 20, 20]
    given = [(0.02, 200, 4), (0.02, 600, 12), (30, 40, 30), (0, 40, 0), (1, 40, 1)]
    for warmup, steps, updates in given:
        assert ScheduleConfig(warmup_steps=warmup).warmup_updates(steps) == updates
    assert LLM.parse(["--schedule.warmup_steps", "0.02"]).schedule.warmup_steps == 0.02
    assert repr(LLM.parse(["--schedule.warmup_steps", "7"]).schedule.warmup_steps) == "7"
    assert LLM.parse(["--train.max_steps", "5"]).schedule.warmup_steps is None


def make_config(name="cosine", steps=200, optimizer="stacey", **schedule):
    optimizer = OptimizerConfig(optimizer, lr=0.0012)
    return LLMConfig(
        optimizer=optimizer,
        schedule=ScheduleConfig(name, warmup_steps=20, **schedule),
        train=TrainConfig(max_steps=steps),
    )


def test_a_longer_run_says_what_becomes_of_the_learning_rate():
    saved = to_dict(make_config())
    text = lr_change(make_config(steps=400), saved, 200)
    assert text == "lr 0.00012 at update 200, 0.000705 at update 201: the cosine is now over 400 updates"
    assert lr_change(make_config(), saved, 100) is None
    assert lr_change(make_config("constant", steps=400), to_dict(make_config("constant")), 200) is None
    text = lr_change(make_config("constant"), saved, 110)
    assert text == "lr 0.000669 at update 110, 0.0012 at update 111"
    for unknown in ({}, {"schedule": 3}, {"schedule": {"name": "cosine"}, "optimizer": {"lr": None}, "train": {}}):
        assert lr_change(make_config(), unknown, 3) is None


def longer(config, directory):
    """Return the settings of the command that is printed after the run."""
    config.run_dir = str(directory / "a run")
    (directory / "a run").mkdir(exist_ok=True)
    (directory / "a run" / "config.yaml").write_text(yaml_files.dump(to_dict(config)))
    about, command = command_to_continue(config, None).rsplit(": ", 1)
    words = shlex.split(command)
    return about, LLM.parse(words[words.index("--config") :])


def test_the_command_starts_the_processes_as_they_were_started(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    assert _launch() == "python"
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert _launch() == "torchrun --nproc_per_node 8"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert _launch() == "torchrun --nnodes 2 --nproc_per_node 4"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert _launch() == "accelerate launch --config_file FILE"


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("cosine", {}),
        ("linear", {"alpha": "lr", "tau": "lr"}),
        ("constant", {}),
        ("wsd", {}),  # without a checkpoint from before the decay
        ("cosine", {"final_p": math.inf}),
        ("cosine", {"final_p": 3.0, "tau": "lr"}),
        ("constant", {"final_p": 3.0}),
        ("constant", {"final_alpha": 9.0}),
        ("cosine", {"final_alpha": 9.0, "final_p": 4.0}),
        ("cosine", {"final_alpha": 9.0, "optimizer": "adamw"}),  # which has no alpha
        ("constant", {"final_p": 3.0, "optimizer": "adamw"}),  # which has no p
        ("wsd", {"final_p": 3.0, "optimizer": "adamw"}),
        ("linear", {"optimizer": "muon"}),
    ],
)
def test_the_command_that_is_printed_continues_with_the_last_settings(name, schedule, tmp_path):
    config = make_config(name, **schedule)
    last = scheduled(config, 200)
    about, then = longer(config, tmp_path)
    assert "lr" in about
    assert (then.run_dir, then.train.max_steps) == (config.run_dir, 400)
    known = {setting: getattr(then.optimizer, setting) for setting in last}
    for step in (200, 201, 399):
        assert known | scheduled(then, step) == pytest.approx(last, rel=1e-5)  # six digits are printed


def test_a_run_that_ends_at_zero_begins_anew(tmp_path):
    about, then = longer(make_config(min_lr_ratio=0.0), tmp_path)
    assert about == "to continue, from the beginning, for the lr has come down to 0"
    assert then.run_dir == f"{tmp_path}/a run-longer"
    # The last checkpoint is where one from before wsd's decay would be.
    growing = make_config("linear", min_lr_ratio=0.0, final_alpha=9.0, final_p=4.0)
    (tmp_path / "step_00000200").mkdir()
    command = command_to_continue(growing, checkpoint_before_decay(growing, tmp_path))
    assert "from the beginning" in command
    assert "schedule.final" not in command
    config = make_config()
    config.train.epochs = 1.5
    assert "--train.epochs 3 --schedule.name constant" in command_to_continue(config, None)


def test_wsd_continues_with_the_p_of_its_checkpoint(tmp_path):
    config = make_config("wsd", final_p=3.0, final_alpha=9.0)
    before = scheduled(config, 160)
    command = command_to_continue(config, tmp_path / "step_00000160")
    words = shlex.split(command.split(" --config ", 1)[1])
    then = LLM.parse(words[1:])
    assert then.schedule.final_p is None
    assert then.schedule.final_alpha is None
    found = then.optimizer.p, then.optimizer.alpha
    assert found == pytest.approx((before["p"], before["alpha"]), rel=1e-5)  # six digits are printed
    assert then.checkpoint.resume_from == str(tmp_path / "step_00000160")
    about = command_to_continue(make_config("wsd", final_p=3.0, optimizer="adamw"), tmp_path / "step_00000160")
    assert "from before the decay" in about
    assert "optimizer.p" not in about


@pytest.mark.slow
def test_wsd_continues_from_before_its_decay_as_if_it_had_been_longer_at_once(tmp_path):
    changes = {"schedule": {"name": "wsd", "warmup_steps": 3, "decay_steps": 4}, "train": {"max_steps": 16}}
    config = write_config(tmp_path, **changes, checkpoint={"every_steps": 5, "keep_last": 1})
    output = launch("--config", config, "--run_dir", tmp_path / "run")
    assert [path.name for path in sorted((tmp_path / "run/checkpoints").iterdir())] == [
        "step_00000012",
        "step_00000016",
    ]
    (line,) = [line for line in output.splitlines() if line.startswith("to continue, from before the decay: ")]
    words = shlex.split(line.rsplit(": ", 1)[1])
    assert words[0] == "python"  # which is how it was started
    assert words[1].endswith("train_llm.py")
    output = launch(*words[2:], "--train.eval_every_steps", 100)
    assert "lr 0.0012 at" not in output  # as it would have been
    launch("--config", config, "--run_dir", tmp_path / "whole", "--train.max_steps", 32)
    assert_equal_checkpoints(tmp_path / "run-longer", tmp_path / "whole", 32)


def test_the_printed_command_resumes_and_finds_the_tokens(tmp_path):
    config = make_config("linear", min_lr_ratio=0.0)
    config.run_dir, config.checkpoint.resume = "runs/a", "never"
    options = LLM.parse(shlex.split(command_to_continue(config, None).partition("config.yaml ")[2]))
    assert options.checkpoint.resume == "auto"
    assert (options.run_dir, options.data.cache_dir) == ("runs/a-longer", "runs/a/data")
    config.data.cache_dir = "tokens"
    assert "cache_dir" not in command_to_continue(config, None)
    config = make_config("constant")
    assert "cache_dir" not in command_to_continue(config, None)  # the same run_dir


@pytest.mark.slow
def test_epochs_are_counted_on_with_another_batch(tmp_path):
    config, run = write_config(tmp_path, train={"eval_every_steps": 1000}), tmp_path / "run"
    options = ("--config", config, "--run_dir", run, "--checkpoint.every_steps", "null")
    launch(*options, "--train.epochs", "0.05")
    (windows,) = {round(row["step"] * 8 / row["epoch"]) for row in training_rows(run)[-1:]}
    step = training_rows(run)[-1]["step"]
    assert step == math.ceil(0.05 * windows / 8)
    change = ("--train.global_batch_size", "16", "--checkpoint.allow_changes", "[train.global_batch_size]")
    for epochs in ("0.1", "0.15"):
        launch(*options, "--train.epochs", epochs, *change)
        left = float(epochs) * windows - 8 * step
        assert training_rows(run)[-1]["step"] == step + math.ceil(left / 16)
    assert "nothing to do" in launch(*options, "--train.epochs", "0.05", *change)
