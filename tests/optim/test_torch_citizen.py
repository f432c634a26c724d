"""The optimizers behave as torch.optim's own do: closures, schedulers, state dicts, DTensors, compiled models."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import lr_scheduler

from stacey_dist import LpDescent, Stacey
from stacey_dist.checkpoint import load_checkpoint, save_checkpoint
from stacey_dist.optim.memory import is_plain
from tests.optim.helpers import make_problem, run

BOTH = pytest.mark.parametrize("optimizer_class", [Stacey, LpDescent])


def make_model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(7, 13), torch.nn.Tanh(), torch.nn.Linear(13, 3)).to(dtype)


def train(model, optimizer, steps, seed=0, scheduler=None):
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        x = torch.randn(5, 7, generator=generator).to(dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def assert_equal_runs(a, b):
    (model_a, optimizer_a), (model_b, optimizer_b) = a, b
    for p, q in zip(model_a.parameters(), model_b.parameters(), strict=True):
        assert torch.equal(p, q)
        assert optimizer_a.state[p].keys() == optimizer_b.state[q].keys()
        for name, value in optimizer_a.state[p].items():
            assert value.dtype == optimizer_b.state[q][name].dtype, name
            assert torch.equal(value, optimizer_b.state[q][name]), name


def test_settings_differ_by_group():
    theta, gradients = make_problem(size=31, steps=4)
    settings = [
        dict(lr=0.1, p=2, weight_decay=0.5),
        dict(lr=0.01, p=8, variant="pp", state_dtype=torch.float32, rounding="nearest", z_init="zeros", seed=5),
    ]
    params = [torch.nn.Parameter(theta.clone()) for _ in settings]
    optimizer = Stacey([{"params": [p], **s} for p, s in zip(params, settings, strict=True)], tau=0.1)
    for g in gradients:
        for p in params:
            p.grad = g.clone()
        optimizer.step()
    for p, s in zip(params, settings, strict=True):
        expected, state = run(Stacey, theta, gradients, tau=0.1, **s)
        assert torch.equal(p, expected)
        assert torch.equal(optimizer.state[p]["z"], state["z"])


def test_add_param_group_in_the_middle_and_parameters_without_gradients():
    theta, gradients = make_problem(size=31, steps=6)
    first, second, frozen = (torch.nn.Parameter(theta.clone()) for _ in range(3))
    optimizer = Stacey([first, frozen])
    for index, g in enumerate(gradients):
        if index == 3:
            optimizer.add_param_group({"params": [second], "p": 4})
        first.grad, second.grad = g.clone(), g.clone()
        optimizer.step()
    assert torch.equal(frozen, theta)
    assert frozen not in optimizer.state
    assert optimizer.state[first]["step"] == 6
    assert optimizer.state[second]["step"] == 3
    assert torch.equal(second, run(Stacey, theta, gradients[3:], p=4)[0])


@BOTH
def test_a_refused_group_leaves_the_optimizer_as_it_was(optimizer_class):
    optimizer = optimizer_class([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match=r"p=1\.0"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "p": 1})
    assert len(optimizer.param_groups) == 1


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda s: 0.9**s),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda s: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "ConstantLR": lr_scheduler.ConstantLR,
    "LinearLR": lr_scheduler.LinearLR,
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "PolynomialLR": lr_scheduler.PolynomialLR,
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20, cycle_momentum=False),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(o, 0.9)]),
}


@pytest.mark.parametrize("lr", [0.02, torch.tensor(0.02)], ids=["number", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_drives_it(name, lr):
    theta, gradients = make_problem(size=31, steps=7)
    param = torch.nn.Parameter(theta.clone())
    optimizer = Stacey([param], lr=copy.deepcopy(lr))
    scheduler = SCHEDULERS[name](optimizer)
    lrs = []
    for g in gradients:
        lrs.append(float(optimizer.param_groups[0]["lr"]))
        param.grad = g.clone()
        optimizer.step()
        scheduler.step()
    assert len(set(lrs)) > 1
    assert torch.equal(param, run(Stacey, theta, gradients, lrs)[0])


@pytest.mark.parametrize("name", ["CyclicLR", "OneCycleLR"])
def test_cycle_momentum_changes_beta1_and_leaves_the_decay_of_m(name):
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = Stacey([param], betas=(0.9, 0.97))
    make = {
        "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, step_size_up=3),
        "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    }
    scheduler = make[name](optimizer)
    betas = []
    for _ in range(6):
        param.grad = torch.ones(3)
        optimizer.step()
        scheduler.step()
        betas.append(optimizer.param_groups[0]["betas"])
    assert len({beta1 for beta1, _ in betas}) > 2
    assert {beta2 for _, beta2 in betas} == {0.97}


def test_reduce_lr_on_plateau():
    model = make_model()
    optimizer = Stacey(model.parameters(), lr=0.1)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for _ in range(3):
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] < 0.1


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16])
def test_state_dict_keeps_dtypes_and_the_trajectory(param_dtype, state_dtype):
    model = make_model(param_dtype)
    optimizer = Stacey(model.parameters(), state_dtype=state_dtype, weight_decay=0.1)
    train(model, optimizer, 5)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = make_model(param_dtype, seed=1)
    # The new optimizer was even made with another state_dtype: the saved group's settings win, as in torch.
    other_optimizer = Stacey(other.parameters(), lr=1.0, state_dtype=torch.float64)
    other.load_state_dict(saved["model"])
    other_optimizer.load_state_dict(saved["optimizer"])
    assert all(s[k].dtype == state_dtype for s in other_optimizer.state.values() for k in ("z", "m"))
    assert all(s["step"].dtype == torch.int64 for s in other_optimizer.state.values())
    assert_equal_runs((model, optimizer), (other, other_optimizer))
    train(model, optimizer, 5, seed=1)
    train(other, other_optimizer, 5, seed=1)
    assert_equal_runs((model, optimizer), (other, other_optimizer))


def test_state_that_an_engine_widened_comes_back_narrow():
    model = make_model()
    optimizer = Stacey(model.parameters())
    train(model, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["z"], state["m"], state["step"] = state["z"].float(), state["m"].float(), int(state["step"])
    other = copy.deepcopy(model)
    other_optimizer = Stacey(other.parameters())
    other_optimizer.load_state_dict(saved)
    assert_equal_runs((model, optimizer), (other, other_optimizer))


def test_what_a_program_keeps_in_the_state_is_loaded_too():
    optimizer = Stacey(make_model().parameters())
    optimizer.state["program"] = {"seen": 3}
    other = Stacey(make_model().parameters())
    other.load_state_dict(optimizer.state_dict())
    assert other.state["program"] == {"seen": 3}


def test_the_state_dict_of_another_optimizer_is_refused_and_nothing_is_loaded():
    model = make_model()
    optimizer = Stacey(model.parameters(), lr=0.01, alpha=0.5)
    train(model, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    other_model = make_model()
    other = torch.optim.AdamW(other_model.parameters(), lr=0.1)
    train(other_model, other, 1)
    with pytest.raises(ValueError, match="has step, exp_avg, exp_avg_sq and not step, z, m: it is another optimizer's"):
        optimizer.load_state_dict(other.state_dict())
    bad = copy.deepcopy(before)
    bad["param_groups"][0]["tau"] = 2.0
    with pytest.raises(ValueError, match=r"tau=2\.0 is not allowed"):
        optimizer.load_state_dict(bad)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    for number, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(state[name], value) for name, value in before["state"][number].items())
    older = copy.deepcopy(before)
    del older["param_groups"][0]["alpha"]  # as before there was such a setting
    Stacey(make_model().parameters(), alpha=0.25).load_state_dict(older)


def test_load_state_dict_hooks_see_the_right_dtypes():
    model = make_model()
    optimizer = Stacey(model.parameters())
    train(model, optimizer, 1)
    seen = []
    optimizer.register_load_state_dict_post_hook(lambda o: seen.extend(s["z"].dtype for s in o.state.values()))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [torch.bfloat16] * 4


@BOTH
@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_deepcopy_and_pickle(optimizer_class, how):
    model = make_model()
    optimizer = optimizer_class(model.parameters())
    train(model, optimizer, 3)
    other, other_optimizer = how((model, optimizer))
    for pair in ((model, optimizer), (other, other_optimizer)):
        train(*pair, 3, seed=1)
    assert_equal_runs((model, optimizer), (other, other_optimizer))


@pytest.mark.parametrize(("optimizer_class", "later"), [(Stacey, ["lr_reference"]), (LpDescent, ["rounding", "seed"])])
def test_a_pickle_of_an_older_version_gets_the_defaults_of_later_settings(optimizer_class, later):
    optimizer = optimizer_class([torch.nn.Parameter(torch.ones(3))])
    expected = {name: optimizer.defaults[name] for name in later}
    for group in (optimizer.defaults, *optimizer.param_groups):
        for name in later:
            del group[name]
    restored = pickle.loads(pickle.dumps(optimizer))
    for group in (restored.defaults, *restored.param_groups):
        assert {name: group[name] for name in expected} == expected


def test_a_compiled_model_trains():
    model = make_model()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = Stacey(compiled.parameters())
    plain = make_model()
    plain_optimizer = Stacey(plain.parameters())
    train(compiled, optimizer, 5)
    train(plain, plain_optimizer, 5)
    for p, q in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)  # a compiled backward may sum in another order
    assert all(s["z"].dtype == torch.bfloat16 for s in optimizer.state.values())


@BOTH
@pytest.mark.parametrize(("variant", "z_init"), [("p2", "params"), ("p2", "zeros"), ("pp", "params"), ("2p", "zeros")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_taking_a_fresh_state_dict_changes_nothing(optimizer_class, variant, z_init, dtype):
    # torch makes an optimizer without state take a step with zero gradients and lr 0.
    settings = dict(variant=variant, z_init=z_init) if optimizer_class is Stacey else {}
    make = lambda model: optimizer_class(model.parameters(), weight_decay=0.1, **settings)  # noqa: E731
    model, untouched = make_model(dtype), make_model(dtype)
    optimizer, untouched_optimizer = make(model), make(untouched)
    taken = get_optimizer_state_dict(model, optimizer)
    assert len(taken["state"]) == 4
    for p, q in zip(model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(p, q)
    for pair in ((model, optimizer), (untouched, untouched_optimizer)):
        train(*pair, 4)
    assert_equal_runs((model, optimizer), (untouched, untouched_optimizer))


@BOTH
def test_taking_a_fresh_state_dict_changes_nothing_before_a_warm_up_from_zero(optimizer_class):
    pairs = []
    for takes in (True, False):
        model = make_model()
        optimizer = optimizer_class(model.parameters(), weight_decay=0.1)
        scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 5))
        if takes:
            get_optimizer_state_dict(model, optimizer)
        train(model, optimizer, 6, scheduler=scheduler)
        pairs.append((model, optimizer))
    assert_equal_runs(*pairs)
    assert {int(state["step"]) for state in pairs[0][1].state.values()} == {5}


@BOTH
def test_weights_that_are_loaded_after_a_fresh_state_dict_are_where_training_begins(optimizer_class):
    pretrained, pairs = make_model(seed=1).state_dict(), []
    for takes in (True, False):
        model = make_model()
        optimizer = optimizer_class(model.parameters())
        if takes:
            get_optimizer_state_dict(model, optimizer)
        model.load_state_dict(pretrained)
        train(model, optimizer, 4)
        pairs.append((model, optimizer))
    assert_equal_runs(*pairs)


def test_a_state_of_zeros_that_was_loaded_is_no_fresh_one():
    model = make_model()
    optimizer = Stacey(model.parameters())
    saved = get_optimizer_state_dict(model, optimizer)
    for state in saved["state"].values():
        state["z"].fill_(0.5)
    set_optimizer_state_dict(model, optimizer, saved)
    assert all(torch.equal(state["z"], torch.full_like(state["z"], 0.5)) for state in optimizer.state.values())
    train(model, optimizer, 1)
    assert all((state["z"] - 0.5).abs().max() < 0.1 for state in optimizer.state.values())


@BOTH
def test_a_capture_needs_capturable(optimizer_class, monkeypatch):
    model = make_model()
    optimizer = optimizer_class(model.parameters())
    train(model, optimizer, 1)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"captured in a CUDA graph.*Set capturable=True in every group"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Named(torch.nn.Parameter):
    """As projects tag parameters."""


def test_a_parameter_that_adds_names_takes_the_kernel():
    weight = Named(torch.ones(5))
    assert is_plain(Named)
    assert not is_plain(type(torch.nn.Parameter(torch.ones(5)).as_subclass(Logged)))
    optimizer = Stacey([weight], fused=True)
    weight.grad = torch.ones(5)
    optimizer.step()
    assert (weight < 1).all()


class Logged(torch.Tensor):
    """With a __torch_function__ of its own, Tensor's."""


