"""From every engine to every engine, from N processes to M: weights, z, m and steps to the bit, and the way onward."""

import itertools
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from stacey_dist.checkpoint import load_checkpoint, save_checkpoint
from stacey_dist.sharding import fragments
from tests.sharding.engines import Trainer, assert_equal, gather, that_run
from tests.sharding.problem import CASES, Awkward, gradients, group_settings, one_process
from tests.sharding.processes import outcome, spawn
from tests.shared import made_once

pytestmark = pytest.mark.slow
CASE = "p2-stochastic"
SAVED, END = 6, 16
BF16 = {"bf16": {"enabled": True}}
POLICY = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
ENGINES = {
    "single": ("single", {}),
    "ddp": ("ddp", {}),
    "zero_redundancy": ("zero_redundancy", {}),
    "zero1": ("zero1", {}),
    "zero2": ("zero2", {}),
    "zero3": ("zero3", {}),
    "fsdp2": ("fsdp2", {}),
    "hsdp": ("hsdp", {}),
    "zero1 in bf16": ("zero1", BF16),
    "zero2 in bf16": ("zero2", BF16),
    "zero3 in bf16": ("zero3", BF16),
    "fsdp2 in bf16": ("fsdp2", {"mp_policy": POLICY}),
}
PAIRS = list(itertools.product(ENGINES, ENGINES))
WORLD_SIZES = (1, 2, 3, 4)
# In CI each engine is left for two others and entered from two others; with -m exhaustive all pairs are tried.
IN_CI = {
    (before, after) for i, before in enumerate(ENGINES) for j, after in enumerate(ENGINES) if (j - i) % 12 in (1, 4)
}


def world_sizes(pair):
    """Return how many ranks a pair moves between, so that all ways occur; one process has no engine but its own."""
    before, after = divmod(5 * PAIRS.index(pair) % 16, 4)
    return tuple(1 if name == "single" else n + 1 for name, n in zip(pair, (before, after), strict=True))


def make(name):
    engine, options = ENGINES[name]
    # The weights are those of bfloat16 to start with: DeepSpeed's bf16 section begins by rounding them.
    model = Awkward(scalar=False).to(torch.bfloat16).float()
    return Trainer(engine, model, group_settings(CASE), *CASES[CASE], **dict(options)), model


def train(trainer, model, first, last):
    for step in range(first, last):
        trainer.step(gradients(step, model))


def assert_as_one_process(trainer, steps):
    expected = one_process(CASE, False, torch.bfloat16, steps, scheduled=False)
    assert_equal(gather(fragments(trainer.model, trainer.optimizer)), expected)


def save(name, directory):
    trainer, model = make(name)
    train(trainer, model, 0, SAVED)
    path = Path(directory) / name / f"step_{torch.distributed.get_world_size()}"
    save_checkpoint(path, trainer.model, trainer.optimizer)


def move(pair, directory):
    trainer, model = make(pair[1])
    load_checkpoint(Path(directory) / pair[0] / f"step_{world_sizes(pair)[0]}", trainer.model, trainer.optimizer)
    assert_as_one_process(trainer, SAVED)
    train(trainer, model, SAVED, END)
    assert_as_one_process(trainer, END)


def save_all(rank, world_size, in_ci, directory):
    left = {pair[0] for pair in PAIRS if world_sizes(pair)[0] == world_size and (pair in IN_CI) == in_ci}
    run = [name for name, (engine, _) in ENGINES.items() if name in left and that_run(engine)]
    return {name: outcome(save, name, directory) for name in run}


def move_all(rank, world_size, in_ci, directory):
    chosen = [pair for pair in PAIRS if world_sizes(pair)[1] == world_size and (pair in IN_CI) == in_ci]
    return {pair: outcome(move, pair, directory) for pair in chosen}


def save_everywhere(directory, in_ci):
    for world_size in WORLD_SIZES:
        failures = spawn(save_all, world_size, world_size, in_ci, str(directory))
        assert not any(failures.values()), failures
    return str(directory)


def move_everything(_, world_size, in_ci):
    return spawn(move_all, world_size, world_size, in_ci, made_once(save_everywhere, in_ci))


@pytest.mark.parametrize(
    "pair",
    [pytest.param(pair, marks=() if pair in IN_CI else pytest.mark.exhaustive) for pair in PAIRS],
    ids=" to ".join,
)
def test_a_checkpoint_goes_on_elsewhere(pair):
    failure = made_once(move_everything, world_sizes(pair)[1], pair in IN_CI)[pair]
    assert failure is None, failure


def test_all_ways_are_gone():
    assert {world_sizes(pair) for pair in PAIRS} == set(itertools.product(WORLD_SIZES, WORLD_SIZES))
    assert len({world_sizes(pair) for pair in IN_CI}) >= 12
