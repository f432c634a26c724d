"""Checks of what ranks send each other for a checkpoint: for many as little as for a few. test_ranks.py runs them."""

import json

import pytest
import torch
import torch.distributed as dist

from stacey_dist.checkpoint import BackgroundSaver, save_checkpoint
from stacey_dist.checkpoint.collectives import FailedOnAnotherRankError, cpu_group, rank0_call, together
from stacey_dist.checkpoint.manifest import MANIFEST, UnknownFormatError, read_manifest
from stacey_dist.checkpoint.read import load_verified, verify_together
from stacey_dist.checkpoint.shares import Share, collect
from stacey_dist.checkpoint.snapshot import Snapshot
from stacey_dist.errors import SettingsError
from stacey_dist.sharding import base_optimizer


class Counted:
    """Counts the bytes of this rank's tensors in calls of torch.distributed, by the calls' names."""

    NAMES = ("all_reduce", "broadcast", "gather", "all_gather", "send", "recv")

    def __enter__(self):
        self.bytes, self.groups = dict.fromkeys(self.NAMES, 0), set()
        self._originals = {name: getattr(dist, name) for name in self.NAMES}
        for name, original in self._originals.items():
            self._put(name, self._counting(name, original))
        return self

    def __exit__(self, *_):
        for name, original in self._originals.items():
            self._put(name, original)

    def _counting(self, name, original):
        def call(tensor, *arguments, **options):
            self.groups.add(options.get("group"))
            self.bytes[name] += sum(one.nbytes for one in (tensor if isinstance(tensor, list) else [tensor]))
            return original(tensor, *arguments, **options)

        return call

    def _put(self, name, function):
        for place in (dist, dist.distributed_c10d):  # that of objects calls the others there
            setattr(place, name, function)


def check_a_save_sends_what_its_ranks_have_begun(directory, make):
    trainer, saver = make("zero1", steps=2), BackgroundSaver()  # where each rank begins some of the tensors

    def save(number):
        """The bytes of the shares, of all that is sent, and of what describes all tensors; the tensors."""
        path = directory / f"step_{number:08d}"
        with Counted() as counted:
            saver.save(path, trainer.model, trainer.optimizer)
            saver.wait()
        assert saver.failure() is None
        tensors = read_manifest(path)["tensors"]
        return counted.bytes["gather"], sum(counted.bytes.values()), len(json.dumps(tensors)), tensors

    save(0)  # it compares the replicas, too
    shares, everything, whole, _ = save(1)
    ranks = dist.get_world_size()
    sent = shares / ranks if dist.get_rank() == 0 else shares  # rank 0 receives that of each
    assert sent < whole + 300
    assert everything < shares + 500
    for values in base_optimizer(trainer.optimizer).state.values():
        values["z"] = values["z"].float()
    assert save(2)[-1]["optimizer/large.weight/z"][1] == "float32"


def check_a_resume_sends_the_manifest_once(directory, make):
    trainer = make(steps=1)
    path = save_checkpoint(directory / "step_00000001", trainer.model, trainer.optimizer, {"note": "x" * 100_000})
    size = (path / MANIFEST).stat().st_size
    with Counted() as counted:
        manifest = verify_together(path)
    assert counted.bytes["all_gather"] == 0
    assert size * 0.9 < counted.bytes["broadcast"] < size * 1.1  # once, and by one message for all
    with Counted() as counted:
        load_verified(path, manifest, trainer.model, trainer.optimizer)
    assert sum(counted.bytes.values()) < 2000  # and the buffers' few bytes


def check_objects_take_a_group_that_host_memory_has(directory):
    """NCCL's group, which would take them to the GPU, is not used."""
    original = dist.get_backend_config
    dist.get_backend_config = lambda *_: "cuda:nccl"
    try:
        group = cpu_group()
        assert group is not dist.group.WORLD
        assert cpu_group() is group
        with Counted() as counted:
            assert rank0_call(dist.get_rank) == 0
        assert counted.groups == {group}
    finally:
        dist.get_backend_config = original
    assert cpu_group() is dist.group.WORLD


def check_all_ranks_hear_of_a_failure_or_a_result(directory):
    rank, last = dist.get_rank(), dist.get_world_size() - 1

    def fail_on(those):
        if rank in those:
            raise KeyError(f"gone on {rank}")
        return rank

    with pytest.raises(KeyError if rank else FailedOnAnotherRankError, match="gone on 1" if rank == 0 else "gone"):
        together(lambda: fail_on(range(1, last + 1)))
    with pytest.raises(FailedOnAnotherRankError if rank else KeyError, match="gone on 0"):
        rank0_call(lambda: fail_on([0]))
    assert together(lambda: fail_on([])) == rank
    assert rank0_call(lambda: fail_on([])) == 0
    # Errors that the caller tells apart have their kind on every rank.
    for kind in (SettingsError, UnknownFormatError):

        def refuse(those, kind=kind):
            if rank in those:
                raise kind(f"refused by {rank}")

        with pytest.raises(kind, match=f"^refused by {max(rank, 1)}$"):
            together(lambda: refuse(range(1, last + 1)))
        with pytest.raises(kind, match=r"^refused by 0$"):
            rank0_call(lambda: refuse([0]))


def check_a_range_that_is_missing_or_written_twice_is_named(directory):
    rank, size = dist.get_rank(), dist.get_world_size()
    whole = torch.Size([10 * size])

    def written(start, stop):
        copies = Snapshot()
        copies.add("model/right", torch.zeros(10), shape=whole, start=10 * rank)
        copies.add("model/wrong", torch.zeros(stop - start), shape=whole, start=start)
        collect(Share.of(copies, {"bytes": 1, "sha256": "00" * 32}, None), copies)

    start, stop, is_last = 10 * rank, 10 * rank + 10, rank == size - 1
    written(start, stop)
    for ranges in (
        (start + is_last, stop),  # a gap
        (start - is_last, stop),  # an overlap
        (start, stop - is_last),  # the end is missing
        (start - is_last, stop - is_last),  # as many elements as there should be
        (0, 10 * size),  # all of it, by all
    ):
        with pytest.raises(RuntimeError, match="model/wrong: some of its elements were written by no rank, or by two"):
            written(*ranges)
    with pytest.raises(RuntimeError, match="model/wrong: its first elements were written by no rank"):
        written(start + (rank == 0), stop)
    copies = Snapshot()
    copies.add("model/right", torch.zeros(10), shape=whole, start=10 * rank)
    copies.add("model/empty", torch.zeros(0, 3))
    with pytest.raises(RuntimeError, match="model/empty: it was begun by two ranks"):
        collect(Share.of(copies, {"bytes": 1, "sha256": "00" * 32}, None), copies)
