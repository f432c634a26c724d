"""Where training text comes from: files, a dataset of the Hub, or the embedded text."""

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from stacey_dist.data.embedded import EXTRACTOR_VERSION, standard_library_documents
from stacey_dist.data.text import Document, expand_files, hub_documents, read_documents
from stacey_dist.errors import SettingsError

# Bytes of English text in a byte of file, about; only for the progress bar.
_TEXT_PER_BYTE = {".gz": 2.6, ".parquet": 1.7}


@dataclass(frozen=True)
class Source:
    """Documents, and what tells them from other documents.

    Attributes:
        documents: opens the documents from the first, the same ones in the same order on every call.
        identity: a JSON-able value that differs wherever the documents may differ.
        size_bytes: about how many bytes of text there are, for the progress bar; None where unknown.
        validation_documents: like documents, for validation; None to hold some of ``documents`` out.
    """

    documents: Callable[[], Iterator[Document]]
    identity: Any
    size_bytes: int | None = None
    validation_documents: Callable[[], Iterator[Document]] | None = None


def files_source(files: Sequence[str], validation_files: Sequence[str], text_column: str) -> Source:
    """Return the documents of local files; see `read_documents` for the formats.

    Args:
        files: paths and glob patterns.
        validation_files: the same for validation; empty to hold out some of ``files``.
        text_column: the key or column of the text.

    Raises:
        SettingsError: a pattern matches nothing or a file that cannot be read, or both match the same one.
    """
    training = expand_files("data.files", files)
    validation = expand_files("data.validation_files", validation_files) if validation_files else []
    both = {os.path.realpath(file) for file in training} & {os.path.realpath(file) for file in validation}
    if both:
        raise SettingsError(f"data.validation_files: {min(both)} is one of data.files too: it would be trained on")
    return Source(
        documents=lambda: read_documents(training, text_column),
        identity={
            "files": [_file_identity(file) for file in training],
            "validation_files": [_file_identity(file) for file in validation],
            "text_column": text_column,
        },
        size_bytes=sum(_text_bytes(file) for file in training),
        validation_documents=(lambda: read_documents(validation, text_column)) if validation else None,
    )


def hub_source(
    dataset: str,
    config: str | None,
    split: str,
    validation_split: str | None,
    text_column: str,
    streaming: bool,
) -> Source:
    """Return the documents of a dataset of the Hugging Face Hub.

    Nothing is read before the documents are opened.

    Args:
        dataset: its name, such as ``allenai/c4``, by which alone it is told from others; or a local directory, which is
            told by its files.
        config: its configuration, such as ``en``; None for the only one.
        split: the split to train on.
        validation_split: the split for validation; None to hold out some of ``split``.
        text_column: the column of the text.
        streaming: read over the network as needed instead of downloading everything first.
    """

    def validation() -> Iterator[Document]:
        assert validation_split is not None
        try:
            yield from hub_documents(dataset, config, validation_split, text_column, streaming)
        except SettingsError as error:
            what = "data.dataset_validation_split (null: documents held out of the training data)"
            raise SettingsError(f"{what}: {error}") from error

    return Source(
        documents=lambda: hub_documents(dataset, config, split, text_column, streaming),
        identity={
            "dataset": _directory_identity(dataset) if os.path.isdir(dataset) else dataset,
            "config": config,
            "split": split,
            "validation_split": validation_split,
            "text_column": text_column,
        },
        validation_documents=validation if validation_split else None,
    )


def embedded_source() -> Source:
    """Return the text that every Python carries: about 3 MB; see ``standard_library_documents``."""
    return Source(
        documents=standard_library_documents,
        # The patch release too: docstrings differ between them.
        identity={"embedded": EXTRACTOR_VERSION, "python": platform.python_version()},
        size_bytes=3_200_000,
    )


def _file_identity(file: str) -> dict[str, Any]:
    status = os.stat(file)
    return {"path": os.path.realpath(file), "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _directory_identity(directory: str) -> list[dict[str, Any]]:
    """Of all files in a local directory that ``datasets`` loads, at any depth."""
    files = [os.path.join(place, name) for place, _, names in os.walk(directory) for name in names]
    return [_file_identity(file) for file in sorted(files)]


def _text_bytes(file: str) -> int:
    return int(os.path.getsize(file) * _TEXT_PER_BYTE.get(os.path.splitext(file)[1], 1.0))
