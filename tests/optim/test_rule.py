"""The update rule against an independent float64 oracle, and against methods it must reduce to."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from stacey_dist import LpDescent, Stacey
from stacey_dist.optim.rule import mirror_step
from tests.optim import oracle
from tests.optim.helpers import make_problem, run

INF = math.inf
PS = [2, 2.2, 2.8, 3, 4, 8, 16, INF]
CASES = [(v, p) for v in ("p2", "pp", "2p") for p in PS if v == "p2" or p != INF]
COSINE = [0.01 * 0.5 * (1 + math.cos(math.pi * t / 50)) for t in range(50)]


def movement_error(result, expected, start):
    """Relative error of the movement from the start, in the Euclidean norm."""
    result, start = result.double().numpy(), start.double().numpy()
    return np.linalg.norm(result - expected) / np.linalg.norm(expected - start)


@pytest.mark.parametrize("z_init", ["params", "zeros"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("variant", "p"), CASES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # float64: 50 steps of rounding, in another order than the oracle's. float32: the target, ~1e-6 of rounding.
    [(torch.float64, 1e-12), (torch.float32, 5e-6)],
)
def test_stacey_follows_the_paper(dtype, tolerance, variant, p, weight_decay, z_init):
    theta, gradients = make_problem(dtype=dtype)
    settings = dict(
        p=p, variant=variant, alpha=0.01, tau=0.001, betas=(0.9, 0.99), eps=1e-8,
        weight_decay=weight_decay, z_init=z_init,
    )  # fmt: skip
    expected, z, m = oracle.stacey(theta.double().numpy(), gradients.double().numpy(), COSINE, **settings)
    param, state = run(Stacey, theta, gradients, COSINE, state_dtype=dtype, **settings)
    assert movement_error(param, expected, theta) <= tolerance
    z_start = theta if z_init == "params" else torch.zeros_like(theta)
    assert movement_error(state["z"], z, z_start) <= tolerance
    assert movement_error(state["m"], m, torch.zeros_like(theta)) <= tolerance


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("p", PS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
def test_lp_descent_follows_the_paper(dtype, tolerance, p, weight_decay):
    theta, gradients = make_problem(dtype=dtype)
    settings = dict(p=p, eps=1e-8, weight_decay=weight_decay)
    expected = oracle.lp_descent(theta.double().numpy(), gradients.double().numpy(), COSINE, **settings)
    param, _ = run(LpDescent, theta, gradients, COSINE, **settings)
    assert movement_error(param, expected, theta) <= tolerance


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.3, 0.45), (0.0, 0.99)])
def test_small_betas_follow_the_paper_where_gradients_shrink(betas):
    # (1 - beta) (g - m) + m would lose a g that is small beside m.
    theta, gradients = make_problem(steps=20)
    gradients *= (10.0 ** -torch.arange(20.0))[:, None]
    settings = dict(p=INF, variant="p2", alpha=0.01, tau=0.0, eps=0.0, weight_decay=0.0, z_init="params")
    expected, _, m = oracle.stacey(
        theta.double().numpy(), gradients.double().numpy(), COSINE[:20], betas=betas, **settings
    )
    param, state = run(Stacey, theta, gradients, COSINE[:20], state_dtype=torch.float32, betas=betas, **settings)
    assert movement_error(param, expected, theta) <= 5e-6
    # m itself, not its movement: its last value is far below its first.
    assert np.linalg.norm(state["m"].double().numpy() - m) <= 1e-5 * np.linalg.norm(m)


def test_zero_gradients_stay_harmless_where_subnormal_numbers_are_flushed():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        theta = torch.tensor([1.0, 2.0])
        for optimizer_class in (Stacey, LpDescent):
            for p in (3.0, 8.0, INF):
                param, _ = run(optimizer_class, theta, torch.zeros(2, 2), p=p, eps=0.0)
                assert torch.isfinite(param).all()
    finally:
        torch.set_flush_denormal(False)


def test_the_first_step_by_hand():
    # theta0 = z0 = 0, p = 3, g = 4: c = 0.4, s = c / sqrt(c) = sqrt(0.4).
    # theta1 = -(1 - tau) eta sqrt(0.4) - tau alpha 0.4 = -0.999 * 0.01 * 0.6324555 - 0.001 * 0.02 * 0.4
    param, state = run(
        Stacey, torch.zeros(1, dtype=torch.float64), torch.full((1, 1), 4.0, dtype=torch.float64),
        lr=0.01, p=3, alpha=0.02, tau=0.001, betas=(0.9, 0.99), eps=0.0, state_dtype=torch.float64,
    )  # fmt: skip
    assert param.item() == pytest.approx(-0.006326230765, abs=1e-12)
    assert state["z"].item() == pytest.approx(-0.008)
    assert state["m"].item() == pytest.approx(0.04)
    assert state["step"].item() == 1


def test_p_2_without_coupling_is_momentum_descent_in_closed_form():
    # With a constant gradient m_t = (1 - beta2^t) g, so c_t = (1 - beta1 beta2^t) g: a geometric sum.
    theta, gradients = make_problem(steps=1, dtype=torch.float64)
    g, steps, lr, (beta1, beta2), decay = gradients[0], 30, 0.05, (0.9, 0.99), 0.0
    result, _ = run(
        Stacey, theta, [g] * steps, lr=lr, p=2, tau=0, eps=0, betas=(beta1, beta2), weight_decay=decay,
        state_dtype=torch.float64,
    )  # fmt: skip
    expected = theta - lr * g * (steps - beta1 * (1 - beta2**steps) / (1 - beta2))
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float64])
def test_p_infinity_without_coupling_is_lion(state_dtype):
    dtype = state_dtype
    theta, gradients = make_problem(dtype=dtype)
    lr, (beta1, beta2), decay = 1e-3, (0.9, 0.99), 0.1
    expected, m = theta.clone(), torch.zeros_like(theta)
    for g in gradients:  # Lion, as published
        update = (beta1 * m + (1 - beta1) * g).sign()
        expected = expected * (1 - lr * decay) - lr * update
        m = beta2 * m + (1 - beta2) * g
    settings = dict(lr=lr, tau=0, betas=(beta1, beta2), weight_decay=decay, state_dtype=state_dtype)
    result, _ = run(Stacey, theta, gradients, p=INF, eps=0.0, **settings)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13  # Lion multiplies theta by 1 - lr decay, another rounding
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)
    # and a large p comes close to it: |c|^(1/(p-1)) is within 1e-4 of 1 for the c here
    near, _ = run(Stacey, theta, gradients, p=1e6, eps=0.0, **settings)
    torch.testing.assert_close(near, expected, rtol=1e-4, atol=1e-5)


def test_lp_descent_is_sgd_at_p_2_and_sign_sgd_at_infinity():
    theta, gradients = make_problem(dtype=torch.float64, steps=20)
    sgd, _ = run(torch.optim.SGD, theta, gradients, lr=0.1)
    ours, _ = run(LpDescent, theta, gradients, lr=0.1, p=2)
    torch.testing.assert_close(ours, sgd, rtol=1e-13, atol=1e-15)
    ours, _ = run(LpDescent, theta, gradients, lr=0.1, p=INF)
    torch.testing.assert_close(ours, theta - 0.1 * gradients.sign().sum(0), rtol=1e-13, atol=1e-14)
    # with eps = 0 the smallest gradients count in full, down to the last subnormal number
    tiny = torch.tensor([[1e-45, -1e-45, 1e-39, -1e-30, 0.0, -0.0, 1e38]])
    ours, _ = run(LpDescent, torch.zeros(7), tiny, lr=0.125, p=INF)
    assert torch.equal(ours, -0.125 * tiny[0].sign())


@pytest.mark.parametrize(("variant", "p"), CASES)
def test_zero_gradient_and_zero_momentum_move_nothing_but_the_coupling(variant, p):
    # s(0) = 0 exactly, also with eps = 0; and the mirror step of a zero c gives z back to the last bit.
    theta = torch.tensor([0.5, -0.25, 0.0, 1e-3, 1e-30])
    zeros = torch.zeros(3, 5)
    settings = dict(variant=variant, p=p, eps=0.0, state_dtype=torch.float32)
    param, state = run(Stacey, theta, zeros, **settings)
    assert torch.equal(param, theta)
    assert torch.equal(state["z"], theta)
    assert torch.equal(state["m"], torch.zeros(5))


@pytest.mark.parametrize("p", [16.0, 32.0, 64.0])
def test_mirror_step_survives_large_p_and_small_z(p):
    # |z|^(p-1) underflows in float32 here; the step must still follow float64.
    theta, gradients = make_problem(steps=20)
    gradients *= 1e-6
    settings = dict(p=p, variant="pp", alpha=0.01, tau=0.001, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    expected, z, _ = oracle.stacey(
        theta.double().numpy(), gradients.double().numpy(), [0.01] * 20, z_init="params", **settings
    )
    param, state = run(Stacey, theta, gradients, [0.01] * 20, state_dtype=torch.float32, **settings)
    assert movement_error(param, expected, theta) <= 5e-6
    assert movement_error(state["z"], z, theta) <= 5e-6


# The rounding of a step, relative to the largest u so far: the root's is multiplied by p - 1 when it is undone.
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@hypothesis_settings(deadline=None)
@given(
    p=st.floats(2.0, 100.0, width=32),
    z=st.floats(-2.0, 2.0, width=32).filter(lambda z: z == 0 or abs(z) > 0.01),
    c=st.lists(st.floats(-10.0, 10.0, width=32).filter(lambda c: c == 0 or abs(c) > 1e-6), min_size=1, max_size=8),
)
def test_mirror_steps_add_up(dtype, rounding, p, z, c):
    # |z'|^(p-2) z' = |z|^(p-2) z - alpha c: in u, where the step is linear, z is a sum of the gradients so far.
    alpha, u, largest = 0.01, math.copysign(abs(z) ** (p - 1), z), abs(z) ** (p - 1)
    end = torch.tensor([z], dtype=dtype)
    for value in c:
        end = mirror_step(end, torch.tensor([value], dtype=dtype), alpha, p)
        u -= alpha * value
        largest = max(largest, abs(u))
    assert abs(math.copysign(end.abs().item() ** (p - 1), end.item()) - u) <= rounding * p * len(c) * largest


@pytest.mark.parametrize(("variant", "p"), CASES)
@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
def test_non_finite_gradients_come_out_non_finite_and_stay_where_they_are(variant, p, bad):
    theta = torch.tensor([0.5, -0.25, 0.0, 0.125, 1.0])
    gradients = torch.ones(2, 5)
    gradients[0, 1], gradients[0, 2] = bad, bad
    param, state = run(Stacey, theta, gradients, variant=variant, p=p)
    clean, clean_state = run(Stacey, theta, torch.ones(2, 5), variant=variant, p=p)
    hit = torch.tensor([False, True, True, False, False])
    for result, expected in [(param, clean), (state["z"], clean_state["z"]), (state["m"], clean_state["m"])]:
        assert not result[hit].isfinite().any()
        assert torch.equal(result[~hit], expected[~hit])
