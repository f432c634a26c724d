"""Where training text comes from: files, a dataset of the Hub, or the embedded text."""

import contextlib
import itertools
import os
import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from stacey_dist.data.embedded import EXTRACTOR_VERSION, standard_library_documents
from stacey_dist.data.paths import expand_files, literal_directory
from stacey_dist.data.splits import overlap
from stacey_dist.data.text import BadRecord, Document, Records, read_records, record_of
from stacey_dist.errors import InputError, one_line

OnBadRecord = Literal["error", "skip"]

# Bytes of English text in a byte of file, about; only for the progress bar.
_TEXT_PER_BYTE = {".gz": 2.6, ".parquet": 1.7}


@dataclass(frozen=True)
class Input:
    """A part of the text that is read as a whole: a file, a split of a data set, the embedded text.

    Attributes:
        records: opens the documents from the first, the same ones in the same order on every call, with a
            `BadRecord` in the place of each that is to be skipped. Where its records have a `place`, it takes one, and
            opens what follows that record.
        identity: a JSON-able value that differs wherever the documents may differ.
        size_bytes: about how many bytes of text there are; None where unknown.
    """

    records: Callable[..., Records]
    identity: Any
    size_bytes: int | None = None


@dataclass(frozen=True)
class Source:
    """Documents, and their identity.

    Attributes:
        inputs: the parts of the text, in order.
        identity: a JSON-able value that differs wherever the documents may differ.
        validation_inputs: like inputs, for validation; None to hold some of the documents of ``inputs`` out.
        on_bad_record: what ``inputs`` do with a bad record.
    """

    inputs: Sequence[Input]
    identity: Any
    validation_inputs: Sequence[Input] | None = None
    on_bad_record: OnBadRecord = "error"

    def documents(self) -> Iterator[Document]:
        """Yield the documents of all inputs, without the bad records."""
        records = itertools.chain.from_iterable(each.records() for each in self.inputs)
        return (record for record in records if isinstance(record, Document))


def files_source(
    files: Sequence[str],
    validation_files: Sequence[str],
    text_column: str,
    on_bad_record: OnBadRecord = "error",
) -> Source:
    """Return the documents of local files; see `read_records` for the formats.

    Args:
        files: paths and glob patterns.
        validation_files: the same for validation; empty to hold out some of ``files``.
        text_column: the key or column of the text.
        on_bad_record: what to do with a line or row without a document: raise InputError, or skip it.

    Raises:
        InputError: a pattern matches nothing or a file that cannot be read, or both match the same one.
    """
    training = expand_files("files", files)
    validation = expand_files("validation_files", validation_files) if validation_files else []
    both = {os.path.realpath(file) for file in training} & {os.path.realpath(file) for file in validation}
    if both:
        raise InputError(f"validation_files: {min(both)} is one of `files` too: it would be trained on")

    def input_of(file: str) -> Input:
        records, identity = _opening(on_bad_record, partial(read_records, file, text_column)), file_identity(file)
        size = int(identity["size"] * _TEXT_PER_BYTE.get(os.path.splitext(file)[1], 1.0))
        return Input(records, {"file": identity, "text_column": text_column}, size)

    inputs, held_out = [input_of(file) for file in training], [input_of(file) for file in validation]
    identity = {
        "files": [each.identity["file"] for each in inputs],
        "validation_files": [each.identity["file"] for each in held_out],
        "text_column": text_column,
    }
    return Source(
        inputs=inputs,
        identity=identity | _if_skipping(on_bad_record),
        validation_inputs=held_out or None,
        on_bad_record=on_bad_record,
    )


