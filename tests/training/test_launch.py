"""train_llm.py as `accelerate launch` starts it: resume, processes, precision, interruption, trackers."""

import math
import shutil
import signal

import pytest
import torch

from stacey_dist.checkpoint import verify
from tests.shared import made_once
from tests.training.helpers import (
    SMOOTH,
    assert_equal_checkpoints,
    assert_nearly_equal_runs,
    checkpoint,
    launch,
    launch_and_signal,
    launch_and_signal_everyone,
    rows,
    training_rows,
    write_config,
)

pytestmark = pytest.mark.slow


def train_in_one_go(directory):
    config = write_config(directory)
    output = launch("--config", config, "--run_dir", directory / "run", "--tracking.sample_tokens", 3)
    return directory, config, output


@pytest.fixture(scope="module")
def uninterrupted():
    """Make 24 updates in one go; return (directory, its config, what it printed)."""
    return made_once(train_in_one_go)


def test_a_run_leaves_what_it_promises(uninterrupted):
    directory, _, output = uninterrupted
    run = directory / "run"
    assert {p.name for p in run.iterdir()} >= {
        ".lock",
        "config.yaml",
        "metrics.jsonl",
        "loss.png",
        "checkpoints",
        "model",
    }
    assert [row["step"] for row in training_rows(run)] == list(range(1, 25))
    assert {"loss", "lr", "grad_norm", "tokens_per_second"} <= training_rows(run)[0].keys()
    evaluations = [row for row in rows(run) if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == [12, 24]
    for row in evaluations:
        assert row["eval_perplexity"] == pytest.approx(math.exp(row["eval_loss"]))
    states = checkpoint(run, 24)
    assert {t.dtype for n, t in states.items() if n.endswith(("/z", "/m"))} == {torch.bfloat16}
    (line,) = [line for line in output.splitlines() if "at the last lr, 0.00012: python " in line]
    assert f"train_llm.py --config {run}/config.yaml" in line
    assert "sample: " in output


def test_killed_and_resumed_equals_uninterrupted(uninterrupted, tmp_path):
    directory, config, _ = uninterrupted
    launch_and_signal(signal.SIGKILL, 17, tmp_path / "run", "--config", config)
    assert not (tmp_path / "run" / "checkpoints" / "step_00000024").exists()
    output = launch("--config", config, "--run_dir", tmp_path / "run")
    assert "step_00000012 after 12 updates" in output
    assert_equal_checkpoints(tmp_path / "run", directory / "run", 24)
    # each update stands once in the metrics, with the loss of the uninterrupted run
    resumed, whole = training_rows(tmp_path / "run"), training_rows(directory / "run")
    assert [(r["step"], r["loss"], r["grad_norm"]) for r in resumed] == [
        (r["step"], r["loss"], r["grad_norm"]) for r in whole
    ]


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.exhaustive), signal.SIGINT])
def test_a_signal_saves_and_the_next_start_goes_on(uninterrupted, tmp_path, number):
    directory, config, _ = uninterrupted
    # Each update is evaluated, but not the one after which it stops: who sent the signal will not wait.
    arguments = ("--config", config, "--train.eval_every_steps", 1)
    output, status = launch_and_signal(number, 7, tmp_path / "run", *arguments)
    assert status == 128 + number
    assert output.count(signal.Signals(number).name) == 1
    assert "Traceback" not in output
    assert output.startswith("1 process on cpu")
    assert "the same command resumes from here" in output
    step = max(row["step"] for row in training_rows(tmp_path / "run"))
    assert f"after update {step};" in output
    assert 7 <= step < 24
    assert max(row["step"] for row in rows(tmp_path / "run") if "eval_loss" in row) == step - 1
    output = launch(*arguments, "--run_dir", tmp_path / "run")
    assert f"after {step} updates" in output
    assert_equal_checkpoints(tmp_path / "run", directory / "run", 24)
    evaluations = {row["step"]: row["eval_loss"] for row in rows(tmp_path / "run") if "eval_loss" in row}
    assert list(evaluations) == list(range(1, 25))
    for row in rows(directory / "run"):
        assert "eval_loss" not in row or evaluations[row["step"]] == row["eval_loss"]


def test_starting_a_complete_run_again_says_so(uninterrupted, tmp_path):
    directory, config, _ = uninterrupted
    run = shutil.copytree(directory / "run", tmp_path / "run")
    before = (run / "metrics.jsonl").read_text()
    output = launch("--config", config, "--run_dir", run)
    assert "is complete with 24 updates" in output
    assert (run / "metrics.jsonl").read_text() == before


def test_another_run_in_the_same_directory_is_refused(uninterrupted, tmp_path):
    directory, config, _ = uninterrupted
    run = shutil.copytree(directory / "run", tmp_path / "run")
    before = (run / "config.yaml").read_text()
    output = launch("--config", config, "--run_dir", run, "--seed", 1, "--model.num_hidden_layers", 3, expect=2)
    assert "belongs to another run" in output
    assert "seed: 0 in the checkpoint, 1 now" in output
    assert "model.num_hidden_layers: 2 in the checkpoint, 3 now" in output
    output = launch("--config", config, "--run_dir", run, "--checkpoint.resume", "never", expect=2)
    assert "checkpoint.resume: never is not allowed" in output
    assert (run / "config.yaml").read_text() == before


