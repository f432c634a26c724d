"""The files of ranks: they are torch's, any ranges are read from any of them, and few are opened."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from stacey_dist.checkpoint import read, shard
from stacey_dist.checkpoint.manifest import sha256
from stacey_dist.checkpoint.shard import Range, read_shards, shard_name, write_shard


def test_a_shard_is_what_torchs_storage_writes(tmp_path):
    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)
    ranges = {
        f"tensor/{index}": Range(7 * index, torch.arange(5 + index).to(dtype)) for index, dtype in enumerate(kinds)
    }
    described = write_shard(tmp_path / shard_name(2), ranges)
    assert described == {
        "bytes": (tmp_path / shard_name(2)).stat().st_size,
        "sha256": sha256(tmp_path / shard_name(2)),
    }
    metadata = HuggingFaceStorageReader(str(tmp_path)).read_metadata()
    assert metadata.state_dict_metadata.keys() == ranges.keys()
    for name, part in ranges.items():
        kind = metadata.state_dict_metadata[name]
        assert kind.properties.dtype == part.values.dtype
        assert [(tuple(c.offsets), tuple(c.sizes)) for c in kind.chunks] == [((part.start,), (part.values.numel(),))]
    for name, tensor in load_file(tmp_path / shard_name(2)).items():
        assert torch.equal(tensor, ranges[name].values)
        assert tensor.dtype == ranges[name].values.dtype


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
    files = data.draw(st.permutations(sorted(directory.iterdir())))
    read_shards(files, wanted)
    assert all(torch.equal(part.values, whole[name][part.start : part.stop]) for name, part in wanted.items())


def test_elements_that_are_in_no_file_are_named(tmp_path):
    write_shard(tmp_path / shard_name(0), {"model/a": Range(0, torch.zeros(5))})
    with pytest.raises(OSError, match="model/a: not all elements are in the files"):
        read_shards([tmp_path / shard_name(0)], {"model/a": Range(4, torch.zeros(2))})
    with pytest.raises(OSError, match=r"shard-00002.*cannot be read"):
        read_shards([tmp_path / shard_name(1)], {"model/a": Range(4, torch.zeros(1))})


@pytest.mark.parametrize("layout", ["each tensor over all ranks", "one tensor after another"])
def test_of_many_files_a_rank_opens_few(layout, tmp_path, monkeypatch):
    """With the shards of 64 ranks as FSDP2 and ZeRO-3, and as ZeRO-1 and 2, have them: its own and the steps."""
    ranks, names = 64, [f"layer{i}" for i in range(5)]
    whole = {f"{kind}/{name}": torch.randn(640) for name in names for kind in ("model", "optimizer/z")}
    held: list[dict[str, Range]] = []
    for rank in range(ranks):
        mine = {}
        for place, name in enumerate(names):
            if layout == "each tensor over all ranks":
                start, stop = 10 * rank, 10 * (rank + 1)
            else:
                start, stop = (min(max(50 * edge - 640 * place, 0), 640) for edge in (rank, rank + 1))
            if start < stop:
                mine |= {
                    key: Range(start, values[start:stop]) for key, values in whole.items() if key.endswith("/" + name)
                }
                if start == 0:
                    mine[f"optimizer/{name}/step"] = Range(0, torch.tensor([7.0]))
        write_shard(tmp_path / shard_name(rank), mine)
        held.append(mine)
    manifest = {"files": {shard_name(rank): {} for rank in range(ranks)}}
    opened: list[str] = []
    original = shard.safe_open
    monkeypatch.setattr(shard, "safe_open", lambda file, **kw: (opened.append(file.name), original(file, **kw))[1])
    monkeypatch.setattr(read, "world_size", lambda: ranks)
    for rank, mine in enumerate(held):
        monkeypatch.setattr(read, "rank", lambda rank=rank: rank)
        wanted = {key: Range(part.start, torch.zeros_like(part.values)) for key, part in mine.items()}
        wanted |= {f"optimizer/{name}/step": Range(0, torch.zeros(1)) for name in names if f"model/{name}" in mine}
        opened.clear()
        read._read(tmp_path, manifest, wanted)
        assert all(torch.equal(wanted[key].values, part.values) for key, part in mine.items())
        assert all(part.values == 7.0 for key, part in wanted.items() if key.endswith("step"))
        assert opened[0] == shard_name(rank)
        reach = 0 if layout == "each tensor over all ranks" else 640 // 50 + 1  # ranks before that the tensor is on
        assert len(opened) <= 2 + 2 * reach  # it looks on both sides
