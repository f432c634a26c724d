"""|x|^q: its error, its exact roads, and that an element's bits do not depend on where the element stands."""

import ctypes
import ctypes.util
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stacey_dist.optim.power import exp2_parts, exp2_times, log2_near_one, log2_parts, multiply_add, power
from stacey_dist.optim.rule import mirror_step

ALL_POSITIVE = [0x00000001, 0x007FFFFF, 0x00800000, 0x3F7FFFFF, 0x3F800000, 0x3F800001, 0x7F7FFFFF]


def floats_of_every_size(count, seed=0):
    """Positive finite float32 numbers, uniform in their bit patterns, with the corners and many subnormals."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randint(1, 0x7F800000, (count,), generator=generator, dtype=torch.int32)
    subnormal = torch.randint(1, 0x00800000, (count // 10,), generator=generator, dtype=torch.int32)
    return torch.cat([normal, subnormal, torch.tensor(ALL_POSITIVE, dtype=torch.int32)]).view(torch.float32)


@pytest.mark.parametrize("exponent", [1e-6, 0.0476, 1 / 6, 4 / 9, 0.6, 2 / 3, 6 / 7, 14 / 15, 62 / 63, 0.999])
def test_relative_error_over_the_whole_range(exponent):
    x = floats_of_every_size(200_000)
    exact = x.double().numpy() ** exponent
    error = np.abs(power(x, exponent).double().numpy() - exact) / exact
    normal = exact >= 2.0**-126
    assert error[normal].max() <= 2e-6
    # Below, a float32's grid is 2^-149 wide.
    below = np.abs(power(x, exponent).double().numpy() - exact)[~normal]
    assert (below <= 2e-6 * exact[~normal] + 2.0**-150).all()


def test_exact_exponents():
    x = floats_of_every_size(10_000)
    assert torch.equal(power(x, 0.0), torch.ones_like(x))
    assert torch.equal(power(x, 1.0), x)
    # numpy takes the processor's own instruction, which is correctly rounded
    assert torch.equal(power(x, 0.5), torch.from_numpy(np.sqrt(x.numpy())))


def test_zero_and_ranges():
    assert power(torch.zeros(1), 1 / 3).item() == 0.0
    whole, fraction = log2_parts(torch.tensor([8.0, 1.0, 2.0**-149]))
    assert (whole + fraction).tolist() == [3.0, 0.0, -149.0]
    far = torch.tensor([-1e6, 128.0, -149.0])
    assert exp2_parts(far, torch.zeros(3)).tolist() == [0.0, math.inf, 2.0**-149]


@settings(max_examples=60, deadline=None)
@given(
    start=st.integers(0, 200),
    length=st.integers(1, 150),
    stride=st.integers(1, 3),
    p=st.sampled_from([2.2, 2.8, 3.0, 8.0]),
    threads=st.integers(1, 4),
)
def test_bits_do_not_depend_on_position(start, length, stride, p, threads):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1000, generator=generator).abs()
    z, c = torch.randn(1000, generator=generator), torch.randn(1000, generator=generator)
    cut = slice(start, start + stride * length, stride)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(power(x[cut], (p - 2) / (p - 1)), power(x, (p - 2) / (p - 1))[cut])
        assert torch.equal(mirror_step(z[cut], c[cut], 0.01, p), mirror_step(z, c, 0.01, p)[cut])
    finally:
        torch.set_num_threads(before)


def by_the_c_library(a, b, c):
    fmaf = ctypes.CDLL(ctypes.util.find_library("m")).fmaf
    fmaf.argtypes, fmaf.restype = [ctypes.c_float] * 3, ctypes.c_float
    return torch.tensor([fmaf(*numbers) for numbers in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)])


def hard_cases(count, generator):
    """Return products and sums whose exact value lies midway between two floats, just beside that, or near zero."""

    def draw(low, high):
        return torch.randint(low, high, (count,), generator=generator)

    def any_float():
        return draw(-(2**31), 2**31).to(torch.int32).view(torch.float32)

    a, b, c = any_float(), any_float(), any_float()
    kind = draw(0, 7)
    # A sum near zero, of opposite signs: what is left is the product's last bits.
    opposite = -(a.double() * b.double() * (1.0 + (draw(0, 3) - 1) * 2.0 ** -draw(20, 60).double())).float()
    c = torch.where(kind == 0, opposite, c)
    # The middle between two neighbours, and as little above or below as a product of small numbers gives.
    large = draw(2**23, 2**24).double() * 2.0 ** draw(-40, 40).double()
    unit = torch.exp2(torch.floor(torch.log2(large)) - 23)
    a = torch.where(kind == 1, (unit / 2).float() * (1.0 + (draw(0, 3) - 1) * 2.0**-23), a)
    b = torch.where(kind == 1, (draw(0, 2) * 2 - 1) * (1.0 + (draw(0, 3) - 1) * 2.0**-23).float(), b)
    c = torch.where(kind == 1, large.float(), c)
    # Subnormal results, and products below all floats beside a subnormal.
    a = torch.where(kind == 2, draw(-(2**24), 2**24) * 2.0**-100, a)
    b = torch.where(kind == 2, draw(-(2**24), 2**24) * 2.0 ** -draw(55, 80).float(), b)
    c = torch.where(kind == 2, (draw(-(2**24), 2**24)).to(torch.int32).abs().view(torch.float32), c)
    # Near overflow.
    a = torch.where(kind == 3, draw(2**23, 2**24) * 2.0**41, a)
    b = torch.where(kind == 3, draw(2**23, 2**24) * 2.0**39, b)
    c = torch.where(kind == 3, draw(-(2**24), 2**24) * 2.0**104, c)
    # The middle between two subnormal neighbours, as above.
    for_a, for_b = ((1.0 + (draw(0, 3) - 1) * 2.0**-23).float() * 2.0**-75 for _ in range(2))
    a, b = torch.where(kind == 5, for_a, a), torch.where(kind == 5, (draw(0, 2) * 2 - 1) * for_b, b)
    c = torch.where(kind == 5, draw(2**21, 2**23).to(torch.int32).view(torch.float32), c)
    # Zeros of both signs.
    a = torch.where(kind == 4, (draw(0, 3) - 1) * 0.0, a)
    c = torch.where((kind == 4) & (draw(0, 2) == 0), -0.0, c)
    return a, b, c


def test_multiply_add_is_the_processors():
    generator = torch.Generator().manual_seed(0)
    a, b, c = hard_cases(60_000, generator)
    ours, expected = multiply_add(a, b, c), by_the_c_library(a, b, c)
    assert torch.equal(ours.isnan(), expected.isnan())
    number = ~expected.isnan()
    different = (ours.view(torch.int32) != expected.view(torch.int32)) & number
    assert not different.any(), [t[different][:3].tolist() for t in (a, b, c, ours, expected)]
    # One at a time: together, all take the longer road that only some of them need.
    alone = torch.cat([multiply_add(*case) for case in zip(*(t[:10_000].split(1) for t in (a, b, c)), strict=True)])
    assert torch.equal(alone.view(torch.int32)[number[:10_000]], ours[:10_000].view(torch.int32)[number[:10_000]])
    # The cases are hard: rounded twice, by way of float64, or by way of float32, many come out otherwise.
    twice = (a.double() * b.double() + c.double()).float()
    assert ((twice != expected) & number).sum() > 300
    assert ((a * b + c != expected) & number).sum() > 10_000
    # Numbers for factor and summand are rounded to float32 first.
    tenth = torch.full_like(a, 0.1)
    assert torch.equal(multiply_add(c, 0.1, 0.1)[number], by_the_c_library(c, tenth, tenth)[number])


def test_errors_of_logarithms_and_powers():
    x = floats_of_every_size(200_000)
    whole, fraction = log2_parts(x)
    exact = np.log2(x.double().numpy())
    error = np.abs(whole.double().numpy() + fraction.double().numpy() - exact)
    assert error.max() <= 1.8e-7  # 4.7e-8 of the polynomial, the rest is rounding
    near = torch.cat([1.0 + torch.logspace(-7, -0.4, 50_000), 1.0 - torch.logspace(-7, -0.7, 50_000)])
    whole, fraction = log2_near_one(near)
    exact = np.log1p(near.double().numpy() - 1.0) / math.log(2.0)
    assert (np.abs(whole.double().numpy() + fraction.double().numpy() - exact) <= 2e-6 * np.abs(exact)).all()
    t = torch.linspace(-0.5, 0.5, 100_001)
    for k in (-126.0, -24.0, 0.0, 1.0, 127.0):
        exact = np.exp2(t.double().numpy() + k)
        normal = (exact >= 2.0**-126) & (exact < 2.0**128)
        result = exp2_parts(torch.full_like(t, k), t.clone()).double().numpy()
        assert (np.abs(result - exact) <= 2.3e-7 * exact)[normal].all()
    # A product with a power near one is rounded once, and that correctly but for the power's own error.
    for value in (0.75, -1.9990234375):
        small = t * 1e-3
        exact = value * np.exp2(small.double().numpy())
        result = exp2_times(torch.full_like(t, value), torch.zeros_like(t), small).double().numpy()
        unit = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 23)
        assert (np.abs(result - exact) <= 0.51 * unit).all()
