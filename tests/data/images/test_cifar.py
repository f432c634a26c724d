"""CIFAR as published, and pickles that are no data."""

import contextlib
import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stacey_dist.data.images import open_images, plain_pickle
from stacey_dist.errors import SettingsError
from tests.data.images.helpers import same


def cifar_file(count: int, seed: int, **labels: int) -> dict[bytes, Any]:
    data = np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)
    named = {key.encode(): [(seed + i) % of for i in range(count)] for key, of in labels.items()}
    return {b"data": data, b"batch_label": b"x", b"filenames": [b"a.png"] * count} | named


def dump(path: Path, value: Any, protocol: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(value, protocol))


def write_cifar10(directory: Path, protocol: int = 2, seed: int = 0) -> list[dict[bytes, Any]]:
    dump(directory / "batches.meta", {b"label_names": [b"plane", b"car", b"bird"], b"num_vis": 3072}, protocol)
    files = [cifar_file(4, seed + i, labels=3) for i in range(6)]
    for i, content in enumerate(files, start=1):
        dump(directory / (f"data_batch_{i}" if i < 6 else "test_batch"), content, protocol)
    return files


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("above", [False, True])
def test_cifar10(tmp_path: Path, above: bool, protocol: int) -> None:
    files = write_cifar10(tmp_path / "cifar-10-batches-py", protocol)
    train, test = open_images(str(tmp_path if above else tmp_path / "cifar-10-batches-py"))
    assert (len(train), len(test)) == (20, 4)
    assert train.classes == test.classes == ["plane", "car", "bird"]
    assert train.labels.tolist() == [label for content in files[:5] for label in content[b"labels"]]
    expected = files[1][b"data"][2]
    pixels = train.read(6)
    assert isinstance(pixels, np.ndarray)
    assert pixels[3, 5].tolist() == [expected[c * 1024 + 3 * 32 + 5] for c in range(3)]
    same(test)


def test_cifar_as_python_2_wrote_it() -> None:
    """Strings of Python 2, and numpy's older way to pickle."""
    data = bytes(range(256)) * 12
    content = (
        b"\x80\x02}q\x01U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq\x05"
        b"(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89T\x00\x0c\x00\x00" + data + b"tbs."
    )
    loaded = plain_pickle.load(content)
    assert loaded[b"data"].shape == (1, 3072)
    assert loaded[b"data"].tobytes() == data


def test_cifar100(tmp_path: Path) -> None:
    dump(tmp_path / "meta", {b"fine_label_names": [b"apple", b"bear"], b"coarse_label_names": [b"x"]})
    dump(tmp_path / "train", cifar_file(6, 0, fine_labels=2, coarse_labels=1))
    dump(tmp_path / "test", cifar_file(2, 1, fine_labels=2, coarse_labels=1))
    train, test = open_images(str(tmp_path))
    assert train.classes == ["apple", "bear"]
    assert train.labels.tolist() == [0, 1] * 3
    assert test.labels.tolist() == [1, 0]


class Malicious:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("function", [os.system, eval, exec, getattr, subprocess.call, np.load, pickle.loads])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_in_a_pickle_is_never_loaded(tmp_path: Path, function: Any, protocol: int) -> None:
    write_cifar10(tmp_path)
    mark = tmp_path / "executed"
    dump(tmp_path / "data_batch_3", {b"data": Malicious(function, f"touch {mark}"), b"labels": []}, protocol)
    with pytest.raises(SettingsError, match=r"data_batch_3 cannot be read: it asks for [^\n]*, which is no data$"):
        open_images(str(tmp_path))
    assert not mark.exists()


def test_persistent_ids_extensions_and_other_codecs_are_refused(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    for content in (
        b"Pgo\n.",
        b"\x80\x02\x82\x01.",
        b"c_codecs\nencode\n(Vx\nVutf-16\ntR.",
        b"",
        b"junk",
        pickle.dumps([1]),
    ):
        (tmp_path / "test_batch").write_bytes(content)
        with pytest.raises(SettingsError, match=r"data\.path: .*test_batch (cannot be read|holds list)"):
            open_images(str(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        {b"data": np.zeros((4, 3072))},
        {b"data": np.zeros((4, 99), np.uint8)},
        {b"data": [1]},
        {b"data": np.zeros((2, 2, 3072), np.uint8)},
        {b"labels": [9] * 4},
        {b"labels": [0]},
        {b"labels": [[0, 0], [0, 0]]},
        {b"labels": [10**30] * 4},
        {b"labels": ["0"] * 4},
        {b"labels": 4},
    ],
)
def test_bad_cifar(tmp_path: Path, change: dict[bytes, Any]) -> None:
    write_cifar10(tmp_path)
    dump(tmp_path / "test_batch", cifar_file(4, 0, labels=3) | change)
    with pytest.raises(SettingsError, match=r"data\.path: .*test_batch"):
        open_images(str(tmp_path))


def test_text_for_names_that_is_a_number_is_not_taken_for_a_length(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    dump(tmp_path / "batches.meta", {b"label_names": [10**12]})
    with pytest.raises(SettingsError, match=r"batches\.meta has no label_names"):
        open_images(str(tmp_path))


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(max_size=300),
    lambda values: (
        st.lists(values) | st.tuples(values, values) | st.dictionaries(st.text() | st.binary() | st.integers(), values)
    ),
    max_leaves=30,
)


@settings(max_examples=200, deadline=None)
@given(value=PLAIN, protocol=st.integers(0, 5))
def test_plain_data_are_read_as_pickle_reads_them(value: Any, protocol: int) -> None:
    content = pickle.dumps(value, protocol)
    assert repr(plain_pickle.load(content)) == repr(pickle.loads(content))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_bytes_are_plain_data_or_refused(data: st.DataObject) -> None:
    content = bytearray(pickle.dumps(cifar_file(2, 0, labels=3), data.draw(st.integers(0, 5))))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(plain_pickle.PlainPickleError):
        plain_pickle.load(bytes(content))


# What each costs Python's own unpickler: hours for a hash, all memory, or the process.
TUPLE_OF_TUPLES = b"\x80\x02})" + b"2\x86" * 60 + b"K\x01s."
DEEP_KEY = b"\x80\x02})" + b"\x85" * 1_000_000 + b"K\x01s."
ENCODED_AGAIN = (
    b"\x80\x02(c_codecs\nencode\nq\x00X\x00\x00\x01\x00" + b"x" * 65536 + b"q\x01X\x06\x00\x00\x00latin1q\x02"
)
ENCODED_AGAIN += b"h\x00h\x01h\x02\x86R" * 100_000 + b"l."


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (TUPLE_OF_TUPLES, "it asks for DUP"),
        (TUPLE_OF_TUPLES.replace(b"2\x86", b"q\x00h\x00\x86"), "a key that is a tuple"),
        (DEEP_KEY, "a key that is a tuple"),
        (ENCODED_AGAIN, "it would grow without end"),
        (b"\x80\x02cnumpy\ndtype\n}X\x01\x00\x00\x00aK\x01sb.", "in the place of _Array"),
        (b"I" + b"9" * 5000 + b"\n.", "a damaged pickle"),
        (b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f.", "a damaged pickle"),
        (b"\x80\x02K\x01", "a damaged pickle"),
        (b"\x80\x02cos\nsystem\n.", "it asks for os.system"),
        (b"\x80\x02cnumpy\nndarray\n)R.", "it calls numpy.ndarray"),
    ],
)
def test_hostile_pickles_end_at_once(content: bytes, reason: str) -> None:
    with pytest.raises(plain_pickle.PlainPickleError, match=reason):
        plain_pickle.load(content)
