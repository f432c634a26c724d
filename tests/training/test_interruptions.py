"""Signals at the worst moment, checkpoints by the clock, and disks that are full."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from stacey_dist.checkpoint import find_checkpoints, verify
from stacey_dist.checkpoint.compare import differences
from stacey_dist.checkpoint.manifest import step_of
from tests.shared import made_once
from tests.training.forked import Forked
from tests.training.helpers import rows, training_rows, write_config

pytestmark = pytest.mark.slow
PROGRAM = "tests/training/instrumented.py"
STEPS = 12


def prepare(directory):
    return write_config(
        directory,
        train={"max_steps": STEPS, "eval_every_steps": STEPS, "micro_batch_size": 2},
        checkpoint={"every_steps": 2},
    )


@pytest.fixture(scope="module")
def config():
    return made_once(prepare)


def start(config, run_dir, *arguments, engine="cpu_ddp", **variables):
    arguments = ("--config", config, "--run_dir", run_dir, *arguments)
    return Forked(*arguments, program=PROGRAM, processes=2, engine=engine, **variables)


def train_undisturbed(directory, config):
    for engine in ("cpu_ddp", "cpu_zero2"):
        output, status = start(config, directory / engine, engine=engine).wait()
        assert status == 0, output
    return directory


@pytest.fixture(scope="module")
def undisturbed(config):
    return made_once(train_undisturbed, config)


def last(run_dir):
    return run_dir / "checkpoints" / f"step_{STEPS:08d}"


@pytest.mark.parametrize(
    ("engine", "event", "rank", "count"),
    [
        pytest.param("cpu_zero2", "update", 1, 5, marks=pytest.mark.exhaustive),
        ("cpu_ddp", "update", 0, 5),
        ("cpu_zero2", "forward", 1, 10),  # the second of two micro-batches
        pytest.param("cpu_ddp", "backward", 0, 9, marks=pytest.mark.exhaustive),
        ("cpu_ddp", "save", 1, 2),
        pytest.param("cpu_zero2", "written", 1, 2, marks=pytest.mark.exhaustive),
        ("cpu_ddp", "rename", 0, 2),
        pytest.param("cpu_zero2", "retention", 0, 2, marks=pytest.mark.exhaustive),
    ],
)
def test_sigterm_to_one_process_at_any_moment(undisturbed, config, tmp_path, engine, event, rank, count):
    run = tmp_path / "run"
    output, status = start(config, run, engine=engine, ACCIDENT=f"{event} {rank} {count} {int(signal.SIGTERM)}").wait()
    newest = find_checkpoints(run / "checkpoints")[0]
    verify(newest)
    assert status == 128 + signal.SIGTERM, output
    assert step_of(newest) < STEPS
    assert output.count(f"stopped by signal 15 after update {step_of(newest)}; the same command resumes from here") == 1
    output, status = start(config, run, engine=engine).wait()
    assert status == 0, output
    assert f"resumed from {newest}" in output
    assert differences(last(run), last(undisturbed / engine)) == []


def evaluations(run):
    return [(row["step"], row["eval_loss"]) for row in rows(run) if "eval_loss" in row]


@pytest.mark.parametrize("engine", ["cpu_ddp", pytest.param("cpu_zero2", marks=pytest.mark.exhaustive)])
def test_sigterm_ends_an_evaluation_which_is_made_when_the_run_goes_on(undisturbed, config, tmp_path, engine):
    run, half = tmp_path / "run", STEPS // 2
    often = ("--train.eval_every_steps", half)
    whole = tmp_path / "whole"
    assert start(config, whole, *often, engine=engine).wait()[1] == 0
    stages = [  # what happens, after which update it is saved, how many evaluations are made by then
        ("evaluation 1 1 15", half, 0),
        ("evaluation 1 1 15", half, 0),  # in the one that is made up for
        ("update 1 2 9", half, 1),  # before a checkpoint knows that it was made
        ("evaluation 1 2 15", STEPS, 1),  # after the last update
        ("evaluation 1 1 15", STEPS, 1),
    ]
    for accident, step, made in stages:
        output, status = start(config, run, *often, engine=engine, ACCIDENT=accident).wait()
        assert status != 0
        assert (f"stopped by signal 15 after update {step};" in output) == accident.endswith("15"), output
        assert step_of(find_checkpoints(run / "checkpoints")[0]) == step
        assert evaluations(run) == evaluations(whole)[:made]
    output, status = start(config, run, *often, engine=engine).wait()
    assert status == 0, output
    assert evaluations(run) == evaluations(whole)
    assert (run / "model" / "model.safetensors").exists()
    assert differences(last(run), last(undisturbed / engine)) == []
    best = ["best_step", "best_score", "evaluated_step"]
    assert [verify(last(run))["extra"][name] for name in best] == [verify(last(whole))["extra"][name] for name in best]
    output, status = start(config, run, *often, engine=engine).wait()
    assert "nothing to do" in output
    assert evaluations(run) == evaluations(whole)


def wait_for_step(group, run, step):
    while group.alive() and not any(row["step"] >= step for row in training_rows(run)):
        time.sleep(0.002)


def test_two_sigterms_and_a_ctrl_c_that_comes_twice_at_once(undisturbed, config, tmp_path):
    for number in (signal.SIGTERM, signal.SIGINT):
        run = tmp_path / number.name
        group = start(config, run)
        wait_for_step(group, run, 3)
        group.send(number)
        time.sleep(0.01)
        group.send(number)  # as Slurm's comes to every process, and once more from torchrun's agent
        output, status = group.wait()
        assert status == 128 + number, output
        assert output.count(f"{number.name}: finishing this step, then saving") == 1
        output, status = start(config, run).wait()
        assert status == 0, output
        assert differences(last(run), last(undisturbed / "cpu_ddp")) == []


def test_saving_beside_training_and_waiting_for_it_save_the_same(undisturbed, config, tmp_path):
    run = tmp_path / "run"
    output, status = start(config, run, "--checkpoint.asynchronous", "false").wait()
    assert status == 0, output
    for path in find_checkpoints(run / "checkpoints"):
        assert differences(path, undisturbed / "cpu_ddp" / "checkpoints" / path.name) == []


def test_checkpoints_by_the_clock_and_for_good(config, tmp_path):
    run = tmp_path / "run"
    arguments = ("--checkpoint.every_steps", "null", "--checkpoint.every_minutes", 1e-9, "--checkpoint.keep_every", 5)
    output, status = start(config, run, *arguments, "--checkpoint.keep_last", 3).wait()
    assert status == 0, output
    assert [step_of(path) for path in find_checkpoints(run / "checkpoints")] == [12, 11, 10, 5]
    run = tmp_path / "other"
    output, status = start(config, run, "--checkpoint.every_steps", "null", "--checkpoint.every_minutes", "null").wait()
    assert status == 0, output
    assert [step_of(path) for path in find_checkpoints(run / "checkpoints")] == [12]


@pytest.fixture
def small_disk(tmp_path):
    """Yield a file system of 3 MiB: `fill` leaves less space than a checkpoint needs, `free` undoes it."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", disk], check=True)
    yield SmallDisk(disk)
    subprocess.run(["umount", "-l", disk], check=True)


