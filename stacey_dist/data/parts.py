"""The layout of a prepared directory: parts of tokens, progress.json meanwhile, index.json when complete."""

import bisect
import copy
import itertools
import mmap
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from stacey_dist.errors import InputError
from stacey_dist.files import read_json

FORMAT_VERSION = 1
INDEX = "index.json"
PROGRESS = "progress.json"
ASIDE = ".damaged"
"""What is put behind the name of a damaged part."""
SPLITS = ("train", "validation")

PART_TOKENS = 2**29
"""A part is closed after the document that brings it to this many tokens: 1 or 2 GiB."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the dtype that parts store ids below ``vocab_size`` in: little-endian uint16 or uint32."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def split_of(name: str, held_out: int | None, number: int) -> str:
    """Return the split that a pass's document goes to.

    Args:
        name: the pass.
        held_out: every so many documents of a pass are for validation; None for none.
        number: how many documents went before.
    """
    return name if held_out is None else "train" if number % held_out else "validation"


def encode_ids(tokens: Sequence[int] | NDArray[Any], vocab_size: int) -> bytes:
    """Return ids as they are stored.

    Raises:
        InputError: an id is not in the vocabulary.
    """
    ids = np.asarray(tokens, dtype=np.int64)
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        bad = int(ids.max() if ids.max() >= vocab_size else ids.min())
        raise InputError(f"the tokenizer gives the id {bad}, and its vocabulary ends at {vocab_size - 1}")
    return ids.astype(token_dtype(vocab_size)).tobytes()


def read_index(directory: Path) -> dict[str, Any]:
    """Return the index of a complete directory.

    Raises:
        InputError: there is none, it is damaged, or another version's.
    """
    path = directory / INDEX
    try:
        index = read_json(path)
        if not isinstance(index, dict):
            raise ValueError("not an object")
        if index.get("format") == FORMAT_VERSION:
            _check_index(index)
    except FileNotFoundError as error:
        raise InputError(f"{directory} holds no prepared tokens: it has no {INDEX}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}: {error}); delete {directory}") from error
    if index.get("format") != FORMAT_VERSION:
        raise InputError(
            f"{directory} has format {index.get('format')} and this version reads {FORMAT_VERSION}: "
            "delete the directory"
        )
    return index


def _check_index(index: dict[str, Any]) -> None:
    """Raise ValueError, KeyError or TypeError unless the index says what a directory holds."""
    vocab_size, end = index["vocab_size"], index["end_token_id"]
    if not (_is_count(vocab_size) and _is_count(end) and end < vocab_size and isinstance(index["tokenizer"], str)):
        raise ValueError("its vocabulary is not one")
    if index["dtype"] not in ("<u2", "<u4"):
        raise ValueError(f"dtype {index['dtype']!r}")
    for split, content in index["splits"].items():
        for number, part in enumerate(content["parts"]):
            # A name from elsewhere is no path to follow.
            if part["name"] != f"{split}-{number:05d}.bin" or not _is_count(part["tokens"]):
                raise ValueError(f"part {number} of {split}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


class SplitTokens:
    """The tokens of one split as one array over its parts, which are mapped into memory.

    What was mapped can be read even when a part is renamed or replaced meanwhile.

    Args:
        directory: where the parts lie.
        parts: the entries of the index: ``name`` and ``tokens`` of each.
        dtype: of the ids.
    """

    def __init__(self, directory: Path, parts: Sequence[dict[str, Any]], dtype: np.dtype[Any]) -> None:
        self._parts = [_map(directory / part["name"], part["tokens"], dtype) for part in parts]
        self._starts = [0, *itertools.accumulate(part["tokens"] for part in parts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return a copy of the tokens [start, stop), of which there is at least one.

        Raises:
            OSError: a part was missing or shorter than recorded.
        """
        pieces = []
        for i in range(bisect.bisect_right(self._starts, start) - 1, bisect.bisect_left(self._starts, stop)):
            part, begin = self._parts[i], self._starts[i]
            if part is None:
                raise OSError(f"part {i} is missing or too short")
            pieces.append(part[max(0, start - begin) : stop - begin])
        return np.concatenate(pieces)


