"""`lr_reference`: tau and alpha follow a group's learning rate."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from stacey_dist import Stacey
from stacey_dist.optim.kernels import Call
from stacey_dist.optim.rule import MAX_LOG2_ALPHA, log2_in_parts, scale_with_lr
from tests.optim.helpers import make_problem, run
from tests.optim.kernel_cases import BF16, F32, assert_same_bits, make_row

VARIANTS = pytest.mark.parametrize("variant", ["p2", "pp", "2p"])
FUSED = pytest.mark.parametrize("fused", [None, False])
SETTINGS = dict(p=3.5, alpha=0.3, tau=0.2, betas=(0.5, 0.7))


def random_steps(optimizer, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


@VARIANTS
@FUSED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_lr_zero_freezes_weights_and_z_and_unfreezing_does_not_jump(variant, fused, dtype):
    param = nn.Parameter(torch.randn(301, generator=torch.Generator().manual_seed(1)).to(dtype))
    optimizer = Stacey([param], lr=0.01, lr_reference=0.01, variant=variant, fused=fused, weight_decay=0.1, **SETTINGS)
    random_steps(optimizer, 5)
    (group,), state = optimizer.param_groups, optimizer.state[param]
    before = param.detach().clone(), state["z"].clone(), state["m"].clone()
    group["lr"] = 0.0
    random_steps(optimizer, 20, seed=1)
    assert torch.equal(param, before[0])
    assert torch.equal(state["z"], before[1])
    assert not torch.equal(state["m"], before[2])  # the momentum goes on, as that of torch's AdamW does
    group["lr"] = 1e-7
    random_steps(optimizer, 1)
    assert (param.detach().float() - before[0].float()).abs().max() <= 1e-5 + 0.01 * (dtype is torch.bfloat16)


@VARIANTS
def test_without_a_reference_lr_zero_moves_as_in_the_paper(variant):
    theta, gradients = make_problem(size=31, steps=3)
    moved, _ = run(Stacey, theta, gradients, [0.01, 0.0, 0.0], variant=variant, **SETTINGS)
    stopped, _ = run(Stacey, theta, gradients[:1], [0.01], variant=variant, **SETTINGS)
    assert not torch.equal(moved, stopped)


@VARIANTS
@FUSED
def test_a_group_frozen_from_the_start_stays_as_it_is(variant, fused):
    params = [nn.Parameter(torch.linspace(-1, 1, 64)) for _ in range(2)]
    groups = [{"params": [params[0]], "lr": 0.0}, {"params": [params[1]]}]
    optimizer = Stacey(groups, lr=0.01, lr_reference=0.01, variant=variant, fused=fused, **SETTINGS)
    random_steps(optimizer, 10)
    assert torch.equal(params[0].detach(), torch.linspace(-1, 1, 64))
    assert not torch.equal(params[1].detach(), torch.linspace(-1, 1, 64))


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25, 8.0])
def test_it_is_the_rule_with_tau_and_alpha_in_proportion(share):
    theta, gradients = make_problem(size=501, steps=4)
    lr = 0.0625 * share
    tau = min(1.0, SETTINGS["tau"] * share)
    found, state = run(Stacey, theta, gradients, lr=lr, lr_reference=0.0625, **SETTINGS)
    expected, expected_state = run(
        Stacey, theta, gradients, lr=lr, **SETTINGS | dict(alpha=SETTINGS["alpha"] * share, tau=tau)
    )
    assert torch.equal(found, expected)
    assert torch.equal(state["z"], expected_state["z"])


@pytest.mark.parametrize("variant", ["pp", "2p"])
@pytest.mark.parametrize("share", [1.0, 0.3, 1e-6, 40.0])
def test_mirror_steps_are_those_of_the_smaller_alpha(variant, share):
    theta, gradients = make_problem(size=501, steps=3)
    settings = SETTINGS | dict(state_dtype=torch.float32)
    lr = float(torch.tensor(0.01 * share))
    found, state = run(Stacey, theta, gradients, lr=lr, lr_reference=0.01, variant=variant, **settings)
    in_proportion = dict(alpha=settings["alpha"] * lr / 0.01, tau=min(1.0, settings["tau"] * lr / 0.01))
    expected, expected_state = run(
        Stacey, theta.double(), gradients.double(), lr=lr, variant=variant,
        **settings | in_proportion | dict(state_dtype=torch.float64),
    )  # fmt: skip
    # A root of two terms that nearly cancel loses digits; most elements have nearly all of theirs.
    for a, b in ((found, expected), (state["z"], expected_state["z"])):
        error = (a.double() - b).abs() / b.abs().clamp(min=1e-3)
        assert error.median() < 1e-6
        assert error.max() < 1e-3


def layer_groups(model, lr, decay):
    """Return groups as timm's `param_groups_layer_decay` makes them: each layer's lr is a share of the next one's."""
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    return [
        {"params": list(layer.parameters()), "lr": lr * decay ** (len(layers) - 1 - depth)}
        for depth, layer in enumerate(layers)
    ]


def test_layer_wise_decay_slows_the_lower_layers_in_proportion():
    def movements(decay, lr_reference):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8))
        before = copy.deepcopy(model)
        settings = SETTINGS | dict(alpha=10.0)
        optimizer = Stacey(layer_groups(model, 1e-3, decay), lr_reference=lr_reference, **settings)
        random_steps(optimizer, 10)
        return [float((a.weight - b.weight).detach().norm()) for a, b in zip(model, before, strict=True)]

    even, followed, paper = movements(1.0, None), movements(0.1, 1e-3), movements(0.1, None)
    assert even[2] == followed[2]
    assert followed[0] < 0.02 * even[0]  # its lr is 0.01 of the last layer's
    assert paper[0] > 0.5 * even[0]  # where z drives the weights, their lr hardly matters


