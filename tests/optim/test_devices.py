"""No tensor of the CPU meets one of a GPU: the rule on fake tensors, which know their device and hold no numbers."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stacey_dist.optim import rule
from stacey_dist.optim.rounding import random_bits, round_stochastic
from tests.optim.kernel_cases import BF16, F32, settings_of


def results(variant, p, dtype):
    """Of the rule, of rounding, and of settings that follow the learning rate."""
    weight, gradient, z, m = (torch.ones(5, 3, device="cuda", dtype=dtype) for _ in range(4))
    new = rule.stacey_update(weight, gradient, z, m, settings_of(variant, p))
    rounded = [
        round_stochastic(new[1].float(), narrow, random_bits(new[1].float(), new[2].float(), 7))
        for narrow in (BF16, torch.float16)
    ]
    lr = torch.ones(1, device="cuda", dtype=torch.float64)
    return [*new, *rounded, rule.scale_with_lr(lr, 0.013, 0.3, 0.2, F32)]


@pytest.mark.parametrize("variant", ["p2", "pp", "2p"])
@pytest.mark.parametrize("p", [2.8, 3.0])
def test_the_rule_stays_on_its_device(variant, p):
    for dtype in (F32, torch.float64):
        with FakeTensorMode():
            assert {tensor.device.type for tensor in results(variant, p, dtype)} == {"cuda"}


def test_a_tensor_of_another_device_is_found(monkeypatch):
    power = rule.power
    monkeypatch.setattr(rule, "power", lambda x, *others: power(x, *others) + torch.ones(x.shape))
    with FakeTensorMode(), pytest.raises(RuntimeError, match="device"):
        results("p2", 2.8, F32)
