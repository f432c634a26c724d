"""CIFAR as published, and pickles that are no data."""

import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stacey_dist.data.images import open_images, read_pixels
from stacey_dist.errors import InputError
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


def test_cifar_as_python_2_wrote_it(tmp_path: Path) -> None:
    """Strings of Python 2, and numpy's older way to pickle."""
    data = bytes(range(256)) * 12
    content = (
        b"\x80\x02}q\x01U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq\x05"
        b"(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89T\x00\x0c\x00\x00" + data + b"tbsU\x06labels](K\x02es."
    )
    write_cifar10(tmp_path)
    (tmp_path / "test_batch").write_bytes(content)
    _, test = open_images(str(tmp_path))
    assert np.array_equal(read_pixels(test, 0), np.frombuffer(data, np.uint8).reshape(3, 32, 32).transpose(1, 2, 0))


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
    with pytest.raises(InputError, match=r"data_batch_3 cannot be read: UnpicklingError: [\w.]+ has no place in it$"):
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
        with pytest.raises(InputError, match=r"^path: .*test_batch (cannot be read|holds list)"):
            open_images(str(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        {b"data": np.zeros((4, 3072))},
        {b"data": np.zeros((4, 99), np.uint8)},
        {b"data": [1]},
        {b"data": np.zeros((2, 2, 3072), np.uint8)},
        {b"data": np.zeros((4, 3072), np.int8)},
        {b"data": np.asfortranarray(np.ones((4, 3072), np.uint8))},
        {b"data": np.dtype("u1")},
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
    with pytest.raises(InputError, match=r"^path: .*test_batch"):
        open_images(str(tmp_path))


def test_text_for_names_that_is_a_number_is_not_taken_for_a_length(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    dump(tmp_path / "batches.meta", {b"label_names": [10**12]})
    with pytest.raises(InputError, match=r"batches\.meta has no label_names"):
        open_images(str(tmp_path))
