"""Checkpoints of several processes: a failure on one, a pickle on the disk, more ranks than parameters."""

import functools
import pickle
import resource
import signal
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from stacey_dist.checkpoint import (
    BackgroundSaver,
    DamagedCheckpointError,
    background,
    find_checkpoints,
    load_checkpoint,
    read,
    read_tensors,
    save_checkpoint,
    verify,
    write,
)
from stacey_dist.checkpoint.collectives import FailedOnAnotherRankError
from stacey_dist.checkpoint.snapshot import Snapshot
from stacey_dist.errors import SettingsError
from stacey_dist.sharding import base_optimizer, fragments
from tests.checkpoint import messages
from tests.sharding.engines import Trainer, assert_equal, gather, that_run
from tests.sharding.problem import CASES, Awkward, gradients, group_settings, one_process
from tests.sharding.processes import outcome, spawn
from tests.shared import made_once

pytestmark = pytest.mark.slow
CASE = "p2-stochastic"


def make(engine=None, steps=0):
    engine = engine or that_run("fsdp2", "zero3")[0]
    model = Awkward(scalar=False)
    trainer = Trainer(engine, model, group_settings(CASE), *CASES[CASE])
    for step in range(steps):
        trainer.step(gradients(step, model))
    return trainer


def check_a_full_disk_on_one_rank(directory):
    trainer = make(steps=1)
    good = save_checkpoint(directory / "step_00000001", trainer.model, trainer.optimizer)
    last = dist.get_rank() == dist.get_world_size() - 1
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if last:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
    try:
        expected = OSError if last else FailedOnAnotherRankError
        with pytest.raises(expected, match="File too large") as raised:
            save_checkpoint(directory / "step_00000002", trainer.model, trainer.optimizer)
        assert last or f"on rank {dist.get_world_size() - 1}: OSError" in str(raised.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    dist.barrier()
    assert [path.name for path in directory.iterdir()] == ["step_00000001"]
    verify(good)
    save_checkpoint(directory / "step_00000002", trainer.model, trainer.optimizer)
    assert len(find_checkpoints(directory)) == 2


class Bomb:
    def __reduce__(self):
        return (print, ("a pickle was opened",))


def check_no_pickle_is_opened(directory):
    trainer = make(steps=2)
    path = save_checkpoint(directory / "step_00000002", trainer.model, trainer.optimizer, {"note": 1})
    if dist.get_rank() == 0:
        for name in (".metadata", "model.pt", "optimizer.bin", "__0_0.distcp", "extra.pkl"):
            (path / name).write_bytes(pickle.dumps(Bomb()))
    dist.barrier()
    opened = []
    original = torch.load, pickle.load
    torch.load = lambda *_, **__: opened.append("torch.load")
    pickle.load = lambda *_, **__: opened.append("pickle.load")
    try:
        other = make()
        load_checkpoint(path, other.model, other.optimizer)
    finally:
        torch.load, pickle.load = original
    assert opened == []
    assert_equal(gather(fragments(other.model, other.optimizer)), one_process(CASE, False, steps=2, scheduled=False))


def check_a_stray_part_is_refused(directory):
    trainer = make(steps=1)
    path = save_checkpoint(directory / "step_00000001", trainer.model, trainer.optimizer)
    if dist.get_rank() == 0:
        (part,) = path.glob("shard-00001-*")
        (path / "shard-00009-model-00001-of-00001.safetensors").write_bytes(part.read_bytes())
    dist.barrier()
    before = [f.weight.clone() for f in fragments(trainer.model, trainer.optimizer)]
    with pytest.raises(DamagedCheckpointError, match=r"shard-00009.*does not belong to this checkpoint"):
        load_checkpoint(path, trainer.model, trainer.optimizer)
    after = [f.weight for f in fragments(trainer.model, trainer.optimizer)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def check_an_altered_file_of_any_rank_is_named_on_all(directory):
    trainer = make(steps=1)
    for rank in range(dist.get_world_size()):
        path = save_checkpoint(directory / f"{rank}" / "step_00000001", trainer.model, trainer.optimizer)
        file = path / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
        if dist.get_rank() == 0:
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(content)
        dist.barrier()
        with pytest.raises(DamagedCheckpointError, match=rf"{file}: its content does not match its checksum"):
            load_checkpoint(path, trainer.model, trainer.optimizer)


def check_no_rank_writes_more_than_its_share(directory):
    for engine in that_run("zero1", "zero3", "fsdp2"):
        trainer = make(engine, steps=1)
        path = save_checkpoint(directory / engine / "step_00000001", trainer.model, trainer.optimizer)
        sizes = sorted(file.stat().st_size for file in path.glob("*.safetensors"))
        assert len(sizes) == dist.get_world_size()
        assert sizes[-1] < 1.3 * sum(sizes) / len(sizes) + 8192  # a header, whole rows


def check_a_directory_that_ranks_do_not_share(directory):
    trainer = make(steps=1)
    write._VISIBLE_SECONDS, original = 0.2, write._VISIBLE_SECONDS
    own = directory / f"node {dist.get_rank()}"
    try:
        with pytest.raises(OSError, match=r"rank \d does not see .*; all ranks must write to the same directory"):
            save_checkpoint(own / "step_00000001", trainer.model, trainer.optimizer)
    finally:
        write._VISIBLE_SECONDS = original
    dist.barrier()
    assert not list(directory.glob("*/*"))


def check_a_background_save_to_a_path_that_is_taken(directory):
    trainer, saver = make(steps=1), BackgroundSaver()
    path = directory / "step_00000001"
    if dist.get_rank() == 0:
        path.mkdir(parents=True)
        (path / "notes.txt").touch()
    dist.barrier()
    saver.save(path, trainer.model, trainer.optimizer)
    saver.wait()
    with pytest.raises(
        SettingsError, match="is there already and is not a checkpoint"
    ):  # on all, not on the first alone
        saver.failure()


def check_shards_without_elements_know_their_step(directory):
    trainer = make(steps=3)
    path = save_checkpoint(directory / "step_00000003", trainer.model, trainer.optimizer)
    other = make()
    load_checkpoint(path, other.model, other.optimizer)
    parts = fragments(other.model, other.optimizer, empty=True)
    assert dist.get_rank() == 0 or any(f.start == f.stop for f in parts)
    assert [float(f.step) for f in parts] == [3.0] * len(parts)


def check_parameters_without_state_begin_where_they_are(directory):
    """ZeRO keeps them in one tensor with others that have state: they are to begin there as the optimizer begins."""
    trainer = make("ddp", steps=2)
    updated = ("large", "one", "primes")
    for name, param in trainer.model.named_parameters():
        if param.requires_grad and not any(part in name for part in updated):
            del base_optimizer(trainer.optimizer).state[param]
    path = save_checkpoint(directory / "step_00000002", trainer.model, trainer.optimizer)
    for engine in ("zero1", "zero3"):
        other = make(engine)
        load_checkpoint(path, other.model, other.optimizer)
        new = [f for f in fragments(other.model, other.optimizer) if not f.name.startswith(updated)]
        new = [f for f in new if f.z is not None]  # in a tensor of their own they get a state with their first update
        assert all(torch.equal(f.z, f.weight.to(f.z.dtype)) and not f.m.any() for f in new), engine
        found = torch.tensor(len(new))
        dist.all_reduce(found)
        assert found > 0, engine


def check_one_count_for_many_parameters_is_the_largest(directory):
    trainer = make("ddp", steps=2)
    first = next(p for p in trainer.model.parameters() if p.requires_grad)
    base_optimizer(trainer.optimizer).state[first]["step"].fill_(500)
    path = save_checkpoint(directory / "step_00000500", trainer.model, trainer.optimizer)
    for engine in that_run("zero1", "zero3", "fsdp2"):
        other = make(engine)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load_checkpoint(path, other.model, other.optimizer)
        said = sum("had 2 updates and" in str(w.message) and "continue with 500" in str(w.message) for w in caught)
        counts = {}
        for f in fragments(other.model, other.optimizer):
            counts.setdefault(f.owner, set()).add(float(f.step))
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (said, [sorted(c) for c in counts.values()]))
        assert {len(found) for _, owners in everyone for found in owners} == {1}, engine
        assert {found[0] for _, owners in everyone for found in owners} >= {500.0}, engine
        assert (sum(said for said, _ in everyone) > 0) == engine.startswith("zero"), engine


def check_a_file_that_one_rank_cannot_read(directory):
    trainer = make(steps=1)
    path = save_checkpoint(directory / "step_00000001", trainer.model, trainer.optimizer)
    last = dist.get_rank() == dist.get_world_size() - 1

    def broken(*_):
        raise OSError(5, "Input/output error")

    original, read._read = read._read, broken if last else read._read
    try:
        with pytest.raises(OSError if last else FailedOnAnotherRankError, match="Input/output error"):
            load_checkpoint(path, trainer.model, trainer.optimizer)
    finally:
        read._read = original


def check_frozen_parameters_are_written_in_turns(directory):
    def frozen_too(engine):
        model = Awkward(scalar=False)
        for part in (model.large, model.one):
            part.weight.requires_grad_(False)
        return Trainer(engine, model, group_settings(CASE), *CASES[CASE])

    read._BATCH_BYTES, original = 1, read._BATCH_BYTES  # and read one after another
    try:
        for engine in that_run("ddp", "zero3", "fsdp2"):
            trainer = frozen_too(engine)
            path = save_checkpoint(directory / engine / "step_00000001", trainer.model, trainer.optimizer)
            writers = {
                name: file.name[:11]
                for file in path.glob("*.safetensors")
                for name in load_file(file)
                if name in ("model/large.weight", "model/one.weight", "model/frozen.weight")
            }
            assert len(writers) == 3, engine
            assert len(set(writers.values())) == dist.get_world_size(), engine
            expected = read_tensors(path)
            other = frozen_too(engine)
            with torch.no_grad():
                for param in other.model.parameters():
                    getattr(param, "to_local", lambda param=param: param)().zero_()
            load_checkpoint(path, other.model, other.optimizer)
            again = read_tensors(save_checkpoint(directory / engine / "step_00000002", other.model, other.optimizer))
            assert all(torch.equal(again[name], tensor) for name, tensor in expected.items()), engine
    finally:
        read._BATCH_BYTES = original


def check_a_saver_older_than_the_process_group_has_its_own(directory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(background, "world_size", lambda: 1)
        saver = BackgroundSaver()
    trainer = make(steps=1)
    with messages.Counted() as counted:
        saver.save(directory / "step_00000001", trainer.model, trainer.optimizer)
        saver.wait()
    assert saver.failure() is None
    # `compare_once` and the copy talk over the saver's group too.
    assert {group for group in counted.groups if group is not None} == {saver._group}


def check_one_rank_that_cannot_copy_or_finish_fails_all(directory):
    trainer, saver, last = make(steps=1), BackgroundSaver(), dist.get_world_size() - 1
    original = Snapshot.add

    def failing_on(rank, part):
        def add(self, name, *arguments, **options):
            if dist.get_rank() == rank and part in name:
                raise RuntimeError("no memory")
            original(self, name, *arguments, **options)

        return add

    # Rank 0 copies the frozen parameter, which all ranks gather together, whatever fails on one.
    for rank, part in ((last, ""), (0, "model/frozen")):
        own = RuntimeError if dist.get_rank() == rank else FailedOnAnotherRankError
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Snapshot, "add", failing_on(rank, part))
            for save in (save_checkpoint, saver.save):
                with pytest.raises(own, match="no memory"):
                    save(directory / "step_00000001", trainer.model, trainer.optimizer)

    def then():
        if dist.get_rank() == last:
            raise OSError("not deleted")

    saver.save(directory / "step_00000002", trainer.model, trainer.optimizer, then=then)
    saver.wait()
    assert saver.failed_in_a_row == 1
    assert "not deleted" in str(saver.failure())
    verify(directory / "step_00000002")


CHECKS = {
    "a saver older than the process group": check_a_saver_older_than_the_process_group_has_its_own,
    "one rank that cannot copy or finish fails all": check_one_rank_that_cannot_copy_or_finish_fails_all,
    "a save sends what its ranks have begun": functools.partial(
        messages.check_a_save_sends_what_its_ranks_have_begun, make=make
    ),
    "a resume sends the manifest once": functools.partial(messages.check_a_resume_sends_the_manifest_once, make=make),
    "objects take a group that host memory has": messages.check_objects_take_a_group_that_host_memory_has,
    "all ranks hear of a failure or a result": messages.check_all_ranks_hear_of_a_failure_or_a_result,
    "a range that is missing or twice is named": messages.check_a_range_that_is_missing_or_written_twice_is_named,
    "one count for many parameters is the largest": check_one_count_for_many_parameters_is_the_largest,
    "a file that one rank cannot read": check_a_file_that_one_rank_cannot_read,
    "frozen parameters are written in turns": check_frozen_parameters_are_written_in_turns,
    "parameters without state begin where they are": check_parameters_without_state_begin_where_they_are,
    "an altered file of any rank is named on all": check_an_altered_file_of_any_rank_is_named_on_all,
    "a directory that ranks do not share": check_a_directory_that_ranks_do_not_share,
    "a background save to a path that is taken": check_a_background_save_to_a_path_that_is_taken,
    "shards without elements know their step": check_shards_without_elements_know_their_step,
    "a full disk on one rank": check_a_full_disk_on_one_rank,
    "no pickle is opened": check_no_pickle_is_opened,
    "a stray part is refused": check_a_stray_part_is_refused,
    "no rank writes more than its share": check_no_rank_writes_more_than_its_share,
}


def all_checks(rank, directory):
    return {name: outcome(check, Path(directory) / name) for name, check in CHECKS.items()}


def check_all(directory, world_size):
    return spawn(all_checks, world_size, str(directory))


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_checkpoints_of_ranks(world_size, name):
    failure = made_once(check_all, world_size)[name]
    assert failure is None, failure
