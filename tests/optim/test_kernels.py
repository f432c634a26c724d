"""The C++ kernel: the plain rule's bits on every instruction set, wherever an element lies, and what it refuses."""

import copy
import math
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stacey_dist import LpDescent, Stacey
from stacey_dist.optim import base, kernels
from stacey_dist.optim.kernels import Call, NoKernelError, Row, cpu
from stacey_dist.optim.rule import stacey_update
from tests.optim.helpers import make_problem, run
from tests.optim.kernel_cases import (
    BF16,
    CASES,
    F32,
    KINDS,
    OTHER_SETTINGS,
    assert_same_bits,
    copied,
    element_bits,
    make_row,
    plainly,
    settings_of,
)

SETS = [*cpu.INSTRUCTION_SETS.values(), cpu.PORTABLE]
HERE = SETS[[name for _, name in SETS].index(cpu.find().name.removeprefix("C++ for ")) :]  # this processor's, and less


@pytest.mark.parametrize(("weight", "gradient", "state", "stochastic", "scale"), KINDS)
@pytest.mark.parametrize(("variant", "p"), CASES)
def test_the_bits_of_the_plain_rule(variant, p, weight, gradient, state, stochastic, scale):
    row = make_row(20_001, weight, gradient, state, step=6.0)
    # Betas that are below a half, and are not any more in float32.
    for changes in ({}, OTHER_SETTINGS, dict(beta1=0.49999999, beta2=0.49999999)):
        scale_tensor = None if scale is None else torch.tensor(scale)
        call = Call(settings_of(variant, p, **changes), stochastic, seed=2**40 + 7, grad_scale=scale_tensor)
        expected = plainly(row, call, step=7)
        assert torch.isfinite(expected[0]).float().mean() > 0.4  # not all has become NaN
        for instruction_set in HERE:
            ours = copied(row)
            cpu.CpuKernel(*instruction_set)([ours], call)
            assert_same_bits(expected, ours, instruction_set)
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
    whole = make_row(count, weight, F32, BF16)
    pieces = []
    for offset, start, stop in zip(offsets, cuts, cuts[1:], strict=False):
        tensors = []
        for tensor in whole[:4]:  # each piece at an address of its own
            space = torch.zeros(offset + stop - start, dtype=tensor.dtype)
            space[offset:] = tensor[start:stop]
            tensors.append(space[offset:])
        pieces.append(Row(*tensors, torch.tensor(0)))
    call = Call(settings_of(*case), stochastic=True, seed=3)
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
    rows = [make_row(n, F32, F32, BF16, float(i)) for i, n in enumerate(sizes)]
    call = Call(settings_of("p2", 2.8), stochastic=True, seed=0)
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
    """Against the rule in float64: ordinary weights, gradients of many sizes, states in float32."""
    count = 200_000
    generator = torch.Generator().manual_seed(0)
    theta, z = (torch.randn(count, generator=generator) * 0.02 for _ in range(2))
    g, m = (torch.randn(count, generator=generator) * torch.logspace(-8, 1, count) for _ in range(2))
    m = m.abs() * g.sign()  # c does not cancel: what is left would be its terms' rounding
    s = settings_of(variant, p)
    weight_new, z_new, m_new = stacey_update(*(t.double() for t in (theta, g, z, m)), s)
    ours = Row(theta.clone(), g, z.clone(), m.clone(), torch.tensor(0))
    cpu.find()([ours], Call(s, stochastic=True, seed=0))

    def errors(result, exact, terms):
        """Largest and mean error, in units in the last place of the largest number that is added."""
        unit = torch.exp2(torch.floor(torch.log2(terms.double()))) * 2.0**-23
        error = (result.double() - exact).abs() / unit
        return error.max().item(), error.mean().item()

    c = (s.beta1 * m.double() + (1 - s.beta1) * g.double()).abs()
    step = s.lr * (c if variant == "2p" else c ** (1 / (p - 1)))
    largest, mean = errors(ours.weight, weight_new, theta.abs() + step + s.tau * z_new.abs())
    assert largest <= 8
    assert mean <= 0.5
    assert errors(ours.m, m_new, torch.maximum(m.abs(), g.abs()))[0] <= 0.6
    if variant == "p2" or p == 2.0:
        assert errors(ours.z, z_new, z.abs() + s.alpha * c)[0] <= 2
        return
    # The mirror step takes a root of u, whose terms may nearly cancel; the mean is what counts.
    size = torch.maximum(z.abs().double(), (s.alpha * c) ** (1 / (p - 1)))
    kept = z_new.abs() > 0.1 * size
    assert kept.double().mean() > 0.8
    largest, mean = errors(ours.z[kept], z_new[kept], size[kept])
    assert largest <= 150
    assert mean <= 0.8


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
    with pytest.raises(RuntimeError, match=r"fused=True, but a parameter of shape \(4, 6\) has gaps, or another order"):
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
        with pytest.warns(UserWarning, match="plain rule, which is slower: no compiler was there"):
            param, _ = run(Stacey, theta, gradients)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(Stacey, theta, gradients)
    finally:
        base.kernel.cache_clear()
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(run(Stacey, theta, gradients)[0], param)


