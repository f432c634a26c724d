"""The generic cases of PyTorch's own optimizer tests, by its `OptimizerInfo`, for the optimizers here.

Each test here is named as the one of PyTorch's test/test_optim.py that checks the same; `DOES_NOT_APPLY` has the others
with the reason. The tests are written anew: PyTorch's are not installed with it.
"""

import copy
import io
import itertools

import pytest
import torch
from torch.nn import Parameter
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._pytree import tree_flatten

from stacey_dist import LpDescent, Stacey

DOES_NOT_APPLY = {
    "test_foreach_matches_forloop": "there is no foreach; kernels are compared with the plain rule in test_kernels.py",
    "test_foreach_large_tensor": "there is no foreach",
    "test_peak_memory_foreach": "there is no foreach; a step's memory is measured in test_torch_citizen.py",
    "test_set_default_dtype_works_with_foreach": "there is no foreach",
    "test_defaults_changed_to_foreach": "there is no foreach",
    "test_mixed_device_dtype": "there is no foreach; a group's dtypes are mixed in test_kernels.py",
    "test_fused_matches_forloop": "bit by bit in test_kernels.py",
    "test_fused_large_tensor": "needs more memory than a test may take",
    "test_fused_does_not_step_if_foundinf": "in test_kernels.py",
    "test_fused_error_on_params_on_meta": "in test_settings.py",
    "test_cuda_fused": "needs a GPU",
    "test_capturable": "needs a GPU; under Triton's interpreter in test_triton.py",
    "test_cudagraphs": "needs a GPU",
    "test_differentiable": "there is no differentiable: the update is in place and outside autograd",
    "test_maximize": "there is no maximize: negate the loss",
    "test_complex": "complex parameters are refused, see test_complex_is_refused",
    "test_complex_2d": "complex parameters are refused",
    "test_rosenbrock_sparse": "sparse gradients are refused, see test_sparse_is_refused",
    "test_sparse_unequal_shapes": "sparse gradients are refused",
    "test_second_order_optims_return_consistent_types": "first order only",
    "test_forloop_goes_right_direction_multigpu": "needs two GPUs",
    "test_state_dict_with_cuda_params": "needs a GPU",
    "test_load_state_dict_to_another_device": "needs a GPU",
}


EACH = pytest.mark.parametrize("info", ["p2", "pp", "2p", "lp_descent"], indirect=True)
SCALES = pytest.mark.parametrize("scale", [pytest.param(0.1, marks=pytest.mark.exhaustive), 1.0, 10.0])


@pytest.fixture
def info(request):
    from tests.optim.optimizer_info import OPTIM_DB

    return OPTIM_DB[request.param]


def made(info):
    """Yield the optimizer class with the settings of each input, which are new objects each time."""
    for optim_input in info.optim_inputs_func(device="cpu"):
        yield optim_input.desc, lambda params, i=optim_input: info.optim_cls(params, **copy.deepcopy(i.kwargs))


def problem(seed=0, contiguous=True, scale=1.0, dtype=torch.float32):
    """Return PyTorch's quadratic: weight (10, 5), bias (10,), and the closure's loss without the optimizer."""
    g = torch.Generator().manual_seed(seed)
    weight, bias, x = torch.randn(10, 5, 2, generator=g), torch.randn(10, 2, generator=g), torch.randn(5, generator=g)
    weight, bias = weight.to(dtype)[..., 0], bias.to(dtype)[..., 0]
    if contiguous:
        weight, bias = weight.contiguous(), bias.contiguous()
    weight, bias, x = Parameter(weight), Parameter(bias), x.to(dtype)
    return weight, bias, lambda: (weight.mv(x) + bias).pow(2).sum() * scale


def closure(optimizer, loss_of):
    def evaluate():
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        return loss

    return evaluate


def first_and_last_loss(optimizer, scheduler_inputs, loss_of):
    """Return the loss before and after 20 steps, each followed by one of every scheduler."""
    schedulers = [scheduler(optimizer) for scheduler in scheduler_inputs]
    evaluate = closure(optimizer, loss_of)
    first = evaluate().item()
    for _ in range(20):
        loss = optimizer.step(evaluate)
        for scheduler in schedulers:
            takes_loss = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
            scheduler.step(loss) if takes_loss else scheduler.step()
    return first, evaluate().item()


