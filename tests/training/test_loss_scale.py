"""A loss scale that is handed on goes on as if it had not been; to another engine, with its scale and its count."""

import pytest
import torch
from deepspeed.runtime.fp16 import loss_scaler
from hypothesis import given, settings
from hypothesis import strategies as st

from stacey_dist.training import loss_scale

WINDOW = 4


@pytest.fixture(autouse=True, scope="module")
def alone():
    """DeepSpeed's scaler asks for its rank, to log on the first alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_scaler.dist, "get_rank", lambda: 1)
        yield


OVERFLOWS = st.lists(st.booleans(), max_size=40)


class Torch:
    """torch's scaler, told of overflows through a gradient."""

    def __init__(self):
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=WINDOW)
        self.param = torch.nn.Parameter(torch.zeros(()))
        self.optimizer = torch.optim.SGD([self.param], lr=0.0)

    def update(self, overflow):
        self.scaler.scale(self.param * (float("inf") if overflow else 1.0)).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def scale(self):
        return self.scaler.get_scale()


class DeepSpeed:
    def __init__(self):
        self.scaler = loss_scaler.DynamicLossScaler(2.0**20, WINDOW, 1.0, 2, False, False, torch.float32)

    def update(self, overflow):
        self.scaler.update_scale(overflow)

    def scale(self):
        return self.scaler.cur_scale


def scales(engine, overflows):
    found = []
    for overflow in overflows:
        engine.update(overflow)
        found.append(engine.scale())
    return found


def check_handed_on(kind, before, after):
    whole, first, second = kind(), kind(), kind()
    expected = scales(whole, before + after)
    scales(first, before)
    loss_scale.load(loss_scale.state_of(first.scaler), second.scaler)
    assert scales(second, after) == expected[len(before) :]


@settings(deadline=None)
@given(before=OVERFLOWS, after=OVERFLOWS)
def test_handed_on_by_torch(before, after):
    check_handed_on(Torch, before, after)


@settings(deadline=None)
@given(before=OVERFLOWS, after=OVERFLOWS)
def test_handed_on_by_deepspeed(before, after):
    check_handed_on(DeepSpeed, before, after)


@settings(deadline=None)
@given(before=OVERFLOWS)
def test_from_one_engine_to_the_other(before):
    """The scale is the same, and doubles as soon as it would have, but that DeepSpeed doubles one update later."""
    for kind, other in ((Torch, DeepSpeed), (DeepSpeed, Torch)):
        first, second = kind(), other()
        scales(first, before)
        loss_scale.load(loss_scale.state_of(first.scaler), second.scaler)
        handed = first.scale()
        assert second.scale() == handed
        doubled = [scales(engine, [False] * (WINDOW + 1)).index(2 * handed) for engine in (first, second)]
        assert abs(doubled[0] - doubled[1]) <= 1
