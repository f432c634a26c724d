"""Figure 1's experiment: what it computes has known answers."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from lion_pytorch import Lion

from experiments import synthetic
from tests.optim import oracle


def quiet(_):
    pass


def test_starts_are_functions_of_their_seeds():
    assert torch.equal(synthetic.starts(7)[:3], synthetic.starts(3))
    many = synthetic.starts(400).double()
    assert many.mean(dim=0) == pytest.approx([0, 0], abs=0.2)
    assert many.std(dim=0) == pytest.approx([1, 1], abs=0.2)


@pytest.mark.parametrize("p", synthetic.DISTRIBUTIONS)
def test_the_gradient_is_that_of_the_negative_log_density(p):
    x = synthetic.starts(5).double().requires_grad_()
    ((x - torch.tensor(synthetic.MU)).abs() ** p / p).sum().backward()
    torch.testing.assert_close(synthetic.gradient(x.detach(), p), x.grad)


@pytest.mark.parametrize("p", synthetic.DISTRIBUTIONS)
@pytest.mark.parametrize("name", ["STACEY(p,2)", "STACEY(p,p)"])
def test_first_steps_of_stacey_are_those_of_the_paper(name, p):
    start = torch.tensor([[-0.5, 0.7], [1.3, -0.2], [0.6, 0.4]])
    make = synthetic.make_optimizer(name, p)
    path = synthetic.descend(start, p, make, 5, quiet)
    settings = dict(p=p, variant=synthetic.VARIANTS[name], alpha=1e-2, tau=1e-3, betas=(0.9, 0.99), eps=1e-8)
    theta, gradients = start.double().numpy(), []
    for step in range(1, 6):
        gradients.append((path[step - 1].double().numpy() - np.array([2.0, 0.0])) ** (p - 1))
        expected, *_ = oracle.stacey(theta, gradients, [1e-3] * step, **settings, weight_decay=0.0, z_init="params")
        np.testing.assert_allclose(path[step].numpy(), expected, rtol=0, atol=3e-6)


def test_first_step_of_each_rival_by_hand():
    start = torch.tensor([[-1.0, 1.0]])
    # Adam's and Lion's first steps are the sign of the gradient times the learning rate; no weight decay.
    for name in ("AdamW", "Lion"):
        path = synthetic.descend(start, 8, synthetic.make_optimizer(name, 8), 1, quiet)
        torch.testing.assert_close(path[1], torch.tensor([[-0.999, 0.999]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", synthetic.OPTIMIZERS)
def test_a_start_moves_as_it_would_alone(name):
    rows = synthetic.starts(9)
    make = synthetic.make_optimizer(name, 4)
    together = synthetic.descend(rows, 4, make, 30, quiet)
    alone = synthetic.descend(rows[4:5], 4, make, 30, quiet)
    # STACEY to the bit; the others as nearly as torch's vectorised functions are equal to their scalar ones.
    tolerance = 0.0 if name in synthetic.VARIANTS else 1e-6
    torch.testing.assert_close(together[:, 4:5], alone, rtol=0, atol=tolerance)


def test_steepest_descent_without_acceleration_is_a_geometric_sequence():
    # s(g) = sign(d) |d|^((p-1)/(p-1)) = d for d = x - mu, so d shrinks by 1 - eta each step, with no momentum.
    make = partial(synthetic.Stacey, lr=1e-3, p=8, tau=0.0, betas=(0.0, 0.0), eps=0.0, state_dtype=torch.float64)
    start = torch.tensor([[-1.0, 1.0]], dtype=torch.float64)
    path = synthetic.descend(start, 8, make, 200, quiet)
    away = start - torch.tensor(synthetic.MU)
    torch.testing.assert_close(path[200] - torch.tensor(synthetic.MU), away * 0.999**200, rtol=1e-9, atol=0)


def test_summary_of_known_distances():
    steps = torch.arange(41, dtype=torch.float64)
    falls = 4.0 * 0.5**steps  # under 0.1 from 6 on
    returns = torch.where(steps == 30, 0.2, falls)
    diverges = torch.where(steps == 3, 101.0, falls)
    breaks = torch.where(steps > 38, math.nan, falls)
    found = synthetic.summary(torch.stack([falls, falls, returns, diverges, breaks], dim=1))
    assert (found["diverged"], found["arrived"], found["arrival_median"]) == (0.4, 0.8, 6.0)  # 6, 6, 31, 6, never
    assert found["mean"] == pytest.approx([4.0, 4.0 * 0.5**20, 4.0 * 0.5**40])
    assert found["final_deviation"] == 0.0
    assert found["steps_away"] == 0.0
    found = synthetic.summary(torch.stack([diverges, breaks], dim=1))
    assert found == {"diverged": 1.0, "arrived": 0.0, "arrival_median": None, "mean": None}


def test_everybody_is_as_the_docstring_says():
    parameter = torch.nn.Parameter(torch.zeros(2))
    stacey = synthetic.make_optimizer("STACEY(p,p)", 8)([parameter]).param_groups[0]
    chosen = {name: stacey[name] for name in ("lr", "p", "variant", "alpha", "tau", "betas", "eps", "weight_decay")}
    assert chosen == dict(
        lr=1e-3, p=8, variant="pp", alpha=1e-2, tau=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0
    )
    assert (stacey["state_dtype"], stacey["z_init"]) == ("float32", "params")
    lion = synthetic.make_optimizer("Lion", 8)([parameter])
    assert isinstance(lion, Lion)
    for optimizer in (lion, synthetic.make_optimizer("AdamW", 8)([parameter])):
        assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (1e-3, 0.0)
