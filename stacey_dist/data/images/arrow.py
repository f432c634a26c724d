"""Images in parquet files as the Hugging Face Hub keeps them, or from the Hub: memory-mapped Arrow."""

import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stacey_dist.data.images.decode import BrokenImageError
from stacey_dist.data.images.files import read_file
from stacey_dist.data.images.image_set import identity_of, sampled
from stacey_dist.data.images.parquet import load_parquet, parquet_features
from stacey_dist.errors import SettingsError

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "fine_label", "labels")


class ArrowImages:
    """The rows of a ``datasets.Dataset`` whose images are encoded files.

    Args:
        dataset: memory-mapped, so that processes and workers share what they read.
        image_column: of struct<bytes, path>, as ``datasets.Image`` is stored, or of bytes.
        labels: of the rows, int64.
        classes: the classes' names.
        source: what ``name`` puts before a row's number.
    """

    def __init__(
        self, dataset: Any, image_column: str, labels: NDArray[np.int64], classes: list[str], source: str
    ) -> None:
        self.dataset = dataset
        self.image_column = image_column
        self.labels = labels
        self.classes = classes
        self.source = source
        self._open()

    def _open(self) -> None:
        # Straight from the Arrow chunks: a row through `datasets` costs ten times as much.
        chunks = self.dataset.data.column(self.image_column).chunks
        self._starts = np.cumsum([0, *map(len, chunks)])
        nested = bool(chunks) and hasattr(chunks[0], "field")
        self._bytes = [chunk.field("bytes") if nested else chunk for chunk in chunks]
        paths = nested and any(field.name == "path" for field in chunks[0].type)
        self._paths = [chunk.field("path") for chunk in chunks] if paths else []

    @cached_property
    def identity(self) -> str:
        """A hash of class names, labels, and the content of up to 256 images, evenly spread.

        Raises SettingsError where one of them is in a file that is not there.
        """
        return identity_of(self.classes, self.labels, map(self._read_or_empty, sampled(len(self))))

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, i: int) -> bytes:
        """Return the encoded image of row i.

        Raises:
            BrokenImageError: the row holds neither bytes nor a path.
            OSError: it holds a path, and that file cannot be read.
        """
        content = self._content(i)
        if content is not None:
            return content
        chunk, row = self._place(i)
        path = self._paths[chunk][row].as_py() if self._paths else None
        if path is None:
            raise BrokenImageError("neither bytes nor a path")
        return read_file(path)

    def _read_or_empty(self, i: int) -> bytes:
        try:
            return self.read(i)
        except BrokenImageError:
            return b""
        except OSError as error:
            raise SettingsError(f"{self.name(i)}: its file cannot be read: {error}") from error

    def name(self, i: int) -> str:
        """Return the source and the row's number, from 0."""
        return f"{self.source}, row {i}"

    def __getstate__(self) -> dict[str, Any]:
        # Pickling the chunks would copy their content; the dataset is pickled as the names of its files.
        return {name: value for name, value in vars(self).items() if name not in ("_bytes", "_paths")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def _place(self, i: int) -> tuple[int, int]:
        chunk = int(np.searchsorted(self._starts, i, side="right")) - 1
        return chunk, i - int(self._starts[chunk])

    def _content(self, i: int) -> bytes | None:
        chunk, row = self._place(i)
        content: bytes | None = self._bytes[chunk][row].as_py()
        return content


def parquet_images(
    train: Sequence[str],
    validation: Sequence[str],
    image_column: str | None,
    label_column: str | None,
    cache_dir: str | None,
) -> tuple[ArrowImages, ArrowImages]:
    """Return (train, validation) of local parquet files, converted once to Arrow in ``cache_dir``.

    Args:
        train: paths, taken literally.
        validation: the same.
        image_column: None for the one that the files declare as images, or one called image or img.
        label_column: None for label or fine_label, or the only one that the files declare as class labels.
        cache_dir: where Arrow files are kept, as large as the parquet; None for the cache of ``datasets``.

    Raises:
        SettingsError: files that cannot be read, no such columns, labels that are none.
    """
    import datasets

    directory = Path(cache_dir or datasets.config.HF_DATASETS_CACHE).absolute()
    places = ("data.path: train", "data.path: validation")
    loaded = []
    for files, place in zip((train, validation), places, strict=True):
        # Absolute: pyarrow takes a leading ~ for the home directory, and file: for the beginning of an address.
        paths = [Path(file).absolute() for file in files]
        features = parquet_features(paths[0])
        columns = [_image_column(features, image_column, place), _label_column(features, label_column, place)]
        loaded.append(load_parquet(paths, columns, features, directory))
    return _image_sets(loaded, places, image_column, label_column)


def hub_images(
    dataset: str,
    config: str | None,
    split: str,
    validation_split: str,
    image_column: str | None,
    label_column: str | None,
    cache_dir: str | None,
) -> tuple[ArrowImages, ArrowImages]:
    """Return (train, validation) of a dataset of the Hugging Face Hub, downloaded whole.

    Args:
        dataset: its name, such as ``ILSVRC/imagenet-1k``.
        config: its configuration; None for the only one.
        split: to train on.
        validation_split: to evaluate on.
        image_column: see `parquet_images`.
        label_column: see `parquet_images`.
        cache_dir: where Arrow files are kept; None for the cache of ``datasets``.

    Raises:
        SettingsError: the dataset cannot be loaded, it has no such columns, labels that are none.
    """
    loaded = [_load(dataset, config, name, cache_dir) for name in (split, validation_split)]
    places = (f"data.dataset: {dataset}, split {split}", f"data.dataset: {dataset}, split {validation_split}")
    return _image_sets(loaded, places, image_column, label_column)


def _load(dataset: str, config: str | None, split: str, cache_dir: str | None) -> Any:
    import datasets

    # Where a folder of such a name is, `datasets` would read it, and take its name for a pattern.
    if re.fullmatch(r"[\w./\\ -]+", dataset) is None:
        raise SettingsError(f"data.dataset: {dataset!r} is no name of a data set; data.path names a directory")
    # fsspec, through which `datasets` writes, takes this for a chain of file systems.
    if cache_dir is not None and "::" in os.path.abspath(cache_dir):
        raise SettingsError(f"data.cache_dir: {os.path.abspath(cache_dir)} must not hold '::' for data.dataset")
    # Every loader and file system behind `datasets` has its own exceptions: all of them mean that it cannot be read.
    try:
        # Absolute, for a leading ~ is taken for the home directory.
        cache = None if cache_dir is None else os.path.abspath(cache_dir)
        return datasets.load_dataset(dataset, name=config, split=split, cache_dir=cache)
    except Exception as error:
        cause = error.__cause__ or error
        reason = (str(cause).strip().splitlines() or [""])[0]
        raise SettingsError(
            f"data.dataset: {dataset}, split {split}: cannot be loaded: {type(cause).__name__}: {reason}"
        ) from error


def _image_sets(
    loaded: Sequence[Any], places: tuple[str, str], image_column: str | None, label_column: str | None
) -> tuple[ArrowImages, ArrowImages]:
    columns = []
    for dataset, place in zip(loaded, places, strict=True):
        image = _image_column(dataset.features, image_column, place)
        label = _label_column(dataset.features, label_column, place)
        columns.append((image, label, _labels(dataset, label, place)))
    (_, label, labels), (_, validation_label, validation_labels) = columns
    names = [
        getattr(loaded[0].features[label], "names", None),
        getattr(loaded[1].features[validation_label], "names", None),
    ]
    if names[0] is None and names[1] is None:
        # Undeclared: as many as the largest label of either says.
        count = 1 + int(max(labels.max(), validation_labels.max()))
        names = [[str(i) for i in range(count)]] * 2
    train, held_out = (
        ArrowImages(dataset, image, values, list(classes or []), place)
        for dataset, (image, _, values), classes, place in zip(loaded, columns, names, places, strict=True)
    )
    return train, held_out


def _image_column(features: Any, wanted: str | None, place: str) -> str:
    import datasets

    stored = {"bytes", "path"}

    def holds_images(feature: Any) -> bool:
        binary = getattr(feature, "dtype", None) in ("binary", "large_binary")
        return isinstance(feature, datasets.Image) or binary or (isinstance(feature, dict) and stored <= set(feature))

    declared = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    fitting = [name for name, feature in features.items() if holds_images(feature)]
    return _column("data.image_column", "images", wanted, IMAGE_COLUMNS, declared, fitting, features, place)


def _label_column(features: Any, wanted: str | None, place: str) -> str:
    import datasets

    def holds_labels(feature: Any) -> bool:
        return isinstance(feature, datasets.ClassLabel) or "int" in str(getattr(feature, "dtype", ""))

    declared = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    fitting = [name for name, feature in features.items() if holds_labels(feature)]
    return _column("data.label_column", "integer labels", wanted, LABEL_COLUMNS, declared, fitting, features, place)


def _column(
    setting: str,
    kind: str,
    wanted: str | None,
    usual: Sequence[str],
    declared: list[str],
    fitting: list[str],
    features: Any,
    place: str,
) -> str:
    """The column that is asked for, else one of a usual name, else the only one that is declared to be such."""
    if wanted is not None:
        if wanted not in fitting:
            raise SettingsError(_no_column(setting, wanted, kind, features, place))
        return wanted
    named = [name for name in usual if name in fitting]
    if not named and len(declared) != 1:
        raise SettingsError(_no_column(setting, None, kind, features, place))
    return (named or declared)[0]


def _no_column(setting: str, wanted: str | None, kind: str, features: Any, place: str) -> str:
    reason = "must be set" if wanted is None else f"{wanted!r} is no column of {kind}"
    return f"{setting}: {reason}; {place} has {', '.join(f'{n} ({_kind(f)})' for n, f in features.items())}"


def _kind(feature: Any) -> str:
    return str(getattr(feature, "dtype", type(feature).__name__)) if not isinstance(feature, dict) else "struct"


def _labels(dataset: Any, column: str, place: str) -> NDArray[np.int64]:
    """Return the labels after checking that there are some, and each is one."""
    stored = dataset.data.column(column)
    if not len(stored):
        raise SettingsError(f"{place} has no rows")
    if stored.null_count:
        raise SettingsError(f"{place}: column {column!r} has {stored.null_count} rows without a label")
    labels = stored.to_numpy().astype(np.int64)
    names = getattr(dataset.features[column], "names", None)
    bad = np.flatnonzero((labels < 0) | (labels >= len(names) if names is not None else False))
    if bad.size:
        reason = "it has no labels, as ImageNet's test split has none" if labels[bad[0]] == -1 else "not a class"
        raise SettingsError(f"{place}: column {column!r} is {labels[bad[0]]} in row {bad[0]}: {reason}")
    return labels