@BOTH
def test_another_optimizers_state_is_refused(optimizer_class):
    model = make_model()
    adamw = torch.optim.AdamW(model.parameters())
    train(model, adamw, 1)
    optimizer = optimizer_class(model.parameters())
    train(model, optimizer, 1)
    good = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"exp_avg.*another optimizer's"):
        optimizer.load_state_dict(adamw.state_dict())
    for state in good["state"].values():
        del state["step"]
        state["other"] = torch.ones(1)
    with pytest.raises(ValueError, match="another optimizer's"):
        optimizer.load_state_dict(good)


def test_a_list_is_no_state():
    model = make_model()
    optimizer = Stacey(model.parameters())
    train(model, optimizer, 1)
    saved = optimizer.state_dict()
    saved["state"][0]["z"] = saved["state"][0]["z"].tolist()
    with pytest.raises(ValueError, match="state z of parameter 0 is a list, not a tensor"):
        optimizer.load_state_dict(saved)


def test_a_seed_of_numpy():
    assert Stacey(make_model().parameters(), seed=np.int64(3)).param_groups[0]["seed"] == 3


def test_distributed_state_dict_round_trip():
    model = make_model()
    optimizer = Stacey(model.parameters(), weight_decay=0.1)
    train(model, optimizer, 4)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    other = copy.deepcopy(model)
    other_optimizer = Stacey(other.parameters(), weight_decay=0.1)
    set_optimizer_state_dict(other, other_optimizer, saved)
    assert_equal_runs((model, optimizer), (other, other_optimizer))
    for pair in ((model, optimizer), (other, other_optimizer)):
        train(*pair, 4, seed=1)
    assert_equal_runs((model, optimizer), (other, other_optimizer))


