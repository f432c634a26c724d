"""Tensors whose memory is not their value: parameters, gradients and states of every such kind."""

import copy

import pytest
import torch

from stacey_dist import LpDescent, Stacey
from stacey_dist.optim.memory import is_cut_short, overlaps, readable

BOTH = pytest.mark.parametrize("optimizer_class", [Stacey, LpDescent])
FUSED = pytest.mark.parametrize("fused", [None, False])
START = [0.5, -1.5, 2.0, 0.0, 3.0]
GRADIENT = [0.25, -2.0, 0.0, 1.0, -0.5]


def negated(values, dtype=torch.float32):
    """Return a tensor of these values whose memory has the opposite signs."""
    tensor = torch.tensor(values, dtype=dtype).neg()._neg_view()
    assert tensor.is_neg()
    return tensor


def updated(param, gradient, steps=3, optimizer_class=Stacey, **settings):
    param = torch.nn.Parameter(param if param.is_neg() else param.clone())
    param.grad_dtype = None  # any
    optimizer = optimizer_class([param], lr=0.02, **settings)
    for _ in range(steps):
        param.grad = gradient
        optimizer.step()
    return param.detach(), optimizer.state[param]


def settings_of(optimizer_class, fused):
    return dict(fused=fused) if optimizer_class is Stacey else {}


@BOTH
@FUSED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("which", ["parameter", "gradient", "both"])
def test_the_negative_bit(optimizer_class, fused, dtype, which):
    settings = settings_of(optimizer_class, fused)
    # torch lets a gradient have another dtype than its parameter from 2.9 on.
    mixed = dtype is torch.bfloat16 and hasattr(torch.Tensor, "grad_dtype")
    gradient_dtype = torch.float32 if mixed else dtype
    plain = torch.tensor(START, dtype=dtype), torch.tensor(GRADIENT, dtype=gradient_dtype)
    expected, state = updated(*plain, optimizer_class=optimizer_class, **settings)
    param = negated(START, dtype) if which != "gradient" else plain[0].clone()
    gradient = negated(GRADIENT, gradient_dtype) if which != "parameter" else plain[1]
    found, found_state = updated(param, gradient, optimizer_class=optimizer_class, **settings)
    assert torch.equal(found, expected)
    assert all(torch.equal(found_state[name], value) for name, value in state.items())
    assert torch.equal(gradient, plain[1])


def test_a_gradient_that_autograd_made_with_the_bit_and_fused_kernels():
    def train(fused):
        angle = torch.nn.Parameter(torch.tensor([2.0]))  # autograd keeps the bit of one element only
        optimizer = Stacey([angle], lr=0.02, fused=fused)
        for _ in range(20):
            optimizer.zero_grad()
            (torch.complex(torch.ones(1), angle).conj() * (2 + 1j)).abs().sum().backward()
            assert angle.grad.is_neg()
            optimizer.step()
        return angle.detach()

    assert torch.equal(train(True), train(False))
    assert 0.0 < train(True).item() < 1.9


def test_a_parameter_with_the_bit_is_refused_with_fused_true():
    param = torch.nn.Parameter(negated(START))
    optimizer = Stacey([param], fused=True)
    param.grad = torch.tensor(GRADIENT)
    with pytest.raises(RuntimeError, match=r"fused=True, but the memory of a tensor of shape \(5,\) is not its value"):
        optimizer.step()


