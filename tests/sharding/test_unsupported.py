"""What splits a model in a way that is not supported is refused by name at the first call; replicas are compared."""

import functools
import os
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from stacey_dist import Stacey
from stacey_dist.checkpoint import BackgroundSaver, load_checkpoint, save_checkpoint, verify
from stacey_dist.errors import SettingsError
from stacey_dist.sharding import fragments, refresh_weights
from tests.sharding.processes import outcome, spawn
from tests.shared import made_once

RANKS = 3


def model_of(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def assert_refused_everywhere(model, optimizer, match, directory):
    path = Path(directory) / "checkpoint"
    for call in (
        lambda: fragments(model, optimizer),
        lambda: save_checkpoint(path, model, optimizer),
        lambda: BackgroundSaver().save(path, model, optimizer),
    ):
        with pytest.raises(NotImplementedError, match=match):
            call()
    assert not path.exists()


def check_fsdp1(directory):
    for original in (True, False):
        with pytest.raises(NotImplementedError, match="FSDP1"):
            refresh_weights(FullyShardedDataParallel(model_of(), device_id=torch.device("cpu")), None)
        wrapped = FullyShardedDataParallel(model_of(), use_orig_params=original, device_id=torch.device("cpu"))
        optimizer = Stacey(wrapped.parameters())
        assert_refused_everywhere(wrapped, optimizer, "FSDP1 .* is not supported", directory)
        assert_refused_everywhere(wrapped.module, optimizer, "FSDP1 .* is not supported", directory)
        inside = nn.Sequential(wrapped)
        assert_refused_everywhere(inside, Stacey(inside.parameters()), "FSDP1 .* is not supported", directory)


def check_marked_parameters(directory):
    for mark, name in (
        ({"tensor_model_parallel": True}, "tensor parallelism"),
        ({"partition_dim": 0}, "tensor parallelism"),
        ({"allreduce": False, "group_name": "ep_size_2"}, "expert parallelism"),
    ):
        model = model_of()
        vars(model[2].weight).update(mark)
        assert_refused_everywhere(model, Stacey(model.parameters()), f"{name} is not supported .*2.weight", directory)
    model = model_of()
    vars(model[2].weight).update(tensor_model_parallel=False, partition_dim=-1, allreduce=True)
    fragments(model, Stacey(model.parameters()))


def check_tensor_parallel(directory):
    model, mesh = model_of(), init_device_mesh("cpu", (dist.get_world_size(),))
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, [Shard(1)]))
    assert_refused_everywhere(model, Stacey(model.parameters()), "0.weight is placed", directory)
    model = model_of()  # by rows, but each rank's rows are its own
    own = torch.distributed.device_mesh.DeviceMesh("cpu", [dist.get_rank()])
    model[0].weight = nn.Parameter(DTensor.from_local(model[0].weight.detach(), own, [Shard(0)]))
    assert_refused_everywhere(model, Stacey(model.parameters()), "mesh of 1 of the 3 ranks", directory)


def check_other_weights(directory):
    rank, path = dist.get_rank(), Path(directory) / "checkpoint"
    for difference, named in (
        ("weight", r"model/2\.weight has other values on ranks 0, 1 and on rank 2"),
        ("element", r"model/0\.bias has other values on ranks 0, 1 and on rank 2"),
        ("state", r"optimizer/2\.bias/z has other values on ranks 0, 1 and on rank 2"),
        ("no state", r" has other values on ranks 0, 1 and on rank 2"),
        ("name", r"(mine|2\.weight) is not the same parameter on ranks 0, 1 and on rank 2"),
        ("shape", r"0\.weight is not the same parameter on ranks 0, 1 and on rank 2"),
    ):
        model = model_of()
        if rank == 2 and difference == "weight":
            model[2].weight = nn.Parameter(model_of(seed=1)[2].weight.detach())
        if rank == 2 and difference == "name":
            model = nn.Sequential(OrderedDict([("0", model[0]), ("1", model[1]), ("mine", model[2])]))
        if rank == 2 and difference == "shape":
            model[0].weight = nn.Parameter(torch.zeros(3, 6))
        optimizer = Stacey(model.parameters())
        for param in model.parameters():
            param.grad = torch.full_like(param, 0.1)
        if rank < 2 or difference != "no state":
            optimizer.step()
        if rank == 2 and difference == "element":
            model[0].bias.data[1] = torch.nextafter(model[0].bias.data[1], torch.tensor(torch.inf))
        if rank == 2 and difference == "state":
            optimizer.state[model[2].bias]["z"][1] = 2
        for save in (save_checkpoint, BackgroundSaver().save):
            with pytest.raises(SettingsError, match=named):
                save(path, model, optimizer)
        assert not path.exists()


