"""Documents of a data set of the Hugging Face Hub, or of a local directory that ``datasets`` loads."""

import contextlib
import itertools
import os
from collections.abc import Iterator

from stacey_dist.data.paths import literal_directory
from stacey_dist.data.text import BadRecord, Document, document_of, one_line, raising
from stacey_dist.errors import SettingsError


def hub_documents(
    dataset: str, config: str | None, split: str, text_column: str, streaming: bool
) -> Iterator[Document]:
    """Yield the documents of a data set; see `hub_records`.

    Raises:
        SettingsError: as `hub_records`, and for the first row without a text.
    """
    return raising(hub_records(dataset, config, split, text_column, streaming))


def hub_records(
    dataset: str, config: str | None, split: str, text_column: str, streaming: bool
) -> Iterator[Document | BadRecord]:
    """Yield the documents of a dataset of the Hugging Face Hub, or of a local directory that ``datasets``
    loads, and a `BadRecord` for each row without a text.

    Args:
        dataset: its name, such as ``allenai/c4``, or a directory, which is taken literally.
        config: its configuration, such as ``en``; None for the only one.
        split: such as ``train``.
        text_column: the column that holds the text.
        streaming: read over the network as needed instead of downloading everything first.

    Raises:
        SettingsError: the dataset cannot be found, reached or read.
    """
    import datasets

    name = f"dataset {dataset!r}" + (f", config {config!r}" if config else "") + f", split {split!r}"
    with contextlib.ExitStack() as stack:
        path = dataset
        if os.path.isdir(dataset):
            path = stack.enter_context(literal_directory(dataset))
            # A cache of temporary links would be found by no later run.
            streaming = streaming or path != os.path.realpath(dataset)
        # Every loader and file system behind `datasets` has its own exceptions: all of them mean that it cannot
        # be read.
        try:
            rows = iter(datasets.load_dataset(path, config, split=split, streaming=streaming))
        except Exception as error:
            raise SettingsError(f"{name} cannot be loaded: {one_line(error)}") from error
        # An open parquet reader would hang the process at exit.
        stack.callback(getattr(rows, "close", lambda: None))
        for number in itertools.count(1):
            try:
                row = next(rows, None)
            except Exception as error:
                raise SettingsError(f"{name}: row {number} cannot be read: {one_line(error)}") from error
            if row is None:
                return
            found = document_of(row, text_column, name, f"row {number}", f"{name}, row {number}")
            if found is not None:
                yield found
