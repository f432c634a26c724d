"""Programs under `accelerate launch`: save_state and load_state, and engines that do not come up."""

import subprocess
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from stacey_dist import Stacey
from stacey_dist.errors import SettingsError
from stacey_dist.sharding import fragments
from stacey_dist.training import engine
from tests.training.forked import command, environment


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu_ddp", "cpu_zero1", "cpu_zero3", "cpu_fsdp2"])
def test_save_state_and_load_state(config, tmp_path):
    program = command(processes=2, engine=config, program="tests/sharding/accelerate_program.py")
    result = subprocess.run(program, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert "rank 0 is as expected" in result.stdout
    assert "rank 1 is as expected" in result.stdout


def came_up(kind, processes=2):
    return SimpleNamespace(distributed_type=kind, num_processes=processes)


@pytest.mark.parametrize(
    ("requested", "kind"),
    [
        ("deepspeed", DistributedType.MULTI_GPU),
        ("fsdp2", DistributedType.MULTI_CPU),
        ("ddp", DistributedType.FSDP),
        ("zero_redundancy", DistributedType.DEEPSPEED),
        ("ddp", DistributedType.NO),
    ],
)
def test_an_engine_that_did_not_come_up_is_an_error(monkeypatch, requested, kind):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match=f"{requested} was asked for, but Accelerate came up with {kind.value}"):
        engine._check_engine(requested, came_up(kind))


def test_processes_that_did_not_join_are_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match="2 processes were launched, but Accelerate joined 1"):
        engine._check_engine("ddp", came_up(DistributedType.NO, processes=1))


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "single"),
        ({"WORLD_SIZE": "2"}, "ddp"),
        ({"WORLD_SIZE": "2", "ROLE_NAME": "zero_redundancy"}, "zero_redundancy"),
        ({"WORLD_SIZE": "2", "ROLE_NAME": "default"}, "ddp"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "deepspeed"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "fsdp2"),
    ],
)
def test_the_launch_names_the_engine(monkeypatch, variables, expected):
    for name in ("WORLD_SIZE", "ROLE_NAME", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "FSDP_VERSION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert engine.requested_engine() == expected


def test_the_first_version_of_fsdp_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(SettingsError, match="fsdp_version: 1 is not allowed"):
        engine.requested_engine()


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.FSDP])
def test_fragments_of_a_model_that_is_not_sharded_as_launched_are_refused(kind):
    model = torch.nn.Linear(3, 2)
    optimizer = Stacey(model.parameters())
    with pytest.raises(RuntimeError, match=f"launched for {kind.value}, but the model is not sharded by it"):
        fragments(model, optimizer, came_up(kind))
