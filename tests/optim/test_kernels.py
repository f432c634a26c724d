"""The C++ kernel: the plain rule's bits on every instruction set, wherever an element lies, and what it refuses."""

import copy
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stacey_dist import Stacey
from stacey_dist.optim import base, kernels
from stacey_dist.optim.kernels import Call, NoKernelError, Row, cpu
from stacey_dist.optim.rule import StaceySettings, stacey_update
from stacey_dist.optim.stacey import Store
from tests.optim.helpers import make_problem, run

SETS = [*cpu.INSTRUCTION_SETS.values(), cpu.PORTABLE]
HERE = SETS[[name for _, name in SETS].index(cpu.find().name.removeprefix("C++ for ")) :]  # this processor's, and less
PS = [2.0, 2.2, 2.8, 3.0, 3.5, 4.0, 8.0, 16.0, 64.0, math.inf]
CASES = [(variant, p) for variant in ("p2", "pp", "2p") for p in PS if variant == "p2" or p != math.inf]
BF16, F32 = torch.bfloat16, torch.float32


def settings_of(variant, p, **changes):
    numbers = dict(lr=0.01, alpha=0.03, tau=1e-3, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1) | changes
    numbers["lr"] = float(torch.tensor(numbers["lr"]))
    return StaceySettings(p=p, variant=variant, **numbers)


