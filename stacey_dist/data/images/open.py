"""Images for training and evaluation from a directory, the Hub, or drawn."""

from pathlib import Path

from stacey_dist.data.images.cifar import cifar_images
from stacey_dist.data.images.digits import drawn_digits
from stacey_dist.data.images.folder import folder_images
from stacey_dist.data.images.image_set import ImageSet
from stacey_dist.data.images.tables import hub_images, parquet_images
from stacey_dist.data.splits import overlap
from stacey_dist.errors import InputError

_LOOKED_FOR = (
    "train/ and val/, validation/ or test/ with a folder a class; "
    "train*.parquet and val*.parquet or test*.parquet, there or in data/; "
    "CIFAR's Python files (data_batch_1 ... or train, test, meta), there or in cifar-10-batches-py/ or "
    "cifar-100-python/"
)


def open_images(
    path: str | None = None,
    dataset: str | None = None,
    dataset_config: str | None = None,
    split: str = "train",
    validation_split: str = "validation",
    image_column: str | None = None,
    label_column: str | None = None,
    cache_dir: str | None = None,
) -> tuple[ImageSet, ImageSet]:
    """Return (train, validation), which have the same classes.

    Args:
        path: a directory of images in one of three layouts: folders of classes, the Hub's parquet, CIFAR's Python
            files. None for a dataset of the Hub, or drawn digits where that is None too.
        dataset: the name of a dataset of the Hugging Face Hub.
        dataset_config: its configuration; None for the only one.
        split: of the dataset, to train on.
        validation_split: of the dataset, to evaluate on.
        image_column: of parquet and datasets; None to find it.
        label_column: of parquet and datasets; None to find it.
        cache_dir: where the names of files in folders are remembered, and Arrow files of parquet and datasets are kept;
            None to list folders at every start, and for the cache of ``datasets``.

    Raises:
        InputError: nothing that can be read is there, both or contradicting arguments are given, the splits overlap, or
            the two do not have the same classes.
    """
    if path is not None and dataset is not None:
        raise InputError(f"path: {path!r} and `dataset` {dataset!r}: only one of them can be set")
    if dataset is not None and overlap(split, validation_split):
        raise InputError(f"validation_split: {validation_split!r} has images of the split for training, {split!r}")
    columns = image_column, label_column
    directory = None if path is None else _directory(path)
    if dataset is not None:
        found: tuple[ImageSet, ImageSet] = hub_images(
            dataset, dataset_config, (split, validation_split), *columns, cache_dir
        )
    elif directory is not None and (files := _parquet_files(directory)):
        found = parquet_images(*files, *columns, cache_dir)
    else:
        for argument, column in zip(("image_column", "label_column"), columns, strict=True):
            if column is not None:
                raise InputError(f"{argument}: {column!r}: only parquet files and datasets of the Hub have columns")
        found = drawn_digits() if directory is None else _other_images(directory, cache_dir)
    classes, validation_classes = (images.classes for images in found)
    if classes != validation_classes:
        other = sorted(set(classes) ^ set(validation_classes))
        reason = f"{other[0]!r} is in one only" if other else "their order differs"
        raise InputError(
            f"{'path' if path else 'dataset'}: {path or dataset}: {len(classes)} classes for training and "
            f"{len(validation_classes)} for validation must be the same, and {reason}"
        )
    return found


def _directory(path: str) -> Path:
    """Return the directory of that very name, else the one that a leading ~/ means in a shell."""
    literal = Path(path)
    return literal.expanduser() if path.startswith("~/") and not literal.exists() else literal


def _parquet_files(directory: Path) -> tuple[list[Path], list[Path]] | None:
    """Return the files for training and validation, sorted; None where there are none for training."""
    for place in (directory, directory / "data"):
        train, validation, test = (
            sorted(file for file in place.glob(f"{split}*.parquet") if file.is_file())
            for split in ("train", "val", "test")
        )
        if train and not (validation or test):
            raise InputError(f"path: {place} has train*.parquet and neither val*.parquet nor test*.parquet")
        if train:
            return train, validation or test
    return None


def _other_images(directory: Path, cache_dir: str | None) -> tuple[ImageSet, ImageSet]:
    if not directory.is_dir():
        raise InputError(f"path: {directory} is no directory; looked for {_LOOKED_FOR}")
    if (found := cifar_images(directory)) is not None:
        return found
    if (directory / "train").is_dir():
        return folder_images(directory, Path(cache_dir) if cache_dir else None)
    raise InputError(f"path: {directory} holds no images in a layout that can be read; looked for {_LOOKED_FOR}")
