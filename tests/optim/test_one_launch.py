"""A step of many tensors: where nothing is unusual all are checked at once, and what is unusual is found."""

import copy

import pytest
import torch

from stacey_dist import Stacey
from stacey_dist.optim import base

SHAPES = [(3, 4), (5,), (2, 3, 2), ()]


def made(**settings):
    """Return parameters with a step behind them and a new gradient, and their optimizer."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = Stacey(params, lr=0.1, alpha=0.5, tau=0.25, **settings)
    for _ in range(2):
        for param in params:
            param.grad = torch.randn(param.shape)
        optimizer.step()
    for param in params:
        param.grad = torch.randn(param.shape)
    return params, optimizer


def rows(optimizer, number=0):
    """Return the rows that a step of a group would launch at once; None if it would look at each parameter."""
    group, launched = optimizer.param_groups[number], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "kernel", lambda _: lambda found, call: launched.append(found))
        at_once = optimizer._update_at_once(optimizer._kernel_call(group), group, optimizer._parts_to_update(group))
    assert len(launched) == at_once
    return launched[0] if at_once else None


def transposed(param, optimizer):
    param.data = param.data.t().contiguous().t()
    param.grad = param.grad.t().contiguous().t()


def set_state(name, change):
    def apply(param, optimizer):
        optimizer.state[param][name] = change(optimizer.state[param][name])

    return apply


def set_gradient(change):
    def apply(param, optimizer):
        param.grad = change(param.grad)

    return apply


def without_its_state(param, optimizer):
    optimizer.state[param].clear()


def a_new_parameter(param, optimizer):
    other = torch.nn.Parameter(param.detach().clone())
    other.grad = torch.ones_like(param)
    optimizer.param_groups[0]["params"][0] = other


def in_bfloat16(param, optimizer):
    param.data = param.data.bfloat16()
    param.grad = None
    param.grad = torch.ones_like(param)


UNUSUAL = {
    "a parameter of another order in memory": transposed,
    "a parameter of another dtype": in_bfloat16,
    "a new parameter": a_new_parameter,
    "no state": without_its_state,
    "a gradient of another order": set_gradient(lambda g: g.t().contiguous().t()),
    "a gradient of a subclass": set_gradient(lambda g: g.as_subclass(type("Other", (torch.Tensor,), {}))),
    "z of another dtype": set_state("z", torch.Tensor.float),
    "z of another order": set_state("z", lambda z: z.t().contiguous().t()),
    "m of another dtype": set_state("m", torch.Tensor.float),
    "m with the negative bit": set_state("m", torch._neg_view),
    "a step of another dtype": set_state("step", torch.Tensor.float),
    "a step that is no tensor": set_state("step", int),
}


def test_one_launch_takes_what_is_usual():
    params, optimizer = made()
    found = rows(optimizer)
    assert [row.weight for row in found] == [*params]
    for param, row in zip(params, found, strict=True):
        state = optimizer.state[param]
        assert row.gradient is param.grad
        assert (row.z is state["z"], row.m is state["m"], row.step is state["step"]) == (True, True, True)


def test_tensors_without_elements_are_usual():
    _, optimizer = made()
    empty = torch.nn.Parameter(torch.zeros(0, 3))
    optimizer.add_param_group({"params": [empty, torch.nn.Parameter(torch.ones(2))]})
    for param in optimizer.param_groups[1]["params"]:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert len(rows(optimizer, 1)) == 2


@pytest.mark.parametrize("unusual", UNUSUAL)
def test_what_is_unusual_is_looked_at_alone(unusual):
    """And the update has the bits of the plain rule."""
    weights = []
    for fused in (None, False):
        params, optimizer = made(fused=fused)
        UNUSUAL[unusual](params[0], optimizer)
        if fused is None:
            assert rows(optimizer) is None
        optimizer.step()
        weights.append([param.detach().contiguous() for param in optimizer.param_groups[0]["params"]])
    assert all(torch.equal(ours, plain) for ours, plain in zip(*weights, strict=True))


def test_a_state_of_another_shape_is_refused():
    params, optimizer = made()
    optimizer.state[params[0]]["m"] = torch.zeros(4, 3, dtype=torch.bfloat16)
    before = copy.deepcopy([*params])
    with pytest.raises(ValueError, match="must have one shape and device"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


def test_a_gradient_of_another_dtype_has_a_launch_of_its_own(monkeypatch):
    params, optimizer = made(fused=True)
    launched = []
    kernel = base.kernel("cpu")
    monkeypatch.setattr(base, "kernel", lambda _: lambda rows, call: (launched.append(len(rows)), kernel(rows, call)))
    optimizer.step()
    assert launched == [len(SHAPES)]
    params[0].data = params[0].data.bfloat16()
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert sorted(launched[1:]) == [1, len(SHAPES) - 1]
