"""The layout of a prepared directory: parts of tokens, progress.json meanwhile, index.json when complete."""

import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

FORMAT_VERSION = 1
INDEX = "index.json"
PROGRESS = "progress.json"

PART_TOKENS = 2**29
"""A part is closed after the document that brings it to this many tokens: 1 or 2 GiB."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the dtype that parts store ids below ``vocab_size`` in: little-endian uint16 or uint32."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def write_json(path: Path, value: Any) -> None:
    """Replace a file as `replace_file` does, with a value as JSON."""
    replace_file(path, json.dumps(value, indent=1, sort_keys=True).encode())


def replace_file(path: Path, content: bytes) -> None:
    """Replace a file so that at any instant, a loss of power included, the whole old or new one is there."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


class PartWriter:
    """Appends documents to the parts of one split.

    Where parts end depends on the documents alone, never on when they were written, flushed or resumed.

    Args:
        directory: where the parts lie.
        split: ``train`` or ``validation``.
        dtype: of the stored ids.
        state: what `state` returned before, to go on from there: what was written after it is cut off.

    Raises:
        OSError: a part that ``state`` lists is missing or shorter than it was.
    """

    def __init__(self, directory: Path, split: str, dtype: np.dtype[Any], state: dict[str, Any] | None = None):
        self._directory = directory
        self._split = split
        self._dtype = dtype
        self._file: BinaryIO | None = None
        self._parts: list[dict[str, Any]] = [dict(part) for part in state["parts"]] if state else []
        self.documents: int = state["documents"] if state else 0
        self.tokens: int = sum(part["tokens"] for part in self._parts)
        self._cut()

    def append(self, tokens: Sequence[int]) -> None:
        """Append one document's ids. Raises OverflowError where an id does not fit the dtype."""
        if self._file is None or self._parts[-1]["tokens"] >= PART_TOKENS:
            self._open_next()
        assert self._file is not None
        content = np.array(tokens, dtype=self._dtype).tobytes()
        self._file.write(content)
        part = self._parts[-1]
        part["tokens"] += len(tokens)
        part["crc32"] = zlib.crc32(content, part["crc32"])
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
        """Return ``{"documents": n, "parts": [{"name": …, "tokens": n, "crc32": n}, …]}``, JSON-able."""
        return {"documents": self.documents, "parts": [dict(part) for part in self._parts]}

    def _open_next(self) -> None:
        if self._file is not None:
            self.close()
        if not self._parts or self._parts[-1]["tokens"] >= PART_TOKENS:
            self._parts.append({"name": f"{self._split}-{len(self._parts):05d}.bin", "tokens": 0, "crc32": 0})
        # After `_cut` the file ends where the state says, or is not there.
        self._file = open(self._directory / self._parts[-1]["name"], "ab")  # noqa: SIM115

    def _cut(self) -> None:
        """Cut off what was written after the state: bytes at the end of a part, and whole parts."""
        sizes = {part["name"]: part["tokens"] * self._dtype.itemsize for part in self._parts}
        for name, size in sizes.items():
            if (self._directory / name).stat().st_size < size:
                raise OSError(f"{name} is shorter than its recorded {size} bytes")
        for path in self._directory.glob(f"{self._split}-*.bin"):
            if path.name in sizes:
                os.truncate(path, sizes[path.name])
            else:
                path.unlink()
