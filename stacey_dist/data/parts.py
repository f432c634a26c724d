"""The layout of a prepared directory: parts of tokens, progress.json during preparation, index.json when complete."""

import contextlib
import functools
import mmap
import os
import zlib
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
"""The suffix of the name of a damaged part."""
SPLITS = ("train", "validation")

PART_TOKENS = 2**29
"""A part is closed after the document that brings it to this many tokens: 1 or 2 GiB."""

OPEN_PARTS = 128
"""A process keeps so many parts of a split mapped. A map holds a file descriptor, of which systems allow 1 024."""


def part_name(split: str, number: int) -> str:
    """Return the file name of a split's part."""
    return f"{split}-{number:05d}.bin"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the dtype that parts store ids below ``vocab_size`` in: little-endian uint16 or uint32."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def held_out_of(name: str, every: int | None, first: int, count: int) -> NDArray[np.bool_]:
    """Return which of a pass's documents go to the validation split.

    Args:
        name: the pass.
        every: every so many documents of a pass are for validation; None for those of the pass ``validation``.
        first: how many documents went before.
        count: of the documents.
    """
    if every is None:
        return np.full(count, name == "validation")
    return np.arange(first, first + count) % every == 0


def stored_ids(ids: NDArray[np.int64], vocab_size: int) -> NDArray[Any]:
    """Return ids in the dtype of parts.

    Raises:
        InputError: an id is not in the vocabulary.
    """
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        bad = int(ids.max() if ids.max() >= vocab_size else ids.min())
        raise InputError(f"the tokenizer gives the id {bad}, and its vocabulary ends at {vocab_size - 1}")
    return ids.astype(token_dtype(vocab_size))


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
            if part["name"] != part_name(split, number) or not _is_count(part["tokens"]):
                raise ValueError(f"part {number} of {split}")
    # 0.1.0 skipped none, and wrote nothing of that.
    if not _is_count(index.setdefault("skipped", {"count": 0, "first": []})["count"]):
        raise ValueError("its number of skipped records is not one")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