@VARIANTS
@pytest.mark.parametrize("schedule", ["linear", "cosine", "polynomial"])
def test_schedules_that_end_at_zero_come_to_rest(variant, schedule):
    param = nn.Parameter(torch.linspace(-1, 1, 64))
    optimizer = Stacey([param], lr=0.01, lr_reference=0.01, variant=variant, **SETTINGS)
    scheduler = {
        "linear": lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=10),
        "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
        "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 10),
    }[schedule](optimizer)
    sizes = []
    for seed in range(13):
        before = param.detach().clone()
        random_steps(optimizer, 1, seed)
        if seed < 10:
            scheduler.step()
        sizes.append(float((param.detach() - before).abs().max()))
    assert sizes[0] > 0
    assert sizes[-3:] == [0.0, 0.0, 0.0]
    assert optimizer.param_groups[0]["lr"] == 0.0


@VARIANTS
@FUSED
def test_tensor_lr_and_the_kernel_give_the_bits_of_the_plain_rule(variant, fused):
    theta, gradients = make_problem(size=2049, steps=5)
    lrs = [0.01, 0.007, 1e-9, 0.0, 0.02]
    settings = SETTINGS | dict(lr_reference=0.013, variant=variant, weight_decay=0.1)
    expected, state = run(Stacey, theta, gradients, lrs, fused=False, **settings)
    found, found_state = run(Stacey, theta, gradients, [torch.tensor(lr) for lr in lrs], fused=fused, **settings)
    assert torch.equal(found, expected)
    assert all(torch.equal(found_state[name], value) for name, value in state.items())


@VARIANTS
@pytest.mark.parametrize("lr", [0.01, 0.004, 1e-9, 0.0, 0.3])
def test_a_learning_rate_on_the_device_gives_the_same_bits(triton_kernel, variant, lr):
    """As `capturable` has it, under Triton's interpreter."""
    row = make_row(3_000, F32, F32, BF16)._replace(step=torch.tensor(4))  # with lr = 0, the first steps are others
    param = nn.Parameter(row.weight.clone())
    optimizer = Stacey([param], lr=lr, lr_reference=0.013, variant=variant, weight_decay=0.1, fused=False, **SETTINGS)
    (group,) = optimizer.param_groups
    optimizer.state[param] = {"z": row.z.clone(), "m": row.m.clone(), "step": torch.tensor(4)}
    param.grad = row.gradient.clone()
    optimizer.step()
    state = optimizer.state[param]
    call = Call(
        optimizer._settings({**group, "lr": 0.0, "lr_reference": None}, torch.float32), True, 0,
        capturable=True, lr=torch.tensor(lr), lr_reference=0.013,
    )  # fmt: skip
    triton_kernel([row], call)
    assert_same_bits((param.detach(), state["z"], state["m"]), row)


def test_the_share_is_exact_at_the_reference():
    values = scale_with_lr(torch.tensor([0.013], dtype=torch.float64), 0.013, 0.3, 0.2, torch.float32).tolist()
    assert values[:2] == [0.3, 0.2]
    assert 2 ** (values[2] + values[3]) == pytest.approx(0.3, rel=1e-15)


def test_a_state_dict_from_before_there_was_the_setting():
    param = nn.Parameter(torch.ones(3))
    optimizer = Stacey([param], lr_reference=0.5)
    random_steps(optimizer, 1)
    older = copy.deepcopy(optimizer.state_dict())
    del older["param_groups"][0]["lr_reference"]
    fresh = Stacey([nn.Parameter(torch.ones(3))])
    fresh.load_state_dict(older)
    assert fresh.param_groups[0]["lr_reference"] is None


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan"), "fast", True])
def test_bad_references(value):
    with pytest.raises(ValueError, match="Stacey: lr_reference="):
        Stacey([nn.Parameter(torch.ones(3))], lr_reference=value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [1.0, 0.3, 0.9999, 1.9999, 1e-6, 1e-40, 40.0, 2.0**-100])
@pytest.mark.parametrize("alpha", [0.3, 0.7, 1.0, 1.4, 1e-9])
def test_parts_of_the_logarithm_are_an_integer_and_at_most_a_half(dtype, share, alpha):
    lr = torch.tensor([share], dtype=torch.float64)
    alpha_now, _, whole, fraction = scale_with_lr(lr, 1.0, alpha, 0.1, dtype).tolist()
    assert whole == round(whole)
    assert abs(fraction) <= 0.5
    assert whole + fraction == pytest.approx(math.log2(alpha_now), abs=2e-7)  # log2_parts' error in float32


def test_the_logarithm_of_a_large_alpha_is_bounded_with_a_share_too():
    # More would exceed the exponents of float32 in the mirror step.
    *_, whole, fraction = scale_with_lr(
        torch.tensor([1e30], dtype=torch.float64), 1.0, 1e30, 0.1, torch.float32
    ).tolist()
    assert whole == MAX_LOG2_ALPHA
    assert abs(fraction) <= 0.5
    assert sum(log2_in_parts(1e60)) == MAX_LOG2_ALPHA