@EACH
@pytest.mark.parametrize(
    ("with_lrsched", "contiguous"),
    [(True, True), pytest.param(True, False, marks=pytest.mark.exhaustive), (False, True), (False, False)],
)
def test_forloop_goes_right_direction(info, contiguous, with_lrsched):
    for desc, make in made(info):
        for scheduler_inputs in info.scheduler_inputs if with_lrsched else ([],):
            weight, bias, loss_of = problem(contiguous=contiguous)
            optimizer = make([weight, bias])
            first, last = first_and_last_loss(optimizer, scheduler_inputs, loss_of)
            assert last < first, desc


@EACH
@SCALES
def test_defaults_go_right_direction_at_every_scale(info, scale):
    (_, make), *_ = made(info)
    for seed in range(5):
        weight, bias, loss_of = problem(seed, scale=scale)
        optimizer = make([weight, bias])
        evaluate = closure(optimizer, loss_of)
        first = evaluate().item()
        for _ in range(200):
            optimizer.step(evaluate)
        assert evaluate().item() < 0.95 * first


@EACH
@SCALES
@pytest.mark.parametrize("start", [(1.5, 1.5), (-1.2, 1.0)])
def test_defaults_on_rosenbrock(info, scale, start):
    if info.optim_cls is LpDescent:
        scale /= 100  # no momentum: its lr of 0.01 is too large a step in so narrow a valley
    (_, make), *_ = made(info)
    point = Parameter(torch.tensor(start))
    optimizer = make([point])
    evaluate = closure(optimizer, lambda: ((1 - point[0]) ** 2 + 100 * (point[1] - point[0] ** 2) ** 2) * scale)
    losses = [optimizer.step(evaluate).item() for _ in range(1000)]
    assert losses[-1] < 0.5 * losses[0]
    assert all(loss <= 3 * losses[0] for loss in losses)


@EACH
@SCALES
@pytest.mark.parametrize("hidden", [0, 16])
def test_defaults_on_linear_regression_and_a_small_network(info, scale, hidden):
    (_, make), *_ = made(info)
    torch.manual_seed(1)
    layers = [torch.nn.Linear(8, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 1)] if hidden else None
    model = torch.nn.Sequential(*layers) if layers else torch.nn.Linear(8, 1)
    x = torch.randn(64, 8)
    y = x @ torch.randn(8, 1) + 0.1 * torch.randn(64, 1)
    optimizer = make(model.parameters())
    evaluate = closure(optimizer, lambda: (model(x) - y).square().mean() * scale)
    losses = [optimizer.step(evaluate).item() for _ in range(400)]
    assert losses[-1] < 0.97 * losses[0]
    assert max(losses) <= 1.01 * losses[0]


@EACH
def test_param_group_with_lrscheduler_goes_right_direction(info):
    for scheduler_inputs in info.scheduler_inputs:
        weight, bias, loss_of = problem()
        optimizer = info.optim_cls([{"params": [weight]}, {"params": [bias], "lr": 0.01}], lr=0.001)
        first, last = first_and_last_loss(optimizer, scheduler_inputs, loss_of)
        assert last < first