class SplitTokens:
    """The tokens of one split as one array over its parts.

    A part is mapped into memory when it is first read, and `OPEN_PARTS` at most are mapped at once. It can be pickled,
    in 8 bytes for each part.

    Args:
        directory: where the parts lie.
        split: ``train`` or ``validation``.
        starts: the place of each part's first token in the split, and the number of all tokens at the end.
        dtype: of the ids.
        windows: whether tokens are read in windows at random places; then parts must have their recorded size. If
            false, tokens are read in order, and a part may be longer, like one that a killed preparation was writing.
    """

    def __init__(
        self, directory: Path, split: str, starts: NDArray[np.int64], dtype: np.dtype[Any], windows: bool = True
    ) -> None:
        self._arguments = (directory, split, starts, dtype, windows)
        self._starts = starts
        # What falls out of the cache is unmapped by the last view of it: threads may be reading it.
        self._part = functools.lru_cache(OPEN_PARTS)(functools.partial(_map, *self._arguments))

    @classmethod
    def of_index(cls, directory: Path, split: str, index: dict[str, Any], windows: bool = True) -> "SplitTokens":
        """Return the tokens of a split as an index, or a saved progress, lists them."""
        counts = [part["tokens"] for part in index["splits"][split]["parts"]]
        return cls(directory, split, np.cumsum([0, *counts], dtype=np.int64), np.dtype(index["dtype"]), windows)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self) -> tuple[Any, ...]:
        return SplitTokens, self._arguments

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return a copy of the tokens [start, stop), of which there is at least one.

        Raises:
            InputError: a part is missing, or has another size than recorded.
        """
        first = int(np.searchsorted(self._starts, start, "right")) - 1
        last = int(np.searchsorted(self._starts, stop, "left"))
        begins = self._starts[first:last].tolist()
        return np.concatenate(
            [self._part(first + i)[max(0, start - begin) : stop - begin] for i, begin in enumerate(begins)]
        )


def _map(
    directory: Path, split: str, starts: NDArray[np.int64], dtype: np.dtype[Any], windows: bool, number: int
) -> NDArray[np.integer]:
    path, tokens = directory / part_name(split, number), int(starts[number + 1] - starts[number])
    reason = "is missing"
    # A damaged part is read on where it was put aside: the process that found the damage stops the run.
    for file in (path, path.with_name(path.name + ASIDE)):
        with contextlib.suppress(FileNotFoundError):
            size, expected = file.stat().st_size, tokens * dtype.itemsize
            if size == expected or (size > expected and not windows):
                mapped = np.memmap(file, dtype, "r", shape=(tokens,))
                # What the system would read around a window is not needed.
                mapped._mmap.madvise(  # type: ignore[attr-defined]
                    mmap.MADV_RANDOM if windows else mmap.MADV_SEQUENTIAL
                )
                return np.asarray(mapped)
            reason = f"has {size} bytes where {expected} were written"
            break
    raise InputError(f"{path} {reason}; `stacey-dist prepare` prepares it again, or delete {directory}")


class PartWriter:
    """Appends documents to the parts of one split.

    Where parts end depends on the documents alone, never on when they were written, flushed or resumed.

    Args:
        directory: where the parts lie.
        split: ``train`` or ``validation``.
        dtype: of the ids.
        state: what `state` returned, to resume from there: what was written after it is cut off.

    Raises:
        FileNotFoundError: a part that ``state`` lists is missing.
        ValueError: one is shorter than it was.
    """

    def __init__(self, directory: Path, split: str, dtype: np.dtype[Any], state: dict[str, Any] | None = None):
        self._directory = directory
        self._split = split
        self._itemsize = dtype.itemsize
        self._file: BinaryIO | None = None
        self._parts: list[dict[str, Any]] = state["parts"] if state else []
        self.documents: int = state["documents"] if state else 0
        self.tokens: int = sum(part["tokens"] for part in self._parts)
        self._cut()

    def append(
        self,
        tokens: NDArray[Any],
        lengths: NDArray[np.integer],
        place: dict[str, Any],
        skips: NDArray[np.integer],
        sums: dict[str, int],
    ) -> None:
        """Append documents.

        Args:
            tokens: their ids, as they are stored, one document after another, each with the end token.
            lengths: how many each has, at least one.
            place: the pass and the input that they are of, JSON-able; kept where one of them begins a part.
            skips: how many documents of the input come before each; kept there, too.
            sums: ``{"documents": n, "tokens": n, "crc32": n}`` of its input so far (modified in place).
        """
        ends = np.cumsum(lengths)
        first = start = 0
        while first < len(lengths):
            if self._file is None or self._parts[-1]["tokens"] >= PART_TOKENS:
                self._open_next(place | {"skip": int(skips[first])})
            assert self._file is not None
            # Up to the document that brings the part to its size.
            full = np.searchsorted(ends, start + PART_TOKENS - self._parts[-1]["tokens"])
            first = min(int(full) + 1, len(lengths))
            content = tokens[start : (start := int(ends[first - 1]))]
            self._file.write(content.data)
            self._parts[-1]["tokens"] += len(content)
            self._parts[-1]["crc32"] = zlib.crc32(content.data, self._parts[-1]["crc32"])
        sums["documents"] += len(lengths)
        sums["tokens"] += start
        sums["crc32"] = zlib.crc32(tokens.data, sums["crc32"])
        self.tokens += start
        self.documents += len(lengths)

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
        """Return ``{"documents": n, "parts": [{"name": …, "tokens": n, "crc32": n, "start": …}, …]}`` to be saved."""
        return {"documents": self.documents, "parts": self._parts}

    def _open_next(self, place: dict[str, Any]) -> None:
        self.close()
        if not self._parts or self._parts[-1]["tokens"] >= PART_TOKENS:
            name = part_name(self._split, len(self._parts))
            self._parts.append({"name": name, "tokens": 0, "crc32": 0, "start": place})
        # After `_cut` the file ends where the state says, or is not there.
        self._file = open(self._directory / self._parts[-1]["name"], "ab")  # noqa: SIM115

    def _cut(self) -> None:
        """Cut off what was written after the state: bytes at the end of a part, and whole parts."""
        sizes = {part["name"]: part["tokens"] * self._itemsize for part in self._parts}
        for name, size in sizes.items():
            if (self._directory / name).stat().st_size < size:
                raise ValueError(f"{name} is shorter than its recorded {size} bytes")
        for path in self._directory.glob(f"{self._split}-*.bin"):
            if path.name in sizes:
                os.truncate(path, sizes[path.name])
            else:
                path.unlink()
