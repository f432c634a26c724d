"""train_llm.py goes on from any engine on any other: the same samples, and the losses of the run that stayed."""

import functools
import itertools
import json
import shutil

import pytest

from tests.training.forked import Forked
from tests.training.helpers import SMOOTH, training_rows, write_config

pytestmark = pytest.mark.slow
ENGINES = ["cpu", "cpu_ddp", "cpu_zero_redundancy", "cpu_zero1", "cpu_zero2", "cpu_zero3", "cpu_fsdp2"]
HALF, END, BATCH = 10, 20, 12
BEFORE = dict(zip(ENGINES, (1, 2, 3, 4, 3, 2, 4), strict=True))
AFTER = dict(zip(ENGINES, (1, 4, 2, 3, 4, 3, 2), strict=True))
RING = list(zip(ENGINES, ENGINES[1:] + ENGINES[:1], strict=True))
PAIRS = [
    pytest.param(*pair, marks=() if pair in RING else pytest.mark.exhaustive)
    for pair in itertools.permutations(ENGINES, 2)
]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_config(
        tmp_path_factory.mktemp("move"),
        train={"max_steps": END, "global_batch_size": BATCH, "eval_every_steps": END},
        checkpoint={"every_steps": HALF},
    )


def run(config, directory, engine, processes):
    output, status = Forked(
        "--config", config, "--run_dir", directory, *SMOOTH,
        program="tests/training/instrumented.py", processes=processes, RECORD=directory.with_name("samples"),
        engine=None if processes == 1 else engine,
    ).wait()  # fmt: skip
    assert status == 0, output
    return output


def samples(directory, processes):
    """The ids of each update's samples, in the order of the processes that had them, by position."""
    found = {}
    for rank in range(processes):
        for line in (directory / f"samples.{rank}").read_text().splitlines():
            position, ids = json.loads(line)
            found.setdefault(position, []).extend(ids)
    return found


@pytest.fixture(scope="module")
def stayed(config, tmp_path_factory):
    """The directory of a run of 20 updates on one engine."""

    @functools.cache
    def run_on(engine):
        directory = tmp_path_factory.mktemp(engine)
        run(config, directory / "run", engine, BEFORE[engine])
        return directory

    return run_on


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_a_run_goes_on_elsewhere(stayed, config, tmp_path, before, after):
    whole = stayed(before)
    moved = tmp_path / "run" / "checkpoints"
    moved.mkdir(parents=True)
    shutil.copytree(whole / "run/checkpoints" / f"step_{HALF:08d}", moved / f"step_{HALF:08d}")
    output = run(config, tmp_path / "run", after, AFTER[after])
    assert f"after {HALF} updates" in output
    expected = samples(whole, BEFORE[before])
    assert list(expected) == list(range(0, END * BATCH, BATCH))
    assert all(len(ids) == BATCH for ids in expected.values())
    assert samples(tmp_path, AFTER[after]) == {k: ids for k, ids in expected.items() if k >= HALF * BATCH}
    ours, theirs = training_rows(tmp_path / "run"), training_rows(whole / "run")[HALF:]
    for a, b in zip(ours, theirs, strict=True):
        assert a["step"] == b["step"]
        # Sums of a batch's float32 losses and gradients in another order, over 10 updates.
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
