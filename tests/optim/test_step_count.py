"""The count of updates stays exact beyond 2^24, where a float32 stands still, and with it the random bits change."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from stacey_dist import LpDescent, Stacey
from stacey_dist.checkpoint.read import load_checkpoint, read_tensors
from stacey_dist.checkpoint.write import save_checkpoint
from stacey_dist.optim.kernels import Call
from tests.optim.kernel_cases import BF16, F32, assert_same_bits, copied, make_row, plainly, settings_of

LAST = 2**24  # the last of the float32 numbers that have all integers below them
BOTH = pytest.mark.parametrize("optimizer_class", [Stacey, LpDescent])
FUSED = pytest.mark.parametrize("fused", [None, False])


def made(optimizer_class, count, dtype=torch.float32, **settings):
    """Return a model and its optimizer that says to have made `count` updates."""
    torch.manual_seed(0)
    model = nn.Linear(9, 5).to(dtype)
    optimizer = optimizer_class(model.parameters(), lr=1e-3, **settings)
    one_step(model, optimizer)
    for state in optimizer.state.values():
        state["step"].fill_(count)
    return model, optimizer


def one_step(model, optimizer):
    generator = torch.Generator().manual_seed(7)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
    optimizer.step()


def counts(optimizer):
    return [state["step"].item() for state in optimizer.state.values()]


@BOTH
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("start", [LAST - 2, 2**31 - 2, 2**53])
def test_the_count_goes_on(optimizer_class, fused, start):
    model, optimizer = made(optimizer_class, start, **({"fused": fused} if optimizer_class is Stacey else {}))
    for step in range(1, 5):
        one_step(model, optimizer)
        assert counts(optimizer) == [start + step] * 2
    assert all(state["step"].dtype is torch.int64 for state in optimizer.state.values())


@FUSED
def test_rounding_differs_from_step_to_step_beyond_two_to_the_24(fused):
    # Equal weights, gradients and states: only the count of updates tells these roundings apart.
    outcomes = set()
    for start in range(LAST - 1, LAST + 5):
        torch.manual_seed(0)
        param = nn.Parameter(torch.rand(4096).add_(1.0).bfloat16())
        optimizer = Stacey([param], lr=1e-4, p=2.0, tau=0.0, alpha=0.0, betas=(0.0, 0.0), fused=fused)
        optimizer.state[param] = {
            "step": torch.tensor(start), "z": torch.zeros_like(param), "m": torch.zeros_like(param)
        }  # fmt: skip
        param.grad = torch.ones_like(param)
        optimizer.step()
        outcomes.add(tuple(param.detach().view(torch.int16).tolist()))
    assert len(outcomes) == 6


@FUSED
def test_the_movement_beyond_two_to_the_24_is_unbiased(fused):
    torch.manual_seed(0)
    param = nn.Parameter(torch.rand(4096).add_(1.0).bfloat16())
    optimizer = Stacey([param], lr=1e-4, p=2.0, tau=0.0, alpha=0.0, betas=(0.0, 0.0), fused=fused)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    optimizer.state[param]["step"].fill_(LAST)
    start = param.detach().float().clone()
    for _ in range(300):
        param.grad = torch.ones_like(param)
        optimizer.step()
    moved = param.detach().float() - start
    # An element moves by 2^-7 with a probability of 0.0128 a step: spread 0.0153, of the mean 0.0153 / 64.
    assert moved.mean() == pytest.approx(-0.03, abs=5 * 0.0153 / 64)
    assert 0.01 < moved.std() < 0.02


def test_triton_counts_beyond_two_to_the_24_on_host_and_device(triton_kernel):
    for start in (LAST, 2**33 + 5):
        row = make_row(3_000, BF16, F32, BF16, step=start)
        s = settings_of("p2", 2.8)
        for capturable, found_inf in ((False, None), (True, None), (True, torch.zeros(1))):
            call = Call(s, stochastic=True, seed=3, capturable=capturable, found_inf=found_inf)
            ours = copied(row)
            triton_kernel([ours], call)
            assert ours.step.item() == start + 1
            assert_same_bits(plainly(row, call, step=start + 1), ours)
        triton_kernel([ours], Call(s, True, 3, capturable=True, found_inf=torch.tensor([2.0])))
        assert ours.step.item() == start + 1  # a loss scale that overflowed: nothing changes


@BOTH
@pytest.mark.parametrize("old", [torch.tensor, lambda n: torch.tensor(float(n)), int, float])
def test_a_state_dict_with_another_kind_of_count(optimizer_class, old):
    model, optimizer = made(optimizer_class, 1234)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = old(int(state["step"]))
    other = copy.deepcopy(model)
    other_optimizer = optimizer_class(other.parameters())
    other_optimizer.load_state_dict(saved)
    for pair in ((model, optimizer), (other, other_optimizer)):
        one_step(*pair)
    assert counts(other_optimizer) == [1235] * 2
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert all(state["step"].dtype is torch.int64 for state in other_optimizer.state.values())


@BOTH
@FUSED
@pytest.mark.parametrize("old", [torch.tensor, lambda n: torch.tensor(float(n)), int, float])
def test_a_state_that_an_engine_put_there_with_another_kind_of_count(optimizer_class, fused, old):
    model, optimizer = made(optimizer_class, 1234, **({"fused": fused} if optimizer_class is Stacey else {}))
    for state in optimizer.state.values():
        state["step"] = old(1234)
    one_step(model, optimizer)
    assert counts(optimizer) == [1235] * 2
    assert all(state["step"].dtype is torch.int64 for state in optimizer.state.values())


@BOTH
def test_it_is_saved_and_loaded_exactly(optimizer_class, tmp_path):
    model, optimizer = made(optimizer_class, LAST + 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = optimizer_class(model.parameters())
    other.load_state_dict(torch.load(file, weights_only=True))
    assert counts(other) == [LAST + 3] * 2
    other = optimizer_class(model.parameters())
    set_optimizer_state_dict(model, other, get_optimizer_state_dict(model, optimizer))
    assert counts(other) == [LAST + 3] * 2
    path = save_checkpoint(tmp_path / "step_00000001", model, optimizer)
    other = optimizer_class(model.parameters())
    load_checkpoint(path, model, other)
    assert counts(other) == [LAST + 3] * 2
    assert all(state["step"].dtype is torch.int64 for state in other.state.values())
    assert read_tensors(path, ["optimizer/weight/step"])["optimizer/weight/step"].item() == LAST + 3


def test_a_checkpoint_with_float32_counts_is_loaded(tmp_path):
    """As version 0.1.0 wrote them."""
    model, optimizer = made(Stacey, 1234)
    for state in optimizer.state.values():
        state["step"] = state["step"].to(torch.float32)
    path = save_checkpoint(tmp_path / "step_00000001", model, optimizer)
    assert read_tensors(path, ["optimizer/weight/step"])["optimizer/weight/step"].dtype is torch.float32
    other = Stacey(model.parameters())
    load_checkpoint(path, model, other)
    assert counts(other) == [1234] * 2
    assert all(state["step"].dtype is torch.int64 for state in other.state.values())


def test_other_optimizers_keep_their_float32_counts(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    one_step(model, optimizer)
    path = save_checkpoint(tmp_path / "step_00000001", model, optimizer)
    other = torch.optim.AdamW(model.parameters())
    load_checkpoint(path, model, other)
    assert all(state["step"].dtype is torch.float32 and state["step"] == 1 for state in other.state.values())