@EACH
@pytest.mark.parametrize("num_dim", [0, 1, 2])
def test_tensor_lr(info, num_dim):
    results = []
    for lr in (0.002, torch.tensor(0.002).reshape((1,) * num_dim)):
        weight, bias, loss_of = problem()
        optimizer = info.optim_cls([weight, bias], lr=lr, weight_decay=0.1)
        evaluate = closure(optimizer, loss_of)
        for _ in range(5):
            optimizer.step(evaluate)
        results.append((weight.detach(), bias.detach()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@EACH
def test_errors(info):
    for error in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        assert error.error_on.name == "CONSTRUCTION_ERROR"
        i = error.optimizer_error_input
        context = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
        with context(error.error_type, match=error.error_regex):
            info.optim_cls(i.params, **i.kwargs)


@EACH
def test_complex_is_refused(info):
    assert not info.supports_complex
    with pytest.raises(ValueError, match=r"dtype torch\.complex64 is not supported"):
        info.optim_cls([Parameter(torch.ones(2, dtype=torch.complex64))])


@EACH
def test_sparse_is_refused(info):
    assert not info.supports_sparse
    param = Parameter(torch.ones(3))
    optimizer = info.optim_cls([param])
    param.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match=r"layout torch\.sparse_coo is not supported; use dense gradients"):
        optimizer.step()


@EACH
def test_param_groups_weight_decay(info):
    weight, bias, loss_of = problem()
    optimizer = info.optim_cls([{"params": [weight]}, {"params": [bias], "weight_decay": 0.5}], weight_decay=0.0)
    plain_weight, plain_bias, plain_loss_of = problem()
    plain = info.optim_cls([plain_weight, plain_bias])
    closure(optimizer, loss_of)(), closure(plain, plain_loss_of)()
    optimizer.step(), plain.step()
    assert torch.equal(weight, plain_weight)
    assert not torch.equal(bias, plain_bias)


@EACH
def test_param_groups_lr(info):
    weight, bias, loss_of = problem()
    first = weight.detach().clone(), bias.detach().clone()
    extra = {"tau": 0.0} if info.optim_cls is Stacey else {}  # z moves weights whatever lr is
    optimizer = info.optim_cls([{"params": [weight], "lr": 0.0}, {"params": [bias]}], lr=0.01, **extra)
    for _ in range(3):
        optimizer.step(closure(optimizer, loss_of))
    assert torch.equal(weight, first[0])
    assert not torch.equal(bias, first[1])


@EACH
def test_step_is_noop_when_params_have_no_grad(info):
    for desc, make in made(info):
        params = [Parameter(torch.ones(2, 3)) for _ in range(2)]
        optimizer = make(params)
        optimizer.step()
        assert all(torch.equal(p, torch.ones(2, 3)) for p in params), desc
        assert not optimizer.state


@EACH
def test_step_is_noop_for_zero_grads(info, request):
    for desc, make in made(info):
        if desc in ("weight_decay", "z from 0"):  # decay acts on every weight, and z at 0 draws each toward it
            continue
        param = Parameter(torch.linspace(-2, 2, 9).bfloat16().float())  # z, in bfloat16, is the weight itself
        before = param.detach().clone()
        optimizer = make([param])
        for _ in range(3):
            param.grad = torch.zeros_like(param)
            optimizer.step()
        if request.node.callspec.id in ("p2", "lp_descent"):
            assert torch.equal(param, before), desc
        else:  # c = 0 leaves z exactly as it is in a mirror step, too
            torch.testing.assert_close(param.detach(), before, rtol=0, atol=0, msg=desc)


@EACH
def test_optimizer_can_be_printed(info):
    for _, make in made(info):
        text = repr(make([Parameter(torch.ones(2))]))
        assert info.optim_cls.__name__ in text
        assert "lr: " in text


@EACH
def test_state_dict_deterministic(info):
    for desc, make in made(info):
        weight, bias, loss_of = problem()
        optimizer = make([weight, bias])
        for _ in range(5):
            optimizer.step(closure(optimizer, loss_of))
        saved = copy.deepcopy(optimizer.state_dict())
        other_weight, other_bias, other_loss_of = problem()
        other = make([other_weight, other_bias])
        other.load_state_dict(saved)
        with torch.no_grad():
            other_weight.copy_(weight), other_bias.copy_(bias)
        for _ in range(5):
            optimizer.step(closure(optimizer, loss_of)), other.step(closure(other, other_loss_of))
            assert torch.equal(weight, other_weight), desc
            assert torch.equal(bias, other_bias), desc
        assert_same_state(optimizer.state_dict(), other.state_dict())
        other.param_groups.extend(other.param_groups)  # repeated parameters have one number
        assert other.state_dict()["param_groups"][0]["params"] == other.state_dict()["param_groups"][-1]["params"]


def assert_same_state(a, b):
    (leaves, tree), (other_leaves, other_tree) = tree_flatten(a), tree_flatten(b)
    assert tree == other_tree
    for leaf, other in zip(leaves, other_leaves, strict=True):  # assert_close does not take text
        assert torch.equal(leaf, other) if isinstance(leaf, torch.Tensor) else leaf == other


@EACH
def test_can_load_older_state_dict(info):
    for flag in info.not_og_supported_flags:
        weight, bias, loss_of = problem()
        optimizer = info.optim_cls([weight, bias])
        optimizer.step(closure(optimizer, loss_of))
        older = copy.deepcopy(optimizer.state_dict())
        for group in older["param_groups"]:
            del group[flag]
        optimizer.load_state_dict(older)
        optimizer.step(closure(optimizer, loss_of))
        assert flag in optimizer.param_groups[0]


@EACH
@pytest.mark.parametrize(("named_before", "named_after"), itertools.product([False, True], repeat=2))
def test_can_load_from_to_named_state_dict(info, named_before, named_after):
    weight, bias, loss_of = problem()
    named = [("weight", weight), ("bias", bias)]
    optimizer = info.optim_cls(named if named_before else [weight, bias])
    optimizer.step(closure(optimizer, loss_of))
    other = info.optim_cls(named if named_after else [weight, bias])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.step(closure(other, loss_of))
    assert ("param_names" in other.param_groups[0]) == (named_before or named_after)  # loaded names are kept
    assert [int(state["step"]) for state in other.state.values()] == [2, 2]


@EACH
@pytest.mark.parametrize("weights_only", [True, False])
def test_save_load_equality_with_weights_only(info, weights_only):
    for _, make in made(info):
        weight, bias, loss_of = problem()
        optimizer = make([weight, bias])
        optimizer.step(closure(optimizer, loss_of))
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        assert_same_state(torch.load(file, weights_only=weights_only), optimizer.state_dict())


@EACH
def test_load_nontensor_step(info):
    weight, bias, loss_of = problem()
    optimizer = info.optim_cls([weight, bias])
    optimizer.step(closure(optimizer, loss_of))
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = state["step"].item()
    optimizer.load_state_dict(saved)
    optimizer.step(closure(optimizer, loss_of))
    assert all(state["step"] == 2 and isinstance(state["step"], torch.Tensor) for state in optimizer.state.values())


@EACH
def test_cpu_load_state_dict(info):
    weight, bias, loss_of = problem(dtype=torch.float64)
    optimizer = info.optim_cls([weight, bias])
    optimizer.step(closure(optimizer, loss_of))
    other_weight, other_bias, other_loss_of = problem(dtype=torch.float32)
    other = info.optim_cls([other_weight, other_bias])
    other.load_state_dict(optimizer.state_dict())
    other.step(closure(other, other_loss_of))
    assert all(state["step"].device.type == "cpu" for state in other.state.values())


@EACH
def test_step_hooks(info):
    weight, bias, loss_of = problem()
    optimizer = info.optim_cls([weight, bias])
    calls = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: calls.append("own pre")),
        register_optimizer_step_pre_hook(lambda *_: calls.append("global pre")),
        optimizer.register_step_post_hook(lambda *_: calls.append("own post")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global post")),
    ]
    optimizer.step(closure(optimizer, loss_of))
    for handle in handles:
        handle.remove()
    optimizer.step(closure(optimizer, loss_of))
    assert sorted(calls[:2]) == ["global pre", "own pre"]
    assert sorted(calls[2:]) == ["global post", "own post"]