class SmallDisk:
    def __init__(self, path):
        self.path, self.filler = path, path / "filler"

    def fill(self):
        space = os.statvfs(self.path)
        self.filler.write_bytes(b"\0" * (space.f_bavail * space.f_frsize - 8192))

    def free(self):
        self.filler.unlink()


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_a_full_disk_stops_a_run_at_the_third_failure_and_loses_nothing_before(
    undisturbed, config, tmp_path, small_disk
):
    run = small_disk.path / "run"
    group = start(config, run, ACCIDENT=f"save 0 2 {int(signal.SIGSTOP)}")  # the save after update 4
    stopped = wait_until_stopped(group.processes[0].pid)
    small_disk.fill()
    os.kill(stopped, signal.SIGCONT)
    output, status = group.wait()
    assert status == 2, output
    assert output.count("a checkpoint failed, training continues: ") == 2, output
    assert "train_llm.py: error: run_dir: the checkpoint after update" in output
    assert "No space left on device" in output
    assert output.count("its rows are kept until it can") <= 1
    assert names(run) == ["step_00000002"]
    verify(run / "checkpoints" / "step_00000002")
    small_disk.free()
    output, status = start(config, run).wait()
    assert status == 0, output
    assert "after 2 updates" in output
    assert differences(last(run), last(undisturbed / "cpu_ddp")) == []


def test_a_run_outlives_a_disk_that_is_full_for_a_while(undisturbed, config, tmp_path, small_disk):
    run = small_disk.path / "run"
    pauses = ";".join(f"save 0 {count} {int(signal.SIGSTOP)}" for count in (2, 3))
    group = start(config, run, "--checkpoint.asynchronous", "false", ACCIDENT=pauses)
    for change in (small_disk.fill, small_disk.free):
        stopped = wait_until_stopped(group.processes[0].pid)
        change()
        os.kill(stopped, signal.SIGCONT)
    output, status = group.wait()
    assert status == 0, output
    assert output.count("a checkpoint failed, training continues: ") == 1
    assert differences(last(run), last(undisturbed / "cpu_ddp")) == []
    # Rows that could not be written wait for it.
    assert [row["step"] for row in training_rows(run)] == list(range(1, STEPS + 1))


def wait_until_stopped(pid):
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.005)
    return pid


@pytest.mark.parametrize(("limit", "message"), [("FSIZE", "File too large"), ("NOFILE", "Too many open files")])
def test_a_run_outlives_a_limit_of_the_process_for_a_while(config, tmp_path, limit, message):
    run = tmp_path / "run"
    arguments = ("--config", config, "--run_dir", run, "--checkpoint.asynchronous", "false")
    # Under it for the checkpoints after updates 4 and 6; the next one has to succeed.
    output, status = Forked(*arguments, program="tests/training/limited.py", LIMIT=f"{limit} 4 7").wait()
    assert status == 0, output
    assert output.count("a checkpoint failed, training continues: ") == 2, output
    assert output.index("a checkpoint failed") < output.index(f"step 5/{STEPS}")  # a save that is waited for
    assert message in output
    assert step_of(find_checkpoints(run / "checkpoints")[0]) == STEPS
    verify(last(run))
    assert [row["step"] for row in training_rows(run)] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(("limit", "message"), [("FSIZE", "File too large"), ("NOFILE", "Too many open files")])
def test_a_limit_that_stays_ends_the_run_with_one_line(config, tmp_path, limit, message):
    run = tmp_path / "run"
    # A save beside training would hold files when the limit comes, and free them later.
    arguments = ("--config", config, "--run_dir", run, "--checkpoint.asynchronous", "false")
    output, status = Forked(*arguments, program="tests/training/limited.py", LIMIT=f"{limit} 3 99").wait()
    assert status == 2, output
    assert "train_llm.py: error: run_dir: the checkpoint after update" in output
    assert message in output
    assert "Traceback" not in output
    # Without a free file the hidden directory of a failed save cannot be deleted; the next start does that.
    assert [step_of(path) for path in find_checkpoints(run / "checkpoints")] == [2]
