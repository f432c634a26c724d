"""Images in parquet files as the Hugging Face Hub keeps them, or from the Hub: memory-mapped Arrow tables."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from stacey_dist.data.images.decode import BrokenImageError
from stacey_dist.data.images.image_set import identity_of, read_file, read_sampled
from stacey_dist.data.lock import locked_directory
from stacey_dist.errors import InputError, one_line
from stacey_dist.files import replacing

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "fine_label", "labels")

_FORMAT_VERSION = 1
_ROWS = 1024
"""In a batch of an Arrow file: 100 MB of photos. Fewer where images are so large that a batch would exceed:"""
_BATCH_BYTES = 1 << 28


class TableImages:
    """The rows of a ``datasets.Dataset`` whose images are encoded files.

    Args:
        dataset: memory-mapped, so that processes and workers share what they read.
        columns: of the images, struct<bytes, path> as ``datasets.Image`` is stored, or bytes; and of the labels.
        source: what ``name`` puts before a row's number.
        classes: their names, where the dataset has none; None for as many as the largest label says.

    Raises:
        InputError: there are no rows, or rows without a label of a class.
    """

    def __init__(self, dataset: Any, columns: tuple[str, str], source: str, classes: list[str] | None = None) -> None:
        images, labels = columns
        self._dataset, self._columns, self._source = dataset, columns, source
        # A row of the dataset itself takes 113 us, and one of the column 3 to 26.
        self._images = dataset.data.column(images)
        self.declared: list[str] | None = getattr(dataset.features[labels], "names", None)
        """The classes that the dataset declares."""
        self.labels = _labels(dataset.data.column(labels), self.declared, f"{source}: column {labels!r}")
        self.classes = self.declared or classes or [str(i) for i in range(1 + int(self.labels.max()))]

    @cached_property
    def identity(self) -> str:
        """A hash of class names, labels, and the content of up to 256 images, evenly spread.

        Raises InputError where one of them is in a file that is not there.
        """
        return identity_of(self, read_sampled(self))

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """The bytes of each encoded image; -1 where the row holds none."""
        stored = pc.struct_field(self._images, "bytes") if pa.types.is_struct(self._images.type) else self._images
        lengths: NDArray[np.int64] = pc.binary_length(stored).fill_null(-1).to_numpy().astype(np.int64)
        return lengths

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, i: int) -> bytes:
        """Return the encoded image of row i.

        Raises:
            BrokenImageError: the row holds neither bytes nor a path.
            OSError: it holds a path, and that file cannot be read.
        """
        value = self._images[i].as_py()
        stored = value if isinstance(value, dict) else {"bytes": value}
        content: bytes | None = stored["bytes"]
        if content is not None:
            return content
        if stored.get("path") is None:
            raise BrokenImageError("neither bytes nor a path")
        return read_file(stored["path"])

    def name(self, i: int) -> str:
        """Return the source and the row's number, from 0."""
        return f"{self._source}, row {i}"

    def __reduce__(self) -> tuple[Any, ...]:
        # The dataset is pickled as the names of its files; the column would be with its content.
        return TableImages, (self._dataset, self._columns, self._source, self.classes)