def test_warm_up_from_zero_keeps_the_first_gradient():
    # The first lr of many schedules is 0. Elements with a gradient take the whole step: m, z and the coupling.
    theta, gradients = make_problem(size=50, steps=3)
    _, state = run(Stacey, theta, gradients, [0.0, 0.01, 0.01], betas=(0.9, 0.99), state_dtype=torch.float32)
    expected_m = torch.zeros(50)
    for g in gradients:
        expected_m = expected_m + 0.01 * (g - expected_m)
    torch.testing.assert_close(state["m"], expected_m, rtol=1e-6, atol=1e-8)
    assert state["step"] == 2  # the first step with a learning rate of zero is not counted


@pytest.mark.parametrize("z_init", ["params", "zeros"])
@pytest.mark.parametrize("rates", [(0.0, 0.01), (0.0, 0.0, 0.0, 0.01, 0.01), (0.01, 0.0, 0.01)], ids=str)
def test_a_warm_up_from_zero_is_the_same_on_any_split(rates, z_init):
    """Rows get their first gradient at different updates, as embeddings do."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(4, 64, generator=generator)
    gradients = [torch.randn(4, 64, generator=generator) for _ in rates]
    for update, gradient in enumerate(gradients):
        gradient[update + 1 :] = 0.0
    settings = dict(lr=0.01, z_init=z_init, alpha=0.1, tau=0.1, seed=1)

    def train(parts):
        params = [torch.nn.Parameter(part.clone().bfloat16()) for part in parts]
        optimizer = Stacey(params, **settings, rounding="nearest")
        for rate, gradient in zip(rates, gradients, strict=True):
            optimizer.param_groups[0]["lr"] = rate
            for param, part in zip(params, gradient.chunk(len(params)), strict=True):
                param.grad = part.bfloat16()
            optimizer.step()
        counts = {int(optimizer.state[param]["step"]) for param in params}
        tensors = [params, *([optimizer.state[param][name] for param in params] for name in ("z", "m"))]
        return counts, [torch.cat([tensor.detach() for tensor in each]) for each in tensors]

    (counts, expected), (split_counts, found) = train([whole]), train(whole.chunk(4))
    assert counts == split_counts == {len(rates) if rates[0] else sum(rate > 0 for rate in rates)}
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("load", ["in place", "load_checkpoint"])
def test_a_state_that_was_loaded_after_torch_has_made_one(load, tmp_path):
    model = make_model()
    optimizer = Stacey(model.parameters())
    train(model, optimizer, 4)
    other = copy.deepcopy(model)
    other_optimizer = Stacey(other.parameters())
    get_optimizer_state_dict(other, other_optimizer)  # takes a step with a learning rate of 0
    if load == "in place":
        for param, saved in zip(other.parameters(), model.parameters(), strict=True):
            for name, value in optimizer.state[saved].items():
                other_optimizer.state[param][name].copy_(value)
    else:
        load_checkpoint(save_checkpoint(tmp_path / "saved", model, optimizer), other, other_optimizer)
    for pair in ((model, optimizer), (other, other_optimizer)):
        train(*pair, 2, seed=1)
    assert_equal_runs((model, optimizer), (other, other_optimizer))


@pytest.mark.parametrize("way", ["state dict", "deepcopy", "checkpoint"])
def test_a_warm_up_from_zero_resumes_as_if_it_had_not_stopped(way, tmp_path):
    def warm_up(model, optimizer, rates, seed):
        for number, rate in enumerate(rates):
            for group in optimizer.param_groups:
                group["lr"] = rate
            train(model, optimizer, 1, seed=seed + number)

    model = make_model()
    optimizer = Stacey(model.parameters())
    warm_up(model, optimizer, (0.0, 0.0), seed=0)
    if way == "deepcopy":
        other, other_optimizer = copy.deepcopy((model, optimizer))
    else:
        other = copy.deepcopy(model)
        other_optimizer = Stacey(other.parameters())
        if way == "state dict":
            other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        else:
            load_checkpoint(save_checkpoint(tmp_path / "saved", model, optimizer), other, other_optimizer)
    for pair in ((model, optimizer), (other, other_optimizer)):
        warm_up(*pair, (0.0, 0.01, 0.01), seed=2)
    assert_equal_runs((model, optimizer), (other, other_optimizer))
    assert {int(state["step"]) for state in other_optimizer.state.values()} == {2}


@pytest.mark.filterwarnings("ignore")  # torch.compile's
def test_a_step_within_a_compiled_function():
    model = make_model()
    compiled_model = copy.deepcopy(model)
    optimizer, compiled_optimizer = (Stacey(each.parameters()) for each in (model, compiled_model))

    def update(model, optimizer, x):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    compiled = torch.compile(update, backend="eager")
    for step in range(3):
        x = torch.randn(2, next(model.parameters()).shape[1], generator=torch.Generator().manual_seed(step))
        update(model, optimizer, x)
        compiled(compiled_model, compiled_optimizer, x)
    assert_equal_runs((model, optimizer), (compiled_model, compiled_optimizer))


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    """Return a device mesh of this one process."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@BOTH
def test_a_gradient_that_is_still_to_be_summed(optimizer_class, mesh):
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    values, gradient = torch.randn(5, 3), torch.randn(5, 3)
    found = []
    for placement in (Replicate(), Partial()):
        weight = torch.nn.Parameter(DTensor.from_local(values.clone(), mesh, [Replicate()]))
        weight.grad = DTensor.from_local(gradient, mesh, [placement])
        optimizer_class([weight]).step()
        found.append(weight.to_local())
    assert torch.equal(*found)
    assert not torch.equal(found[0], values)
    weight.grad = DTensor.from_local(gradient, mesh, [Shard(0)])
    with pytest.raises(RuntimeError, match=r"a gradient placed .*Shard.* does not fit its parameter"):
        optimizer_class([weight]).step()


