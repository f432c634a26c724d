"""A checkpoint remembers whether what is trained in it is finite, and the newest finite one is not deleted."""

import errno
import functools
import os

import pytest
import torch
import torch.distributed as dist

from stacey_dist import Stacey, cli, files
from stacey_dist.checkpoint import find_checkpoints, manifest, retain, save_checkpoint, verify
from stacey_dist.checkpoint.manifest import MANIFEST, read_manifest, step_of
from stacey_dist.checkpoint.shard import all_finite
from stacey_dist.sharding import fragments
from tests.checkpoint.test_manifest import forge
from tests.sharding.engines import Trainer, that_run
from tests.sharding.problem import CASES, Awkward, gradients, group_settings
from tests.sharding.processes import outcome, spawn


class Masked(torch.nn.Module):
    """Buffers, frozen parameters and whole numbers beside what is trained."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.trained = torch.nn.Parameter(torch.ones(7, dtype=dtype))
        self.frozen = torch.nn.Parameter(torch.full((3,), torch.nan), requires_grad=False)
        self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
        self.register_buffer("count", torch.tensor(2**40))


def stepped(dtype=torch.float32):
    model = Masked(dtype)
    optimizer = Stacey([model.trained])
    model.trained.grad = torch.ones_like(model.trained)
    optimizer.step()
    return model, optimizer


def save(directory, step, *, ruined=False):
    model, optimizer = stepped()
    if ruined:
        optimizer.state[model.trained]["z"][6] = torch.nan
    return save_checkpoint(directory / f"step_{step:08d}", model, optimizer)


def as_an_earlier_version_wrote_it(path):
    forge(path, lambda m: m.pop("finite"))


def steps(directory):
    return [step_of(path) for path in find_checkpoints(directory)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_element_of_a_weight_or_a_state(tmp_path, dtype, value):
    assert verify(save_checkpoint(tmp_path / "good", *stepped(dtype)))["finite"] is True
    for where in ("weight", "z", "m"):
        model, optimizer = stepped(dtype)
        with torch.no_grad():
            (model.trained if where == "weight" else optimizer.state[model.trained][where])[3] = value
        assert verify(save_checkpoint(tmp_path / where, model, optimizer))["finite"] is False


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("size", [1, 31, (1 << 15) + 1])
def test_every_place_of_a_tensor(dtype, size):
    values = torch.ones(size).to(dtype)
    values[0], values[-1] = torch.finfo(dtype).max, torch.finfo(dtype).min
    assert all_finite(values)
    for place in {0, size // 2, size - 1}:
        for ruin in (torch.nan, torch.inf, -torch.inf):
            changed = values.float() if dtype == torch.float8_e5m2 else values.clone()
            changed[place] = ruin
            assert not all_finite(changed.to(dtype))
    assert all_finite(torch.empty(0, dtype=dtype))
    assert all_finite(torch.full((3,), torch.iinfo(torch.int64).min))


def test_the_newest_finite_one_stays(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    for step in (3, 4, 5):
        retain(save(tmp_path, step, ruined=True), keep_last=1)
        assert steps(tmp_path) == [step, 2]
    retain(save(tmp_path, 6), keep_last=1)
    assert steps(tmp_path) == [6]


def test_where_an_earlier_version_did_not_write_it(tmp_path):
    for step in (1, 2, 3):
        as_an_earlier_version_wrote_it(save(tmp_path, step))
    retain(save(tmp_path, 4, ruined=True), keep_last=1)
    assert steps(tmp_path) == [4, 3]  # it may be finite, and nothing is known to be
    save(tmp_path, 2)
    retain(save(tmp_path, 5, ruined=True), keep_last=1)
    assert steps(tmp_path) == [5, 3, 2]
    (tmp_path / "step_00000002" / MANIFEST).write_text("{")
    retain(save(tmp_path, 6, ruined=True), keep_last=1)
    assert steps(tmp_path) == [6, 3]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.EINVAL, errno.ENOENT])
def test_one_that_cannot_be_read_now_stays(tmp_path, monkeypatch, number):
    good = save(tmp_path, 1)
    newest = save(tmp_path, 2, ruined=True)

    def fail(file):
        if file.parent == good:
            raise OSError(number, os.strerror(number))
        return files.read_json(file)

    monkeypatch.setattr(manifest, "_READ_AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(manifest, "read_json", fail)
    retain(newest, keep_last=1)
    assert good.exists() == (number != errno.ENOENT)


def test_the_tool_says_it(tmp_path, capsys):
    good, ruined, unknown = save(tmp_path, 1), save(tmp_path, 2, ruined=True), save(tmp_path, 3)
    as_an_earlier_version_wrote_it(unknown)
    said = {good: "", ruined: "with weights or optimizer states that are not finite", unknown: ""}
    for path, words in said.items():
        for command in (["list", str(tmp_path)], ["verify", str(path)], ["show", str(path)]):
            assert cli.main(["checkpoint", *command]) == 0
            lines = [line for line in capsys.readouterr().out.splitlines() if command[0] != "list" or str(path) in line]
            assert ("not finite" in lines[0]) == bool(words)
            assert words in lines[0]
        known = {good: "finite", ruined: "not finite", unknown: "not known to be finite"}[path]
        assert f"trainable weights and optimizer states: {known}" in lines


def check_any_rank_and_engine(engines, directory):
    """The last rank's last element, where it has some; more ranks than rows leave shards empty."""
    for engine in that_run(*engines):
        model = Awkward(scalar=False)
        trainer = Trainer(engine, model, group_settings("p2-stochastic"), *CASES["p2-stochastic"])
        trainer.step(gradients(0, model))
        last = fragments(trainer.model, trainer.optimizer)[-1]
        alone = engine != "ddp" and engine != "hsdp"  # replicas must be equal
        ruining = not alone or dist.get_rank() == dist.get_world_size() - 1
        for kind, tensor in {"none": None, "weight": last.weight, "z": last.state["z"]}.items():
            place = tensor.detach().reshape(-1)[-1:] if ruining and tensor is not None else torch.empty(0)
            before = place.clone()
            place.fill_(torch.nan)
            path = save_checkpoint(directory / f"{engine}-{kind}", trainer.model, trainer.optimizer)
            place.copy_(before)
            assert read_manifest(path)["finite"] is (kind == "none"), (engine, kind)


def all_checks(rank, engines, directory):
    return outcome(functools.partial(check_any_rank_and_engine, engines, directory))


@pytest.mark.slow
@pytest.mark.parametrize(
    "engines", [("zero3", "fsdp2"), pytest.param(("ddp", "zero1", "hsdp"), marks=pytest.mark.exhaustive)]
)
def test_any_rank_and_engine(tmp_path, engines):
    assert spawn(all_checks, 4, engines, tmp_path) is None
