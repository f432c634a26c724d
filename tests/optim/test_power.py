"""|x|^q: its error, its exact roads, and that an element's bits do not depend on where the element stands."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stacey_dist.optim.power import exp2_parts, log2_parts, power
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