@BOTH
def test_a_norm_that_is_a_dtensor_clips(optimizer_class, mesh):
    from torch.distributed.tensor import DTensor, Replicate

    values, gradient = torch.randn(40), torch.randn(40)
    found = []
    for wrapped in (False, True):
        weight = torch.nn.Parameter(values.clone())
        weight.grad = gradient
        optimizer = optimizer_class([weight])
        norm = torch.tensor(8.0)
        with optimizer.scaled_gradients(DTensor.from_local(norm, mesh, [Replicate()]) if wrapped else norm):
            optimizer.step()
        found.append(weight.detach())
    assert torch.equal(*found)


@BOTH
def test_dtensor_parameters(optimizer_class, mesh):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    plain, sharded = make_model(), make_model()
    for layer in (sharded[0], sharded[2], sharded):
        fully_shard(layer, mesh=mesh)
    plain_optimizer, optimizer = optimizer_class(plain.parameters()), optimizer_class(sharded.parameters())
    get_optimizer_state_dict(sharded, optimizer)
    train(plain, plain_optimizer, 4)
    train(sharded, optimizer, 4)
    for p, q in zip(plain.parameters(), sharded.parameters(), strict=True):
        assert isinstance(q, DTensor)
        assert torch.equal(p, q.full_tensor())
        for name in optimizer.state_names:
            value = optimizer.state[q][name]
            assert isinstance(value, DTensor)
            assert value.placements == q.placements
            assert torch.equal(value.full_tensor(), plain_optimizer.state[p][name])


