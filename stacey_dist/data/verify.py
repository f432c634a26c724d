"""Parts of prepared tokens are compared with what was written, and made anew where they differ."""

import contextlib
import os
import threading
import time
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stacey_dist.data.parts import ASIDE, encode_ids, read_index, split_of
from stacey_dist.data.readahead import read_ahead
from stacey_dist.data.source import Source
from stacey_dist.data.tokenizer import Tokenizer
from stacey_dist.errors import SettingsError

_CHUNK = 2**23
"""Bytes that are read at once."""

_THREADS = 4

_WAIT_SECONDS = 20.0
"""The first update waits so long at most: for some ten GB."""


@dataclass(frozen=True)
class DamagedPart:
    """A part that is not what was written.

    Attributes:
        split: ``train`` or ``validation``.
        name: of its file.
        tokens: how many it should hold.
        crc32: of its bytes as they should be.
        start: where in the documents it begins, as the index has it; None where it has not.
        reason: what is wrong, as a predicate.
        inode: of the file that was read, where it was.
    """

    split: str
    name: str
    tokens: int
    crc32: int | None
    start: dict[str, Any] | None
    reason: str
    inode: int | None = None


def damaged_parts(directory: Path, *, whole: bool) -> list[DamagedPart]:
    """Return the damaged parts of a complete directory.

    Args:
        directory: as `prepare` returns it.
        whole: read all of them, and not only their sizes.

    Raises:
        SettingsError: the index is damaged, or a part that is as it was written has an id that is not in the
            vocabulary.
    """
    index = read_index(directory)
    check = _verify if whole else _check_size
    with ThreadPoolExecutor(_THREADS, "verify") as pool:
        found = pool.map(lambda each: check(directory, index, *each), _parts(index))
        return [part for part in found if part is not None]


class Verification:
    """Reads all parts of a directory in threads, beside training.

    A damaged part is put aside under another name, so that the next start makes it anew.

    Args:
        directory: as `prepare` returns it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._index = read_index(directory)
        self._pending = deque(_parts(self._index))
        self._errors: list[str] = []
        self._waited = False
        # Daemons: a run that ends does not wait for them.
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(_THREADS)]
        for thread in self._threads:
            thread.start()

    def check(self, *, finish: bool = False) -> None:
        """Raise SettingsError if damage has been found so far.

        The first call waits some seconds, in which all parts of a small directory are read. With ``finish``, the call
        waits for all of them.
        """
        if not self._waited or finish:
            deadline = time.monotonic() + _WAIT_SECONDS
            for thread in self._threads:
                thread.join(None if finish else max(0.0, deadline - time.monotonic()))
            self._waited = True
        if self._errors:
            raise SettingsError(
                f"{'; '.join(self._errors)}: the run stops, and the next start makes it anew. A checkpoint that was "
                "saved since this start may have been trained on other text"
            )

    def _work(self) -> None:
        with contextlib.suppress(IndexError):  # of an empty deque
            while True:
                split, part = self._pending.popleft()
                try:
                    damaged = _verify(self._directory, self._index, split, part)
                    if damaged is not None:
                        _put_aside(self._directory / damaged.name, damaged.inode)
                        self._errors.append(f"{self._directory / damaged.name} {damaged.reason}")
                except (OSError, SettingsError) as error:
                    self._errors.append(f"{self._directory / part['name']}: {error}")


def make_anew(directory: Path, part: DamagedPart, source: Source, tokenizer: Tokenizer, validation_every: int) -> None:
    """Encode the documents of a damaged part again, and replace it.

    Args:
        directory: as `prepare` returns it, locked by the caller.
        part: what to make; it has a start.
        source: as for `prepare`.
        tokenizer: as for `prepare`.
        validation_every: as for `prepare`.

    Raises:
        SettingsError: the text cannot be read, or gives other tokens than it did.
    """
    path = directory / part.name
    temporary = path.with_name(path.name + ".tmp")
    tokens, crc = 0, 0
    with open(temporary, "wb") as file:
        for document in _documents(directory, part, source, tokenizer, validation_every):
            content = encode_ids(document[: part.tokens - tokens], tokenizer.vocab_size)
            file.write(content)
            tokens, crc = tokens + min(len(document), part.tokens - tokens), zlib.crc32(content, crc)
            if tokens == part.tokens:
                break
        file.flush()
        os.fsync(file.fileno())
    if (tokens, crc) != (part.tokens, part.crc32):
        temporary.unlink()
        raise SettingsError(
            f"{path} {part.reason}, and the text gives other tokens now than when it was made; delete {directory} to "
            "have all of it prepared anew"
        )
    os.replace(temporary, path)
    path.with_name(path.name + ASIDE).unlink(missing_ok=True)


def _documents(
    directory: Path, part: DamagedPart, source: Source, tokenizer: Tokenizer, validation_every: int
) -> Iterator[list[int]]:
    """Yield the documents of a part's split from where the part begins."""
    start = part.start
    assert start is not None
    inputs = source.inputs if start["pass"] == "train" else source.validation_inputs
    assert inputs is not None
    held_out = validation_every if source.validation_inputs is None else None
    records = read_index(directory)["inputs"][start["pass"]]
    number, skip, read = sum(_documents_in(record) for record in records[: start["input"]]), start["skip"], 0
    if start["input"] < len(records) and records[start["input"]]["read"] == _documents_in(records[start["input"]]):
        # Every document that was read is in the parts: those before need not be encoded.
        read, number, skip = skip, number + skip, 0
    with read_ahead(inputs[start["input"] :], read) as batches:
        for batch in batches:
            for tokens in tokenizer.encode_batch(batch.texts):
                if not tokens:
                    continue
                if skip == 0 and split_of(start["pass"], held_out, number) == part.split:
                    yield [*tokens, tokenizer.end_token_id]
                number, skip = number + 1, max(0, skip - 1)
            if batch.error is not None:
                raise batch.error


