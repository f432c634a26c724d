"""Inputs to chunks of tokens, by any number of processes on any number of hosts, which share a directory.

A process takes a group of inputs by its lock, and writes its records chunk after chunk. So a killed process loses the
chunk that it was at, and another one goes on from the chunk before.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stacey_dist.data.blocks import Block, encode, pack, unpack
from stacey_dist.data.lock import locked
from stacey_dist.data.readahead import read_ahead
from stacey_dist.data.reuse import Reuse
from stacey_dist.data.source import Input, Source
from stacey_dist.data.tokenizer import Tokenizer
from stacey_dist.errors import InputError
from stacey_dist.files import replace_file

CHUNKS = "chunks"

_CHUNK_TOKENS = 2**19
"""A chunk has so many at least: two seconds of one core, and one batch of text."""

_GROUP_BYTES = 2**26
"""Small files are taken together, up to so much text."""

Failure = tuple[str, InputError]
"""The key of a group, and why it cannot be read on."""


@dataclass(frozen=True)
class Group:
    """Inputs that one process encodes.

    Attributes:
        name: the pass, ``train`` or ``validation``.
        first: the number of the first input in its pass.
        inputs: the inputs.
        key: what the names of its chunks begin with, the same wherever the same inputs are encoded alike.
    """

    name: str
    first: int
    inputs: Sequence[Input]
    key: str


class Encoder:
    """Writes the chunks of a directory.

    Args:
        directory: the one that is being prepared.
        source, tokenizer, max_tokens: as for `prepare`.
    """

    def __init__(self, directory: Path, source: Source, tokenizer: Tokenizer, max_tokens: int | None) -> None:
        self._chunks = directory / CHUNKS
        self._tokenizer = tokenizer
        # A copy that ends at a limit would not know how many of the skipped records came before.
        with_skipped = source.on_bad_record == "skip" and max_tokens is None
        self.reuse = Reuse(directory, tokenizer.fingerprint, tokenizer.end_token_id, with_skipped)
        self.groups = [
            *_groups("train", source.inputs, source.on_bad_record, tokenizer),
            *_groups("validation", source.validation_inputs or (), source.on_bad_record, tokenizer),
        ]
        self._link_known()

    def _link_known(self) -> None:
        """Take over the chunks that other directories have, of preparations that were not completed."""
        self._chunks.mkdir(exist_ok=True)
        new = {
            group.key for group in self.groups if not self._end(group).exists() and not self.chunk(group, 0).exists()
        }
        for other in self._chunks.parent.parent.glob(f"*/{CHUNKS}"):
            with suppress(OSError):  # it was completed meanwhile, and its chunks have gone
                names = {path.name for path in other.glob("*.npz")}
                for name in sorted(names):
                    key = name.partition("-")[0]
                    if key in new and _chunk_name(key, 0) in names:
                        os.link(other / name, self._chunks / name)

    def chunk(self, group: Group, number: int) -> Path:
        """Return the path of a group's chunk."""
        return self._chunks / _chunk_name(group.key, number)

    def first_chunk(self, group: Group) -> int:
        """Return the number of the first chunk of a group that is there, 0 if none is."""
        return min(map(_number, self._chunks.glob(f"{group.key}-*.npz")), default=0)

    def discard(self, group: Group, number: int) -> None:
        """Remove a group's chunks from one on, so that they are encoded again."""
        self._end(group).unlink(missing_ok=True)
        for chunk in self._chunks.glob(f"{group.key}-*.npz"):
            if _number(chunk) >= number:
                chunk.unlink(missing_ok=True)

    def work(self, first: int = 0, step: int = 1) -> Generator[Failure | None, None, None]:
        """Encode what no other process encodes: every `step`-th group from the `first` on, then the others.

        Yields None after each chunk, and a failure for each group that cannot be read on.
        """
        for group in (*self.groups[first::step], *self.groups):
            if not self._end(group).exists():
                lock = self._chunks / f"{group.key}.lock"
                # Another process has the group, or the directory is complete.
                with suppress(BlockingIOError, FileNotFoundError), locked(lock, False, wait=False):
                    if not self._end(group).exists():
                        yield from self._encode(group)

    def _end(self, group: Group) -> Path:
        """Return the path of the file that says that all chunks of a group were written."""
        return self._chunks / f"{group.key}.end"

    def _encode(self, group: Group) -> Iterator[Failure | None]:
        number, last = self._last(group)
        pending: list[Block] = []
        tokens, failure = 0, None
        try:
            for block in self._blocks(group, last):
                pending.append(block)
                tokens += len(block.tokens)
                if tokens >= _CHUNK_TOKENS:
                    replace_file(self.chunk(group, number), pack(pending))
                    number, pending, tokens = number + 1, [], 0
                    yield None
        except InputError as error:
            failure = group.key, error
        if pending:
            replace_file(self.chunk(group, number), pack(pending))
            yield None
        if failure is None:
            self._end(group).touch()
        else:
            yield failure

    def _last(self, group: Group) -> tuple[int, Block | None]:
        """Return the number of the next chunk of a group, and the last block that there is."""
        for chunk in sorted(self._chunks.glob(f"{group.key}-*.npz"), reverse=True):
            try:
                return _number(chunk) + 1, unpack(chunk)[-1]
            except ValueError:
                chunk.unlink()
        return 0, None

    def _blocks(self, group: Group, last: Block | None) -> Iterator[Block]:
        """Yield what follows a block of a group, from the beginning without one."""
        inputs = group.inputs
        number, read, place, copying = (0, 0, None, False) if last is None else _after(last)
        while number < len(inputs):
            found = self.reuse.find(inputs[number].identity) if copying or not read else None
            if found is not None:
                for block in found.blocks(number):
                    if block.first >= read:
                        yield block
                number, read, place, copying = _after(block)
                continue
            if copying:
                raise InputError(
                    f"{self._chunks.parent}: another directory from which it was being filled has gone or is damaged; "
                    "delete it"
                )
            known = (n for n in range(number + 1, len(inputs)) if self.reuse.knows(inputs[n].identity))
            with read_ahead(inputs[number : next(known, len(inputs))], read, place) as batches:
                for batch in batches:
                    for block in encode(batch, self._tokenizer, number, read):
                        yield block
                        number, read, place, _ = _after(block)
                    if batch.error is not None:
                        raise batch.error


def _after(block: Block) -> tuple[int, int, Any, bool]:
    """Return the input and the record that follow a block, the place of the record, and `Block.copying`."""
    if block.ended:
        return block.input + 1, 0, None, False
    return block.input, block.first + len(block.lengths), block.place, block.copying


def _chunk_name(key: str, number: int) -> str:
    return f"{key}-{number:06d}.npz"


def _number(chunk: Path) -> int:
    return int(chunk.stem.rpartition("-")[2])


def _groups(name: str, inputs: Sequence[Input], on_bad_record: str, tokenizer: Tokenizer) -> Iterator[Group]:
    seen: Counter[str] = Counter()
    first = size = 0
    for stop, each in enumerate(inputs, start=1):
        size += _GROUP_BYTES if each.size_bytes is None else each.size_bytes
        if size >= _GROUP_BYTES or stop == len(inputs):
            some = inputs[first:stop]
            made_by = tokenizer.fingerprint, tokenizer.end_token_id, on_bad_record
            content = json.dumps([name, *made_by, [each.identity for each in some]], sort_keys=True)
            seen[content] += 1
            key = hashlib.sha256(f"{seen[content]} {content}".encode()).hexdigest()[:24]
            yield Group(name, first, some, key)
            first, size = stop, 0