@pytest.mark.parametrize(
    "make",
    [
        lambda t: t,
        lambda t: t.t().contiguous().t(),
        lambda t: t.view(8, 32, 64, -1).contiguous(memory_format=torch.channels_last),
    ],
    ids=["contiguous", "transposed", "channels_last"],
)
def test_chunks_and_memory_layout_change_nothing(make, monkeypatch):
    monkeypatch.setattr("stacey_dist.optim.chunks.CPU_CHUNK_PER_THREAD", 1000)
    theta = make(torch.randn(256, 640, generator=torch.Generator().manual_seed(0)))
    g = torch.randn_like(theta)
    result, state = run(Stacey, theta, [g, -g / 2])
    flat, flat_state = run(Stacey, theta.reshape(-1), [g.reshape(-1), -g.reshape(-1) / 2])
    assert torch.equal(result.reshape(-1), flat)
    assert torch.equal(state["z"].reshape(-1), flat_state["z"])
    assert state["z"].stride() == theta.stride()


def peak_memory(work):
    """Return the most bytes that tensors took at once while `work` ran, over what was there before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    held = highest = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("variant", ["p2", "pp"])
def test_extra_memory_of_a_step_does_not_grow_with_the_parameter(variant, fused):
    def peak(elements):
        param = torch.nn.Parameter(torch.ones(elements))
        optimizer = Stacey([param], variant=variant, fused=fused)
        param.grad = torch.ones(elements)
        optimizer.step()  # makes the state
        return peak_memory(optimizer.step)

    # The profiler of torch 2.6 takes 40 kB for each operation: more chunks would take gigabytes.
    small, large = peak(1 << 18), peak(3 << 18)
    assert fused or small > 0
    assert large <= small * 1.01


def test_loading_makes_no_wider_copies():
    param = torch.nn.Parameter(torch.ones(1 << 20))
    optimizer = Stacey([param])
    param.grad = torch.ones(1 << 20)
    optimizer.step()
    saved = optimizer.state_dict()
    assert peak_memory(lambda: optimizer.load_state_dict(saved)) < 1 << 20  # float32 copies would be 8 MiB


def test_empty_and_scalar_parameters():
    empty, scalar = torch.nn.Parameter(torch.empty(0, 5)), torch.nn.Parameter(torch.tensor(0.5))
    optimizer = Stacey([empty, scalar])
    for _ in range(3):
        F.mse_loss(scalar + empty.sum(), torch.tensor(0.0)).backward()
        optimizer.step()
    assert optimizer.state[empty]["step"] == 3
    assert optimizer.state[empty]["z"].shape == (0, 5)
    assert scalar.item() < 0.5


def test_import_needs_torch_only():
    import subprocess
    import sys

    code = (
        "import sys, torch; before = set(sys.modules); import stacey_dist; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; print(sorted(new))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(eval(result.stdout)) <= {"stacey_dist"} | set(sys.stdlib_module_names)
