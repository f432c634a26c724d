"""Documents from text files (JSON lines, parquet, plain text) and from the Hugging Face Hub."""

import glob
import gzip
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stacey_dist.errors import SettingsError

PLAIN_TEXT_DOCUMENT = 8 * 1024
"""Plain text is cut at the first blank line after this many characters."""

_LONGEST_PARAGRAPHS = 8 * PLAIN_TEXT_DOCUMENT
_PARQUET_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Document:
    """One training text.

    Attributes:
        text: the text, never empty, valid Unicode.
        source: where it came from, for messages: a file and line, a dataset and row, a module.
    """

    text: str
    source: str


def expand_files(setting: str, patterns: Sequence[str]) -> list[str]:
    """Return the files that paths and glob patterns name, each pattern's matches sorted, each file once.

    Args:
        setting: the setting that the patterns come from, for messages.
        patterns: paths or patterns; ``**`` matches any directories, ``~`` is the home directory.

    Raises:
        SettingsError: there are no patterns, one matches nothing, or a match is a directory, empty, or of a
            format other than the seven that `read_documents` reads.
    """
    if not patterns:
        raise SettingsError(f"{setting}: no files were given")
    files: list[str] = []
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        # A path that exists is taken as it stands, even with brackets in its name.
        matches = [expanded] if os.path.exists(expanded) else sorted(glob.glob(expanded, recursive=True))
        if not matches:
            raise SettingsError(f"{setting}: {pattern!r} matches no file")
        files += matches
    for file in files:
        if os.path.isdir(file):
            raise SettingsError(f"{setting}: {file} is a directory; to take its files, write {file}/*.json.gz")
        _reader(file, setting)
        if not os.path.exists(file):
            raise SettingsError(f"{setting}: {file} is a link to a file that is not there")
        if os.path.getsize(file) == 0:
            raise SettingsError(f"{setting}: {file} is empty (0 bytes)")
    return list(dict.fromkeys(files))


def read_documents(files: Sequence[str], text_column: str) -> Iterator[Document]:
    """Yield the documents of files, in order.

    - ``.json.gz``, ``.jsonl.gz``, ``.json``, ``.jsonl``: one JSON object a line, the layout of C4 on the Hub.
    - ``.parquet``: one document a row.
    - ``.txt``, ``.txt.gz``: plain text, cut into documents at the first blank line after 8 KiB of text; where
      none comes within 64 KiB, at the next end of a line.

    Blank lines of JSON files and documents without text are left out.

    Args:
        files: paths.
        text_column: the key or column that holds the text; plain text has none.

    Raises:
        SettingsError: a file cannot be read, is truncated, malformed or not UTF-8, lacks the text column, has
            something other than a string there, or holds no text at all. The message names the file, and the
            line or row.
    """
    for file in files:
        empty = True
        for document in _reader(file, "data.files")(file, text_column):
            if document.text:
                empty = False
                yield document
        if empty:
            raise SettingsError(f"{file}: no text in it")


