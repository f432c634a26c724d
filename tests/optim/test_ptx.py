"""What Triton compiles for GPUs, executed on the CPU (see ptx.py): the plain rule's bits. No GPU is needed.

This is what a launch compiles on a GPU: it goes through the same tables and arguments, only the last call is another.
"""

import dataclasses
import math

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from stacey_dist.optim.kernels import Call, Row
from tests.optim.conftest import triton_before, triton_module
from tests.optim.kernel_cases import (
    BF16,
    F32,
    KINDS,
    OTHER_SETTINGS,
    assert_same_bits,
    copied,
    make_row,
    plainly,
    settings_of,
)
from tests.optim.ptx import AccessError, Executable, UnknownCodeError

pytestmark = pytest.mark.slow

# Vectors of 16 bytes where all addresses and sizes allow it, single elements otherwise; tails of blocks in both.
ALIGNED, UNALIGNED = (2056, 0, 8, 1024), (1500, 0, 1, 1025, 7)
NUMBERS, ON_DEVICE = False, True  # where the learning rate, an overflow and step counts are
# compute capability, variant, p, index of KINDS, sizes, capturable, other settings: every road through the kernel, and
# on each GPU every variant, vectors and single elements, float32 and bfloat16
CASES = [
    (90, "p2", 2.0, 0, ALIGNED, NUMBERS, {}),
    (90, "p2", 2.8, 2, ALIGNED, ON_DEVICE, {}),
    (90, "p2", 3.0, 1, UNALIGNED, ON_DEVICE, {}),
    (90, "p2", math.inf, 3, UNALIGNED, NUMBERS, OTHER_SETTINGS),
    (90, "pp", 2.8, 0, ALIGNED, NUMBERS, {}),
    (90, "2p", 8.0, 1, UNALIGNED, ON_DEVICE, {}),
    (90, "pp", 2.0, 2, UNALIGNED, NUMBERS, OTHER_SETTINGS),
    (80, "p2", 2.8, 0, ALIGNED, NUMBERS, {}),
    (80, "pp", 3.0, 2, UNALIGNED, ON_DEVICE, {}),
    (100, "p2", 2.8, 2, UNALIGNED, ON_DEVICE, {}),
    (100, "pp", 2.8, 0, ALIGNED, NUMBERS, {}),
]


class OnCpu:
    """Takes the place of a Triton function: it is compiled for a GPU as in a launch there, and its PTX runs here."""

    def __init__(self, function):
        self.function = function
        self.sm = 90
        self.memory = []
        """What the kernel is led to by the addresses in its tables."""
        self.edit = lambda code: code
        self.executables = {}

    # What Triton asks a driver while it compiles; each compute capability is a device of its own.
    def get_current_target(self):
        return GPUTarget("cuda", self.sm, 32)

    def get_current_device(self):
        return self.sm

    def get_current_stream(self, device):
        return 0

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            driver.set_active(self)
            compiled = self.function.warmup(*arguments, grid=grid, **options)
            assert compiled.asm["cubin"]  # ptxas took it
            self.code = code = self.edit(compiled.asm["ptx"])
            if code not in self.executables:
                self.executables[code] = Executable(code)
            self.executables[code](grid[0], arguments, self.memory)

        return launch


@pytest.fixture(scope="module")
def kernel():
    if triton_before(3, 6):
        pytest.skip("the code of Triton before 3.6 was not looked at")
    with triton_module(interpreted=False) as module:
        found = module.TritonKernel()
        found.module, found.compiled = module, OnCpu(module.stacey_step)
        module.stacey_step = found.compiled
        module._EMPTY = 4  # so that entries have several blocks, and some programs none
        yield found
    if torch.cuda.is_available():
        driver.reset_active()


def placed(row, offset):
    """A copy of a row, each tensor so many elements behind an address that is a multiple of 64."""
    tensors = []
    for tensor in row[:4]:
        space = torch.zeros(offset + tensor.numel(), dtype=tensor.dtype)
        tensors.append(space[offset:].copy_(tensor))
    return Row(*tensors, row.step.clone())


def launch(kernel, sm, rows, call):
    """As on a GPU of this compute capability."""
    kernel.compiled.sm = sm
    kernel.compiled.memory = [tensor for row in rows for tensor in row]
    kernel(rows, call)


@pytest.mark.parametrize(("sm", "variant", "p", "kind", "sizes", "on_device", "changes"), CASES)
def test_the_bits_of_the_plain_rule(kernel, sm, variant, p, kind, sizes, on_device, changes):
    weight, gradient, state, stochastic, scale = KINDS[kind]
    rows = [make_row(n, weight, gradient, state, step=float(n % 5)) for n in sizes]
    s = settings_of(variant, p, **changes)
    scale_tensor = None if scale is None else torch.tensor([scale])
    given = call = Call(s, stochastic, seed=2**40 + 7, grad_scale=scale_tensor)
    if on_device:
        there = dict(capturable=True, lr=torch.tensor(s.lr), found_inf=torch.zeros(1))
        given = dataclasses.replace(call, settings=dataclasses.replace(s, lr=0.0), **there)
    ours = [placed(row, offset=int(sizes is UNALIGNED)) for row in rows]
    for launched in (1, 2):  # the second one uses the tables of the first
        expected = [plainly(row, call, step=int(row.step) + 1) for row in ours]
        launch(kernel, sm, ours, given)
        for n, same, row in zip(sizes, expected, ours, strict=True):
            assert_same_bits(same, row, n)
            assert row.step == n % 5 + launched
    assert ("ld.global.v4.b32" in kernel.compiled.code) == (sizes is ALIGNED)
    if on_device:
        given.found_inf.fill_(1.0)
        before = [copied(row) for row in ours]
        launch(kernel, sm, ours, given)
        for old, row in zip(before, ours, strict=True):
            assert_same_bits((old.weight, old.z, old.m), row)
            assert row.step == old.step


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("setp.lt.s64", "setp.ge.s64", AccessError),  # the mask
        ("sub.rn.f32", "add.rn.f32", AssertionError),
        ("div.rn.f32", "mul.rn.f32", AssertionError),
        ("shr.u64", "shl.b64", AssertionError),  # of the rounding's key
        ("fma.rn.f32", "fma.rz.f32", UnknownCodeError),
        ("div.rn.f32", "div.full.f32", UnknownCodeError),
        ("add.rn.f32", "add.rn.ftz.f32", UnknownCodeError),
    ],
)
def test_other_code_is_found(kernel, monkeypatch, old, new, error):
    def edit(code):
        assert old in code
        return code.replace(old, new)

    monkeypatch.setattr(kernel.compiled, "edit", edit)
    row = make_row(1100, F32, F32, BF16)
    call = Call(settings_of("p2", 2.8), stochastic=True, seed=3)
    ours = placed(row, offset=1)
    with pytest.raises(error):  # noqa: PT012
        launch(kernel, 90, [ours], call)
        assert_same_bits(plainly(row, call, step=1), ours)


def test_a_vector_at_an_odd_address_is_found(kernel, monkeypatch):
    """A GPU ends the program there. The tables are to see it: here they say that all is well."""
    ours = placed(make_row(1024, F32, F32, BF16), offset=1)
    call = Call(settings_of("p2", 2.8), stochastic=True, seed=3)
    launch(kernel, 90, [ours], call)
    monkeypatch.setattr(kernel.module._Tables, "are_aligned", True)
    with pytest.raises(AccessError):
        launch(kernel, 90, [ours], call)