@FUSED
def test_loaded_states_with_the_bit_or_expanded_are_taken_by_value(fused):
    param = torch.nn.Parameter(torch.tensor(START))
    optimizer = Stacey([param], fused=fused, state_dtype=torch.float32)
    param.grad = torch.tensor(GRADIENT)
    optimizer.step()
    results = []
    for make in (torch.clone, lambda t: t.neg()._neg_view()):
        saved = copy.deepcopy(optimizer.state_dict())
        saved["state"][0]["z"] = make(saved["state"][0]["z"])
        saved["state"][0]["m"] = torch.full((1,), 0.25).expand(5)
        other = torch.nn.Parameter(param.detach().clone())
        other_optimizer = Stacey([other], fused=fused)
        other_optimizer.load_state_dict(saved)
        other.grad = torch.tensor(GRADIENT)
        other_optimizer.step()
        results.append((other.detach(), other_optimizer.state[other]["z"], other_optimizer.state[other]["m"]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("state", [torch.ones(5).to_sparse(), torch.ones(5, dtype=torch.complex64)])
def test_loaded_states_that_are_no_dense_real_tensors_are_refused(state):
    param = torch.nn.Parameter(torch.tensor(START))
    optimizer = Stacey([param])
    param.grad = torch.tensor(GRADIENT)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["z"] = state
    with pytest.raises(ValueError, match="state z of parameter 0 is not a dense tensor of floating point numbers"):
        Stacey([param]).load_state_dict(saved)


@BOTH
@FUSED
def test_an_expanded_gradient_and_a_zero_tensor(optimizer_class, fused):
    settings = settings_of(optimizer_class, fused)
    for gradient in (torch.full((1,), 0.25).expand(5), torch._efficientzerotensor(5, dtype=torch.float32)):
        found, _ = updated(torch.tensor(START), gradient, optimizer_class=optimizer_class, **settings)
        expected, _ = updated(torch.tensor(START), gradient.clone(), optimizer_class=optimizer_class, **settings)
        assert torch.equal(found, expected)


@BOTH
@pytest.mark.parametrize(
    ("param", "reason"),
    [
        (torch.ones(1).expand(4), "more than one of its elements refers to a single memory location"),
        (torch.ones(6).as_strided((3, 3), (1, 1)), "more than one of its elements"),
        (torch._efficientzerotensor(3, dtype=torch.float32), "it is a zero tensor"),
        (torch.eye(3).to_sparse(), "its layout is torch.sparse_coo"),
        (torch.eye(3).to_sparse_csr(), "its layout is torch.sparse_csr"),
    ],
    ids=["expanded", "overlapping", "zero", "coo", "csr"],
)
def test_parameters_that_cannot_be_updated_are_refused(optimizer_class, param, reason):
    with pytest.raises(ValueError, match=f"{optimizer_class.__name__}: a parameter cannot be updated: {reason}"):
        optimizer_class([torch.nn.Parameter(param)])


@BOTH
@pytest.mark.parametrize("what", ["parameter", "gradient", "expanded"])
def test_memory_that_went_away_later_is_refused_before_anything_changes(optimizer_class, what):
    good, bad = (torch.nn.Parameter(torch.tensor(START)) for _ in range(2))
    optimizer = optimizer_class([good, bad])
    good.grad, bad.grad = torch.tensor(GRADIENT), torch.tensor(GRADIENT)
    if what == "expanded":
        bad.data = torch.ones(1).expand(5)
    else:
        (bad if what == "parameter" else bad.grad).untyped_storage().resize_(8)
    with pytest.raises(RuntimeError, match=r"storage was resized|more than one of its elements"):
        optimizer.step()
    assert torch.equal(good.detach(), torch.tensor(START))
    assert not optimizer.state


@pytest.mark.parametrize(
    ("size", "stride", "expected"),
    [
        ((4, 5), (5, 1), False),
        ((4, 5), (1, 4), False),
        ((2, 3), (3, 2), False),  # interleaved, and yet each has a place of its own: 0 2 4 / 3 5 7
        ((3, 4), (3, 2), True),  # 6 twice
        ((3, 3), (1, 1), True),
        ((1, 3), (0, 1), False),
        ((2, 3), (0, 1), True),
        ((4, 3), (9, 2), False),
        ((), (), False),
    ],
)
def test_overlaps(size, stride, expected):
    tensor = torch.zeros(100).as_strided(size, stride)
    assert overlaps(tensor) is expected


def test_is_cut_short():
    storage = torch.zeros(10)
    part = storage[4:9:2]
    assert not is_cut_short(part)
    storage.untyped_storage().resize_(9 * 4)
    assert not is_cut_short(part)
    storage.untyped_storage().resize_(8 * 4)
    assert is_cut_short(part)
    assert not is_cut_short(torch.zeros(0, 3))


def test_readable_copies_only_what_it_must():
    tensor = torch.ones(3)
    assert readable(tensor) is tensor
    assert not readable(tensor._neg_view()).is_neg()


@FUSED
def test_tensor_subclasses_are_taken_by_value(fused):
    from torch.testing._internal.two_tensor import TwoTensor

    expected, _ = updated(torch.tensor(START), torch.tensor(GRADIENT), fused=fused)
    gradient = TwoTensor(torch.tensor(GRADIENT), torch.tensor(GRADIENT))
    found, _ = updated(torch.tensor(START), gradient, fused=fused)
    assert type(found) is not TwoTensor or torch.equal(found.a, found.b)
    assert torch.equal(found, expected)
