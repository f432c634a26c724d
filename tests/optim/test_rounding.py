"""Stochastic rounding: unbiased, spread like independent random bits, and the same wherever an element stands."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stacey_dist import LpDescent, Stacey
from stacey_dist.optim.rounding import STATES, WEIGHT, Store, random_bits, round_key, round_stochastic
from stacey_dist.optim.rule import lp_descent_update
from tests.optim.helpers import make_problem, run


def halves(first, second, key):
    """Return the two times 16 random bits of an element: z's, or a weight's, and m's."""
    random = random_bits(first, second, key)
    return (random >> 16) & 0xFFFF, random & 0xFFFF


def neighbours(value, dtype):
    """Return the numbers of `dtype` at and around float32 `value`: (below in size, above in size)."""
    drop = 16 if dtype == torch.bfloat16 else 13
    bits = value.view(torch.int32) & -(1 << drop)
    return bits.view(torch.float32), (bits + (1 << drop)).view(torch.float32)


@functools.cache
def keys_of(count):
    """Return the keys of so many steps."""
    return torch.tensor([round_key(0, step, STATES) for step in range(count)], dtype=torch.int32)


@pytest.mark.parametrize("half", ["upper", "lower"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0123456, -3.3333, 1.0000001, 1e-4, -2.5e-3])
def test_unbiased_for_a_fixed_value_over_steps(dtype, value, half):
    count = 1_000_000
    x, other = torch.full((count,), value), torch.full((count,), 0.25)
    upper, lower = halves(x, other, keys_of(count))
    draws = round_stochastic(x, dtype, upper if half == "upper" else lower).float()
    below, above = neighbours(x[:1], dtype)
    assert ((draws == below) | (draws == above)).all()
    chance = ((x[0] - below) / (above - below)).item()
    spread = math.sqrt(chance * (1 - chance) / count)
    assert abs((draws == above).float().mean().item() - chance) <= 4 * spread  # four standard errors