def check_what_may_differ(directory):
    """Buffers, frozen parameters and random numbers: of DDP, and of replicas of FSDP2's shards."""
    for number, make in enumerate((DistributedDataParallel, lambda model: model, fully_shard)):
        model = model_of()
        model[0].weight.requires_grad_(False)
        if make is not fully_shard:
            model[0].weight.data += dist.get_rank()
        torch.manual_seed(dist.get_rank())
        made = make(model)
        optimizer = Stacey([p for p in made.parameters() if p.requires_grad])
        model[1].running_mean.add_(dist.get_rank())
        path = save_checkpoint(Path(directory) / str(number), made, optimizer)
        load_checkpoint(path, made, optimizer)
        assert verify(path)["finite"] is True


def check_whole_states(directory):
    """A state dict of one process has whole tensors, which are not a rank's rows."""
    alone = model_of()
    trained = Stacey(alone.parameters())
    alone(torch.randn(4, 5)).sum().backward()
    trained.step()
    sharded = fully_shard(model_of())
    optimizer = Stacey(sharded.parameters())
    with pytest.raises(ValueError, match="state z of parameter 0 is whole and its parameter is sharded; load it by"):
        optimizer.load_state_dict(trained.state_dict())


CHECKS = {
    check.__name__: check
    for check in (
        check_fsdp1,
        check_marked_parameters,
        check_tensor_parallel,
        check_other_weights,
        check_what_may_differ,
        check_whole_states,
    )
}


def all_checks(rank, directory):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    results = {}
    for name, check in CHECKS.items():
        results[name] = outcome(functools.partial(check, f"{directory}/{name}"))
    return results


def check_all(directory):
    return spawn(all_checks, RANKS, str(directory))


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_ranks(name):
    failure = made_once(check_all)[name]
    assert failure is None, failure


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("fairscale.nn.data_parallel.fully_sharded_data_parallel", "fairscale"),
        ("megatron.core.tensor_parallel.layers", "Megatron"),
        ("colossalai.booster.plugin", "ColossalAI"),
        ("deepspeed.runtime.pipe.module", "DeepSpeed's pipeline"),
        ("deepspeed.moe.layer", "DeepSpeed's mixture"),
        ("torch.distributed.pipelining._IR", "pipeline parallelism"),
    ],
)
def test_classes_of_other_libraries_and_what_is_derived_from_them(module, name):
    foreign = type("Foreign", (nn.Module,), {"__module__": module})
    derived = type("Mine", (foreign,), {})
    model = nn.Sequential(nn.Linear(2, 2), derived())
    with pytest.raises(NotImplementedError, match=f"{name}.* is not supported"):
        fragments(model, Stacey(model.parameters()))


def test_a_stage_of_a_pipeline_is_no_model():
    from torch.distributed.pipelining import PipelineStage

    stage = PipelineStage.__new__(PipelineStage)
    with pytest.raises(NotImplementedError, match="pipeline parallelism"):
        fragments(stage, Stacey(nn.Linear(2, 2).parameters()))


def test_distributed_optimizers():
    model = nn.Linear(2, 2)
    for module in ("megatron.core.optimizer.distrib_optimizer", "torch.distributed.optim.optimizer", "horovod.torch"):
        optimizer = type("DistributedOptimizer", (), {"__module__": module})()
        optimizer.optimizer = None
        wrapper = SimpleNamespace(optimizer=optimizer)
        for made in (optimizer, wrapper):
            with pytest.raises(NotImplementedError, match="is not supported"):
                fragments(model, made)


def test_an_optimizer_of_parameters_that_the_model_lacks(tmp_path):
    model, other = nn.Linear(2, 2), nn.Linear(3, 1)
    optimizer = Stacey([*model.parameters(), *other.parameters()])
    for call in (fragments, functools.partial(save_checkpoint, tmp_path / "checkpoint")):
        with pytest.raises(SettingsError, match=r"updates 2 parameters that are not the model's.*\(1, 3\)"):
            call(model, optimizer)
    both = nn.ModuleList([model, other])
    save_checkpoint(tmp_path / "checkpoint", both, optimizer)


def test_a_trainable_parameter_that_the_optimizer_lacks_is_saved_without_state(tmp_path):
    model = nn.Linear(2, 2)
    optimizer = Stacey([model.weight])
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    path = save_checkpoint(tmp_path / "checkpoint", model, optimizer)
    saved = verify(path)["tensors"]
    assert "model/bias" in saved
    assert "optimizer/weight/z" in saved
    assert "optimizer/bias/z" not in saved
    other = nn.Linear(2, 2)
    restored = Stacey([other.weight])
    load_checkpoint(path, other, restored)
    assert torch.equal(other.bias, model.bias)
    assert list(restored.state) == [other.weight] or not restored.state.get(other.bias)
