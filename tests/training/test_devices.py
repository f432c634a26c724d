"""Both launchers on the CPU, in CI, and on GPUs, with `pytest -m gpu`."""

import itertools
import shutil

import pytest

from tests.devices import DEVICES
from tests.training.helpers import (
    SMOOTH,
    assert_nearly_equal_runs,
    launch,
    training_rows,
    write_config,
    write_image_config,
)

pytestmark = pytest.mark.slow


def train_and_resume(*arguments, run, steps, device, program):
    """What a run logs, and what it logs once its last third was made again from a checkpoint."""
    saved = 2 * steps // 3
    arguments = (*arguments, "--run_dir", run, "--train.max_steps", steps, "--checkpoint.every_steps", saved)
    outputs, found = [], []
    for _ in range(2):
        outputs.append(launch(*arguments, device=device, program=program))
        found.append(training_rows(run))
        shutil.rmtree(run / "checkpoints" / f"step_{steps:08d}")
    assert ("on cpu (" in outputs[0]) == (device == "cpu")
    assert f"after {saved} updates" in outputs[1]
    assert [row["step"] for row in found[0]] == [row["step"] for row in found[1]] == list(range(1, steps + 1))
    assert not any(row["skipped_steps"] for row in found[1])
    assert found[0][-1]["loss"] < found[0][0]["loss"]
    # On a GPU a sum may be made in another order each time.
    for before, again in zip(*found, strict=True):
        assert again["loss"] == pytest.approx(before["loss"], abs=0.0 if device == "cpu" else 0.02)


@pytest.mark.parametrize(
    ("device", "precision", "compiled"),
    [
        ("cpu", "bf16", "false"),
        pytest.param("cpu", "fp16", "true", marks=pytest.mark.exhaustive),
        *(
            pytest.param("cuda", *how, marks=pytest.mark.gpu)
            for how in itertools.product(("bf16", "fp16"), ("false", "true"))
        ),
    ],
)
def test_llama(tmp_path, device, precision, compiled):
    arguments = ("--config", write_config(tmp_path), "--train.mixed_precision", precision, "--train.compile", compiled)
    train_and_resume(*arguments, run=tmp_path / "run", steps=30, device=device, program="train_llm.py")


@pytest.mark.parametrize("device", DEVICES)
def test_resnet_with_workers(tmp_path, device):
    """On a GPU their batches lie in pinned memory."""
    arguments = ("--config", write_image_config(tmp_path), "--data.workers", 2, "--train.mixed_precision", "bf16")
    train_and_resume(*arguments, run=tmp_path / "run", steps=21, device=device, program="train_imagenet.py")


@pytest.mark.gpu
def test_a_full_gpu_is_told_in_two_lines(tmp_path):
    """tests/training/test_reports.py has the message on the CPU, where there is no such error."""
    config = write_config(tmp_path, data={"sequence_length": 8192})
    too_much = ("--train.global_batch_size", 4096)  # 33 M tokens: in float32, their logits take 50 GiB
    output = launch("--config", config, "--run_dir", tmp_path / "run", *too_much, device="cuda", expect=1)
    assert "train_llm.py: error: CUDA out of memory" in output
    assert "lower train.micro_batch_size, or shard over more GPUs" in output
    assert "Traceback" not in output.partition("error: CUDA out of memory")[0]


@pytest.mark.parametrize(
    ("device", "engine"),
    [
        *(pytest.param("cpu", f"cpu_{engine}", marks=pytest.mark.exhaustive) for engine in ("ddp", "zero2", "fsdp2")),
        *(
            pytest.param("cuda", engine, marks=pytest.mark.gpu(devices=2))
            for engine in ("ddp", "zero_redundancy", "zero1", "zero2", "zero3", "fsdp2")
        ),
    ],
)
def test_two_processes_train_as_one(tmp_path, device, engine):
    """In float32: tests/training/test_engines.py, on other engines and with resuming, for the CPU."""
    arguments = ("--config", write_config(tmp_path), *SMOOTH, "--train.mixed_precision", "no")
    launch(*arguments, "--run_dir", tmp_path / "one", device=device)
    launch(*arguments, "--run_dir", tmp_path / "two", device=device, processes=2, engine=engine)
    assert_nearly_equal_runs(tmp_path / "two", tmp_path / "one")
