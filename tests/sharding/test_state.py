"""What happens to the state: each engine's own save and load, fragments written back, bytes on each rank."""

import copy
import functools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from stacey_dist.checkpoint import load_checkpoint, read_tensors, save_checkpoint
from stacey_dist.checkpoint.snapshot import Snapshot
from stacey_dist.checkpoint.write import write
from stacey_dist.sharding import fragments, state_bytes
from tests.sharding.engines import ENGINES, TAKES_SCALARS, Trainer, assert_equal, gather
from tests.sharding.problem import CASES, LR, Awkward, gradients, group_settings, one_process, schedule
from tests.sharding.processes import outcome, spawn
from tests.shared import made_once

pytestmark = pytest.mark.slow
HALF, END = 3, 6
CASE = "p2-stochastic"


def make(engine):
    model = Awkward(engine in TAKES_SCALARS)
    return Trainer(engine, model, group_settings(CASE), *CASES[CASE]), model


def train(trainer, model, first, last):
    for step in range(first, last):
        for group, peak in zip(trainer.scheduled.param_groups, (LR, 0.5 * LR), strict=True):
            group["lr"] = peak * schedule(step)
        trainer.step(gradients(step, model))


def assert_as_one_process(engine, trainer, steps):
    ours = gather(fragments(trainer.model, trainer.optimizer))
    assert_equal(ours, one_process(CASE, engine in TAKES_SCALARS, steps=steps))