def parquet_images(
    train: Sequence[Path],
    validation: Sequence[Path],
    image_column: str | None,
    label_column: str | None,
    cache_dir: str | None,
) -> tuple[TableImages, TableImages]:
    """Return (train, validation) of local parquet files, converted once to Arrow in ``cache_dir``.

    Args:
        train: paths, taken literally.
        validation: the same.
        image_column: None for the one that the files declare as images, or one called image or img.
        label_column: None for label or fine_label, or the only one that the files declare as class labels.
        cache_dir: where Arrow files are kept, as large as the parquet; None for the cache of ``datasets``.

    Raises:
        InputError: files that cannot be read, no such columns, labels that are none.
    """
    import datasets

    directory = Path(cache_dir or datasets.config.HF_DATASETS_CACHE).absolute() / "parquet"

    def load(files: Sequence[Path], split: str) -> TableImages:
        # Absolute: pyarrow takes a leading ~ for the home directory, and file: for the beginning of an address.
        paths = [file.absolute() for file in files]
        features, source = _features(paths[0]), f"{files[0].parent}, {split}"
        columns = _columns(features, image_column, label_column, source)
        kept = datasets.Features({name: features[name] for name in columns})
        arrows = [directory / _arrow_name(path, kept) for path in paths]
        found = [_opened(*each) for each in zip(paths, arrows, strict=True)]
        if any(dataset is None for dataset in found):
            with locked_directory(directory, "cache_dir", "name a `cache_dir` on another"):
                for path, arrow in zip(paths, arrows, strict=True):
                    if _opened(path, arrow) is None:  # nor has another process converted it
                        _convert(path, kept, arrow)
            found = [datasets.Dataset.from_file(str(arrow)) for arrow in arrows]
        return TableImages(datasets.concatenate_datasets(found), columns, source)

    return _with_equal_classes(load(train, "train"), load(validation, "validation"))


def hub_images(
    dataset: str,
    config: str | None,
    splits: tuple[str, str],
    image_column: str | None,
    label_column: str | None,
    cache_dir: str | None,
) -> tuple[TableImages, TableImages]:
    """Return two splits of a dataset of the Hugging Face Hub, downloaded whole. See `parquet_images`.

    Raises:
        InputError: the dataset cannot be loaded, it has no such columns, labels that are none.
    """
    import datasets

    # Where a folder of such a name is, `datasets` would read it, and take its name for a pattern.
    if re.fullmatch(r"[\w./\\ -]+", dataset) is None:
        raise InputError(f"dataset: {dataset!r} is no name of a data set; `path` names a directory")
    # Absolute, for a leading ~ is taken for the home directory.
    cache = None if cache_dir is None else os.path.abspath(cache_dir)
    # fsspec, through which `datasets` writes, takes this for a chain of file systems.
    if cache is not None and "::" in cache:
        raise InputError(f"cache_dir: {cache} must not hold '::' for `dataset`")

    def load(split: str) -> TableImages:
        source = f"{dataset}, split {split}"
        # Every loader and file system behind `datasets` has its own exceptions: all mean that it cannot be read.
        try:
            loaded = datasets.load_dataset(dataset, name=config, split=split, cache_dir=cache)
        except Exception as error:
            raise InputError(f"dataset: {source}: cannot be loaded: {one_line(error.__cause__ or error)}") from error
        return TableImages(loaded, _columns(loaded.features, image_column, label_column, source), source)

    return _with_equal_classes(*map(load, splits))


def _with_equal_classes(train: TableImages, validation: TableImages) -> tuple[TableImages, TableImages]:
    """Return both after giving the classes of the one that has more of them to one that declares none."""
    most = max(train.classes, validation.classes, key=len)
    for images in (train, validation):
        images.classes = images.declared or most
    return train, validation


def _features(file: Path) -> Any:
    import datasets

    # Parquet and what its metadata say of features each fail in ways of their own: all mean that it cannot be read.
    try:
        return datasets.Features.from_arrow_schema(pq.read_schema(file))
    except Exception as error:
        raise InputError(f"path: {file} cannot be read: {one_line(error)}") from error


def _arrow_name(file: Path, features: Any) -> str:
    """Return the name of a parquet file's Arrow file: another one when the parquet file has moved or changed."""
    status = file.stat()
    known = [_FORMAT_VERSION, str(file), status.st_size, status.st_mtime_ns, features.to_dict()]
    return f"{hashlib.sha256(json.dumps(known).encode()).hexdigest()[:24]}.arrow"


