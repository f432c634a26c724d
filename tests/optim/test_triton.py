"""The Triton kernel under Triton's interpreter, on the CPU: the plain rule's bits."""

import dataclasses
import sys

import pytest
import torch

from stacey_dist.optim import kernels
from stacey_dist.optim.kernels import Call, NoKernelError
from tests.optim.kernel_cases import (
    BF16,
    CASES,
    F32,
    KINDS,
    OTHER_SETTINGS,
    assert_same_bits,
    copied,
    make_row,
    plainly,
    settings_of,
)


@pytest.fixture(scope="module")
def kernel(triton_kernel):
    return triton_kernel


@pytest.mark.parametrize(("weight", "gradient", "state", "stochastic", "scale"), KINDS)
@pytest.mark.parametrize(("variant", "p"), CASES)
def test_the_bits_of_the_plain_rule(kernel, variant, p, weight, gradient, state, stochastic, scale):
    row = make_row(5_001, weight, gradient, state, step=6.0)
    for changes in ({}, OTHER_SETTINGS):
        scale_tensor = None if scale is None else torch.tensor([scale])
        call = Call(settings_of(variant, p, **changes), stochastic, seed=2**40 + 7, grad_scale=scale_tensor)
        ours = copied(row)
        kernel([ours], call)
        assert_same_bits(plainly(row, call, step=7), ours)
        assert ours.step == 7


def tables_of(kernel, rows):
    return kernel._tables[torch.device("cpu"), rows[0].weight.data_ptr()]


def test_one_launch_updates_many_tensors_and_later_ones_use_its_tables(kernel):
    rows = [make_row(n, F32, F32, BF16, step=float(n % 5)) for n in (1, 0, 1024, 3000, 7, 1025)]
    ours = [copied(row) for row in rows]
    call = Call(settings_of("p2", 2.8), stochastic=True, seed=3)
    tables = []
    for launch in range(3):
        expected = [plainly(row, call, step=int(row.step) + 1) for row in ours]
        kernel(ours, call)
        for row, same in zip(ours, expected, strict=True):
            assert_same_bits(same, row)
        tables.append(tables_of(kernel, ours))
        assert [float(row.step) for row in ours] == [n % 5 + launch + 1 for n in (1, 0, 1024, 3000, 7, 1025)]
    assert tables[0] is tables[1] is tables[2]
    kernel(ours[:-1], call)
    assert tables_of(kernel, ours) is not tables[0]


def test_groups_keep_their_tables_while_tau_follows_a_schedule(kernel, monkeypatch):
    kernel._tables.clear()
    groups = [[make_row(n, F32, F32, BF16, step=0.0)] for n in (5, 1030)]
    tables = []
    for step, tau in enumerate((0.01, 0.005), start=1):
        for rows in groups:
            call = Call(settings_of("p2", 2.8, tau=tau), True, 3, capturable=True, lr=torch.tensor(0.01))
            expected = plainly(
                rows[0], dataclasses.replace(call, settings=settings_of("p2", 2.8, tau=tau, lr=0.01)), step
            )
            kernel(rows, call)
            assert_same_bits(expected, rows[0])
            tables.append(tables_of(kernel, rows))
    assert tables[0] is tables[2]
    assert tables[1] is tables[3]
    strangers = [make_row(8, F32, F32, BF16) for _ in range(100)]
    monkeypatch.setattr(sys.modules[type(kernel).__module__], "_MOST_TABLES", 64)
    for row in strangers:
        kernel([row], call)
    assert len(kernel._tables) == 64


def test_tables_of_a_graph_are_its_own(kernel, monkeypatch):
    """A capture records that they are filled; until a replay they hold nothing."""
    module = sys.modules[type(kernel).__module__]
    monkeypatch.setattr(kernel, "_tables", {})  # those of tests before may have been of a weight at the same address
    rows, call = [make_row(9, F32, F32, BF16)], Call(settings_of("p2", 2.8), True, 3)
    monkeypatch.setattr(module, "_is_capturing", lambda device: True)
    kernel(rows, call)
    assert ("cpu", rows[0].weight.data_ptr()) not in {(key[0].type, key[1]) for key in kernel._tables}
    graph = kernel._captured[-1]
    monkeypatch.setattr(module, "_is_capturing", lambda device: False)
    kernel(rows, call)
    eager = tables_of(kernel, rows)
    assert eager is not graph
    monkeypatch.setattr(module, "_is_capturing", lambda device: True)
    kernel(rows, call)
    assert kernel._captured[-1] is eager  # filled already, and kept for the graph's life


def test_what_lies_on_the_device_is_read_there(kernel):
    """As `capturable` has it: steps, learning rate, loss scale and overflow in tensors."""
    row = make_row(3_000, F32, F32, BF16, step=4.0)
    s = settings_of("pp", 3.0, lr=0.007)
    lr, scale, found_inf = torch.tensor(0.007), torch.tensor([8.0]), torch.zeros(1)
    by_number = Call(s, stochastic=True, seed=1, grad_scale=scale)
    on_device = Call(
        dataclasses.replace(s, lr=0.0), True, 1, grad_scale=scale, capturable=True, lr=lr, found_inf=found_inf
    )
    ours = copied(row)
    kernel([ours], on_device)
    assert_same_bits(plainly(row, by_number, step=5), ours)
    assert ours.step == 5
    found_inf.fill_(1.0)  # the same launch again, as a replay would have it
    before = copied(ours)
    kernel([ours], on_device)
    assert_same_bits((before.weight, before.z, before.m), ours)
    assert ours.step == 5
    found_inf.zero_()
    lr.fill_(0.02)
    expected = plainly(ours, dataclasses.replace(by_number, settings=settings_of("pp", 3.0, lr=0.02)), step=6)
    kernel([ours], on_device)
    assert_same_bits(expected, ours)
    assert ours.step == 6


def test_a_kernel_for_gpus_needs_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "stacey_dist.optim.kernels.triton", raising=False)
    with pytest.raises(NoKernelError, match="the kernel for GPUs needs triton, which can't be imported"):
        kernels.find("cuda")
    with pytest.raises(NoKernelError, match="no kernel is written for devices of type mps"):
        kernels.find("mps")
