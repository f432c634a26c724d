"""The promise: on every engine and number of ranks, weights, z and m are those of one process, bit for bit."""

import functools

import pytest
import torch

from stacey_dist.sharding import fragments
from tests.sharding.engines import ENGINES, TAKES_SCALARS, Trainer, assert_equal, gather
from tests.sharding.problem import CASES, STEPS, Awkward, gradients, group_settings, one_process, schedule
from tests.sharding.processes import outcome, spawn

pytestmark = pytest.mark.slow
WORLD_SIZES = (1, 2, 3, 4)


def check(engine, case):
    scalar = engine in TAKES_SCALARS
    model = Awkward(scalar)
    trainer = Trainer(engine, model, group_settings(case), *CASES[case])
    scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.scheduled, schedule)
    for step in range(STEPS):
        trainer.step(gradients(step, model))
        scheduler.step()
    assert_equal(gather(fragments(trainer.model, trainer.optimizer)), one_process(case, scalar))


def all_cases(rank):
    return {(engine, case): outcome(check, engine, case) for engine in ENGINES for case in CASES}


@functools.cache
def outcomes(world_size):
    """One launch runs all cases of a number of ranks."""
    return spawn(all_cases, world_size)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_equals_one_process(world_size, engine, case):
    failure = outcomes(world_size)[engine, case]
    assert failure is None, failure