def hub_documents(
    dataset: str, config: str | None, split: str, text_column: str, streaming: bool
) -> Iterator[Document]:
    """Yield the documents of a dataset of the Hugging Face Hub, or of a local directory that ``datasets``
    loads.

    Args:
        dataset: its name, such as ``allenai/c4``.
        config: its configuration, such as ``en``; None for the only one.
        split: such as ``train``.
        text_column: the column that holds the text.
        streaming: read over the network as needed instead of downloading everything first.

    Raises:
        SettingsError: the dataset cannot be found, reached or read, or lacks text in that column.
    """
    import datasets

    name = f"dataset {dataset!r}" + (f", config {config!r}" if config else "") + f", split {split!r}"
    # Every loader and file system behind `datasets` has its own exceptions: all of them mean that it cannot
    # be read.
    try:
        rows = iter(datasets.load_dataset(dataset, config, split=split, streaming=streaming))
    except Exception as error:
        raise SettingsError(f"{name} cannot be loaded: {_one_line(error)}") from error
    try:
        for number in itertools.count(1):
            try:
                row = next(rows, None)
            except Exception as error:
                raise SettingsError(f"{name}: row {number} cannot be read: {_one_line(error)}") from error
            if row is None:
                return
            document = Document(_text(row, text_column, name, f"row {number}"), f"{name}, row {number}")
            if document.text:
                yield document
    finally:
        # An open parquet reader would hang the process at exit.
        close = getattr(rows, "close", None)
        if close is not None:
            close()


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _text(row: Any, column: str, name: str, place: str) -> str:
    """Return a row's text after checking that it is one."""
    if not isinstance(row, dict):
        raise SettingsError(f"{name}, {place}: expected one JSON object a line, got {type(row).__name__}")
    if column not in row:
        raise SettingsError(f"{name}, {place}: no column {column!r} (text_column); it has {', '.join(row) or 'none'}")
    text = row[column]
    if not isinstance(text, str):
        raise SettingsError(f"{name}, {place}: column {column!r} holds {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair, which no encoding and no tokenizer accepts.
        raise SettingsError(f"{name}, {place}: {error.object[error.start]!r} is not a Unicode character") from error
    return text


def _lines(file: str) -> Iterator[tuple[int, str]]:
    """Yield (number, line without its end), decompressed if need be."""
    number = 0
    try:
        with gzip.open(file) if file.endswith(".gz") else open(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                # Some editors on Windows begin a file with a byte order mark.
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise SettingsError(f"{file}, line {number}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SettingsError(f"{file}: truncated or damaged gzip after line {number} ({error})") from error
    except OSError as error:
        raise SettingsError(f"{file}: cannot be read: {_one_line(error)}") from error


def _read_json_lines(file: str, text_column: str) -> Iterator[Document]:
    for number, line in _lines(file):
        if not line or line.isspace():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise SettingsError(f"{file}, line {number}: not one JSON object a line ({error})") from error
        yield Document(_text(row, text_column, file, f"line {number}"), f"{file}:{number}")


def _read_plain_text(file: str, _text_column: str) -> Iterator[Document]:
    block: list[str] = []
    first, size = 1, 0
    for number, line in _lines(file):
        block.append(line)
        size += len(line) + 1
        blank = not line or line.isspace()
        if (blank and size >= PLAIN_TEXT_DOCUMENT) or size >= _LONGEST_PARAGRAPHS:
            yield Document("\n".join(block).strip("\n").rstrip(), f"{file}:{first}")
            block, first, size = [], number + 1, 0
    yield Document("\n".join(block).strip("\n").rstrip(), f"{file}:{first}")


def _read_parquet(file: str, text_column: str) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0  # of rows read
    try:
        # Closed by `with` even when the reader stops early: an open one would hang the process at exit.
        with pq.ParquetFile(file, memory_map=True) as parquet:
            columns = parquet.schema_arrow.names
            if text_column not in columns:
                raise SettingsError(f"{file}: no column {text_column!r} (text_column); it has {', '.join(columns)}")
            for batch in parquet.iter_batches(_PARQUET_ROWS, columns=[text_column]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    row = {text_column: text}
                    yield Document(_text(row, text_column, file, f"row {number}"), f"{file}, row {number}")
    except UnicodeDecodeError as error:
        raise SettingsError(f"{file}, after row {number}: not UTF-8 ({error.reason})") from error
    except (OSError, pa.ArrowException) as error:
        raise SettingsError(f"{file}: cannot be read as parquet: {_one_line(error)}") from error


_READERS: dict[str, Callable[[str, str], Iterator[Document]]] = {
    ".json.gz": _read_json_lines,
    ".jsonl.gz": _read_json_lines,
    ".json": _read_json_lines,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
    ".txt": _read_plain_text,
    ".txt.gz": _read_plain_text,
}


def _reader(file: str, setting: str) -> Callable[[str, str], Iterator[Document]]:
    for suffix, reader in _READERS.items():
        if Path(file).name.endswith(suffix):
            return reader
    raise SettingsError(f"{setting}: {file} has none of the endings that can be read: {', '.join(_READERS)}")
