"""Reuse tokens of the same inputs from other directories of a cache."""

import contextlib
import json
import shutil
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stacey_dist.data.blocks import BAD, Block
from stacey_dist.data.lock import locked
from stacey_dist.data.parts import INDEX, PROGRESS, SPLITS, SplitTokens, held_out_of
from stacey_dist.data.source import file_identity
from stacey_dist.errors import InputError
from stacey_dist.files import read_json

_CHUNK = 2**24
"""Tokens that are read at once."""

_DOCUMENTS = 2**10
"""In a block."""


@dataclass(frozen=True)
class TokenizedInput:
    """The tokens that another directory has of an input, or of its first documents.

    Attributes:
        directory: where the parts lie.
        header: the directory's index, or its progress.
        name: the pass that read the input.
        record: what the directory says of the input: ``read``, ``documents``, ``skipped``, ``splits``.
        finished: these are all of its documents.
        starts: where in each split the input begins, in tokens.
        place: where the input is read next, for `Input.records`.
    """

    directory: Path
    header: dict[str, Any]
    name: str
    record: dict[str, Any]
    finished: bool
    starts: dict[str, int]
    place: Any

    def intact(self) -> bool:
        """Return whether the tokens are those that were written, and end tokens part the documents."""
        end = self.header["end_token_id"]
        for split, sums in self.record["splits"].items():
            crc, ends, last = 0, 0, end
            try:
                for tokens in self._tokens(split):
                    crc = zlib.crc32(tokens.data, crc)
                    ends += int(np.count_nonzero(tokens == end))
                    last = int(tokens[-1])
            except InputError:
                return False
            if (crc, ends, last) != (sums["crc32"], sums["documents"], end):
                return False
        return True

    def blocks(self, number: int) -> Iterator[Block]:
        """Yield the documents in the order of reading, as blocks of input `number`.

        Where among them the records were that gave no document is not known; they come last.
        """
        sums = self.record["splits"].values()
        documents, skipped = sum(each["documents"] for each in sums), self.record["skipped"]
        others = [0] * (self.record["read"] - documents - skipped["count"]) + [BAD] * skipped["count"]
        dtype, every = np.dtype(self.header["dtype"]), self.header["held_out"]
        streams = [self._documents(split) for split in SPLITS]
        for first in range(0, documents + 1, _DOCUMENTS):
            last = first + _DOCUMENTS > documents
            count = min(_DOCUMENTS, documents - first)
            held_out = held_out_of(self.name, every, self.record["documents"] + first, count)
            some = [next(streams[split]) for split in held_out.tolist()]
            lengths = [len(each) for each in some] + others * last
            yield Block(
                number,
                first,
                np.array(lengths, np.int32),
                np.concatenate([np.empty(0, dtype), *some]),
                skipped["first"] if last else [],
                4 * sum(map(len, some)),
                self.place if last else None,
                self.finished and last,
                copying=not last,
            )

    def _documents(self, split: str) -> Iterator[NDArray[Any]]:
        rest: list[NDArray[Any]] = []
        for tokens in self._tokens(split):
            *documents, last = np.split(tokens, np.flatnonzero(tokens == self.header["end_token_id"]) + 1)
            for document in documents:
                yield np.concatenate([*rest, document])
                rest = []
            rest.append(last)

    def _tokens(self, split: str) -> Iterator[NDArray[Any]]:
        """Yield the input's tokens of a split in pieces."""
        tokens = SplitTokens.of_index(self.directory, split, self.header, windows=False)
        start = self.starts[split]
        stop = start + self.record["splits"][split]["tokens"]
        for at in range(start, stop, _CHUNK):
            yield tokens.read(at, min(at + _CHUNK, stop))


class Reuse:
    """All inputs of which the directories beside one have tokens.

    Args:
        directory: the one that is being filled.
        tokenizer: the fingerprint of the tokenizer that must have made the tokens.
        end_token_id: what ends their documents.
        with_skipped: find inputs of which records were skipped, too.
    """

    def __init__(self, directory: Path, tokenizer: str, end_token_id: int, with_skipped: bool) -> None:
        self._found: dict[str, list[TokenizedInput]] = {}
        """By identity, the most complete first."""
        for other in sorted(set(directory.parent.iterdir()) - {directory}):
            # What is not a directory of this version has nothing to offer.
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                header = _header(other)
                if (header["tokenizer"], header["end_token_id"]) == (tokenizer, end_token_id):
                    for found in _inputs(other, header):
                        if with_skipped or not found.record["skipped"]["count"]:
                            self._found.setdefault(_key(found.record["input"]), []).append(found)
        for alike in self._found.values():
            alike.sort(key=lambda each: (each.finished, each.record["read"]), reverse=True)

    def knows(self, identity: Any) -> bool:
        """Return whether another directory may have the tokens of an input."""
        return _key(identity) in self._found

    def find(self, identity: Any) -> TokenizedInput | None:
        """Return the verified tokens of an input, or None."""
        return next((found for found in self._found.get(_key(identity), ()) if found.intact()), None)

    def remove_outdated(self, identities: Iterable[Any]) -> None:
        """Remove directories that nothing will complete, because a file has changed, and whose tokens were copied.

        Args:
            identities: the inputs that were copied or encoded as a whole. A directory that has tokens of others stays,
                unless their files have changed.
        """
        copied = set(map(_key, identities))
        for directory in {each.directory for key in copied for each in self._found.get(key, ())}:
            with (
                contextlib.suppress(OSError, ValueError, KeyError, TypeError),
                locked(directory / "lock", wait=None),
            ):
                header = _header(directory)
                others = [
                    found.record["input"]["file"]
                    for found in _inputs(directory, header)
                    if _key(found.record["input"]) not in copied
                ]
                source = header["source"]
                is_outdated = any(map(_has_changed, [*source["files"], *source["validation_files"]]))
                if not (directory / INDEX).exists() and is_outdated and all(map(_has_changed, others)):
                    shutil.rmtree(directory)


def _key(identity: Any) -> str:
    return json.dumps(identity, sort_keys=True)


def _header(directory: Path) -> dict[str, Any]:
    name = INDEX if (directory / INDEX).exists() else PROGRESS
    header: dict[str, Any] = read_json(directory / name)
    return header


def _inputs(directory: Path, header: dict[str, Any]) -> Iterator[TokenizedInput]:
    """Yield all inputs that a directory has finished, and the one that it is at."""
    starts = dict.fromkeys(header["splits"], 0)
    for name in SPLITS:
        records = [(record, True) for record in header["inputs"][name]]
        place = header.get("position", {}).get(name, {})
        if place.get("current") and not place.get("copying"):
            records.append((place["current"], False))
        for record, finished in records:
            if record["read"]:
                at = None if finished else place.get("place")
                yield TokenizedInput(directory, header, name, record, finished, dict(starts), at)
            for split, sums in record["splits"].items():
                starts[split] += sums["tokens"]


def _has_changed(file: dict[str, Any]) -> bool:
    try:
        return file != file_identity(file["path"])
    except FileNotFoundError:
        return True