@EACH
def test_state_dict_hooks(info):
    weight, bias, loss_of = problem()
    optimizer = info.optim_cls([weight, bias])
    optimizer.step(closure(optimizer, loss_of))
    calls = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("save pre"))
    optimizer.register_state_dict_post_hook(lambda o, d: calls.append("save post") or d)
    optimizer.register_load_state_dict_pre_hook(lambda o, d: calls.append("load pre") or d)
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("load post"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["save pre", "save post", "load pre", "load post"]


@EACH
def test_deepcopy_copies_all_public_attrs(info):
    for _, make in made(info):
        optimizer = make([Parameter(torch.ones(2))])
        public = {name for name in optimizer.__dict__ if not name.startswith("_")}
        assert public == {name for name in copy.deepcopy(optimizer).__dict__ if not name.startswith("_")}


@EACH
def test_non_empty_state(info):
    for _, make in made(info):
        weight, bias, loss_of = problem()
        optimizer = make([weight, bias])
        optimizer.step(closure(optimizer, loss_of))
        assert all(optimizer.state[param] for param in (weight, bias))


@EACH
def test_empty_grad(info):
    for _, make in made(info):
        param = Parameter(torch.empty(5, 0))
        optimizer = make([param])
        param.grad = torch.empty(5, 0)
        optimizer.step()
        assert param.shape == (5, 0)


@EACH
def test_grads_are_never_inplaced_into(info):
    for _, make in made(info):
        weight, bias, loss_of = problem()
        optimizer = make([weight, bias])
        closure(optimizer, loss_of)()
        before = weight.grad.clone(), weight.grad._version
        optimizer.step()
        assert torch.equal(weight.grad, before[0])
        assert weight.grad._version == before[1]


@EACH
def test_optim_infos_do_not_specify_global_cliquey_kwargs(info):
    for optim_input in info.optim_inputs_func(device="cpu"):
        assert not {"foreach", "differentiable"} & optim_input.kwargs.keys()


def test_each_case_is_run_or_has_a_reason():
    run = {name for name in globals() if name.startswith("test_")}
    assert not run & DOES_NOT_APPLY.keys()
    assert all(DOES_NOT_APPLY.values())