def _documents_in(record: dict[str, Any]) -> int:
    return sum(mark["documents"] for mark in record["splits"].values())


def _parts(index: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for split, content in index["splits"].items():
        for part in content["parts"]:
            yield split, part


def _check_size(directory: Path, index: dict[str, Any], split: str, part: dict[str, Any]) -> DamagedPart | None:
    """Return a part that is not there or has another size than recorded."""
    path, size = directory / part["name"], part["tokens"] * np.dtype(index["dtype"]).itemsize
    if not path.exists():
        return _damaged(split, part, "is missing")
    found = path.stat().st_size
    return None if found == size else _damaged(split, part, f"has {found} bytes where {size} were written")


def _verify(directory: Path, index: dict[str, Any], split: str, part: dict[str, Any]) -> DamagedPart | None:
    """Return a part that is not what was written. Raises SettingsError for one that is, with ids that are none."""
    if wrong := _check_size(directory, index, split, part):
        return wrong
    dtype, vocab_size = np.dtype(index["dtype"]), index["vocab_size"]
    crc, largest = 0, 0
    buffer = memoryview(bytearray(_CHUNK))
    with open(directory / part["name"], "rb", buffering=0) as file:
        inode = os.fstat(file.fileno()).st_ino
        while count := file.readinto(buffer):
            crc = zlib.crc32(buffer[:count], crc)
            largest = max(largest, int(np.frombuffer(buffer[: count - count % dtype.itemsize], dtype).max(initial=0)))
    if crc != part.get("crc32", crc):
        return _damaged(split, part, "has another content than was written", inode)
    if largest >= vocab_size:
        raise SettingsError(
            f"{directory / part['name']} holds the token id {largest}, and the vocabulary ends at {vocab_size - 1}; "
            f"delete {directory} to have it prepared anew"
        )
    return None


def _damaged(split: str, part: dict[str, Any], reason: str, inode: int | None = None) -> DamagedPart:
    return DamagedPart(split, part["name"], part["tokens"], part.get("crc32"), part.get("start"), reason, inode)


def _put_aside(path: Path, inode: int | None) -> None:
    """Rename a damaged part, unless another process has done that or has made it anew."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_ino == inode:
            os.replace(path, path.with_name(path.name + ASIDE))
