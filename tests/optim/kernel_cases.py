"""Inputs for kernels over the whole range of numbers, what the plain rule makes of them, and comparing bits."""

import math

import torch

from stacey_dist.optim.kernels import Row
from stacey_dist.optim.rounding import Store
from stacey_dist.optim.rule import StaceySettings, stacey_update

PS = [2.0, 2.2, 2.8, 3.0, 3.5, 4.0, 8.0, 16.0, 64.0, math.inf]
CASES = [(variant, p) for variant in ("p2", "pp", "2p") for p in PS if variant == "p2" or p != math.inf]
BF16, F32 = torch.bfloat16, torch.float32
# dtypes of weight, gradient and states, whether the rounding is stochastic, and a loss scale
KINDS = [
    (F32, F32, BF16, True, None),
    (F32, BF16, F32, True, 2.7),
    (BF16, BF16, BF16, True, None),
    (BF16, F32, BF16, False, None),
]
OTHER_SETTINGS = dict(beta1=0.2, beta2=0.0, alpha=0.0, tau=0.3, eps=0.0, weight_decay=0.0)


def settings_of(variant, p, **changes):
    numbers = dict(lr=0.01, alpha=0.03, tau=1e-3, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1) | changes
    numbers["lr"] = float(torch.tensor(numbers["lr"]))
    return StaceySettings(p=p, variant=variant, **numbers)


def any_bits(count, seed):
    """Numbers over the whole range of float32, with many zeros and subnormal ones, infinities and NaN."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return torch.randint(low, high, (count,), generator=generator).to(torch.int32)

    chosen = torch.randint(0, 20, (count,), generator=generator)
    bits = draw(-(2**31), 2**31)
    bits = torch.where(chosen == 0, draw(0, 2) << 31, bits)  # 0 and -0
    bits = torch.where(chosen == 1, draw(1, 2**23) | (draw(0, 2) << 31), bits)
    bits = torch.where(chosen == 2, (draw(0, 2) << 31) | 0x7F800000, bits)
    bits = torch.where(chosen == 3, torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001])[draw(0, 4)].int(), bits)
    return bits.view(torch.float32)


def numbers(count, seed, size):
    """Half of any bits, half as runs have them."""
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.cat([any_bits(count // 2, seed), torch.randn(count - count // 2, generator=generator) * size])


def element_bits(tensor):
    """The bits as integers, one pattern for all NaN."""
    tensor = tensor.clone()
    tensor[tensor.isnan()] = math.nan
    return tensor.reshape(-1).view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def plainly(row, call, step):
    """What the plain rule makes of copies, on the CPU."""
    weight, gradient, z, m = copied(row)[:4]
    g = gradient.float()
    if call.grad_scale is not None:
        g = g * call.grad_scale.cpu().double().reciprocal().float()
    new = stacey_update(weight.float(), g, z.float(), m.float(), call.settings)
    store = Store("stochastic" if call.stochastic else "nearest", call.seed, step)
    store.states(z, m, *new[1:])
    store.weight(weight, new[0], g)
    return weight, z, m


def copied(row, device="cpu", step_device="cpu"):
    return Row(*(t.to(device, copy=True) for t in row[:4]), row.step.to(step_device, copy=True))


def make_row(count, weight, gradient, state, step=0.0):
    return Row(
        numbers(count, 1, 0.02).to(weight), numbers(count, 2, 1.0).to(gradient),
        numbers(count, 3, 0.02).to(state), numbers(count, 4, 0.1).to(state), torch.tensor(int(step)),
    )  # fmt: skip


def assert_same_bits(expected, row, *note):
    """(weight, z, m) against the row's, on any devices."""
    for name, a, b in zip("wzm", expected, (row.weight, row.z, row.m), strict=True):
        a, b = a.cpu(), b.cpu()
        different = (element_bits(a) != element_bits(b)).nonzero().flatten()
        assert len(different) == 0, (name, len(different), different[:5], a[different[:5]], b[different[:5]], note)
