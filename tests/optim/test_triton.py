"""The Triton kernel under Triton's interpreter, on the CPU: the plain rule's bits."""

import dataclasses
import os
import subprocess
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
    """A capture records that they are filled; until a replay they hold nothing."""
    module = sys.modules[type(kernel).__module__]
    monkeypatch.setattr(kernel, "_tables", {})  # those of tests before may have been of a weight at the same address
    rows, call = [make_row(9, F32, F32, BF16)], Call(settings_of("p2", 2.8), True, 3, capturable=True)
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
    monkeypatch.setattr(module, "_is_capturing", lambda device: False)
    before = eager.table.clone()
    kernel([rows[0]._replace(gradient=rows[0].gradient.clone())], call)
    assert torch.equal(eager.table, before)  # what the graph reads stays as it is
    assert tables_of(kernel, rows) is not eager


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


COMPILE = """
import re
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from stacey_dist.optim.kernels.triton import BLOCK, WARPS, compile_time_values, stacey_step
from tests.optim.kernel_cases import settings_of

POINTERS = dict(table="*i64", block_rows="*i32", block_numbers="*i64", rates="*fp64", scale="*fp32",
                found_inf="*fp32")
# Of an element: c and m' 2, log2 of c and of z 7 each, gap 1 + 3, ratio 4 + 1, its log2 6, growth 1 + 3 + 4 + 1, NaN 1,
# power 1 + 3 + 4 + 1 and NaN 1, coupling 2. A root takes the power's 10 away.
MULTIPLY_ADDS = {2.8: 53, 3.0: 43}
for capability in (80, 90):
    for p, on_device, dtype in ((2.8, False, torch.float32), (3.0, True, torch.bfloat16)):
        values = compile_time_values(
            settings_of("pp", p), dtype, dtype, torch.bfloat16, lr_on_device=on_device, has_scale=on_device,
            has_found_inf=on_device, aligned=not on_device,
        )
        signature = {n: POINTERS.get(n, "constexpr" if n in values else "fp32") for n in stacey_step.arg_names}
        compiled = triton.compile(
            ASTSource(fn=stacey_step, signature=signature, constexprs=values),
            target=GPUTarget("cuda", capability, 32), options=dict(num_warps=WARPS, enable_fp_fusion=False),
        )
        code = compiled.asm["ptx"]
        assert len(compiled.asm["cubin"]) > 1000
        assert not re.search(r"\\.ftz|\\.approx", code), "other bits than the plain rule's"
        fused = len(re.findall(r"fma\\.rn\\.f32", code)) * 32 * WARPS / BLOCK
        assert fused == MULTIPLY_ADDS[p], (fused, "multiply-adds are fused where the rule does not say so")
        assert "div.rn.f32" in code
        assert ("sqrt.rn.f32" in code) == (p == 3.0)
        assert ("ld.global.v4.b32" in code) == (not on_device)
print("compiled")
"""


@pytest.mark.slow
@pytest.mark.usefixtures("triton_compiler")
def test_it_compiles_for_gpus_without_what_would_change_bits():
    """No GPU is needed for that. Other multiply-adds than the rule's, flushed subnormals and approximations would."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert result.stdout == "compiled\n", result.stderr[-3000:]


def test_a_kernel_for_gpus_needs_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "stacey_dist.optim.kernels.triton", raising=False)
    with pytest.raises(NoKernelError, match="the kernel for GPUs needs triton, which can't be imported"):
        kernels.find("cuda")
    with pytest.raises(NoKernelError, match="no kernel is written for devices of type mps"):
        kernels.find("mps")