def _opened(file: Path, arrow: Path) -> Any:
    """Return the ``datasets.Dataset`` of a parquet file's Arrow file, mapped; None if that is not there, or damaged."""
    import datasets

    try:
        dataset = datasets.Dataset.from_file(str(arrow))
        return dataset if dataset.num_rows == pq.read_metadata(file).num_rows else None
    except (OSError, pa.ArrowException):
        return None


def _rows_at_once(metadata: Any) -> int:
    """Return how many rows to read at once: pyarrow makes no batch of 2 GiB of images."""
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    largest = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
    return max(1, min(_ROWS, _BATCH_BYTES // max(1, largest)))


def _convert(file: Path, features: Any, arrow: Path) -> None:
    """Write the columns of a parquet file to an Arrow file, cast to their features.

    `datasets.load_dataset` would convert it too, but takes ``::`` and ``$NAME`` in paths for something else.
    """
    from datasets.table import table_cast

    schema = features.arrow_schema
    try:
        with (
            pq.ParquetFile(file) as opened,
            tqdm(desc=f"reading {file.name}", unit="img", dynamic_ncols=True, leave=False) as bar,
            replacing(arrow) as sink,
            pa.ipc.new_stream(sink, schema) as stream,
        ):
            bar.reset(opened.metadata.num_rows)
            for batch in opened.iter_batches(_rows_at_once(opened.metadata), columns=list(features)):
                table = pa.Table.from_batches([batch]).select(list(features))
                stream.write_table(table_cast(table, schema))
                bar.update(len(batch))
    except OSError:
        raise
    except Exception as error:
        raise InputError(f"path: {file} cannot be read: {one_line(error)}") from error


def _columns(features: Any, image_column: str | None, label_column: str | None, source: str) -> tuple[str, str]:
    """Return the names of the columns of images and of labels.

    Each is the one that is asked for, else one of a usual name, else the only one that is declared to be such.
    """
    import datasets

    def holds_images(feature: Any) -> bool:
        binary = getattr(feature, "dtype", None) in ("binary", "large_binary")
        return binary or (isinstance(feature, dict) and {"bytes", "path"} <= set(feature))

    def holds_labels(feature: Any) -> bool:
        return "int" in str(getattr(feature, "dtype", ""))

    def column(name: str, wanted: str | None, usual: Sequence[str], kind: type, could_be: Callable[[Any], bool]) -> str:
        declared = [each for each, feature in features.items() if isinstance(feature, kind)]
        fitting = [each for each, feature in features.items() if each in declared or could_be(feature)]
        chosen = [each for each in usual if each in fitting] or declared * (len(declared) == 1)
        if wanted is not None:
            chosen = [wanted] if wanted in fitting else []
        if not chosen:
            reason = "must be set" if wanted is None else f"{wanted!r} is no column of {name}s"
            there = (
                f"{each} ({getattr(feature, 'dtype', type(feature).__name__)})" for each, feature in features.items()
            )
            raise InputError(f"{name}_column: {reason}; {source} has {', '.join(there)}")
        return chosen[0]

    return (
        column("image", image_column, IMAGE_COLUMNS, datasets.Image, holds_images),
        column("label", label_column, LABEL_COLUMNS, datasets.ClassLabel, holds_labels),
    )


def _labels(stored: Any, names: list[str] | None, place: str) -> NDArray[np.int64]:
    """Return the labels after checking that there are some, and each is one."""
    if not len(stored):
        raise InputError(f"{place} has no rows")
    if stored.null_count:
        raise InputError(f"{place} has {stored.null_count} rows without a label")
    labels: NDArray[np.int64] = stored.to_numpy().astype(np.int64)
    bad = np.flatnonzero((labels < 0) | (labels >= len(names) if names is not None else False))
    if bad.size:
        reason = "it has no labels, as ImageNet's test split has none" if labels[bad[0]] == -1 else "not a class"
        raise InputError(f"{place} is {labels[bad[0]]} in row {bad[0]}: {reason}")
    return labels
