"""Both launchers go on from any engine on any other: the same samples, and the losses of the run that stayed."""

import itertools
import shutil

import pytest

from tests.shared import made_once
from tests.training.forked import Forked
from tests.training.helpers import SMOOTH, samples, training_rows, write_config, write_image_config

pytestmark = pytest.mark.slow
ENGINES = ["cpu", "cpu_ddp", "cpu_zero_redundancy", "cpu_zero1", "cpu_zero2", "cpu_zero3", "cpu_fsdp2"]
HALF, END, BATCH = 10, 20, 24  # 1 to 4 processes have an even share: batch norms see the same two images
BEFORE = dict(zip(ENGINES, (1, 2, 3, 4, 3, 2, 4), strict=True))
AFTER = dict(zip(ENGINES, (1, 4, 2, 3, 4, 3, 2), strict=True))
RING = list(zip(ENGINES, ENGINES[1:] + ENGINES[:1], strict=True))
IN_CI = [("train_llm", *pair) for pair in RING if pair[0] == "cpu"]
CASES = [
    pytest.param(launcher, *pair, marks=() if (launcher, *pair) in IN_CI else pytest.mark.exhaustive)
    for launcher in ("train_llm", "train_imagenet")
    for pair in itertools.permutations(ENGINES, 2)
]


def prepare(directory):
    settings = dict(
        train={"max_steps": END, "global_batch_size": BATCH, "micro_batch_size": 2, "eval_every_steps": END},
        checkpoint={"every_steps": HALF},
    )
    for launcher in ("train_llm", "train_imagenet"):
        (directory / launcher).mkdir()
    write = {"train_llm": write_config, "train_imagenet": write_image_config}
    return {launcher: write[launcher](directory / launcher, **settings) for launcher in write}


@pytest.fixture(scope="module")
def configs():
    return made_once(prepare)


def run(configs, launcher, directory, engine, processes):
    output, status = Forked(
        "--config", configs[launcher], "--run_dir", directory, *SMOOTH,
        program="tests/training/instrumented.py", processes=processes, RECORD=directory.with_name("samples"),
        engine=None if processes == 1 else engine, LAUNCHER=launcher,
    ).wait()  # fmt: skip
    assert status == 0, output
    return output


def train_on(directory, configs, launcher, engine):
    """Make 20 updates on one engine; return the directory."""
    run(configs, launcher, directory / "run", engine, BEFORE[engine])
    return directory


@pytest.fixture(scope="module")
def stayed(configs):
    return lambda launcher, engine: made_once(train_on, configs, launcher, engine)


@pytest.mark.parametrize(("launcher", "before", "after"), CASES)
def test_a_run_goes_on_elsewhere(stayed, configs, tmp_path, launcher, before, after):
    whole = stayed(launcher, before)
    moved = tmp_path / "run" / "checkpoints"
    moved.mkdir(parents=True)
    shutil.copytree(whole / "run/checkpoints" / f"step_{HALF:08d}", moved / f"step_{HALF:08d}")
    output = run(configs, launcher, tmp_path / "run", after, AFTER[after])
    assert f"after {HALF} updates" in output
    expected = samples(whole, BEFORE[before])
    assert list(expected) == list(range(0, END * BATCH, BATCH))
    assert all(len(ids) == BATCH for ids in expected.values())
    assert samples(tmp_path, AFTER[after]) == {k: ids for k, ids in expected.items() if k >= HALF * BATCH}
    ours, theirs = training_rows(tmp_path / "run"), training_rows(whole / "run")[HALF:]
    assert len(ours) == len(theirs) == END - HALF
    # Batch norms of two small images magnify the last bits tenfold in every update.
    compared = 2 if launcher == "train_imagenet" else END
    for a, b in zip(ours[:compared], theirs[:compared], strict=True):
        assert a["step"] == b["step"]
        # Sums of a batch's float32 losses and gradients in another order, over 10 updates.
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
