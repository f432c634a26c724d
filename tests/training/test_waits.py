"""The host waits for the device where a line is due, and nowhere else; what it does not wait for has the same bits."""

import json
from pathlib import Path

import pytest

from tests.training.helpers import assert_equal_checkpoints, checkpoint, launch, training_rows, write_config

pytestmark = pytest.mark.slow
PROGRAM = "tests/training/on_device.py"
LINES = (1, 4, 8, 9, 10)  # the first, every fourth, the save that is due, the last


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_config(
        tmp_path_factory.mktemp("waits"),
        train={"max_steps": 10, "eval_every_steps": 10, "log_every_steps": 4, "max_grad_norm": 0.3},
        checkpoint={"every_steps": 9},
        data={"sequence_length": 16, "validation_every": 25},
        tracking={"histogram_every": 4},
    )


@pytest.mark.parametrize(
    ("engine", "arguments"),
    [
        (None, ()),
        pytest.param(None, ("--optimizer.name", "adamw", "--optimizer.lr", 1e-3), marks=pytest.mark.exhaustive),
        pytest.param(
            "cpu_zero_redundancy",
            ("--train.micro_batch_size", 2, "--data.document_mask", "true"),
            marks=pytest.mark.exhaustive,
        ),
        pytest.param("cpu_fsdp2", (), marks=pytest.mark.exhaustive),
        pytest.param("cpu_ddp", (), marks=pytest.mark.exhaustive),
        pytest.param("cpu_fsdp2", ("--optimizer.name", "adamw"), marks=pytest.mark.exhaustive),
        pytest.param(None, ("--train.mixed_precision", "fp16"), marks=pytest.mark.exhaustive),
    ],
)
def test_the_host_waits_where_a_line_is_due_and_nowhere_else(config, tmp_path, engine, arguments):
    processes = 1 if engine is None else 2
    how = dict(program=PROGRAM, processes=processes, engine=engine)
    launch("--config", config, "--run_dir", tmp_path / "plain", *arguments, PLAIN=1, **how)
    launch("--config", config, "--run_dir", tmp_path / "device", *arguments, COUNT=tmp_path / "reads", **how)
    for rank in range(processes):
        reads = dict(json.loads(line) for line in Path(f"{tmp_path}/reads.{rank}").read_text().splitlines())
        assert list(reads) == list(range(1, 11))
        assert {step: calls for step, calls in reads.items() if calls and step not in LINES} == {}
        assert all(reads[step] for step in LINES)  # so they are counted
    for step in (9, 10):
        assert_equal_checkpoints(tmp_path / "plain", tmp_path / "device", step)
    counts = {int(tensor) for name, tensor in checkpoint(tmp_path / "device", 10).items() if name.endswith("/step")}
    assert counts == {7}
    assert [(row["step"], row["skipped_steps"]) for row in training_rows(tmp_path / "device")] == [
        (1, 0), (4, 1), (8, 3), (10, 3)
    ]  # fmt: skip
