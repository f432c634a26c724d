"""Verify that parts of prepared tokens have not changed since they were written, and prepare the damaged ones again."""

import contextlib
import os
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stacey_dist.data.blocks import encode, read_ahead
from stacey_dist.data.parts import ASIDE, INDEX, held_out_of, read_index
from stacey_dist.data.source import Source
from stacey_dist.data.tokenizer import Tokenizer
from stacey_dist.errors import InputError
from stacey_dist.files import replacing

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
        entry: what the index says of it: ``name``, ``tokens``, ``crc32``, and where its documents ``start``.
        reason: what is wrong, as a predicate.
        inode: of the file that was read, where it was.
    """

    split: str
    entry: dict[str, Any]
    reason: str
    inode: int | None = None


def damaged_parts(directory: Path, *, whole: bool) -> list[DamagedPart]:
    """Return the damaged parts of a complete directory.

    Args:
        directory: as `prepare` returns it.
        whole: read all of them, and not only their sizes.

    Raises:
        InputError: the index is damaged, or a part that is as it was written has an id that is not in the
            vocabulary.
    """
    index = read_index(directory)
    check = _verify if whole else _check_size
    with ThreadPoolExecutor(_THREADS, "verify") as pool:
        found = pool.map(lambda each: check(directory, index, *each), _parts(index))
        return [part for part in found if part is not None]


def repair_parts(directory: Path, damaged: list[DamagedPart], source: Source, tokenizer: Tokenizer) -> None:
    """Encode the documents of damaged parts again, and replace the parts.

    Of a directory of 0.1.0, which did not write where its parts begin, the index is deleted instead: nothing of it can
    be kept.

    Args:
        directory: as `prepare` returns it, locked by the caller.
        damaged: the parts.
        source, tokenizer: as for `prepare`.

    Raises:
        InputError: the text cannot be read, or gives other tokens than it did.
    """
    for part in damaged:
        print(f"{directory / part.entry['name']} {part.reason}: preparing it again", file=sys.stderr, flush=True)
    if any("start" not in part.entry for part in damaged):
        (directory / INDEX).unlink()
        return
    for part in damaged:
        _replace(directory, part, source, tokenizer)


def _replace(directory: Path, part: DamagedPart, source: Source, tokenizer: Tokenizer) -> None:
    path = directory / part.entry["name"]
    wanted, tokens, crc = part.entry["tokens"], 0, 0
    with replacing(path) as file:
        for document in _documents(read_index(directory), part, source, tokenizer):
            content = document[: wanted - tokens]
            file.write(content.data)
            tokens, crc = tokens + len(content), zlib.crc32(content.data, crc)
            if tokens == wanted:
                break
        if (tokens, crc) != (wanted, part.entry["crc32"]):
            raise InputError(
                f"{path} {part.reason}, and the text gives other tokens now than when it was made; delete {directory} "
                "to prepare all of it again"
            )
    path.with_name(path.name + ASIDE).unlink(missing_ok=True)


def _documents(
    index: dict[str, Any], part: DamagedPart, source: Source, tokenizer: Tokenizer
) -> Iterator[NDArray[Any]]:
    """Yield the documents of a part's split from where the part begins."""
    start = part.entry["start"]
    inputs = (source.inputs if start["pass"] == "train" else source.validation_inputs) or ()
    counts = [
        (record["read"], sum(sums["documents"] for sums in record["splits"].values()))
        for record in index["inputs"][start["pass"]]
    ]
    number, skip, read = sum(documents for _, documents in counts[: start["input"]]), start["skip"], 0
    if start["input"] < len(counts) and len(set(counts[start["input"]])) == 1:
        # Every document that was read is in the parts: those before need not be encoded.
        read, number, skip = skip, number + skip, 0
    with read_ahead(inputs[start["input"] :], read) as batches:
        for batch in batches:
            for block in encode(batch, tokenizer, 0, 0):
                documents = block.documents()
                held_out = held_out_of(start["pass"], index["held_out"], number, len(documents))
                chosen = np.flatnonzero(held_out == (part.split == "validation"))
                yield from (documents[i] for i in chosen if i >= skip)
                number, skip = number + len(documents), max(0, skip - len(documents))


class Verification:
    """Reads all parts of directories in threads, in the background.

    A damaged part is put aside under another name, so that the next start prepares it again.

    Args:
        directories: as `prepare` returns them, perhaps some of them twice.
    """

    def __init__(self, *directories: Path) -> None:
        indexes = {directory: read_index(directory) for directory in directories}
        self._pending = iter([(at, index, *part) for at, index in indexes.items() for part in _parts(index)])
        self._errors: list[str] = []
        self._waited = False
        # Daemons: a run that ends does not wait for them.
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(_THREADS)]
        for thread in self._threads:
            thread.start()

    def check(self, *, finish: bool = False) -> None:
        """Raise InputError if damage has been found so far.

        The first call waits some seconds, in which all parts of a small directory are read. With ``finish``, the call
        waits for all of them.
        """
        if not self._waited or finish:
            deadline = time.monotonic() + _WAIT_SECONDS
            for thread in self._threads:
                thread.join(None if finish else max(0.0, deadline - time.monotonic()))
            self._waited = True
        if self._errors:
            raise InputError(
                f"{'; '.join(self._errors)}: the run stops, and the next start prepares it again. A checkpoint that "
                "was saved since this start may have been trained on other text"
            )

    def _work(self) -> None:
        for directory, index, split, part in self._pending:
            path = directory / part["name"]
            try:
                if damaged := _verify(directory, index, split, part):
                    _put_aside(path, damaged.inode)
                    self._errors.append(f"{path} {damaged.reason}")
            except (OSError, InputError) as error:
                self._errors.append(f"{path}: {error}")


def _parts(index: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for split, content in index["splits"].items():
        for part in content["parts"]:
            yield split, part


def _check_size(directory: Path, index: dict[str, Any], split: str, part: dict[str, Any]) -> DamagedPart | None:
    """Return a part that is not there or has another size than recorded."""
    path, size = directory / part["name"], part["tokens"] * np.dtype(index["dtype"]).itemsize
    if not path.exists():
        return DamagedPart(split, part, "is missing")
    found = path.stat().st_size
    return None if found == size else DamagedPart(split, part, f"has {found} bytes where {size} were written")


def _verify(directory: Path, index: dict[str, Any], split: str, part: dict[str, Any]) -> DamagedPart | None:
    """Return a part that is not what was written.

    Raises:
        InputError: it is what was written, and has an id that is not in the vocabulary.
    """
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
        return DamagedPart(split, part, "does not hold what was written", inode)
    if largest >= vocab_size:
        raise InputError(
            f"{directory / part['name']} holds the token id {largest}, and the vocabulary ends at {vocab_size - 1}; "
            f"delete {directory} to prepare it again"
        )
    return None


def _put_aside(path: Path, inode: int | None) -> None:
    """Rename a damaged part, unless another process has done that or has prepared it again."""
    # In a directory that can only be read, it stays.
    with contextlib.suppress(OSError):
        if path.stat().st_ino == inode:
            os.replace(path, path.with_name(path.name + ASIDE))