def test_a_library_that_is_not_there_not_whole_or_of_other_source_is_named(tmp_path, monkeypatch):
    with pytest.raises(NoKernelError, match=r"the C\+\+ kernel \(avx9\) was not compiled at installation; install a C"):
        cpu._find("_cpu_avx9")
    directory = tmp_path / "stacey_dist/optim/kernels"
    directory.mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    (directory / "_cpu_broken.so").write_bytes(b"not a library")
    with pytest.raises(NoKernelError, match=r"_cpu_broken\.so can't be loaded"):
        cpu._find("_cpu_broken")
    source = 'extern "C" { const char *stacey_source() { return "other"; } void stacey_step() {} }'
    (tmp_path / "other.cpp").write_text(source)
    library = directory / "_cpu_other.so"
    subprocess.run(["g++", "-shared", "-fPIC", tmp_path / "other.cpp", "-o", library], check=True)
    with pytest.raises(NoKernelError, match=rf"{library} was compiled from another version's source"):
        cpu._find("_cpu_other")


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


@pytest.mark.parametrize("make", [lambda p: Stacey(p, fused=False), Stacey, LpDescent], ids=["plain", "kernel", "lp"])
def test_scaled_gradients_are_divided_in_the_steps_within_alone(make):
    theta, gradients = make_problem(size=700, steps=2)
    params = [torch.nn.Parameter(theta.clone()) for _ in range(2)]
    scaled, before = (make([p]) for p in params)
    divisor = torch.tensor(3.7)
    params[0].grad, params[1].grad = gradients[0].clone(), gradients[0] * divisor.double().reciprocal().float()
    with scaled.scaled_gradients(divisor):
        scaled.step()
    before.step()
    assert torch.equal(params[0], params[1])
    assert torch.equal(params[0].grad, gradients[0])
    for param in params:
        param.grad = gradients[1]
    scaled.step()
    before.step()
    assert torch.equal(params[0], params[1])


def test_the_host_does_not_read_a_scale_that_a_kernel_reads(monkeypatch):
    class OnADevice(torch.Tensor):
        """Cannot be read."""

        def __float__(self):
            pytest.fail("the host waited for the device")

    theta, gradients = make_problem(size=70, steps=1)
    param = torch.nn.Parameter(theta)
    param.grad = gradients[0]
    monkeypatch.setattr(base, "kernel", lambda device_type: lambda rows, call: None)
    optimizer = Stacey([param])
    with optimizer.scaled_gradients(torch.tensor(2.0).as_subclass(OnADevice)):
        optimizer.step()
    optimizer = Stacey([param], fused=False)
    with pytest.raises(pytest.fail.Exception), optimizer.scaled_gradients(torch.tensor(2.0).as_subclass(OnADevice)):
        optimizer.step()


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
from stacey_dist import LpDescent, Stacey
torch.set_num_threads(2)
p = torch.nn.Parameter(torch.ones(100_000)); p.grad = torch.ones(100_000)
Stacey([p], fused=True).step()
print(len({line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rpartition("/")[2]}))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "1"


