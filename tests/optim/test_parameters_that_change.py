"""Parameters that share memory, are replaced, change their order in memory, or get states that do not fit."""

import collections
import copy
import gc
import weakref

import pytest
import torch

from stacey_dist import LpDescent, Stacey
from stacey_dist.optim import kernels
from stacey_dist.optim.kernels import Row, apart

FUSED = pytest.mark.parametrize("fused", [None, False])
SIZE = 200_003  # enough elements that threads share them


def shared_twice(steps=3, **settings):
    """Return the weight after steps of two parameters that share its memory."""
    torch.manual_seed(0)
    first, second = torch.nn.Parameter(torch.randn(SIZE)), torch.nn.Parameter(torch.zeros(0))
    second.data = first.data
    optimizer = Stacey([first, second], lr=0.1, **settings)
    for _ in range(steps):
        first.grad, second.grad = torch.randn(SIZE), torch.randn(SIZE)
        optimizer.step()
    return first.detach()


def test_two_parameters_with_one_memory_are_updated_one_after_the_other():
    expected = shared_twice(fused=False)
    for _ in range(5):  # threads that met would differ from run to run
        assert torch.equal(shared_twice(), expected)


def test_rows_with_one_memory_are_launched_apart():
    def row(weight):
        return Row(weight, weight, weight, weight, torch.zeros((), dtype=torch.int64))

    a, b, empty = torch.zeros(3), torch.zeros(4), torch.zeros(0)
    rows = [row(weight) for weight in (a, b, empty, a, empty, a)]
    found = apart(rows, [one.weight.data_ptr() for one in rows])
    numbers = {id(one): number for number, one in enumerate(rows)}
    assert [[numbers[id(one)] for one in launched] for launched, _ in found] == [[0, 1, 2, 4], [3], [5]]
    assert all(addresses == [one.weight.data_ptr() for one in launched] for launched, addresses in found)


@pytest.mark.parametrize("optimizer_class", [Stacey, LpDescent])
def test_a_parameter_that_was_replaced_is_freed(optimizer_class):
    optimizer = optimizer_class([torch.nn.Parameter(torch.zeros(3))])
    seen = []
    for _ in range(3):
        (param,) = optimizer.param_groups[0]["params"]
        param.grad = torch.ones(3)
        optimizer.step()
        seen.append(weakref.ref(param))
        replaced = torch.nn.Parameter(param.detach().clone())
        optimizer.state[replaced] = optimizer.state.pop(param)
        optimizer.param_groups[0]["params"] = [replaced]
        del param
    replaced.grad = torch.ones(3)
    for _ in range(2):  # a step frees those that were replaced before the last one
        optimizer.step()
    gc.collect()
    assert [reference() for reference in seen] == [None] * 3
    assert int(optimizer.state[replaced]["step"]) == 5


def test_states_follow_the_order_in_memory_of_their_parameter():
    torch.manual_seed(0)
    start, gradient = torch.randn(8, 3, 5, 5), torch.randn(8, 3, 5, 5)
    weights = []
    for orders in ([torch.contiguous_format] * 2, [torch.contiguous_format, torch.channels_last]):
        module = torch.nn.Conv2d(3, 8, 5, bias=False)
        with torch.no_grad():
            module.weight.copy_(start)
        optimizer = Stacey(module.parameters(), lr=0.1, fused=True)
        for order in orders:
            module.to(memory_format=order)
            module.weight.grad = gradient.contiguous(memory_format=order)
            optimizer.step()
        state = optimizer.state[module.weight]
        assert state["z"].stride() == state["m"].stride() == module.weight.stride()
        assert kernels.launch_key(Row.of(module.weight, module.weight.grad, state)) is not None
        weights.append(module.weight.detach().contiguous())
    assert torch.equal(*weights)


@FUSED
def test_no_memory_for_the_states_leaves_none(fused, monkeypatch):
    param = torch.nn.Parameter(torch.ones(5))
    param.grad = torch.ones(5)
    optimizer = Stacey([param], fused=fused)
    with monkeypatch.context() as patch:

        def full(*_, **__):
            raise torch.OutOfMemoryError("CUDA out of memory")

        patch.setattr(torch, "zeros_like", full)
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step()
    assert not optimizer.state[param]
    optimizer.step()
    assert int(optimizer.state[param]["step"]) == 1


def trained():
    model = torch.nn.Linear(3, 3)
    optimizer = Stacey(model.parameters(), lr=0.5)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("step", [float("nan"), None, torch.ones(2), "many"])
def test_a_state_dict_that_cannot_be_loaded_changes_nothing(step):
    _, optimizer = trained()
    before = copy.deepcopy(optimizer.state_dict())
    bad = copy.deepcopy(before)
    bad["param_groups"][0]["lr"] = 0.1
    bad["state"][1]["step"] = step
    with pytest.raises(ValueError, match="the step of parameter 1 is not a number of updates"):
        optimizer.load_state_dict(bad)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for number, state in before["state"].items():
        assert all(torch.equal(after["state"][number][name], value) for name, value in state.items())


def test_what_a_program_keeps_of_a_parameter_is_loaded_too():
    model, optimizer = trained()
    optimizer.state[model.weight]["ema"] = torch.full((3, 3), 2.0)
    saved = copy.deepcopy(optimizer.state_dict())
    other, loaded = trained()
    loaded.load_state_dict(saved)
    assert torch.equal(loaded.state[other.weight]["ema"], torch.full((3, 3), 2.0))
    assert torch.equal(loaded.state[other.weight]["z"], optimizer.state[model.weight]["z"])


def test_the_state_of_a_sharded_parameter_is_not_loaded_into_a_whole_one():
    class Sharded(torch.Tensor):
        placements = ()

    _, optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["z"] = saved["state"][0]["z"].as_subclass(Sharded)
    with pytest.raises(ValueError, match="state z of parameter 0 is sharded and its parameter is whole; load it by"):
        optimizer.load_state_dict(saved)


def test_contexts_of_scaled_gradients_may_be_nested():
    _, optimizer = trained()
    outer, inner = torch.tensor(4.0), torch.tensor(2.0)
    with optimizer.scaled_gradients(outer):
        with optimizer.scaled_gradients(inner):
            assert optimizer.grad_scale is inner
        assert optimizer.grad_scale is outer
    assert not hasattr(optimizer, "grad_scale")


def test_betas_are_any_two_numbers():
    params = [torch.nn.Parameter(torch.ones(2))]
    for betas in (collections.UserList([0.5, 0.7]), torch.tensor([0.5, 0.75])):
        first, second = Stacey(params, betas=betas).param_groups[0]["betas"]
        assert (first, second) == (float(betas[0]), float(betas[1]))
    for betas in (0.9, (0.9,), [0.9, 0.99, 0.999], {0.9, 0.99}, "00"):
        with pytest.raises(ValueError, match=r"Stacey: betas=.* it must be two numbers"):
            Stacey(params, betas=betas)


def test_a_dtype_that_a_program_sets_in_a_group():
    model, optimizer = trained()
    optimizer.param_groups[0]["state_dtype"] = torch.float32
    optimizer.step()
    assert optimizer.state[model.weight]["z"].dtype == torch.float32


def test_the_default_device_is_not_that_of_the_parameters():
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.zeros(3)
    torch.set_default_device("meta")
    try:
        for optimizer in (LpDescent([param], lr=0.0), Stacey([param], lr=0.0)):
            optimizer.step()
    finally:
        torch.set_default_device(None)
    assert torch.equal(param.detach(), torch.ones(3))