def hub_source(
    dataset: str,
    config: str | None,
    split: str,
    validation_split: str | None,
    text_column: str,
    streaming: bool,
    on_bad_record: OnBadRecord = "error",
) -> Source:
    """Return the documents of a dataset of the Hugging Face Hub, or of a local directory that ``datasets`` loads.

    Nothing is read before the documents are opened; then InputError is raised for what cannot be loaded or read. It is
    raised at once where the splits overlap, or a local directory has no files.

    Args:
        dataset: its name, such as ``allenai/c4``, which alone identifies it; or a local directory, which is taken
            literally and identified by its files.
        config: its configuration, such as ``en``; None for the only one.
        split: the split to train on.
        validation_split: the split for validation; None to hold out some of ``split``.
        text_column: the column of the text.
        streaming: read over the network as needed instead of downloading everything first.
        on_bad_record: what to do with a row without a document: raise InputError, or skip it.
    """
    if validation_split and overlap(split, validation_split):
        raise InputError(
            f"validation_split: {validation_split!r} has documents of the split for training, {split!r}; null holds "
            "documents out of it"
        )
    identity = {
        "dataset": _directory_identity(dataset) if os.path.isdir(dataset) else dataset,
        "config": config,
        "text_column": text_column,
    }

    def input_of(split: str) -> Input:
        def records() -> Records:
            try:
                yield from _hub_records(dataset, config, split, text_column, streaming)
            except InputError as error:
                if split != validation_split:
                    raise
                raise InputError(f"validation_split: {error}; without one, training documents are held out") from error

        return Input(_opening(on_bad_record, records), identity | {"split": split})

    return Source(
        inputs=[input_of(split)],
        identity=identity | {"split": split, "validation_split": validation_split} | _if_skipping(on_bad_record),
        validation_inputs=[input_of(validation_split)] if validation_split else None,
        on_bad_record=on_bad_record,
    )


def embedded_source() -> Source:
    """Return the text that every Python carries: about 3 MB; see ``standard_library_documents``."""
    # The patch release too: docstrings differ between them.
    identity = {"embedded": EXTRACTOR_VERSION, "python": platform.python_version()}
    return Source([Input(standard_library_documents, identity, size_bytes=3_200_000)], identity)


def file_identity(file: str) -> dict[str, Any]:
    """Return a file's identity, which a change of the file changes: its path, size and time of modification."""
    status = os.stat(file)
    return {"path": os.path.realpath(file), "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _hub_records(dataset: str, config: str | None, split: str, text_column: str, streaming: bool) -> Records:
    """Yield the documents of a split, and a `BadRecord` for each row without a text."""
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
            raise InputError(f"{name} cannot be loaded: {one_line(error)}") from error
        # An open parquet reader would hang the process at exit.
        stack.callback(getattr(rows, "close", lambda: None))
        for number in itertools.count(1):
            try:
                row = next(rows, None)
            except Exception as error:
                raise InputError(f"{name}: row {number} cannot be read: {one_line(error)}") from error
            if row is None:
                return
            yield from record_of(row, text_column, name, f"row {number}")


def _opening(on_bad_record: OnBadRecord, read: Callable[..., Records]) -> Callable[..., Records]:
    """Return a function that opens records, and raises InputError for the first bad one unless they are skipped.

    A damaged file, of which much may be missing, has a warning then.
    """

    def records(*place: Any) -> Records:
        for record in read(*place):
            if isinstance(record, BadRecord):
                if on_bad_record == "error":
                    raise InputError(f"{record.message}; fix it, or leave out bad records with `on_bad_record` skip")
                if record.damage:
                    warnings.warn(f"{record.message}: the rest of the file is left out", stacklevel=2)
            yield record

    return records


def _if_skipping(on_bad_record: OnBadRecord) -> dict[str, str]:
    """Return the argument for an identity; without it where it is the default, so that older caches are found."""
    return {} if on_bad_record == "error" else {"on_bad_record": on_bad_record}


def _directory_identity(directory: str) -> list[dict[str, Any]]:
    """Return the identities of all files in a local directory that ``datasets`` loads, at any depth.

    As ``datasets``, it follows no links to directories, and leaves out names that begin with a dot.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"dataset: {error}") from error

    files = []
    for place, folders, names in os.walk(directory, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [os.path.join(place, name) for name in names if not name.startswith(".")]
    if not files:
        raise InputError(f"dataset: the directory {directory} has no files")
    try:
        return [file_identity(file) for file in sorted(files)]
    except OSError as error:
        raise InputError(f"dataset: {error}") from error