def elements(kind, count=1_000_000):
    """New values of z and m, as runs have them."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(count, generator=generator)
    if kind == "ordinary":
        return torch.randn(count, generator=generator) * 0.02, random * 1e-3
    if kind == "momentum is zero":
        return torch.randn(count, generator=generator) * 0.02, torch.zeros(count)
    if kind == "norm weights":  # all of them near one, as at a run's start
        return 1.0 - 1e-3 * random, 0.01 * random
    if kind == "neighbours":  # each value one step of float32 above the one before
        return (torch.arange(count, dtype=torch.int32) + 0x3C000000).view(torch.float32), torch.full((count,), 1e-3)
    m = (torch.arange(count, dtype=torch.int32) + 0x3A000000).view(torch.float32)
    return torch.full((count,), 0.0123456), m


KINDS = ["ordinary", "momentum is zero", "norm weights", "neighbours", "neighbours in m"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [1, 2, 1000])
def test_unbiased_over_elements_within_one_step(kind, step):
    z, m = elements(kind)
    for x, random in zip((z, m), halves(z, m, round_key(3, step, STATES)), strict=True):
        rounded = round_stochastic(x, torch.bfloat16, random).float()
        below, above = neighbours(x, torch.bfloat16)
        fraction = ((x - below) / (above - below)).double()
        error = ((rounded - x) / (above - below).abs()).double()
        # Of an element with fraction f the error has variance f (1 - f).
        variance = (fraction * (1 - fraction)).mean().item()
        # Four standard errors; an element's error may be as large as its step, where all have one fraction.
        assert abs(error.mean().item()) <= 4 * math.sqrt(variance / len(x)) + 1e-3
        if kind in ("ordinary", "norm weights"):
            assert abs(error.mean().item()) <= 4 * math.sqrt(variance / len(x))
            assert error.square().mean().item() == pytest.approx(variance, rel=0.01)


def test_z_and_m_are_rounded_independently():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, generator=generator)
    other = torch.randn(200_000, generator=generator) * 1e-3
    draws = [
        half.double() / 65536 - 0.5
        for key in [(0, 1, STATES), (0, 2, STATES), (1, 1, STATES), (0, 1, WEIGHT)]
        for half in halves(x, other, round_key(*key))
    ]
    below, above = neighbours(x, torch.bfloat16)
    draws.append(((x - below) / (above - below)).double() - 0.5)  # and of the fraction that is at stake
    for a in range(len(draws)):
        assert draws[a].var().item() == pytest.approx(1 / 12, rel=0.01)
        for b in range(a):
            # four standard errors of a correlation
            correlation = (draws[a] @ draws[b]).item() / len(x) * 12
            assert abs(correlation) <= 4 / math.sqrt(len(x)), (a, b)
    keys = {round_key(seed, step, which) for seed in (0, 1) for step in (1, 2) for which in (STATES, WEIGHT)}
    assert len(keys) == 8


def test_special_values():
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -2.0])
    # a NaN with all its bits set, which adding random bits would carry into a number
    x = torch.cat([x, torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)])
    for dtype in (torch.bfloat16, torch.float16):
        for step in range(50):
            rounded = round_stochastic(x, dtype, halves(x, torch.zeros(9), round_key(0, step, STATES))[0])
            assert rounded[[0, 1, 5, 6]].tolist() == [0.0, 0.0, 1.0, -2.0]
            assert not rounded[[2, 3, 4, 7, 8]].isfinite().any()
            assert rounded[[4, 7, 8]].isnan().all()


def test_float16_grid_below_its_normal_range():
    x = torch.linspace(-1e-4, 1e-4, 4001)
    draws = [
        round_stochastic(x, torch.float16, halves(x, x, round_key(0, step, STATES))[0]).double() for step in range(400)
    ]
    error = torch.stack(draws).mean(0) - x.double()
    spread = 2.0**-24 * 0.5 / math.sqrt(400)
    assert error.abs().max().item() <= 5 * spread


@pytest.mark.parametrize("variant", ["p2", pytest.param("pp", marks=pytest.mark.exhaustive), "2p"])
def test_bfloat16_z_follows_float32_z_where_rounding_to_nearest_does_not(variant):
    size, steps = 4_000, 3_000
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(size, generator=generator) * 0.02
    drift = torch.randn(size, generator=generator) * 1e-3
    optimizers = {}
    for name, dtype, rounding in [
        ("exact", torch.float32, "nearest"),
        ("stochastic", torch.bfloat16, "stochastic"),
        ("nearest", torch.bfloat16, "nearest"),
    ]:
        param = torch.nn.Parameter(theta.clone())
        settings = dict(lr=0.0001, p=2.8, variant=variant, alpha=1e-3, tau=1e-3, betas=(0.9, 0.99))
        if variant != "p2":
            settings["alpha"] = 1e-6  # the mirror step magnifies alpha c by |z|^(2-p) / (p-1)
        optimizers[name] = (param, Stacey([param], state_dtype=dtype, rounding=rounding, **settings))
    for _ in range(steps):
        g = drift + torch.randn(size, generator=generator) * 1e-2
        for param, optimizer in optimizers.values():
            param.grad = g
            optimizer.step()
    z = {name: optimizer.state[param]["z"].double() for name, (param, optimizer) in optimizers.items()}
    movement = z["exact"] - theta.double()

    def kept(name):
        """Return the share of the true movement that z made: 1 if it follows without bias."""
        return ((z[name] - theta.double()) @ movement / (movement @ movement)).item()

    assert kept("stochastic") == pytest.approx(1.0, abs=0.01)
    assert kept("nearest") < 0.5
    error = z["stochastic"] - z["exact"]
    assert abs(error.mean().item()) <= 4 * error.std().item() / math.sqrt(size)


@st.composite
def placements(draw):
    size = draw(st.integers(1, 400))
    cuts = sorted(draw(st.lists(st.integers(0, size), max_size=4)))
    shape = draw(st.sampled_from(["flat", "column", "strided"]))
    return size, cuts, shape


@settings(max_examples=40, deadline=None)
@given(
    placement=placements(),
    variant=st.sampled_from(["p2", "pp", "2p"]),
    p=st.sampled_from([2.0, 2.8, 3.0, 16.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**40),
)
def test_an_element_gets_the_same_bits_in_any_tensor(placement, variant, p, dtype, seed):
    size, cuts, shape = placement
    theta, gradients = make_problem(size=size, steps=3, dtype=dtype, seed=seed % 7)
    settings_ = dict(lr=0.01, p=p, variant=variant, weight_decay=0.1, seed=seed)
    whole, whole_state = run(Stacey, theta, gradients, **settings_)
    for start, stop in zip([0, *cuts], [*cuts, size], strict=True):
        piece = theta[start:stop]
        piece_gradients = gradients[:, start:stop]
        if shape == "column":
            piece, piece_gradients = piece[:, None], piece_gradients[:, :, None]
        elif shape == "strided":
            piece = torch.stack([piece, piece], 1)[:, 0]
        part, part_state = run(Stacey, piece, piece_gradients, **settings_)
        assert torch.equal(part.reshape(-1), whole[start:stop])
        assert torch.equal(part_state["z"].reshape(-1), whole_state["z"][start:stop])
        assert torch.equal(part_state["m"].reshape(-1), whole_state["m"][start:stop])


@pytest.mark.parametrize("optimizer_class", [Stacey, LpDescent])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_need_no_master(optimizer_class, dtype):
    # Each update is far below half a step of the weight's grid: rounded to nearest, nothing would ever move.
    theta = (torch.rand(4096, generator=torch.Generator().manual_seed(0)) + 1.0).to(dtype)
    generator = torch.Generator().manual_seed(1)
    gradients = [(1.0 + 0.1 * torch.randn(4096, generator=generator)).to(dtype) for _ in range(200)]
    lr = 1e-5
    settings = dict(lr=lr, p=math.inf) | ({"tau": 0.0} if optimizer_class is Stacey else {})
    param, _ = run(optimizer_class, theta, gradients, **settings)
    assert param.dtype == dtype
    moved = (theta.double() - param.double()).mean().item()
    assert moved == pytest.approx(200 * lr, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lp_descent_rounds_narrow_weights_as_it_is_told(dtype):
    theta = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    gradient = torch.randn(1000, generator=torch.Generator().manual_seed(1)).to(dtype)
    settings = dict(lr=2.0**-7, p=2.8, eps=0.0, weight_decay=0.1)
    exact = lp_descent_update(theta.float(), gradient.float(), **settings)
    nearest, _ = run(LpDescent, theta, [gradient], rounding="nearest", **settings)
    assert torch.equal(nearest, exact.to(dtype))
    for seed in (0, 7):
        expected, param = torch.empty_like(theta), run(LpDescent, theta, [gradient], seed=seed, **settings)[0]
        Store("stochastic", seed, 1).weight(expected, exact, gradient.float())
        assert torch.equal(param, expected)
    assert not torch.equal(param, run(LpDescent, theta, [gradient], **settings)[0])
