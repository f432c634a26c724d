"""Theorem 1's experiment: constants, noise and descent have known answers."""

import math

import numpy as np
import pytest
import torch

from experiments import theorem
from experiments.objectives import Objective, dual, norm
from experiments.theorem_report import slope, slope_with_interval

FUNCTIONS = [make() for make in theorem.OBJECTIVES]
both = pytest.mark.parametrize("objective", FUNCTIONS, ids=lambda objective: objective.name)
every_p = pytest.mark.parametrize("p", theorem.NORMS)


def quiet(_):
    pass


def points(objective, count=4000, spread=2.0):
    generator = torch.Generator().manual_seed(1)
    return spread * torch.randn(count, len(objective.start), generator=generator, dtype=torch.float64)


@both
def test_gradients(objective):
    x = points(objective, 20).requires_grad_()
    objective.value(x).sum().backward()
    torch.testing.assert_close(objective.gradient(x.detach()), x.grad)


@both
@every_p
def test_the_functions_are_as_smooth_as_stated_and_no_smoother_by_far(objective, p):
    # |f(y) - f(x) - <nabla f(x), y - x>| <= L/2 ||y - x||_p^2
    x = points(objective)
    x[::2] *= 0.05  # near the minimum of one, where it curves most
    step = points(objective).flip(0) * 0.1
    error = objective.value(x + step) - objective.value(x) - (objective.gradient(x) * step).sum(dim=-1)
    ratio = error.abs() / (0.5 * torch.linalg.vector_norm(step, p, dim=-1).square())
    assert ratio.max() <= objective.smoothness(p)
    if objective.name == "separable":  # Hoelder's inequality is an equality for one direction
        weights = objective.noise
        tight = torch.zeros_like(weights)
        if p == 2:
            tight[0] = 1e-4
        else:
            tight = 1e-4 * weights ** (0.0 if p == math.inf else 1 / (p - 2))
        error = objective.value(tight[None])
        assert float(error) / (0.5 * norm(tight, p) ** 2) == pytest.approx(objective.smoothness(p), rel=1e-5)


@both
@every_p
def test_gradients_are_bounded_as_stated(objective, p):
    signs = torch.where(points(objective) > 0, 1.0, -1.0)
    noisy = objective.gradient(points(objective, spread=1.0)) + signs * objective.noise
    assert torch.linalg.vector_norm(noisy, dual(p), dim=-1).max() <= objective.gradient_bound(p)


@both
def test_functions_are_not_convex_where_they_start_and_have_the_least_value_0(objective):
    hessian = torch.autograd.functional.hessian(lambda x: objective.value(x[None])[0], objective.start)
    assert torch.linalg.eigvalsh(hessian)[0] < 0
    assert objective.value(points(objective)).min() > 0
    least = torch.zeros_like(objective.start)
    if objective.name == "regression":
        least[::2], least[1::2] = 1.0, -1.0
    assert objective.value(least[None]).item() == 0


def test_noise_is_the_mean_of_signs():
    objective = FUNCTIONS[0]
    noise = theorem.noise_of_batches(objective, 6, 64)
    assert noise.shape == (64, 6, 8)
    assert torch.equal(noise[:, :2], theorem.noise_of_batches(objective, 2, 64))
    scaled = noise / objective.noise
    assert scaled.mean().item() == pytest.approx(0, abs=0.01)
    assert scaled.square().mean().item() * 64 == pytest.approx(1, abs=0.1)  # variance sigma^2 / n
    assert torch.equal((scaled * 64).round() % 2, torch.zeros_like(scaled))  # 64 signs have an even sum


def quadratic():
    """f(x) = x^2: L = 2, and G = 2 for |x| <= 1."""
    return Objective(
        "quadratic",
        value=lambda x: x.square().sum(dim=-1),
        gradient=lambda x: 2.0 * x,
        start=torch.ones(1, dtype=torch.float64),
        noise=torch.zeros(1, dtype=torch.float64),
        smoothness=lambda p: 2.0,
        largest_gradient=lambda p: 2.0,
    )


def closed_form(steps):
    # x_t = q^t, q = 1 - 2 eta, eta = 1 / (2 sqrt(2 T)):   1/T sum_t 4 q^(2t) = 4/T (1 - q^(2T)) / (1 - q^2)
    q = 1.0 - 1.0 / math.sqrt(2.0 * steps)
    return 4.0 / steps * (1.0 - q ** (2 * steps)) / (1.0 - q * q)


def test_descent_at_p_2_against_its_closed_form_and_slope():
    lengths = [64, 256, 1024]
    found = theorem.measure(quadratic(), 2.0, lengths, 2, quiet)
    expected = [closed_form(steps) for steps in lengths]
    assert found["noise_free"] == pytest.approx(expected, rel=1e-10)
    assert found["noisy"] == [[value, value] for value in found["noise_free"]]
    assert slope(lengths, np.array(found["noise_free"])) == pytest.approx(slope(lengths, np.array(expected)))
    late = [2**power for power in (24, 26, 28)]
    assert slope(late, np.array([closed_form(steps) for steps in late])) == pytest.approx(-0.25, abs=1e-4)


def test_descent_at_p_infinity_by_hand():
    # eta = 1 / sqrt(2 * 8) = 1/4: x = 1, 3/4, 1/2, 1/4, 0, 0, ...; |2x| = 2, 3/2, 1, 1/2, 0, ...; s(0) = 0
    found = theorem.measure(quadratic(), math.inf, [8], 2, quiet)
    assert found["noise_free"] == [5.0 / 8.0]


@both
@every_p
def test_the_bound_holds(objective, p):
    found = theorem.measure(objective, p, [16, 64], 3, quiet)
    assert np.all(np.mean(found["noisy"], axis=1) <= found["bound"])


def test_step_size_and_bound_by_hand():
    objective = FUNCTIONS[0]
    weights = objective.noise.numpy()
    # p = 2: L = 2, G = (3 sqrt 3 / 8 + 1) ||w||_2
    bound = (3 * math.sqrt(3) / 8 + 1) * math.sqrt((weights**2).sum())
    assert theorem.step_size(objective, 2.0, 100) == pytest.approx(1 / (math.sqrt(2) * bound * 10))
    gap = weights.sum() / 2
    expected = (math.sqrt(2) * bound * (gap + 0.5) + 3 * bound * weights.sum()) / 10
    assert theorem.bound(objective, 2.0, 100) == pytest.approx(expected)
    # p = infinity: L = 2 ||w||_1, G^0 = 1
    assert theorem.step_size(objective, math.inf, 100) == pytest.approx(1 / math.sqrt(2 * weights.sum() * 100))
    expected = (math.sqrt(2 * weights.sum()) * (gap + 0.5) + 2 * weights.sum()) / 10
    assert theorem.bound(objective, math.inf, 100) == pytest.approx(expected)


def test_slopes_with_intervals():
    steps = [16, 32, 64, 128]
    exact = [[3.0 * (n * n) ** -0.25] * 5 for n in steps]
    assert slope_with_interval(steps, exact) == pytest.approx((-0.25, -0.25, -0.25))
    noise = np.random.default_rng(0).uniform(0.9, 1.1, size=(4, 20))
    middle, low, high = slope_with_interval(steps, (np.array(exact)[:, :1] * noise).tolist())
    assert low < middle < high
    assert low < -0.25 < high
