"""The promise: on every engine and number of ranks, weights, z and m are those of one process, bit for bit."""

import itertools

import pytest
import torch

from stacey_dist.sharding import fragments
from tests.sharding.engines import ENGINES, TAKES_SCALARS, Trainer, assert_equal, gather
from tests.sharding.problem import CASES, STEPS, Awkward, gradients, group_settings, one_process, schedule
from tests.sharding.processes import outcome, spawn
from tests.shared import made_once

pytestmark = pytest.mark.slow
WORLD_SIZES = (1, 2, 3, 4)


def in_ci(world_size, engine, case):
    """Every two of a number of ranks, an engine and a case meet in CI; all three do with -m exhaustive."""
    return (world_size + ENGINES.index(engine) + list(CASES).index(case)) % 4 == 0


ALL = list(itertools.product(WORLD_SIZES, ENGINES, CASES))


def check(engine, case):
    scalar = engine in TAKES_SCALARS
    model = Awkward(scalar)
    trainer = Trainer(engine, model, group_settings(case), *CASES[case])
    scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.scheduled, schedule)
    for step in range(STEPS):
        trainer.step(gradients(step, model))
        scheduler.step()
    assert_equal(gather(fragments(trainer.model, trainer.optimizer)), one_process(case, scalar))


def all_cases(rank, world_size, quick):
    chosen = [key for key in ALL if key[0] == world_size and in_ci(*key) == quick]
    return {(engine, case): outcome(check, engine, case) for _, engine, case in chosen}


def check_all(_, device, world_size, quick):
    """One launch runs all cases of a number of ranks, those of CI or the others."""
    return spawn(all_cases, world_size, world_size, quick, device=device)


@pytest.mark.parametrize(
    ("device", "world_size", "engine", "case"),
    [
        *(pytest.param("cpu", *key, marks=() if in_ci(*key) else pytest.mark.exhaustive) for key in ALL),
        *(pytest.param("cuda", *key, marks=pytest.mark.gpu(devices=key[0])) for key in ALL if key[0] <= 2),
    ],
)
def test_equals_one_process(device, world_size, engine, case):
    failure = made_once(check_all, device, world_size, in_ci(world_size, engine, case))[engine, case]
    assert failure is None, failure