def _map(path: Path, tokens: int, dtype: np.dtype[Any]) -> NDArray[Any] | None:
    try:
        mapped = np.memmap(path, dtype, "r", shape=(tokens,))
        # Windows lie anywhere: what the system would read around them is not needed.
        mapped._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
        return np.asarray(mapped)
    except (OSError, ValueError):
        return None


class PartWriter:
    """Appends documents to the parts of one split.

    Where parts end depends on the documents alone, never on when they were written, flushed or resumed.

    Args:
        directory: where the parts lie.
        split: ``train`` or ``validation``.
        vocab_size: every id is below it.
        state: what `state` returned, to resume from there: what was written after it is cut off.

    Raises:
        OSError: a part that ``state`` lists is missing or shorter than it was.
    """

    def __init__(self, directory: Path, split: str, vocab_size: int, state: dict[str, Any] | None = None):
        self._directory = directory
        self._split = split
        self._vocab_size = vocab_size
        self._file: BinaryIO | None = None
        self._parts: list[dict[str, Any]] = copy.deepcopy(state["parts"]) if state else []
        self.documents: int = state["documents"] if state else 0
        self.tokens: int = sum(part["tokens"] for part in self._parts)
        self._cut()

    def append(self, tokens: Sequence[int] | NDArray[Any], place: dict[str, Any], sums: dict[str, int]) -> None:
        """Append one document's ids, the end token included.

        Args:
            tokens: the ids, at least one.
            place: how to find the document again, JSON-able; kept where it begins a part.
            sums: ``{"documents": n, "tokens": n, "crc32": n}`` of its input so far (modified in place).

        Raises:
            InputError: an id is not in the vocabulary.
        """
        if self._file is None or self._parts[-1]["tokens"] >= PART_TOKENS:
            self._open_next(place)
        assert self._file is not None
        content = encode_ids(tokens, self._vocab_size)
        self._file.write(content)
        for each in (self._parts[-1], sums):
            each["tokens"] += len(tokens)
            each["crc32"] = zlib.crc32(content, each["crc32"])
        sums["documents"] += 1
        self.tokens += len(tokens)
        self.documents += 1

    def flush(self) -> None:
        """Bring everything appended so far to the disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close."""
        if self._file is not None:
            self.flush()
            self._file.close()
            self._file = None

    def state(self) -> dict[str, Any]:
        """Return ``{"documents": n, "parts": [{"name": …, "tokens": n, "crc32": n, "start": …}, …]}``."""
        return {"documents": self.documents, "parts": copy.deepcopy(self._parts)}

    def _open_next(self, place: dict[str, Any]) -> None:
        self.close()
        if not self._parts or self._parts[-1]["tokens"] >= PART_TOKENS:
            name = f"{self._split}-{len(self._parts):05d}.bin"
            self._parts.append({"name": name, "tokens": 0, "crc32": 0, "start": place})
        # After `_cut` the file ends where the state says, or is not there.
        self._file = open(self._directory / self._parts[-1]["name"], "ab")  # noqa: SIM115

    def _cut(self) -> None:
        """Cut off what was written after the state: bytes at the end of a part, and whole parts."""
        itemsize = token_dtype(self._vocab_size).itemsize
        sizes = {part["name"]: part["tokens"] * itemsize for part in self._parts}
        for name, size in sizes.items():
            if (self._directory / name).stat().st_size < size:
                raise OSError(f"{name} is shorter than its recorded {size} bytes")
        for path in self._directory.glob(f"{self._split}-*.bin"):
            if path.name in sizes:
                os.truncate(path, sizes[path.name])
            else:
                path.unlink()
