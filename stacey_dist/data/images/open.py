"""Images for training and evaluation from what the settings name."""

from pathlib import Path

from stacey_dist.data.images.arrow import hub_images, parquet_images
from stacey_dist.data.images.cifar import cifar_images, find_cifar
from stacey_dist.data.images.embedded import embedded_images
from stacey_dist.data.images.folder import folder_images
from stacey_dist.data.images.image_set import ImageSet
from stacey_dist.errors import SettingsError

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
        path: ``data.path``, a directory of images in one of three layouts: folders of classes, the Hub's parquet,
            CIFAR's Python files. None for a dataset of the Hub, or drawn digits where that is None too.
        dataset: ``data.dataset``, the name of a dataset of the Hugging Face Hub.
        dataset_config: ``data.dataset_config``, its configuration; None for the only one.
        split: ``data.dataset_split``, to train on.
        validation_split: ``data.dataset_validation_split``, to evaluate on.
        image_column: ``data.image_column``, of parquet and datasets; None to find it.
        label_column: ``data.label_column``, of parquet and datasets; None to find it.
        cache_dir: where Arrow files of parquet and datasets are kept; None for the cache of ``datasets``.

    Raises:
        SettingsError: nothing that can be read is there, both or contradicting settings are given, the two do not
            have the same classes.
    """
    if path is not None and dataset is not None:
        raise SettingsError(f"data.path {path!r} and data.dataset {dataset!r}: only one of them can be set")
    train, validation = _open(
        path, dataset, dataset_config, split, validation_split, image_column, label_column, cache_dir
    )
    if train.classes != validation.classes:
        other = sorted(set(train.classes) ^ set(validation.classes))
        reason = f"{other[0]!r} is in one only" if other else "their order differs"
        raise SettingsError(
            f"{'data.path ' + path if path else 'data.dataset ' + str(dataset)}: {len(train.classes)} classes for "
            f"training and {len(validation.classes)} for validation must be the same, and {reason}"
        )
    return train, validation


def _open(
    path: str | None,
    dataset: str | None,
    dataset_config: str | None,
    split: str,
    validation_split: str,
    image_column: str | None,
    label_column: str | None,
    cache_dir: str | None,
) -> tuple[ImageSet, ImageSet]:
    if dataset is not None:
        return hub_images(dataset, dataset_config, split, validation_split, image_column, label_column, cache_dir)
    directory = None if path is None else _directory(path)
    if directory is not None and (files := _parquet_files(directory)):
        return parquet_images(*files, image_column, label_column, cache_dir)
    for setting, value in (("data.image_column", image_column), ("data.label_column", label_column)):
        if value is not None:
            raise SettingsError(f"{setting}: {value!r}: only parquet files and datasets of the Hub have columns")
    if directory is None:
        return embedded_images()
    if not directory.is_dir():
        raise SettingsError(f"data.path: {path} is no directory; looked for {_LOOKED_FOR}")
    if (found := find_cifar(directory)) is not None:
        return cifar_images(found)
    if (directory / "train").is_dir():
        return folder_images(directory)
    raise SettingsError(f"data.path: {path} holds no images in a layout that can be read; looked for {_LOOKED_FOR}")


def _directory(path: str) -> Path:
    """Return the directory of that very name, else the one that a leading ~/ means in a shell."""
    literal = Path(path)
    return literal.expanduser() if path.startswith("~/") and not literal.exists() else literal


def _parquet_files(directory: Path) -> tuple[list[str], list[str]] | None:
    """Return the files for training and validation, sorted; None where there are none of either.

    Raises:
        SettingsError: there are files for training and none for validation.
    """
    for place in (directory, directory / "data"):
        train, validation, test = (
            sorted(str(file) for file in place.glob(f"{split}*.parquet") if file.is_file())
            for split in ("train", "val", "test")
        )
        if train and not (validation or test):
            raise SettingsError(f"data.path: {place} has train*.parquet and neither val*.parquet nor test*.parquet")
        if train:
            return train, validation or test
    return None
