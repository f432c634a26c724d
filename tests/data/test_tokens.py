"""Every token but the first is predicted exactly once, from the token before it."""

import json
import os
import pickle
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stacey_dist.data import IGNORED_LABEL, TokenStream
from stacey_dist.data import parts as parts_module
from stacey_dist.errors import InputError

END = 9
HUGE = {"name": "train-00000.bin", "tokens": 10**30}


def write(directory: Path, parts: list[list[int]], dtype: str = "<u2") -> Path:
    names = []
    for i, part in enumerate(parts):
        (directory / f"train-{i:05d}.bin").write_bytes(np.array(part, dtype=dtype).tobytes())
        names.append({"name": f"train-{i:05d}.bin", "tokens": len(part)})
    splits = {"train": {"documents": 1, "parts": names, "tokens": sum(map(len, parts))}}
    index = {
        "format": 1,
        "dtype": dtype,
        "vocab_size": 60_001,
        "end_token_id": END,
        "tokenizer": "t",
        "splits": splits,
    }
    (directory / "index.json").write_text(json.dumps(index))
    return directory


@settings(max_examples=150, deadline=None)
@given(
    parts=st.lists(st.lists(st.integers(0, 60_000), min_size=1, max_size=9), min_size=1, max_size=6).filter(
        lambda parts: sum(map(len, parts)) >= 2
    ),
    length=st.integers(1, 12),
    dtype=st.sampled_from(["<u2", "<u4"]),
)
def test_windows_equal_brute_force(parts: list[list[int]], length: int, dtype: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        stream = TokenStream(write(Path(directory), parts, dtype), "train", length)
        tokens = [token for part in parts for token in part]
        predicted: list[int] = []
        for i in range(len(stream)):
            inputs, labels = stream.window(i)
            assert inputs.dtype == labels.dtype == np.int64
            assert inputs.shape == labels.shape == (length,)
            count = stream.label_count(i)
            assert 1 <= count <= length
            assert inputs[:count].tolist() == tokens[i * length : i * length + count]
            assert labels[:count].tolist() == tokens[i * length + 1 : i * length + 1 + count]
            assert inputs[count:].tolist() == [END] * (length - count)
            assert labels[count:].tolist() == [IGNORED_LABEL] * (length - count)
            predicted += labels[:count].tolist()
        assert predicted == tokens[1:]
        assert stream.total_labels == len(predicted)
        for outside in (-1, len(stream)):
            with pytest.raises(IndexError):
                stream.window(outside)
            with pytest.raises(IndexError):
                stream.label_count(outside)


def test_pickle_maps_instead_of_copying(tmp_path: Path) -> None:
    stream = TokenStream(write(tmp_path, [[1] * 40_000]), "train", 8)
    pickled = pickle.dumps(stream)
    assert len(pickled) < 2_000
    assert len(pickle.loads(pickled)) == len(stream)


opened: list[str] = []
sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)


@pytest.mark.parametrize("parts", [1, 16_000])
def test_opening_takes_one_file_whatever_the_number_of_parts(tmp_path: Path, parts: int) -> None:
    """And none in a copy, which is what the other processes of a run get."""
    directory = write(tmp_path, [[1, 2, 3]] * parts)
    for path in tmp_path.glob("*.bin"):
        path.unlink()
    opened.clear()
    stream = TokenStream(directory, "train", 2)
    pickled = pickle.dumps(stream)
    copy = pickle.loads(pickled)
    assert [path for path in opened if str(tmp_path) in path] == [str(tmp_path / "index.json")]
    assert len(copy) == len(stream)
    assert len(pickled) < 1_000 + 8 * parts


def test_open_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_module, "OPEN_PARTS", 5)
    stream = TokenStream(write(tmp_path, [[i, i + 1] for i in range(40)]), "train", 2)
    before = len(os.listdir("/proc/self/fd"))
    for window in (*range(39), *range(39)):
        assert stream.window(window)[0].tolist() == [window, window + 1]
        assert len(os.listdir("/proc/self/fd")) <= before + 5
    assert stream.window(38)[0].tolist() == [38, 39]
    opened.clear()
    stream.window(38)
    assert not opened


def test_a_part_that_is_put_aside_is_read_on(tmp_path: Path) -> None:
    """One process finds the damage; the others stop where it says so, and not where the file is missing."""
    stream = TokenStream(write(tmp_path, [[1, 2, 3], [4, 5, 6]]), "train", 5)
    (tmp_path / "train-00001.bin").rename(tmp_path / "train-00001.bin.damaged")
    assert stream.window(0)[1].tolist() == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("size", [0, 3, 5, 8])
def test_altered_part_is_named(tmp_path: Path, size: int) -> None:
    write(tmp_path, [[1, 2, 3], [4, 5, 6]])
    (tmp_path / "train-00001.bin").write_bytes(b"\1" * size)
    with pytest.raises(InputError, match=r"train-00001\.bin.*delete"):
        TokenStream(tmp_path, "train", 2).window(1)


def test_missing_part_is_named(tmp_path: Path) -> None:
    write(tmp_path, [[1, 2, 3], [4, 5, 6]])
    (tmp_path / "train-00000.bin").unlink()
    with pytest.raises(InputError, match=r"train-00000\.bin is missing.*delete"):
        TokenStream(tmp_path, "train", 2).window(0)


def test_bad_directories(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"index\.json"):
        TokenStream(tmp_path, "train", 2)
    write(tmp_path, [[1]])
    with pytest.raises(InputError, match="1 tokens"):
        TokenStream(tmp_path, "train", 2)
    with pytest.raises(InputError, match="'test', only train"):
        TokenStream(tmp_path, "test", 2)
    with pytest.raises(InputError, match="sequence_length"):
        TokenStream(tmp_path, "train", 0)
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        TokenStream(tmp_path, "train", 2)
    for change in ({"skipped": None}, {"skipped": {"count": "7"}}, {"splits": {"train": {"parts": [HUGE]}}}):
        (tmp_path / "index.json").write_text(json.dumps(index | change))
        with pytest.raises(InputError, match="damaged"):
            TokenStream(tmp_path, "train", 2)
    (tmp_path / "index.json").write_text('{"format": 0}')
    with pytest.raises(InputError, match="format 0"):
        TokenStream(tmp_path, "train", 2)
