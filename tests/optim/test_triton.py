"""The Triton kernel under Triton's interpreter, on the CPU, and compiled, on a GPU: the plain rule's bits."""

import dataclasses
import itertools
import sys

import pytest
import torch

from stacey_dist import Stacey
from stacey_dist.optim import base, kernels
from stacey_dist.optim.kernels import Call, NoKernelError
from tests.devices import DEVICES
from tests.optim.conftest import triton_module
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


@pytest.fixture(scope="module", params=DEVICES)
def on_device(request):
    """(device, its kernel)."""
    if request.param == "cpu":
        yield "cpu", request.getfixturevalue("triton_kernel")
    else:
        with triton_module(interpreted=False) as module:
            yield request.param, module.TritonKernel()


# In CI, every variant meets every p, and every kind of numbers; all three with -m exhaustive, and on a GPU.
@pytest.mark.parametrize(
    ("variant", "p", "weight", "gradient", "state", "stochastic", "scale"),
    [
        pytest.param(*case, *kind, marks=[pytest.mark.exhaustive] * ((i + j) % len(KINDS) != 0))
        for i, case in enumerate(CASES)
        for j, kind in enumerate(KINDS)
    ],
)
def test_the_bits_of_the_plain_rule(on_device, variant, p, weight, gradient, state, stochastic, scale):
    device, kernel = on_device
    row = make_row(5_001, weight, gradient, state, step=6.0)
    for changes in ({}, OTHER_SETTINGS):
        scale_tensor = None if scale is None else torch.tensor([scale], device=device)
        call = Call(settings_of(variant, p, **changes), stochastic, seed=2**40 + 7, grad_scale=scale_tensor)
        ours = copied(row, device)
        kernel([ours], call)
        assert_same_bits(plainly(row, call, step=7), ours)
        assert ours.step == 7


def recorded(device, work):
    """`work`, which was done once by now, as a CUDA graph to be replayed; on the CPU itself."""
    if device == "cpu":
        return work
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def test_a_graph_of_two_groups_reads_what_changes_on_the_device(on_device):
    """Weights and states after replays with other gradients, learning rates, scales and overflows."""
    device, kernel = on_device
    lr, scale, found_inf = (torch.tensor(number, device=device) for number in (0.01, 1.0, 0.0))
    groups, calls = [], []
    for variant, p, dtype, sizes in (("p2", 2.8, F32, (1025, 0, 7)), ("pp", 3.0, BF16, (1000, 8))):
        groups.append([copied(make_row(n, dtype, dtype, BF16), device, step_device=device) for n in sizes])
        there = dict(grad_scale=scale, capturable=True, lr=lr, found_inf=found_inf)
        calls.append(Call(settings_of(variant, p, lr=0.0), True, 3, **there))

    def step():
        for rows, call in zip(groups, calls, strict=True):
            kernel(rows, call)

    count = 0
    replay = step  # the first one compiles
    for number in range(21 if device == "cuda" else 3):
        lr.fill_(0.01 / (1 + number))
        scale.fill_(2.0**number)
        overflow = number % 5 == 1
        found_inf.fill_(float(overflow))
        count += not overflow
        expected = []
        for rows, call in zip(groups, calls, strict=True):
            for row in rows:
                row.gradient.copy_(torch.randn(row.gradient.shape, generator=torch.Generator().manual_seed(number)))
                s = dataclasses.replace(call.settings, lr=float(lr))
                old = copied(row)
                new = plainly(row, dataclasses.replace(call, settings=s), step=count)
                expected.append((old.weight, old.z, old.m) if overflow else new)
        replay()
        for new, row in zip(expected, itertools.chain(*groups), strict=True):
            assert_same_bits(new, row, number)
            assert row.step == count
        if number == 0:
            replay = recorded(device, step)


def test_the_class_with_two_groups_whose_gradients_move(on_device, monkeypatch):
    """With gradients made anew for each step, some of them missing."""
    device, kernel = on_device
    monkeypatch.setattr(base, "kernel", lambda device_type: kernel)
    sizes = (1025, 7, 2048, 0, 64)

    def made(device, **settings):
        params = [torch.nn.Parameter(make_row(n, F32, F32, BF16).weight.nan_to_num(1, 1, 1).to(device)) for n in sizes]
        groups = [{"params": params[:2]}, {"params": params[2:], "variant": "2p", "p": 3.0, "lr": 0.1}]
        return params, Stacey(groups, p=2.8, seed=5, **settings)

    (ours, optimizer), (plain, expected) = made(device), made("cpu", fused=False)
    kept = []  # so that the next gradients lie elsewhere
    for step in range(3):
        for number, (one, other) in enumerate(zip(ours, plain, strict=True)):
            missing = number == step
            gradient = torch.randn(one.shape, generator=torch.Generator().manual_seed(10 * step + number))
            kept.append(one.grad)
            one.grad, other.grad = (None, None) if missing else (gradient.to(device), gradient.clone())
        optimizer.step()
        expected.step()
    for one, other in zip(ours, plain, strict=True):
        assert torch.equal(one.cpu(), other)
        for key, value in expected.state[other].items():
            assert torch.equal(optimizer.state[one][key].cpu(), value), key