FLAGS = {"avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"], "avx2": ["-mavx2", "-mfma"], "portable": []}


@pytest.mark.slow
@pytest.mark.parametrize(
    "instruction_set",
    [pytest.param(name, marks=[] if name == HERE[0][0] else pytest.mark.exhaustive) for name, _ in HERE],
)
def test_lengths_and_alignments_under_sanitizers(tmp_path, instruction_set):
    source, include = Path(__file__).with_name("fuzz_cpu.cpp"), f"-I{Path(kernels.__file__).parent}"
    compiler = ["g++", "-std=c++17", "-O0", "-fwrapv", "-ffp-contract=off", "-Wall", "-Wextra"]
    quiet = ["-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-unknown-pragmas"]
    # Checks by calls, and once each, are compiled in half the time: AddressSanitizer finds what null and size would.
    quickly = ["-fno-sanitize=null,object-size", "--param", "asan-instrumentation-with-call-threshold=0"]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", *quickly]
    options = [*compiler, *quiet, *sanitizers, *FLAGS[instruction_set], include]
    subprocess.run([*options, "-o", tmp_path / "fuzz", source], check=True)
    result = subprocess.run([tmp_path / "fuzz", "200"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip() == "200 rounds"


@pytest.mark.exhaustive
@pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-g++") is None or shutil.which("qemu-aarch64-static") is None,
    reason="needs g++-aarch64-linux-gnu and qemu-user-static",
)
def test_the_bits_of_the_plain_rule_on_an_emulated_aarch64(tmp_path):
    source, include = Path(__file__).with_name("step_from_file.cpp"), f"-I{Path(kernels.__file__).parent}"
    compiler = [
        "aarch64-linux-gnu-g++",
        "-std=c++17",
        "-O3",
        "-fwrapv",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-static",
    ]
    subprocess.run([*compiler, include, "-o", tmp_path / "step", source], check=True)
    seen = []
    kernel = cpu.CpuKernel(*cpu.PORTABLE)
    kernel._step = lambda settings, *rest: seen.append(bytes(settings._obj))  # what the library would be called with
    for variant, p in CASES:
        for weight, gradient, state, stochastic, scale in KINDS:
            row = make_row(4_003, weight, gradient, state, step=6.0)
            scale_tensor = None if scale is None else torch.tensor(scale)
            call = Call(settings_of(variant, p), stochastic, seed=2**40 + 7, grad_scale=scale_tensor)
            tensors = [tensor.view(torch.uint8).numpy().tobytes() for tensor in row[:4]]
            size = row.weight.numel().to_bytes(8, "little")
            kernel([copied(row)], call)
            result = subprocess.run(
                ["qemu-aarch64-static", tmp_path / "step"],
                input=b"".join([seen[-1], size, *tensors]),
                capture_output=True,
                check=True,
            )
            ours, rest = copied(row), result.stdout
            for tensor in (ours.weight, ours.z, ours.m):
                count = tensor.numel() * tensor.element_size()
                tensor.copy_(torch.frombuffer(bytearray(rest[:count]), dtype=tensor.dtype))
                rest = rest[count:]
            assert rest == b""
            assert_same_bits(plainly(row, call, step=7), ours, variant, p)


@pytest.mark.parametrize("rows", [99, 101])
def test_states_of_another_shape_are_refused_before_a_kernel_goes_by_their_addresses(rows: int) -> None:
    """Written beyond their end, memory of others would be destroyed without a word."""
    param = torch.nn.Parameter(torch.ones(100, 4))
    optimizer = Stacey([param])
    param.grad = torch.ones_like(param)
    optimizer.step()
    saved = optimizer.state_dict()
    grown = torch.nn.Parameter(torch.ones(rows, 4))
    with pytest.raises(ValueError, match=rf"state z of parameter 0 has the shape \(100, 4\).*\({rows}, 4\)"):
        Stacey([grown]).load_state_dict(saved)
    param.data, param.grad = grown.data, torch.ones_like(grown)
    with pytest.raises(ValueError, match=r"must have one shape and device.*\(100, 4\)"):
        optimizer.step()
    assert torch.equal(param, torch.ones_like(param))