def any_bits(count, seed):
    """Numbers over the whole range of float32, with many zeros and subnormal ones, infinities and NaN."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return torch.randint(low, high, (count,), generator=generator).to(torch.int32)

    chosen = torch.randint(0, 20, (count,), generator=generator)
    bits = draw(-(2**31), 2**31)
    bits = torch.where(chosen == 0, draw(0, 2) << 31, bits)  # 0 and -0
    bits = torch.where(chosen == 1, draw(1, 2**23) | (draw(0, 2) << 31), bits)
    bits = torch.where(chosen == 2, (draw(0, 2) << 31) | 0x7F800000, bits)
    bits = torch.where(chosen == 3, torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001])[draw(0, 4)].int(), bits)
    return bits.view(torch.float32)


def numbers(count, seed, size):
    """Half of any bits, half as runs have them."""
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.cat([any_bits(count // 2, seed), torch.randn(count - count // 2, generator=generator) * size])


def element_bits(tensor):
    """The bits as integers, one pattern for all NaN."""
    tensor = tensor.clone()
    tensor[tensor.isnan()] = math.nan
    return tensor.reshape(-1).view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def plainly(row, call, step):
    """What the plain rule makes of copies."""
    weight, gradient, z, m = (t.clone() for t in row[:4])
    g = gradient.float() if call.inverse_scale is None else gradient.float() * call.inverse_scale
    new = stacey_update(weight.float(), g, z.float(), m.float(), call.settings)
    store = Store("stochastic" if call.stochastic else "nearest", call.seed, step)
    store.states(z, m, *new[1:])
    store.weight(weight, new[0], g)
    return weight, z, m


def copied(row):
    return Row(*(t.clone() for t in row))


@pytest.mark.parametrize(
    ("weight", "gradient", "state", "stochastic", "scale"),
    [
        (F32, F32, BF16, True, None),
        (F32, BF16, F32, True, 0.37),
        (BF16, BF16, BF16, True, None),
        (BF16, F32, BF16, False, None),
    ],
)
@pytest.mark.parametrize(("variant", "p"), CASES)
def test_the_bits_of_the_plain_rule(variant, p, weight, gradient, state, stochastic, scale):
    count = 60_001
    row = Row(
        numbers(count, 1, 0.02).to(weight), numbers(count, 2, 1.0).to(gradient),
        numbers(count, 3, 0.02).to(state), numbers(count, 4, 0.1).to(state), torch.tensor(6.0),
    )  # fmt: skip
    for changes in ({}, dict(beta1=0.2, beta2=0.0, alpha=0.0, tau=0.3, eps=0.0, weight_decay=0.0)):
        call = Call(settings_of(variant, p, **changes), stochastic, seed=2**40 + 7, inverse_scale=scale)
        expected = plainly(row, call, step=7)
        assert torch.isfinite(expected[0]).float().mean() > 0.4  # not all has become NaN
        for instruction_set in HERE:
            ours = copied(row)
            cpu.CpuKernel(*instruction_set)([ours], call)
            for name, a, b in zip("wzm", expected, (ours.weight, ours.z, ours.m), strict=True):
                different = (element_bits(a) != element_bits(b)).nonzero().flatten()
                assert len(different) == 0, (instruction_set, name, different[:5], [t[different[:5]] for t in row[:4]])
            assert ours.step == 7


@st.composite
def placements(draw):
    count = draw(st.integers(1, 700))
    cuts = sorted(draw(st.lists(st.integers(0, count), max_size=5)))
    offsets = draw(st.lists(st.integers(0, 33), min_size=6, max_size=6))
    return count, [0, *cuts, count], offsets


@settings(max_examples=60, deadline=None)
@given(
    placement=placements(),
    case=st.sampled_from([("p2", 2.8), ("p2", 3.0), ("p2", math.inf), ("pp", 2.8), ("2p", 8.0)]),
    weight=st.sampled_from([F32, BF16]),
    instruction_set=st.sampled_from(HERE),
    threads=st.integers(1, 4),
)
def test_an_element_gets_the_same_bits_wherever_it_lies(placement, case, weight, instruction_set, threads):
    count, cuts, offsets = placement
    whole = Row(
        numbers(count, 1, 0.02).to(weight), numbers(count, 2, 1.0), numbers(count, 3, 0.02).to(BF16),
        numbers(count, 4, 0.1).to(BF16), torch.tensor(0.0),
    )  # fmt: skip
    pieces = []
    for offset, start, stop in zip(offsets, cuts, cuts[1:], strict=False):
        tensors = []
        for tensor in whole[:4]:  # each piece at an address of its own
            space = torch.zeros(offset + stop - start, dtype=tensor.dtype)
            space[offset:] = tensor[start:stop]
            tensors.append(space[offset:])
        pieces.append(Row(*tensors, torch.tensor(0.0)))
    call = Call(settings_of(*case), stochastic=True, seed=3, inverse_scale=None)
    kernel = cpu.CpuKernel(*instruction_set)
    before = torch.get_num_threads()
    try:
        kernel([whole], call)
        torch.set_num_threads(threads)
        kernel(pieces, call)
    finally:
        torch.set_num_threads(before)
    for index in (0, 2, 3):
        assert torch.equal(element_bits(torch.cat([p[index] for p in pieces])), element_bits(whole[index]))


@pytest.mark.parametrize("threads", [2, 3, 4])
def test_threads_share_many_tensors_without_a_trace(threads):
    sizes = [50_000, 1, 0, 33, 70_001, 12, 1000]
    rows = [
        Row(
            numbers(n, 1, 0.02), numbers(n, 2, 1.0), numbers(n, 3, 0.02).to(BF16), numbers(n, 4, 0.1).to(BF16),
            torch.tensor(float(i)),
        )
        for i, n in enumerate(sizes)
    ]  # fmt: skip
    call = Call(settings_of("p2", 2.8), stochastic=True, seed=0, inverse_scale=None)
    before = torch.get_num_threads()
    outcomes = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            outcomes.append([copied(row) for row in rows])
            cpu.find()(outcomes[-1], call)
    finally:
        torch.set_num_threads(before)
    for i, (alone, shared) in enumerate(zip(*outcomes, strict=True)):
        assert alone.step == shared.step == i + 1
        for a, b in zip(alone[:4], shared[:4], strict=True):
            assert torch.equal(element_bits(a), element_bits(b))


@pytest.mark.parametrize(("variant", "p"), CASES)
def test_error_of_a_step_in_units_in_the_last_place(variant, p):
    """Against the rule in float64: ordinary numbers, states in float32."""
    count = 200_000
    generator = torch.Generator().manual_seed(0)
    theta, z = (torch.randn(count, generator=generator) * 0.02 for _ in range(2))
    g = torch.randn(count, generator=generator) * torch.logspace(-8, 1, count)
    m = torch.randn(count, generator=generator) * torch.logspace(-8, 1, count)
    s = settings_of(variant, p)
    expected = stacey_update(*(t.double() for t in (theta, g, z, m)), s)
    ours = Row(theta.clone(), g, z.clone(), m.clone(), torch.tensor(0.0))
    cpu.find()([ours], Call(s, stochastic=True, seed=0, inverse_scale=None))
    for name, result, exact, old in (
        ("weight", ours.weight, expected[0], theta), ("z", ours.z, expected[1], z), ("m", ours.m, expected[2], m)
    ):  # fmt: skip
        # The unit is of the largest number in the sum: what cancels has been rounded before.
        scale = torch.maximum(exact.abs(), old.abs().double()) if name != "m" else torch.maximum(m.abs(), g.abs())
        if name == "z" and variant != "p2":
            # Where the two terms of u nearly cancel, z' is a root of their rounding errors.
            size = torch.maximum(z.abs().double(), (s.alpha * expected[2].abs().clamp(min=g.abs())) ** (1 / (p - 1)))
            scale = torch.where(exact.abs() < 0.5 * size, size * 1e3, size)
        unit = torch.exp2(torch.floor(torch.log2(scale.double()))) * 2.0**-23
        error = ((result.double() - exact).abs() / unit).max().item()
        # Half a unit of the last addition, and what the step itself has of error: up to 2e-6 of it, which may be as
        # large as the weight.
        assert error <= {"weight": 12, "z": 2 if variant == "p2" else 20, "m": 1.5}[name], (name, error)


def test_the_class_takes_the_kernel_and_gives_the_plain_rules_bits():
    theta, gradients = make_problem(size=3001, steps=6)
    for variant, p in CASES:
        outcomes = [
            run(Stacey, theta.view(1, -1), gradients[:, None], variant=variant, p=p, fused=fused, seed=5)
            for fused in (False, None, True)
        ]
        for param, state in outcomes[1:]:
            assert torch.equal(param, outcomes[0][0])
            assert all(torch.equal(state[key], outcomes[0][1][key]) for key in ("z", "m", "step"))


def test_no_launch_for_what_the_kernel_cannot_take(monkeypatch):
    seen = []

    class Spy:
        def __call__(self, rows, call):
            seen.extend(rows)
            cpu.find()(rows, call)

    monkeypatch.setattr(base, "kernel", lambda device_type: Spy())
    shapes = {
        "flat": torch.randn(7),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "strided": torch.randn(6, 4)[:, ::2],
        "float16": torch.randn(5).half(),
        "float64": torch.randn(5, dtype=torch.float64),
        "empty": torch.randn(0, 3),
        "other order": torch.randn(4, 6),
    }
    params = {name: torch.nn.Parameter(t) for name, t in shapes.items()}
    plain = {name: torch.nn.Parameter(t.clone(memory_format=torch.preserve_format)) for name, t in shapes.items()}
    optimizers = [Stacey(params.values()), Stacey(plain.values(), fused=False)]
    for _ in range(2):
        for name, p in params.items():
            p.grad = torch.randn(p.shape, dtype=p.dtype)
            if name == "channels_last":
                p.grad = p.grad.to(memory_format=torch.channels_last)
            if name == "other order":
                p.grad = p.grad.t().contiguous().t()
            plain[name].grad = p.grad.clone(memory_format=torch.preserve_format)
        for optimizer in optimizers:
            optimizer.step()
    assert [row.weight.shape for row in seen] == [params[n].shape for n in ("flat", "channels_last", "empty")] * 2
    for name in shapes:
        assert torch.equal(params[name], plain[name]), name


def test_fused_that_cannot_be_had(monkeypatch):
    def parameter(dtype=F32, device="cpu"):
        return torch.nn.Parameter(torch.ones(4, 6, dtype=dtype, device=device))

    assert Stacey([parameter()], fused=True)._step_supports_amp_scaling
    with pytest.raises(RuntimeError, match=r"fused=True, but torch.float16 is neither float32 nor bfloat16"):
        Stacey([parameter(torch.float16)], fused=True)
    with pytest.raises(RuntimeError, match=r"fused=True, but torch.float64 is neither"):
        Stacey([parameter()], fused=True, state_dtype="float64")
    param = parameter()
    optimizer = Stacey([param], fused=True)
    param.grad = torch.ones(6, 4).t()
    with pytest.raises(
        RuntimeError, match=r"fused=True, but a parameter of shape \(4, 6\) has its elements in another"
    ):
        optimizer.step()
    assert torch.equal(param, torch.ones(4, 6))
    monkeypatch.setattr(kernels, "find", missing)
    with pytest.raises(RuntimeError, match="fused=True, but no compiler was there; use fused=None"):
        Stacey([parameter()], fused=True)


def missing(device_type):
    raise NoKernelError("no compiler was there")


def test_without_a_kernel_the_plain_rule_runs_after_one_warning(monkeypatch):
    monkeypatch.setattr(kernels, "find", missing)
    base.kernel.cache_clear()
    theta, gradients = make_problem(size=50, steps=3)
    try:
        with pytest.warns(UserWarning, match="runs its plain rule, which is slower: no compiler was there") as caught:
            param, _ = run(Stacey, theta, gradients)
            run(Stacey, theta, gradients)
        assert len(caught) == 1
    finally:
        base.kernel.cache_clear()
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(run(Stacey, theta, gradients)[0], param)


def test_a_library_that_is_not_there_or_not_whole_is_named(tmp_path, monkeypatch):
    with pytest.raises(NoKernelError, match="kernel for avx9 was not compiled at installation; install a C"):
        cpu._path("avx9")
    broken = tmp_path / "_cpu_broken.so"
    broken.write_bytes(b"not a library")
    with pytest.raises(NoKernelError, match="_cpu_broken.so can't be loaded"):
        cpu._load(broken)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scale", [65536.0, 3.7])
def test_grad_scale_is_what_unscaling_before_is(fused, scale):
    theta, gradients = make_problem(size=700, steps=1)
    params = [torch.nn.Parameter(theta.clone()) for _ in range(2)]
    optimizers = [Stacey([p], fused=fused, p=2.8) for p in params]
    for p in params:
        p.grad = gradients[0] * scale
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(torch.zeros(()))  # makes its tensors
    params[1].grad.mul_(torch.tensor(scale).double().reciprocal().float())
    optimizers[1].step()
    optimizers[0].grad_scale, optimizers[0].found_inf = torch.tensor(scale), torch.zeros(1)
    optimizers[0].step()
    assert torch.equal(params[0], params[1])
    assert torch.equal(params[0].grad, gradients[0] * scale)  # not changed on the way
    before = params[0].detach().clone(), copy.deepcopy(optimizers[0].state[params[0]])
    optimizers[0].found_inf = torch.ones(1)
    optimizers[0].step()
    assert torch.equal(params[0], before[0])
    assert all(torch.equal(optimizers[0].state[params[0]][key], value) for key, value in before[1].items())


def test_the_gradient_scaler_hands_its_scale_to_a_fused_optimizer():
    theta, gradients = make_problem(size=700, steps=3)
    outcomes = []
    for fused in (False, True):
        param = torch.nn.Parameter(theta.clone())
        optimizer = Stacey([param], fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
        for step, g in enumerate(gradients):
            param.grad = None
            scaler.scale((param * g).sum()).backward()
            if step == 1:
                param.grad[3] = math.inf
            scaler.step(optimizer)
            scaler.update()
        outcomes.append((param.detach(), optimizer.state[param]["step"], scaler.get_scale()))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert outcomes[0][1:] == outcomes[1][1:]
    assert outcomes[0][1] == 2


def test_autograd_notices_that_a_weight_has_changed():
    param = torch.nn.Parameter(torch.ones(4))
    optimizer = Stacey([param], fused=True)
    kept = (param * param).sum()
    param.grad = torch.ones(4)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


def test_there_is_one_openmp_in_the_process():
    program = """
import torch
from stacey_dist import Stacey
torch.set_num_threads(2)
p = torch.nn.Parameter(torch.ones(100_000)); p.grad = torch.ones(100_000)
Stacey([p], fused=True).step()
print(len({line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rpartition("/")[2]}))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "1"


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"], ["-mavx2"], []])
def test_lengths_and_alignments_under_sanitizers(tmp_path, flags):
    if len(flags) > 0 and not any(flags[0].removeprefix("-m").startswith(name) for name, _ in HERE):
        pytest.skip(f"this processor has no {flags[0]}")
    program = tmp_path / "fuzz"
    source = Path(__file__).with_name("fuzz_cpu.cpp")
    compiler = ["g++", "-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized"]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-ffp-contract=off"]
    include = f"-I{Path(kernels.__file__).parent}"
    subprocess.run([*compiler, *sanitizers, *flags, include, "-o", program, source], check=True)
    result = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip() == "2000 rounds"
