"""CIFAR-10 and CIFAR-100 as published for Python: pickles, which are read without running them."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stacey_dist.data.images.image_set import ArrayImages
from stacey_dist.errors import InputError
from stacey_dist.files import printable
from stacey_dist.safe_pickle import Function, record, unpickle

_BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
# Where the files of each are published; the files of the classes, of training and of the test; what they call the
# classes and the labels.
_CIFAR_10 = ("cifar-10-batches-py", "batches.meta", _BATCHES, ["test_batch"], b"label_names", b"labels")
_CIFAR_100 = ("cifar-100-python", "meta", ["train"], ["test"], b"fine_label_names", b"fine_labels")

_Array, _Dtype = record("ndarray"), record("dtype")
_new_array = Function(lambda *_: _Array())
_NUMPY = {
    ("numpy.core.multiarray", "_reconstruct"): _new_array,
    ("numpy._core.multiarray", "_reconstruct"): _new_array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
}


def cifar_images(path: Path) -> tuple[ArrayImages, ArrayImages] | None:
    """Return (train, test) of CIFAR-10 or, with its fine labels, of CIFAR-100; None where their files are not there.

    Args:
        path: the directory of the files, or the one in which the published directory lies.

    Raises:
        InputError: a file is damaged, or holds anything but arrays, lists, dictionaries, texts and numbers.
    """
    for published, meta, train, test, names, labels in (_CIFAR_10, _CIFAR_100):
        for directory in (path, path / published):
            if all((directory / file).is_file() for file in (meta, *train, *test)):
                classes = _classes(directory / meta, names)
                return _split(directory, train, labels, classes), _split(directory, test, labels, classes)
    return None


def _classes(path: Path, key: bytes) -> list[str]:
    found = _load(path).get(key)
    if not isinstance(found, list) or not all(isinstance(name, bytes) for name in found):
        raise InputError(f"path: {path} has no {key.decode()}")
    return [name.decode(errors="replace") for name in found]


def _split(directory: Path, files: list[str], key: bytes, classes: list[str]) -> ArrayImages:
    pixels, labels = [], []
    for file in files:
        content = _load(directory / file)
        try:
            pixels.append(_pixels(content.get(b"data")))
            labels.append(_labels(content.get(key)))
        except ValueError as error:
            raise InputError(f"path: {directory / file} is not one of CIFAR's files: {error}") from error
    try:
        return ArrayImages(np.concatenate(pixels), np.concatenate(labels), classes, str(directory / files[0]))
    except ValueError as error:
        raise InputError(f"path: {directory}, {', '.join(files)}: {error}") from error


def _load(path: Path) -> dict[bytes, Any]:
    try:
        content = unpickle(path.read_bytes(), _NUMPY, encoding="bytes")
    except Exception as error:  # damaged pickles fail in many ways
        reason = printable(f"{type(error).__name__}: {error}")[:200]
        raise InputError(f"path: {path} cannot be read: {reason}") from error
    if not isinstance(content, dict):
        raise InputError(f"path: {path} holds {type(content).__name__}, not a dictionary")
    return content


def _pixels(data: Any) -> NDArray[np.uint8]:
    """Return the images, (n, 32, 32, 3). They are stored one colour after another."""
    match getattr(data, "state", None):
        case (_, (int(count), 3072), _Dtype(arguments=(b"u1" | "u1", *_)), False | 0, bytes(values)):
            if count * 3072 == len(values):
                return np.frombuffer(values, np.uint8).reshape(count, 3, 32, 32).transpose(0, 2, 3, 1)
    raise ValueError("data must be an array of 3072 bytes an image")


def _labels(labels: Any) -> NDArray[np.int64]:
    # numpy would make an array of lists of lists, of any size.
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < 100 for label in labels):
        raise ValueError("its labels must be a list of numbers below 100")
    return np.array(labels, dtype=np.int64)
