"""train_llm.py on every engine, by `accelerate launch` with the configuration that users take, on 2 processes."""

import shutil

import pytest

from tests.training.helpers import (
    SMOOTH,
    assert_equal_checkpoints,
    assert_nearly_equal_runs,
    checkpoint,
    launch,
    training_rows,
    write_config,
)

pytestmark = pytest.mark.slow

ENGINES = {
    "cpu_zero_redundancy": "DDP and ZeroRedundancyOptimizer",
    "cpu_zero1": "DeepSpeed ZeRO-1",
    "cpu_zero2": "DeepSpeed ZeRO-2",
    "cpu_zero3": "DeepSpeed ZeRO-3",
    "cpu_fsdp2": "FSDP2",
}


# Every update's gradient is longer than this.
CLIPPED = ("--train.max_grad_norm", "0.3")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    directory = tmp_path_factory.mktemp("one_process")
    config = write_config(directory)
    launch("--config", config, "--run_dir", directory / "run", *SMOOTH, *CLIPPED)
    assert all(row["grad_norm"] > 0.3 for row in training_rows(directory / "run"))
    return directory, config


def on_engine(engine, *arguments, **options):
    return launch(*arguments, *SMOOTH, processes=2, engine=engine, **options)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_trains_as_one_process_and_resumes_exactly(one_process, tmp_path, engine):
    directory, config = one_process
    # Two micro-batches a process: the accumulation is the engine's own.
    whole, part = tmp_path / "whole", tmp_path / "part"
    accumulated = ("--train.micro_batch_size", 2, *CLIPPED)
    output = on_engine(engine, "--config", config, "--run_dir", whole, *accumulated)
    assert f"2 processes on cpu (1 thread) with {ENGINES[engine]}, float32, 8 sequences an update" in output
    assert_nearly_equal_runs(whole, directory / "run")
    for name, tensor in checkpoint(directory / "run", 40).items():
        ours = checkpoint(whole, 40)[name]
        assert ours.dtype == tensor.dtype
        assert ours.shape == tensor.shape
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "step_00000040")
    output = on_engine(engine, "--config", config, "--run_dir", part, *accumulated)
    assert "after 20 updates" in output
    assert_equal_checkpoints(part, whole, 40)


def test_a_run_goes_on_from_engine_to_engine(one_process, tmp_path):
    _, config = one_process
    run = tmp_path / "run"
    constant = ("--schedule.name", "constant", "--checkpoint.keep_last", 9)
    for stage, engine in enumerate(ENGINES):
        steps = 4 * (stage + 1)
        output = on_engine(engine, "--config", config, "--run_dir", run, "--train.max_steps", steps, *constant)
        assert f"after {steps - 4} updates" in output or stage == 0
    launch("--config", config, "--run_dir", run, "--train.max_steps", 24, *SMOOTH, *constant)
    launch("--config", config, "--run_dir", tmp_path / "reference", "--train.max_steps", 24, *SMOOTH, *constant)
    assert_nearly_equal_runs(run, tmp_path / "reference", final_evaluation=False)


@pytest.mark.parametrize(
    ("engine", "precision"),
    [
        ("cpu_zero2", "bf16"),
        ("cpu_zero3", "bf16"),
        ("cpu_fsdp2", "bf16"),
        ("cpu_fsdp2", "fp16"),
        ("cpu_zero_redundancy", "fp16"),
    ],
)
def test_mixed_precision(one_process, tmp_path, engine, precision):
    directory, config = one_process
    run = tmp_path / "run"
    output = on_engine(
        engine, "--config", config, "--run_dir", run, "--train.mixed_precision", precision,
        "--model.tie_word_embeddings", "true", "--checkpoint.every_steps", 40, *CLIPPED,
    )  # fmt: skip
    assert f"mixed precision {precision}" in output
    ours, reference = training_rows(run), training_rows(directory / "run")
    assert ours[-1]["loss"] == pytest.approx(reference[-1]["loss"], abs=0.3)
    states = checkpoint(run, 40)
    # Master weights are what is saved.
    assert {str(t.dtype) for name, t in states.items() if name.startswith("model")} == {"torch.float32"}


@pytest.mark.parametrize("engine", ["cpu_zero2", "cpu_zero3", "cpu_fsdp2"])
def test_an_update_with_a_loss_that_is_not_finite_changes_nothing(one_process, tmp_path, engine):
    run = tmp_path / "run"
    on_engine(
        engine, "--config", one_process[1], "--run_dir", run, "--train.max_steps", 4, "--checkpoint.every_steps", 1,
        "--checkpoint.keep_last", 9, program="tests/training/bad_update.py",
    )  # fmt: skip
    before, bad, after = (checkpoint(run, step) for step in (2, 3, 4))
    assert all((tensor == bad[name]).all() for name, tensor in before.items())
    assert any((tensor != after[name]).any() for name, tensor in bad.items())
    assert [row["skipped_steps"] for row in training_rows(run)] == [0, 0, 1, 1]


def test_what_an_engine_cannot_do_is_said_at_the_start(one_process, tmp_path):
    _, config = one_process
    arguments = ("--config", config, "--run_dir", tmp_path / "run")
    output = on_engine("cpu_zero2", *arguments, "--model.dtype", "bfloat16", expect=2)
    assert "model.dtype: bfloat16 is not allowed with DeepSpeed" in output
    assert "File " not in output.split("train_llm.py: error:")[0]
