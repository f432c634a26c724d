"""Programs of a user's own on the package's loop: tasks, models, callbacks, and without `accelerate launch`."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.shared import made_once
from tests.training.forked import ROOT
from tests.training.helpers import SMOOTH, assert_equal_checkpoints, launch, rows, training_rows

pytestmark = pytest.mark.slow
PROGRAM = "tests/training/own_program.py"
EXAMPLE = "docs/examples/own_task.py"
OPTIONS = (
    "--train.max_steps", "40", "--train.global_batch_size", "12", "--train.micro_batch_size", "3",
    "--train.eval_every_steps", "20", "--train.cpu_threads", "1", "--schedule.name", "constant",
    "--schedule.warmup_steps", "2", "--optimizer.p", "2.5", "--optimizer.lr", "0.3", "--checkpoint.every_steps", "20",
)  # fmt: skip
LINES = {1, 10, 20, 30, 40}  # updates whose line is due


def train_on_one(directory):
    profiled = ("--train.profile", "5,6")
    output = launch(
        *OPTIONS, *profiled, "--run_dir", directory / "run", program=PROGRAM, EVENTS=directory / "events"
    )  # fmt: skip
    return directory, output


@pytest.fixture(scope="module")
def one():
    """The program on one process, with a callback and a profile: (directory, output)."""
    return made_once(train_on_one)


def events(path, *wanted):
    """Return what a callback was told, of these kinds."""
    found = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [event for event in found if event[0] in wanted or not wanted]


def test_a_users_own_task_trains(one, tmp_path):
    directory, output = one
    assert "closed" in output
    last = rows(directory / "run")[-1]["eval_loss"]
    assert last < 0.06  # a hundredth of the targets' mean square: five normal numbers and 1
    two = {"program": PROGRAM, "processes": 2, "EVENTS": tmp_path / "events"}
    output = launch(*OPTIONS, "--run_dir", tmp_path / "two", **two)
    assert "2 processes" in output
    assert rows(tmp_path / "two")[-1]["eval_loss"] == pytest.approx(last, abs=0.06)
    first, second = (events(tmp_path / f"events.{rank}") for rank in range(2))
    assert second == [event for event in first if event[0] != "saved"]


def test_a_model_begins_with_the_seed_whatever_was_drawn_for_the_data(tmp_path):
    outputs = [launch(tmp_path / str(n), program="tests/training/draws.py", DRAWS=n).splitlines() for n in (0, 3)]
    first, second = ([line for line in output if line.startswith("weights: ")] for output in outputs)
    assert first == second
    assert len(first) == 1


def test_what_a_callback_is_told(one):
    told, run = one[0] / "events.0", one[0] / "run"
    assert events(told)[0][:2] == ["run begins", 0]
    assert events(told)[-1][:2] == ["run ends", 40]
    assert [event[1] for event in events(told, "update begins")] == list(range(40))
    updates = events(told, "update")
    assert [event[1] for event in updates] == list(range(1, 41))
    # Read where a line is due, and where it asked for that; the end of one that it waited for is not seen before.
    assert {step for _, step, outcome, _ in updates if outcome} == LINES | {7}
    logged = {row["step"]: row for row in training_rows(run)}
    for _, step, outcome, lr in updates:
        if step in LINES:
            row = logged[step]
            assert (outcome, lr) == ([row["loss"], row["grad_norm"], 0.0], row["lr"])
    assert [event[-2:] for event in events(told, "evaluation")] == [
        [{"eval_loss": row["eval_loss"]}, True] for row in rows(run) if "eval_loss" in row
    ]
    saved = events(told, "saved")
    assert [event[-2:] for event in saved] == [["step_00000020", True], ["step_00000040", True]]
    assert 20 <= saved[0][1] < 40


def test_an_error_in_a_callback_ends_the_run_and_the_next_start_resumes(one, tmp_path):
    run = tmp_path / "run"
    output = launch(*OPTIONS, "--run_dir", run, program=PROGRAM, FAIL=30, expect=1)
    assert "RuntimeError: the callback's own" in output
    output = launch(*OPTIONS, "--run_dir", run, program=PROGRAM)
    assert "after 20 updates" in output
    assert_equal_checkpoints(run, one[0] / "run", 40)


def test_the_profile_is_of_the_updates_that_were_asked_for(one):
    directory, output = one
    profile = directory / "run" / "profile"
    assert f"profile of updates 5 to 6: {profile}" in output
    trace = json.loads(gzip.decompress((profile / "updates-5-6.json.gz").read_bytes()))
    steps = [event for event in trace["traceEvents"] if str(event.get("name", "")).startswith("Optimizer.step#")]
    assert len(steps) == 2


def test_its_settings_are_checked_as_the_packages_own(tmp_path):
    for value, message in (("0", "it must be > 0"), ("13", "it brings bad luck")):
        output = launch("--model.features", value, "--run_dir", tmp_path / "run", program=PROGRAM, expect=2)
        assert f"own_program.py: error: model.features: {value} is not allowed; {message}" in output


def test_its_runs_are_guarded_as_the_packages_own(one, tmp_path):
    run = shutil.copytree(one[0] / "run", tmp_path / "run")
    options = (*OPTIONS, "--run_dir", run, "--train.max_steps", "44")
    output = launch(*options, "--seed", "1", "--optimizer.variant", "pp", program=PROGRAM, expect=2)
    assert "seed: 0 in the checkpoint, 1 now" in output
    assert "optimizer.variant: p2 in the checkpoint, pp now" in output
    changed = ("--model.features", "6", "--checkpoint.allow_changes")
    assert "it may name seed, data, " in launch(*options, *changed, "[model.features]", program=PROGRAM, expect=2)
    output = launch(*options, "--seed", "1", "--checkpoint.allow_changes", "[seed, data]", program=PROGRAM)
    assert training_rows(run)[-1]["step"] == 44


def test_what_its_model_cannot_do_is_refused(tmp_path):
    options = ("--run_dir", tmp_path / "run", "--train.max_steps", "1")
    output = launch(*options, "--hub.push_to", "a/b", program=EXAMPLE, expect=2)
    assert "hub.push_to: a/b is not allowed; this program exports no model" in output
    output = launch(*options, "--train.gradient_checkpointing", "true", program=EXAMPLE, expect=2)
    assert "train.gradient_checkpointing: True is not allowed; Sequential has none" in output


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_deepspeed_casts_its_inputs_too(tmp_path, precision):
    if precision == "fp16" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        pytest.skip("DeepSpeed takes this processor to have no fp16")
    options = ("--train.max_steps", "3", "--train.cpu_threads", "1", "--train.mixed_precision", precision)
    launch(*options, "--run_dir", tmp_path / "run", program=EXAMPLE, processes=2, engine="cpu_zero2")
    assert rows(tmp_path / "run")[-1]["eval_loss"] < 0.5


def test_the_example_trains_on_zero2_then_fsdp2_and_in_a_notebook(tmp_path, monkeypatch):
    options = ("--train.max_steps", "40", "--train.cpu_threads", "1", *SMOOTH)
    options += ("--schedule.name", "constant", "--schedule.warmup_steps", "0")
    launch(*options, "--run_dir", tmp_path / "whole", program=EXAMPLE)
    run = ("--run_dir", tmp_path / "run")
    launch(*options, *run, "--train.max_steps", "20", program=EXAMPLE, processes=2, engine="cpu_zero2")
    output = launch(*options, *run, program=EXAMPLE, processes=2, engine="cpu_fsdp2")
    assert "after 20 updates" in output
    ends = [rows(tmp_path / name)[-1]["eval_loss"] for name in ("whole", "run")]
    assert ends[0] < 0.02  # 0.14 at first
    assert ends[1] == pytest.approx(ends[0], rel=1e-3)  # float32 sums in other orders
    for name in ("own_task.py", "notebook.py"):
        code = (ROOT / "docs/examples" / name).read_text()
        (tmp_path / name).write_text(code.replace('"40"]', f'"40", {options[2:]}]'.replace("(", "*(")))
    monkeypatch.chdir(tmp_path)
    output = launch(program=tmp_path / "notebook.py")
    assert "resumed from runs/notebook/checkpoints/step_00000020 after 20 updates" in output
    assert_equal_checkpoints(tmp_path / "runs/notebook", tmp_path / "whole", 40)


@pytest.mark.parametrize("engine", ["cpu_zero2", pytest.param("cpu_zero3", marks=pytest.mark.exhaustive)])
def test_many_micro_batches_have_the_gradient_of_one(tmp_path, engine):
    """Added in bf16, its norm would be 5 % too small."""
    norms = []
    for micro in (1, 512):
        options = (
            "--train.max_steps", 1, "--train.global_batch_size", 512, "--train.micro_batch_size", micro,
            "--train.max_grad_norm", 0, "--train.cpu_threads", 1, "--schedule.warmup_steps", 0,
        )  # fmt: skip
        run = tmp_path / str(micro)
        launch(*options, "--run_dir", run, program=EXAMPLE, engine=engine, ACCELERATE_MIXED_PRECISION="bf16")
        norms.append(training_rows(run)[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=0.01)
