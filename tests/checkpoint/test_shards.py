"""The files of ranks: they are torch's, any ranges are read from any of them, and few are opened."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from stacey_dist.checkpoint import read, shard
from stacey_dist.checkpoint.manifest import sha256
from stacey_dist.checkpoint.shard import Range, read_shards, shard_name, write_shard


def test_a_shard_is_what_torchs_storage_writes(tmp_path):
    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)
    ranges = {
        f"tensor/{index}": Range(7 * index, torch.arange(5 + index).to(dtype)) for index, dtype in enumerate(kinds)
    }
    described, finite = write_shard(tmp_path / shard_name(2), ranges)
    assert finite is None  # none of them is trained
    assert described == {
        "bytes": (tmp_path / shard_name(2)).stat().st_size,
        "sha256": sha256(tmp_path / shard_name(2)),
    }
    storage = pytest.importorskip("torch.distributed.checkpoint.hf_storage", reason="torch before 2.8 cannot read it")
    metadata = storage.HuggingFaceStorageReader(str(tmp_path)).read_metadata()
    assert metadata.state_dict_metadata.keys() == ranges.keys()
    for name, part in ranges.items():
        kind = metadata.state_dict_metadata[name]
        assert kind.properties.dtype == part.values.dtype
        assert [(tuple(c.offsets), tuple(c.sizes)) for c in kind.chunks] == [((part.start,), (part.values.numel(),))]
    for name, tensor in load_file(tmp_path / shard_name(2)).items():
        assert torch.equal(tensor, ranges[name].values)
        assert tensor.dtype == ranges[name].values.dtype


@settings(deadline=None)
@given(st.data())
def test_any_ranges_are_read_from_any_shards(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("shards")
    size, count = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 5))
    whole = {f"model/{name}": torch.randn(size + name) for name in range(3)}
    for rank in range(count):
        cuts = {name: [values.numel() * part // count for part in (rank, rank + 1)] for name, values in whole.items()}
        write_shard(
            directory / shard_name(rank),
            {name: Range(start, whole[name][start:stop]) for name, (start, stop) in cuts.items() if start < stop},
        )
    wanted = {}
    for name, values in whole.items():
        start, stop = sorted(data.draw(st.tuples(*[st.integers(0, values.numel())] * 2)))
        wanted[name] = Range(start, torch.full((stop - start,), torch.nan))
    files = data.draw(st.permutations(sorted(file.name for file in directory.iterdir())))
    read_shards(directory, files, wanted)
    assert all(torch.equal(part.values, whole[name][part.start : part.stop]) for name, part in wanted.items())


def test_elements_that_are_in_no_file_are_named(tmp_path):
    write_shard(tmp_path / shard_name(0), {"model/a": Range(0, torch.zeros(5))})
    with pytest.raises(OSError, match=f"{tmp_path}: its files do not have all of model/a"):
        read_shards(tmp_path, [shard_name(0)], {"model/a": Range(4, torch.zeros(2))})
    with pytest.raises(OSError, match=r"shard-00002.*cannot be read"):
        read_shards(tmp_path, [shard_name(1)], {"model/a": Range(4, torch.zeros(1))})


def test_a_damaged_header_is_an_error_that_names_the_file(tmp_path):
    write_shard(tmp_path / shard_name(0), {"model/a": Range(0, torch.arange(5.0))})
    whole = (tmp_path / shard_name(0)).read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    for place in range(end):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        (tmp_path / shard_name(0)).write_bytes(damaged)
        values, message = torch.zeros(5), ""
        try:
            read_shards(tmp_path, [shard_name(0)], {"model/a": Range(0, values)})
        except OSError as error:
            message = str(error)
        # or it is in a part that is not used
        assert str(tmp_path) in message or torch.equal(values, torch.arange(5.0)), place


RANKS, NAMES, SIZE = 64, [f"layer{i}" for i in range(5)], 640


def rows_of(rank):
    """FSDP2 and ZeRO-3: each tensor over all ranks."""
    return [(SIZE // RANKS * rank, SIZE // RANKS * (rank + 1))] * len(NAMES)


def rows_of_replicas(rank):
    """HSDP of 4 replicas of 16 ranks each, which hold the same and share the writing."""
    replica, part = divmod(rank, 16)
    return [(40 * part + 10 * replica, 40 * part + 10 * (replica + 1))] * len(NAMES)


def stretch_of_all(rank):
    """ZeRO-1 and 2: one tensor after another."""
    each = len(NAMES) * SIZE // RANKS
    edges = (each * rank, each * (rank + 1))
    return [tuple(min(max(edge - SIZE * place, 0), SIZE) for edge in edges) for place in range(len(NAMES))]


@pytest.mark.parametrize(
    ("layout", "replicas", "limit"),
    [
        (rows_of, 1, 2),  # its own, and that with the steps
        (rows_of_replicas, 4, 5),
        (stretch_of_all, 1, 28),  # up to 13 before it have the same tensor, and it looks on both sides
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_of_many_files_a_rank_opens_few(layout, replicas, limit, tmp_path, monkeypatch):
    whole = {f"{kind}/{name}": torch.randn(SIZE) for name in NAMES for kind in ("model", "optimizer/z")}
    for rank in range(RANKS):
        mine = {}
        for name, (start, stop) in zip(NAMES, layout(rank), strict=True):
            if start < stop:
                mine |= {key: Range(start, whole[key][start:stop]) for key in (f"model/{name}", f"optimizer/z/{name}")}
            if start == 0 < stop:
                mine[f"optimizer/{name}/step"] = Range(0, torch.tensor([7.0]))
        write_shard(tmp_path / shard_name(rank), mine)
    manifest = {"files": {shard_name(rank): {} for rank in range(RANKS)}}
    opened: list[str] = []
    original = shard.safe_open
    monkeypatch.setattr(shard, "safe_open", lambda file, **kw: (opened.append(file.name), original(file, **kw))[1])
    monkeypatch.setattr(read, "world_size", lambda: RANKS)
    for rank in range(RANKS):
        monkeypatch.setattr(read, "rank", lambda rank=rank: rank)
        alike = range(rank % (RANKS // replicas), RANKS, RANKS // replicas) if replicas > 1 else [rank]
        wanted = {}
        for place, name in enumerate(NAMES):
            held = [layout(other)[place] for other in alike]
            start, stop = held[0][0], held[-1][1]
            if start < stop:
                wanted |= {
                    key: Range(start, torch.zeros(stop - start)) for key in (f"model/{name}", f"optimizer/z/{name}")
                }
                wanted[f"optimizer/{name}/step"] = Range(0, torch.zeros(1))
        opened.clear()
        read._read(tmp_path, manifest, wanted, replicas)
        for key, part in wanted.items():
            expected = torch.tensor([7.0]) if key.endswith("/step") else whole[key][part.start : part.stop]
            assert torch.equal(part.values, expected)
        assert opened[0] == shard_name(rank)
        assert len(opened) <= limit