def take(engine, trainer, directory):
    """Save as the engine does; return what its loading needs besides files."""
    if trainer.is_deepspeed:
        trainer.model.save_checkpoint(directory)
        return None
    if engine == "zero_redundancy":
        trainer.optimizer.consolidate_state_dict(to=0)
        content = [trainer.optimizer.state_dict() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(content)
        return copy.deepcopy((trainer.model.state_dict(), content[0]))
    if engine == "ddp":
        return copy.deepcopy((trainer.model.state_dict(), trainer.optimizer.state_dict()))
    content = {
        "model": get_model_state_dict(trainer.model),
        "optimizer": get_optimizer_state_dict(trainer.model, trainer.optimizer),
    }
    dcp.save(content, checkpoint_id=directory)
    return None


def put(engine, trainer, directory, taken):
    """Load as the engine does."""
    if trainer.is_deepspeed:
        path, _ = trainer.model.load_checkpoint(directory)
        assert path is not None
    elif taken is not None:
        trainer.model.load_state_dict(taken[0])
        trainer.optimizer.load_state_dict(taken[1])
    else:
        content = {
            "model": get_model_state_dict(trainer.model),
            "optimizer": get_optimizer_state_dict(trainer.model, trainer.optimizer),
        }
        dcp.load(content, checkpoint_id=directory)
        set_model_state_dict(trainer.model, content["model"])
        set_optimizer_state_dict(trainer.model, trainer.optimizer, content["optimizer"])


def check_own_save_and_load(engine, directory):
    trainer, model = make(engine)
    if engine in ("fsdp2", "hsdp", "ddp"):
        take(engine, trainer, f"{directory}/{engine}-early")  # before there is state: it must change nothing
    train(trainer, model, 0, HALF)
    taken = take(engine, trainer, f"{directory}/{engine}")
    assert_as_one_process(engine, trainer, HALF)
    train(trainer, model, HALF, END)
    assert_as_one_process(engine, trainer, END)
    other, other_model = make(engine)
    train(other, other_model, 3, 5)  # some other state, to be replaced
    put(engine, other, f"{directory}/{engine}", taken)
    assert_as_one_process(engine, other, HALF)
    train(other, other_model, HALF, END)
    assert_as_one_process(engine, other, END)


def assert_computes_with(weights, trainer, model):
    """Assert that the forward pass, on every rank, sees these weights."""
    inputs = gradients(99, model)
    expected = Awkward("scalar.weight" in weights)
    expected.load_state_dict(weights | {"tied.weight": weights["primes.weight"]})
    with torch.no_grad():
        assert torch.equal(trainer.model(inputs), expected(inputs))


def check_fragments_take_a_state(engine, directory, dirty):
    """A checkpoint that was put together from one process's tensors; then one of our own, read back as wholes."""
    scalar = engine in TAKES_SCALARS
    half = one_process(CASE, scalar, steps=HALF)
    weights = {name: weight for name, (weight, _) in half.items()}
    weights["frozen.weight"] = torch.full((5, 3), 0.5)
    saved = {f"model/{name}": weight for name, weight in weights.items()}
    saved |= {f"optimizer/{name}/{key}": value for name, (_, state) in half.items() for key, value in state.items()}
    path = Path(directory) / f"{engine}-{dirty}" / f"step_{HALF:08}"
    write(path, Snapshot.of(saved if dist.get_rank() == 0 else {}), {"made": "by hand"})
    trainer, model = make(engine)
    if dirty:
        train(trainer, model, 3, 5)
    assert load_checkpoint(path, trainer.model, trainer.optimizer)["extra"] == {"made": "by hand"}
    assert_computes_with(weights, trainer, model)
    assert_as_one_process(engine, trainer, HALF)
    train(trainer, model, HALF, END)
    assert_as_one_process(engine, trainer, END)
    ours = save_checkpoint(path.with_name(f"step_{END:08}"), trainer.model, trainer.optimizer)
    tensors = read_tensors(ours)
    expected = one_process(CASE, scalar, steps=END)
    assert torch.equal(tensors.pop("model/frozen.weight"), weights["frozen.weight"])
    assert tensors.keys() == saved.keys() - {"model/frozen.weight"}
    for name, (weight, state) in expected.items():
        assert torch.equal(tensors[f"model/{name}"], weight), name
        for key, value in state.items():
            assert torch.equal(tensors[f"optimizer/{name}/{key}"], value), (name, key)
            assert tensors[f"optimizer/{name}/{key}"].dtype == value.dtype


def check_bytes(engine, directory):
    """z and m in bfloat16: 4 bytes for each parameter of the rank's share, and padding as each engine has it."""
    model = Awkward(engine in TAKES_SCALARS)

    def one_group(model):
        return [{"params": [p for p in model.parameters() if p.requires_grad]}]

    trainer = Trainer(engine, model, one_group, *CASES[CASE])
    total = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    count = sum(1 for p in model.parameters() if p.requires_grad)
    trainer.step(gradients(0, model))
    parts = fragments(trainer.model, trainer.optimizer)
    assert all(t.dtype == torch.bfloat16 for f in parts for t in (f.z, f.m))
    mine, world = state_bytes(trainer.optimizer), dist.get_world_size()
    everyone = [None] * world
    dist.all_gather_object(everyone, (mine, sum(f.stop - f.start for f in parts)))
    for bytes_on_rank, elements in everyone:
        assert 4 * elements <= bytes_on_rank
    shards = (
        1 if engine in ("ddp", "zero0") else (world // 2 if world % 2 == 0 else world) if engine == "hsdp" else world
    )
    largest = 97 * 61
    padding = {
        "ddp": 0,
        "zero0": 0,
        "zero_redundancy": largest,  # whole parameters: the largest cannot be split
        "zero1": 2 * world,  # of the flat group, to 2 elements a rank
        "zero2": 2 * world,
        "zero3": count,  # of each parameter, to a multiple of the ranks
        "fsdp2": count * 97,  # of each parameter, to whole rows
        "hsdp": count * 97,
    }[engine]
    assert max(b for b, _ in everyone) <= 4 * (-(-total // shards) + padding)
    if engine in ("zero1", "zero2", "zero3"):
        assert sum(b for b, _ in everyone) <= 4 * (total + padding * world)


CHECKS = {
    "own save and load": check_own_save_and_load,
    "fragments take a state before the first update": functools.partial(check_fragments_take_a_state, dirty=False),
    "fragments take a state": functools.partial(check_fragments_take_a_state, dirty=True),
    "bytes": check_bytes,
}


def all_checks(rank, directory):
    return {(engine, name): outcome(CHECKS[name], engine, directory) for engine in ENGINES for name in CHECKS}


def check_all(directory, world_size):
    return spawn(all_checks, world_size, str(directory))


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("world_size", [*(pytest.param(n, marks=pytest.mark.exhaustive) for n in (1, 2)), 3])
def test_state(world_size, engine, name):
    failure = made_once(check_all, world_size)[engine, name]
    assert failure is None, failure
