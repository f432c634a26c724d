"""Documents from text files: JSON lines, parquet, plain text.

The readers of the ``datasets`` library do not say where a bad record is, and lose the rest of its file. They are also
slower: on 77 MB of English, they read 17 000 rows a second from C4's json.gz and 35 000 from parquet. These readers
read 29 000 and, with pyarrow, 84 000.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stacey_dist.errors import InputError, one_line

PLAIN_TEXT_DOCUMENT = 8 * 1024
"""Plain text is cut at the first blank line after this many characters."""

_LONGEST_PARAGRAPHS = 8 * PLAIN_TEXT_DOCUMENT
_PARQUET_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Document:
    """One training text.

    Attributes:
        text: the text, never blank, valid Unicode.
        place: where the next record begins, JSON-able, for `read_records`; None where that is not known.
    """

    text: str
    place: Any = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A line or row that holds no document.

    Attributes:
        message: the file, the line or row, and what is wrong with it.
        place: as a `Document` has it.
        damage: the file is damaged there, and nothing behind it can be read.
    """

    message: str
    place: Any = field(default=None, compare=False)
    damage: bool = field(default=False, compare=False)


Records = Generator[Document | BadRecord, None, None]


def read_records(file: str, text_column: str, place: Any = None) -> Records:
    """Yield the documents of a file, in order, and a `BadRecord` in the place of each that cannot be read.

    - ``.json.gz``, ``.jsonl.gz``, ``.json``, ``.jsonl``: one JSON object a line, the layout of C4 on the Hub.
    - ``.parquet``: one document a row.
    - ``.txt``, ``.txt.gz``: plain text, cut into documents at the first blank line after 8 KiB of text; where
      none comes within 64 KiB, at the next end of a line.

    Documents that are empty or of white space alone are left out, and so are blank lines of JSON files. A byte order
    mark at the start of a file is no part of the text. A damaged gzip or parquet file ends with a `BadRecord`.

    Args:
        file: a path, taken literally.
        text_column: the key or column that holds the text; plain text has none.
        place: the `place` of a record, to read what follows it.

    Raises:
        InputError: the file cannot be opened, is parquet without the column, or has neither text nor a bad record.
    """
    empty = place is None
    read = next(reader for ending, reader in _READERS.items() if Path(file).name.endswith(ending))
    for record in read(file, text_column, place):
        empty = False
        yield record
    if empty:
        raise InputError(f"{file}: no text in it")


def record_of(row: Any, column: str, name: str, where: str, place: Any = None) -> Iterator[Document | BadRecord]:
    """Yield the document of a row, a `BadRecord` if it has none, or nothing if its text is blank.

    Args:
        row: a dictionary, or what stands in its place.
        column: the key of the text.
        name: the file or data set, for messages.
        where: the line or row in it, for messages.
        place: the `Document.place`.
    """
    if not isinstance(row, dict):
        wrong = f"expected one JSON object a line, got {type(row).__name__}"
    elif column not in row:
        wrong = f"no column {column!r} (text_column); it has {_names(row)}"
    elif not isinstance(text := row[column], str):
        wrong = f"column {column!r} holds {type(text).__name__}, not a string"
    else:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            # JSON can spell half of a surrogate pair, which no encoding and no tokenizer accepts.
            wrong = f"{error.object[error.start]!r} is not a Unicode character"
        else:
            if text and not text.isspace():
                yield Document(text, place)
            return
    yield BadRecord(f"{name}, {where}: {wrong}", place)


def _names(columns: Any) -> str:
    return ascii(", ".join(map(str, columns)) or "none")[1:-1][:300]


_Place = tuple[int, int]
"""In a file of lines: bytes, decompressed, and lines before."""


def _lines(file: str, begin: _Place | None) -> Iterator[tuple[int, _Place | None, str | BadRecord]]:
    """Yield each line's number, its place, and the line without its end; a `BadRecord` where it is not text.

    Files are decompressed if need be. Where one is damaged, there is no place to continue from.
    """
    end, before = begin or (0, 0)
    number = before
    try:
        with gzip.open(file) if file.endswith(".gz") else open(file, "rb") as lines:
            lines.seek(end)
            for number, line in enumerate(lines, start=before + 1):
                end += len(line)
                yield number, (end, number), _decoded(line, file, number)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        message = f"{file}: truncated or damaged gzip after line {number} ({error})"
        yield number + 1, None, BadRecord(message, damage=True)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {one_line(error)}") from error


