"""A task and a model of a user's own, trained by the package's loop."""

import pytest
import torch

from tests.training.helpers import checkpoint, launch, rows

PROGRAM = "tests/training/own_program.py"
OPTIONS = (
    "--train.max_steps", "40", "--train.global_batch_size", "12", "--train.micro_batch_size", "3",
    "--train.eval_every_steps", "20", "--train.cpu_threads", "1", "--schedule.name", "constant",
    "--schedule.warmup_steps", "2", "--optimizer.p", "2.5", "--optimizer.lr", "0.3", "--checkpoint.every_steps", "20",
)  # fmt: skip


@pytest.mark.slow
def test_a_users_own_task_trains_and_resumes(tmp_path):
    output = launch(*OPTIONS, "--run_dir", tmp_path / "run", program=PROGRAM)
    assert "closed" in output
    last = rows(tmp_path / "run")[-1]["eval_loss"]
    assert last < 0.06  # a hundredth of the targets' mean square: five normal numbers and 1
    output = launch(*OPTIONS, "--run_dir", tmp_path / "two", program=PROGRAM, processes=2)
    assert "2 processes" in output
    assert rows(tmp_path / "two")[-1]["eval_loss"] == pytest.approx(last, abs=0.06)
    launch(*OPTIONS, "--run_dir", tmp_path / "halves", "--train.max_steps", "20", program=PROGRAM)
    output = launch(*OPTIONS, "--run_dir", tmp_path / "halves", program=PROGRAM)
    assert "after 20 updates" in output
    halves = checkpoint(tmp_path / "halves", 40)
    assert all(torch.equal(tensor, halves[name]) for name, tensor in checkpoint(tmp_path / "run", 40).items())


@pytest.mark.slow
def test_its_settings_are_checked_as_the_packages_own(tmp_path):
    for value, message in (("0", "it must be > 0"), ("13", "it brings bad luck")):
        output = launch("--model.features", value, "--run_dir", tmp_path / "run", program=PROGRAM, expect=2)
        assert f"own_program.py: error: model.features: {value} is not allowed; {message}" in output