def test_other_data_are_refused_and_moved_data_are_not(uninterrupted, tmp_path):
    directory, _, _ = uninterrupted
    config = write_config(tmp_path)  # the same text, in another place
    shutil.copytree(directory / "run", tmp_path / "run")
    arguments = ("--config", config, "--run_dir", tmp_path / "run", "--train.max_steps", 42)
    output = launch(*arguments)
    assert "after 24 updates" in output
    assert f"changed since the checkpoint: data.files: ['{directory}/text.txt'] in the checkpoint" in output
    with (tmp_path / "text.txt").open("a") as file:
        file.write("and one more document.\n")
    output = launch(*arguments[:-1], 44, expect=2)
    assert "the training or held-out data are not those it was trained on" in output


def test_a_damaged_checkpoint_is_passed_over(uninterrupted, tmp_path):
    directory, config, _ = uninterrupted
    launch("--config", config, "--run_dir", tmp_path / "run")
    broken = tmp_path / "run" / "checkpoints" / "step_00000024" / "shard-00001-model-00001-of-00001.safetensors"
    content = bytearray(broken.read_bytes())
    content[len(content) // 2] ^= 1
    broken.write_bytes(content)
    output = launch("--config", config, "--run_dir", tmp_path / "run")
    assert f"skipped a damaged checkpoint: {broken}: its content does not match its checksum" in output
    assert "step_00000012 after 12 updates" in output
    assert_equal_checkpoints(tmp_path / "run", directory / "run", 24)


def train_on_one(directory):
    config = write_config(directory)
    launch("--config", config, "--run_dir", directory / "run", *SMOOTH)
    return directory, config


@pytest.fixture(scope="module")
def one_process():
    return made_once(train_on_one)


def train_on_two(directory, config):
    run, tracked = directory / "run", ("--tracking.trackers", "tensorboard")
    launch("--config", config, "--run_dir", run, *SMOOTH, *tracked, processes=2)
    assert (run / "model" / "model.safetensors").exists()
    return directory, config


@pytest.fixture(scope="module")
def two_processes(one_process):
    return made_once(train_on_two, one_process[1])


def test_processes_change_only_the_order_of_sums(one_process, two_processes):
    assert_nearly_equal_runs(two_processes[0] / "run", one_process[0] / "run")


@pytest.mark.parametrize(("processes", "micro"), [pytest.param(2, 1, marks=pytest.mark.exhaustive), (1, 2)])
def test_accumulation_changes_only_the_order_of_sums(one_process, tmp_path, processes, micro):
    directory, config = one_process
    launch(
        "--config", config, "--run_dir", tmp_path / "run", "--train.micro_batch_size", micro, *SMOOTH,
        processes=processes,
    )  # fmt: skip
    assert_nearly_equal_runs(tmp_path / "run", directory / "run")


def test_two_processes_stop_for_slurm_and_go_on_as_if_nothing_had_been(two_processes, tmp_path):
    directory, config = two_processes
    arguments = ("--config", config, *SMOOTH)
    output = launch_and_signal_everyone(signal.SIGTERM, 7, tmp_path / "run", *arguments, processes=2)
    assert output.count("stopped by signal 15 after update") == 1  # said once, by one process
    output = launch(*arguments, "--run_dir", tmp_path / "run", processes=2)
    assert output.count("resumed from") == 1
    assert_equal_checkpoints(tmp_path / "run", directory / "run", 24)


def test_a_checkpoint_of_two_processes_goes_on_with_one(two_processes, tmp_path):
    directory, config = two_processes
    shutil.copytree(directory / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000024")
    assert "after 12 updates" in launch("--config", config, "--run_dir", tmp_path / "run", *SMOOTH)
    assert training_rows(tmp_path / "run")[-1]["loss"] == pytest.approx(
        training_rows(directory / "run")[-1]["loss"], abs=2e-5
    )


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision(uninterrupted, tmp_path, precision):
    directory, config, _ = uninterrupted
    run = tmp_path / "run"
    arguments = ("--config", config, "--train.mixed_precision", precision)
    output, _ = launch_and_signal(signal.SIGTERM, 15, run, *arguments)
    assert f"mixed precision {precision}" in output
    launch(*arguments, "--run_dir", run)
    launch(*arguments, "--run_dir", tmp_path / "whole")
    assert_equal_checkpoints(run, tmp_path / "whole", 24)
    losses, reference = training_rows(run), training_rows(directory / "run")
    # fp16 starts at a loss scale that overflows: the first update is skipped and counted, and the scale halved
    skipped = losses[-1]["skipped_steps"]
    assert skipped <= 3
    assert losses[-1]["loss"] == pytest.approx(reference[-1]["loss"], abs=0.15)
    assert losses[-1]["loss"] != reference[-1]["loss"]


@pytest.mark.parametrize(
    "options",
    [
        ("--model.dtype", "bfloat16", "--train.gradient_checkpointing", "true"),
        ("--optimizer.name", "lp_descent", "--model.tie_word_embeddings", "true", "--model.num_key_value_heads", "1"),
        *(
            pytest.param(options, marks=pytest.mark.exhaustive)
            for options in (
                ("--optimizer.name", "adamw", "--optimizer.betas", "0.9,0.95"),
                ("--optimizer.name", "lion", "--optimizer.lr", "0.001"),
                ("--optimizer.name", "sgd", "--optimizer.lr", "0.1", "--schedule.name", "linear"),
                ("--optimizer.name", "adam", "--schedule.name", "constant", "--schedule.warmup_steps", "0"),
            )
        ),
    ],
    ids=lambda options: "-".join(options[1::2]),
)
def test_options_train_and_resume(uninterrupted, tmp_path, options):
    _, config, _ = uninterrupted
    arguments = ("--config", config, "--train.eval_every_steps", "24", *options)
    launch(*arguments, "--run_dir", tmp_path / "whole", "--train.max_steps", 24, "--checkpoint.every_steps", 12)
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "checkpoints").mkdir()
    (tmp_path / "whole" / "checkpoints" / "step_00000012").rename(tmp_path / "part" / "checkpoints" / "step_00000012")
    launch(*arguments, "--run_dir", tmp_path / "part", "--train.max_steps", 24, "--checkpoint.every_steps", 12)
    assert_equal = checkpoint(tmp_path / "whole", 24), checkpoint(tmp_path / "part", 24)
    for name, tensor in assert_equal[0].items():
        assert torch.equal(tensor, assert_equal[1][name]), name
    losses = training_rows(tmp_path / "whole")
    assert losses[-1]["loss"] < losses[0]["loss"]


@pytest.mark.parametrize(
    "program", ["tests/training/traced.py", pytest.param("train_llm.py", marks=pytest.mark.exhaustive)]
)
def test_a_compiled_model_resumes_a_run_that_was_not_compiled(uninterrupted, tmp_path, program):
    """The names of its weights are the same, and its losses but for the order of sums."""
    directory, config, _ = uninterrupted
    run = tmp_path / "run"
    shutil.copytree(directory / "run" / "checkpoints" / "step_00000012", run / "checkpoints" / "step_00000012")
    output = launch("--config", config, "--run_dir", run, "--train.compile", "true", program=program)
    assert "changed since the checkpoint: train.compile: False in the checkpoint, True now" in output
    losses = [[row["loss"] for row in training_rows(path)[-12:]] for path in (run, directory / "run")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert "traced a graph" in output or losses[0] != losses[1]


@pytest.mark.parametrize(("precision", "processes"), [("no", 2), ("fp16", 1)])
def test_an_update_with_a_loss_that_is_not_finite_changes_nothing(one_process, tmp_path, precision, processes):
    run = tmp_path / "run"
    for last in (3, 4):  # the bad one is the third, and saved since it is the last
        launch(
            "--config", one_process[1], "--run_dir", run, "--train.max_steps", last, "--checkpoint.every_steps", 1,
            "--checkpoint.keep_last", 9, "--train.mixed_precision", precision,
            processes=processes, program="tests/training/ruined_update.py", RUIN="2 none", RECOVER=3,
        )  # fmt: skip
    before, bad, after = (checkpoint(run, step) for step in (2, 3, 4))
    assert all(torch.equal(tensor, bad[name]) for name, tensor in before.items())
    assert any(not torch.equal(tensor, after[name]) for name, tensor in bad.items())
    figures = training_rows(run)
    assert [row["skipped_steps"] for row in figures] == [0, 0, 1, 1]
    assert figures[2]["loss"] is None
    assert figures[3]["loss"] is not None


def test_trackers(uninterrupted, tmp_path):
    _, config, _ = uninterrupted
    output = launch(
        "--config", config, "--run_dir", tmp_path / "run", "--train.max_steps", 5, "--checkpoint.every_steps", 5,
        "--tracking.trackers", "wandb,tensorboard",
    )  # fmt: skip
    assert "the run is kept offline" in output
    (kept,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    known = verify(tmp_path / "run" / "checkpoints" / "step_00000005")["extra"]["trackers"]
    assert kept.name == f"run-{known['wandb']}.wandb"
    # Resumed, it is the same run to wandb.
    launch(
        "--config", config, "--run_dir", tmp_path / "run", "--train.max_steps", 7, "--tracking.trackers", "wandb",
    )  # fmt: skip
    assert {path.name for path in (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")} == {kept.name}
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))) == 2
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


def test_too_many_skipped_updates_stop_the_run(uninterrupted, tmp_path):
    _, config, _ = uninterrupted
    output = launch(
        "--config", config, "--run_dir", tmp_path / "run", "--optimizer.lr", "1e38", "--train.max_skipped_steps", 3,
        expect=2,
    )  # fmt: skip
    assert "train.max_skipped_steps: 4 updates in a row" in output
    assert "lower optimizer.lr" in output
    assert "Traceback" not in output.split("train_llm.py: error:")[0]