def _decoded(line: bytes, file: str, number: int) -> str | BadRecord:
    if b"\0" in line:
        return BadRecord(f"{file}, line {number}: a NUL byte; text is read as UTF-8, not as UTF-16 or binary data")
    try:
        # Some editors on Windows begin a file with a byte order mark.
        return line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        return BadRecord(f"{file}, line {number}: not UTF-8 ({error.reason} at byte {error.start})")


def _read_json_lines(file: str, text_column: str, begin: Any) -> Records:
    for number, place, line in _lines(file, begin):
        if isinstance(line, BadRecord):
            yield replace(line, place=place)
        elif line and not line.isspace():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # a ValueError: an integer of more than 4 300 digits
                yield BadRecord(f"{file}, line {number}: not one JSON object a line ({error})", place)
                continue
            yield from record_of(row, text_column, file, f"line {number}", place)


def _read_plain_text(file: str, _text_column: str, begin: Any) -> Records:
    block: list[str] = []
    place: _Place | None = None
    size = 0
    for _, place, line in _lines(file, begin):
        if isinstance(line, BadRecord):
            yield line  # without its place: it may stand within a document
            place = None  # a document that ends here would be followed by the bad record again
            continue
        block.append(line)
        size += len(line) + 1
        blank = not line or line.isspace()
        if (blank and size >= PLAIN_TEXT_DOCUMENT) or size >= _LONGEST_PARAGRAPHS:
            yield from _block(block, place)
            block, size = [], 0
    yield from _block(block, place)


def _block(lines: list[str], place: Any) -> Iterator[Document]:
    text = "\n".join(lines).strip("\n").rstrip()
    if text:
        yield Document(text, place)


def _read_parquet(file: str, text_column: str, begin: Any) -> Records:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number, skip = 0, begin or 0  # of rows
    try:
        # Closed by `with` even when the reader stops early: an open one would hang the process at exit.
        with pa.memory_map(file) as mapped, pq.ParquetFile(mapped, page_checksum_verification=True) as parquet:
            columns = parquet.schema_arrow.names
            if text_column not in columns:
                raise InputError(f"{file}: no column {text_column!r} (text_column); it has {_names(columns)}")
            groups = list(range(parquet.num_row_groups))
            while groups and number + (rows := parquet.metadata.row_group(groups[0]).num_rows) <= skip:
                number, groups = number + rows, groups[1:]
            for batch in parquet.iter_batches(_PARQUET_ROWS, groups, columns=[text_column]):
                values = batch.column(0)[max(0, skip - number) :]
                number += len(batch) - len(values)
                for text in _values(values):
                    number += 1
                    row = f"row {number}"
                    if isinstance(text, UnicodeDecodeError):
                        yield BadRecord(f"{file}, {row}: not UTF-8 ({text.reason} at byte {text.start})", number)
                        continue
                    yield from record_of({text_column: text}, text_column, file, row, number)
            if number != (rows := parquet.metadata.num_rows):
                yield BadRecord(f"{file}: damaged parquet: {number} rows where its footer says {rows}", damage=True)
    except (OSError, pa.ArrowException) as error:
        if getattr(error, "errno", None) is not None:
            raise InputError(f"{file}: cannot be read: {one_line(error)}") from error
        message = f"{file}: cannot be read as parquet after row {number}: {one_line(error)}"
        yield BadRecord(message, damage=True)


def _values(column: Any) -> Iterator[Any]:
    """Yield a column's values as Python objects, with the exception in the place of text that is not UTF-8."""
    try:
        yield from column.to_pylist()
        return
    except UnicodeDecodeError:
        pass
    for value in column:
        try:
            yield value.as_py()
        except UnicodeDecodeError as error:
            yield error


_READERS: dict[str, Callable[[str, str, Any], Records]] = {
    ".json.gz": _read_json_lines,
    ".jsonl.gz": _read_json_lines,
    ".json": _read_json_lines,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
    ".txt": _read_plain_text,
    ".txt.gz": _read_plain_text,
}
ENDINGS = tuple(_READERS)
"""Of the names of files that can be read."""
