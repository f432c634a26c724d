"""SIGKILL at any instant: restarted until it is done, a run ends equal bit for bit to one that nobody disturbed."""

import random
import shutil
import signal
import time

import pytest

from stacey_dist.checkpoint import find_checkpoints
from stacey_dist.checkpoint.compare import differences
from tests.training.forked import Forked
from tests.training.helpers import training_rows, write_config, write_image_config

pytestmark = pytest.mark.slow

PROGRAM = "tests/training/instrumented.py"
ENGINES = ("cpu_ddp", "cpu_zero2", "cpu_zero3", "cpu_fsdp2")
EVERYWHERE = ("time", "forward", "backward", "update", "save", "before writing", "written")
ON_RANK_0 = ("before the manifest", "manifest", "rename", "renamed", "retention", "deletion")


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    write = {"train_llm": write_config, "train_imagenet": write_image_config}
    return {launcher: write[launcher](tmp_path_factory.mktemp("kill")) for launcher in write}


def curve(run_dir):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in training_rows(run_dir)]


@pytest.mark.parametrize(
    ("launcher", "engine", "kills"),
    [
        ("train_llm", "cpu_fsdp2", 2),
        pytest.param("train_llm", "cpu_zero3", 2, marks=pytest.mark.exhaustive),
        *(
            pytest.param(launcher, engine, 40, marks=[pytest.mark.exhaustive, pytest.mark.timeout(2400)])
            for launcher in ("train_llm", "train_imagenet")
            for engine in ENGINES
        ),
    ],
)
def test_a_run_that_is_killed_again_and_again(configs, tmp_path, launcher, engine, kills):
    steps = 8 * kills
    arguments = (
        "--config", configs[launcher], "--train.max_steps", steps, "--train.eval_every_steps", steps // 2,
        "--train.micro_batch_size", 2, "--checkpoint.every_steps", 2,
    )  # fmt: skip
    how = dict(program=PROGRAM, processes=2, engine=engine, LAUNCHER=launcher)
    output, status = Forked(*arguments, "--run_dir", tmp_path / "whole", **how).wait()
    assert status == 0, output[-3000:]

    run, rng = tmp_path / "run", random.Random(f"{engine} {kills}")
    events = [*EVERYWHERE, *ON_RANK_0]
    # All events come on each engine where there are 40.
    first = kills * (ENGINES.index(engine) + (launcher == "train_imagenet"))
    left = [events[(first + i) % len(events)] for i in range(kills)]
    rng.shuffle(left)
    for event in left:
        rank, count = (0 if event in ON_RANK_0 else rng.randrange(2)), rng.randint(1, 3)
        if event in ("forward", "backward"):
            count = rng.randint(1, 12)
        accident = {} if event == "time" else {"ACCIDENT": f"{event} {rank} {count} {int(signal.SIGKILL)}"}
        group = Forked(*arguments, "--run_dir", run, **how, **accident)
        if event == "time":
            before = len(training_rows(run))
            while group.alive() and len(training_rows(run)) in (0, before):
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.3))
            group.send(signal.SIGKILL, rank)
        while group.alive():
            time.sleep(0.002)
        if rng.random() < 0.5:
            group.send(signal.SIGKILL)  # a machine without power
        output, status = group.wait()
        assert status == -signal.SIGKILL or "Connection" in output, (event, output[-3000:])
        assert not (run / "checkpoints" / f"step_{steps:08d}").exists(), "the run ended before it was killed"
    output, status = Forked(*arguments, "--run_dir", run, **how).wait()
    assert status == 0, output[-3000:]
    final, undisturbed = (d / "checkpoints" / f"step_{steps:08d}" for d in (run, tmp_path / "whole"))
    assert differences(final, undisturbed) == []
    assert curve(run) == curve(tmp_path / "whole")
    assert len(find_checkpoints(run / "checkpoints")) == 2
    assert {path.name[:5] for path in (run / "checkpoints").iterdir()} == {"step_"}, "something is left behind"
    shutil.rmtree(tmp_path)
