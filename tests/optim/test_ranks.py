"""Real processes: rows of a DTensor, unevenly many on a rank and on some none, as on one process."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, distribute_tensor

from stacey_dist import Stacey
from tests.sharding.processes import spawn

STEPS = 4


def make_model():
    """Return a model for three ranks: 7 rows shard unevenly, 2 leave a rank without any; one is frozen, one tied."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2), nn.Linear(2, 2))
    model[2].weight = model[1].bias  # any tied pair: the optimizer sees one parameter
    model[0].bias.requires_grad_(False)
    return model


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def gradients(step):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator) for p in trainable(make_model())]


def settings(params):
    groups = [{"params": params[:1]}, {"params": params[1:], "variant": "2p", "p": 2.8, "weight_decay": 0.1}]
    return dict(params=groups, p=2.2, lr=0.01)


def one_process():
    params = trainable(make_model())
    optimizer = Stacey(**settings(params))
    for step in range(STEPS):
        for p, g in zip(params, gradients(step), strict=True):
            p.grad = g
        optimizer.step()
    return params, optimizer


def sharded_process(rank, world_size):
    mesh = dist.init_device_mesh("cpu", (world_size,))
    model = make_model()
    # The optimizer before the sharding, and its parameters exchanged afterwards: Accelerate does it so.
    optimizer = Stacey(**settings(trainable(model)))
    fully_shard(model, mesh=mesh)
    params = trainable(model)
    optimizer.param_groups[0]["params"], optimizer.param_groups[1]["params"] = params[:1], params[1:]
    assert any(p.to_local().numel() == 0 for p in params) == (rank == world_size - 1)
    # Every rank has state for every parameter, also for one of which it holds nothing; making it changes nothing.
    taken = get_optimizer_state_dict(model, optimizer)["state"]
    everyone = [None] * world_size
    dist.all_gather_object(everyone, {name: sorted(state) for name, state in taken.items()})
    assert all(keys == everyone[0] for keys in everyone)
    assert all(keys == ["m", "step", "z"] for keys in everyone[0].values())
    random_state = torch.get_rng_state()
    for step in range(STEPS):
        for p, g in zip(params, gradients(step), strict=True):
            p.grad = distribute_tensor(g, mesh, p.placements)
        optimizer.step()
    assert torch.equal(torch.get_rng_state(), random_state)
    expected_params, expected = one_process()
    for p, q in zip(expected_params, params, strict=True):
        assert torch.equal(p, q.full_tensor())
        for name, value in expected.state[p].items():
            ours = optimizer.state[q][name]
            assert torch.equal(value, ours if name == "step" else ours.full_tensor()), name


@pytest.mark.slow
def test_shards_of_three_ranks_are_the_whole_of_one():
    spawn(sharded_process, 3, 3)


def clipped_process(rank, world_size):
    mesh = dist.init_device_mesh("cpu", (world_size,))
    model = make_model()
    fully_shard(model, mesh=mesh)
    params, expected_params = trainable(model), trainable(make_model())
    optimizer, expected = Stacey(params, lr=0.0), Stacey(expected_params, lr=0.0)
    # A norm's parts are still to be summed over ranks. At lr 0, a rank makes a step only for parameters of which it has
    # elements.
    optimizer.grad_scale = DTensor.from_local(torch.tensor(1.0), mesh, [Partial()])
    expected.grad_scale = torch.tensor(float(world_size))
    for step in range(2):
        for p, q, g in zip(params, expected_params, gradients(step), strict=True):
            p.grad, q.grad = distribute_tensor(g, mesh, p.placements), g
        optimizer.step()
        expected.step()
        for p, q in zip(params, expected_params, strict=True):
            assert torch.equal(p.full_tensor(), q)


@pytest.mark.slow
def test_ranks_without_elements_sum_a_norm_too():
    spawn(clipped_process, 3, 3)
