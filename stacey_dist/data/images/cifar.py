"""CIFAR-10 and CIFAR-100 as published for Python: pickles, of which only data are read, never code."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stacey_dist.data.images.image_set import ArrayImages
from stacey_dist.errors import SettingsError

_CIFAR_10 = ("cifar-10-batches-py", ("batches.meta", *(f"data_batch_{i}" for i in range(1, 6)), "test_batch"))
_CIFAR_100 = ("cifar-100-python", ("meta", "train", "test"))


def find_cifar(path: Path) -> Path | None:
    """Return the directory of CIFAR's files, ``path`` itself or the published directory in it; None if neither is."""
    for directory, files in (_CIFAR_10, _CIFAR_100):
        for place in (path, path / directory):
            if all((place / file).is_file() for file in files):
                return place
    return None


def cifar_images(directory: Path) -> tuple[ArrayImages, ArrayImages]:
    """Return (train, test) of a directory of CIFAR-10 or, with its fine labels, of CIFAR-100.

    Raises:
        SettingsError: a file is damaged, or holds anything but arrays, lists, dictionaries, strings and numbers.
    """
    if (directory / "batches.meta").is_file():
        meta, train, test = "batches.meta", [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]
        names, labels = b"label_names", b"labels"
    else:
        meta, train, test, names, labels = "meta", ["train"], ["test"], b"fine_label_names", b"fine_labels"
    try:
        classes = [bytes(name).decode() for name in _load(directory / meta)[names]]
    except (KeyError, TypeError, UnicodeDecodeError) as error:
        raise SettingsError(f"data.path: {directory / meta} has no {names.decode()}") from error
    return _split(directory, train, labels, classes), _split(directory, test, labels, classes)


def _split(directory: Path, files: list[str], key: bytes, classes: list[str]) -> ArrayImages:
    pixels, labels = [], []
    for file in files:
        content = _load(directory / file)
        try:
            # Stored a colour after the other.
            pixels.append(_pixels(content[b"data"]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
            labels.append(np.array(content[key], dtype=np.int64))
        except (KeyError, TypeError, ValueError) as error:
            raise SettingsError(f"data.path: {directory / file} is not one of CIFAR's files: {error!r}") from error
    try:
        return ArrayImages(np.concatenate(pixels), np.concatenate(labels), classes, str(directory / files[0]))
    except ValueError as error:
        raise SettingsError(f"data.path: {directory}, {', '.join(files)}: {error}") from error


class _Array:
    """What stands in for a numpy array, its type and its dtype while a pickle is read: keeps what they were given."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes in the old protocol: always so."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r}")
    return text.encode(encoding)


_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Array,
    ("_codecs", "encode"): _encode,
}


class _DataUnpickler(pickle.Unpickler):
    """Calls nothing but the two above, whatever a pickle asks for."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no data") from None


def _load(path: Path) -> dict[bytes, Any]:
    try:
        with open(path, "rb") as file:
            content = _DataUnpickler(file, encoding="bytes").load()
    except Exception as error:  # the unpickler lets through whatever damaged data make it do
        raise SettingsError(f"data.path: {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"data.path: {path} holds {type(content).__name__}, not a dictionary")
    return content


def _pixels(array: Any) -> NDArray[np.uint8]:
    """Return the n x 3072 bytes of what the unpickler gave for a numpy array."""
    if not isinstance(array, _Array) or not isinstance(array.state, tuple):
        raise TypeError("data is no array")
    _, shape, dtype, column_order, content = array.state
    if not isinstance(dtype, _Array) or dtype.arguments[:1] not in ((b"u1",), ("u1",)) or column_order:
        raise TypeError("data is no array of bytes in row order")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)