def test_the_capturable_class_in_a_graph(on_device, monkeypatch):
    device, kernel = on_device
    monkeypatch.setattr(base, "kernel", lambda device_type: kernel)
    if device == "cpu":  # where the class refuses it
        monkeypatch.setattr(Stacey, "_check_capturable", lambda self, group: group.update(fused=True))
    settings = dict(p=2.8, seed=5, lr_reference=0.013)
    param, plain = (torch.nn.Parameter(torch.linspace(-0.1, 0.1, 1025, device=where)) for where in (device, "cpu"))
    optimizer = Stacey([param], lr=torch.tensor(0.013, device=device), capturable=True, **settings)
    expected = Stacey([plain], fused=False, **settings)
    param.grad = torch.zeros_like(param)
    replay = optimizer.step  # the first one makes the states
    for step in range(21 if device == "cuda" else 3):
        plain.grad = torch.randn(1025, generator=torch.Generator().manual_seed(step))
        param.grad.copy_(plain.grad)
        lr = optimizer.param_groups[0]["lr"].fill_(0.013 / (1 + step))
        expected.param_groups[0]["lr"] = float(lr)
        replay()
        expected.step()
        if step == 0:
            replay = recorded(device, optimizer.step)
    assert torch.equal(param.cpu(), plain)
    for key, value in expected.state[plain].items():
        assert torch.equal(optimizer.state[param][key].cpu(), value), key


def tables_of(kernel, rows):
    return kernel._tables[torch.device("cpu"), rows[0].weight.data_ptr()]


SIZES = (1, 0, 1024, 3000, 7, 1025)


def test_one_launch_updates_many_tensors_and_later_ones_send_what_has_moved(kernel, monkeypatch):
    """Entries of one and of several blocks; gradients that move, as they do where they are made anew in each step."""
    module = sys.modules[type(kernel).__module__]
    sent, copy = [], type(kernel)._copy
    monkeypatch.setattr(
        type(kernel), "_copy", lambda self, host, there: (sent.append(host.size), copy(self, host, there))
    )
    for empty in (1 / 16, 1.0):
        monkeypatch.setattr(module, "_EMPTY", empty)
        kernel._tables.clear()
        rows = [make_row(n, F32, F32, BF16, step=float(n % 5)) for n in SIZES]
        ours = [copied(row) for row in rows]
        call = Call(settings_of("p2", 2.8), stochastic=True, seed=3)
        tables = []
        for launch in range(4):
            if launch > 1:
                ours = [row._replace(gradient=(row.gradient * 1.5).clone()) for row in ours]
            if launch == 3:
                ours = [row._replace(z=row.z.clone()) for row in ours]
            expected = [plainly(row, call, step=int(row.step) + 1) for row in ours]
            sent.clear()
            kernel(ours, call)
            for row, same in zip(ours, expected, strict=True):
                assert_same_bits(same, row)
            tables.append(tables_of(kernel, ours))
            assert [float(row.step) for row in ours] == [n % 5 + launch + 1 for n in SIZES]
            # Header, columns and blocks; then step counts, those and gradients, and all up to z. In one copy.
            assert sent == [[4, *[len(tables[0].block_rows)] * 2, 7 * 6], [6], [2 * 6], [4 * 6]][launch]
        assert tables[0] is tables[1] is tables[2] is tables[3]
        # Each of the 8 blocks by itself, or two by two.
        assert (len(tables[0].block_rows), tables[0].programs) == ((8, 8) if empty < 1 else (6, 12))
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
    """A replay fills and reads them, whoever launches meanwhile."""
    module = sys.modules[type(kernel).__module__]
    monkeypatch.setattr(kernel, "_tables", {})  # those of tests before may have been of a weight at the same address
    rows, call = [make_row(9, F32, F32, BF16)], Call(settings_of("p2", 2.8), True, 3, capturable=True)

    def capture():
        with monkeypatch.context() as patch:
            patch.setattr(module, "is_capturing", lambda: True)
            kernel(rows, call)
        return kernel._captured[-1]  # kept for the graph's life

    first = capture()
    assert kernel._tables == {}
    kernel(rows, call)
    eager = tables_of(kernel, rows)
    second = capture()
    assert len({id(tables.table) for tables in (first, eager, second)}) == 3
    assert tables_of(kernel, rows) is eager
    before = [first.table.clone(), second.table.clone()]
    kernel([rows[0]._replace(gradient=rows[0].gradient.clone())], call)
    assert tables_of(kernel, rows) is eager
    assert torch.equal(first.table, before[0])  # what the graphs read stays as it is
    assert torch.equal(second.table, before[1])


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


def test_a_kernel_for_gpus_needs_a_compiler(monkeypatch):
    with triton_module(interpreted=False) as module:

        def fail(_):
            raise RuntimeError("Failed to find C compiler")

        monkeypatch.setattr(module.triton.runtime.driver, "_active", None, raising=False)
        monkeypatch.setattr(type(module.triton.runtime.driver), "active", property(fail))
        with pytest.raises(NoKernelError, match="Triton cannot compile here: RuntimeError: Failed to find C compiler"):
            module.find.__wrapped__()


def test_a_kernel_for_gpus_needs_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "stacey_dist.optim.kernels.triton", raising=False)
    with pytest.raises(NoKernelError, match="the kernel for GPUs needs triton, which can't be imported"):
        kernels.find("cuda")
    with pytest.raises(NoKernelError, match="no kernel is written for devices of type mps"):
        kernels.find("mps")
