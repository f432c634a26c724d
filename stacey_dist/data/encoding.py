"""Encode inputs as chunks of tokens, with any number of processes on any number of hosts that share a directory.

A process locks a group of inputs, and writes its records chunk by chunk. A killed process loses only its current chunk,
and another process continues from there. Each group has its own folder, so the cost of listing its chunks does not
depend on the number of groups.
"""

import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from stacey_dist.data.blocks import Block, encode, gather, pack, read_ahead, unpack
from stacey_dist.data.lock import locked
from stacey_dist.data.reuse import Reuse
from stacey_dist.data.source import Input, Source
from stacey_dist.data.tokenizer import Tokenizer
from stacey_dist.errors import InputError
from stacey_dist.files import replace_file

CHUNKS = "chunks"
_END = "end"

_CHUNK_TOKENS = 2**19
"""A chunk has so many at least: two seconds of one core, and one batch of text."""

_GROUP_BYTES = 2**26
"""Small files are taken together, up to so much text."""

Failure = tuple[str, InputError]
"""The key of a group, and why its next records cannot be read."""


@dataclass(frozen=True)
class Group:
    """Inputs that one process encodes.

    Attributes:
        first: the number of the first input in its pass.
        inputs: the inputs.
        key: the name of its folder, the same wherever the same inputs are encoded alike.
    """

    first: int
    inputs: Sequence[Input]
    key: str


class Encoder:
    """Writes the chunks of a directory.

    Args:
        directory: the one that is being prepared.
        source, tokenizer, max_tokens: as for `prepare`.

    Attributes:
        groups: of each pass, ``train`` and ``validation``, in order.
        reuse: what other directories have of the inputs.

    All arguments are attributes, too.
    """

    def __init__(self, directory: Path, source: Source, tokenizer: Tokenizer, max_tokens: int | None) -> None:
        self.directory, self.source, self.tokenizer, self.max_tokens = directory, source, tokenizer, max_tokens
        self._chunks = directory / CHUNKS
        # A copy puts skipped records last, because their positions are not saved. If max_tokens cut the copy, their
        # number before the cut would be unknown. So inputs with skipped records are not reused with max_tokens.
        with_skipped = source.on_bad_record == "skip" and max_tokens is None
        self._find_known = partial(Reuse, directory, tokenizer.fingerprint, tokenizer.end_token_id, with_skipped)
        self.reuse = self._find_known()
        made_by = tokenizer.fingerprint, tokenizer.end_token_id, source.on_bad_record, with_skipped
        inputs = {"train": source.inputs, "validation": source.validation_inputs or ()}
        self.groups = {name: list(_groups(name, some, made_by)) for name, some in inputs.items()}
        self._all = [group for groups in self.groups.values() for group in groups]
        self._link_known()

    def _link_known(self) -> None:
        """Take over the chunks that other directories have, of preparations that were not completed."""
        known: dict[str, list[Path]] = {}
        # Not Path.glob, which raises an error where a directory goes at that moment.
        for found in glob.glob(f"*/{CHUNKS}/*", root_dir=self.directory.parent):
            folder = self.directory.parent / found
            if folder.parent != self._chunks:
                known.setdefault(folder.name, []).append(folder)
        for group in self._all:
            self._folder(group).mkdir(parents=True, exist_ok=True)
            for folder in known.get(group.key, ()):
                # OSError: another process locks the group, or completed the other directory and removed its chunks.
                with suppress(OSError), self._locked(group):
                    numbers = _numbers(folder)
                    # If chunks of this group were already used and removed, its last chunk or its end file is left.
                    if 0 in numbers and not self._end(group).exists() and not _numbers(self._folder(group)):
                        for number in numbers:
                            os.link(folder / _chunk_name(number), self.chunk(group, number))

    def chunk(self, group: Group, number: int) -> Path:
        """Return the path of a group's chunk."""
        return self._folder(group) / _chunk_name(number)

    def first_chunk(self, group: Group) -> int:
        """Return the number of the first chunk of a group that is there, 0 if none is."""
        return min(_numbers(self._folder(group)), default=0)

    def discard(self, group: Group, number: int) -> None:
        """Remove a group's chunks from one on, so that they are encoded again."""
        self._end(group).unlink(missing_ok=True)
        for each in _numbers(self._folder(group)):
            if each >= number:
                self.chunk(group, each).unlink(missing_ok=True)

    def discard_if_lost(self, group: Group, number: int) -> bool:
        """Remove all chunks of a group if one of them will never be written, and return whether that was so.

        Raises:
            InputError: the folder has gone.
        """

        def lost() -> bool:
            # Not `exists`: NFS may remember for a minute that a file was not there.
            names = os.listdir(self._folder(group))
            later = [each for each in names if each == _END or (each.endswith(".npz") and each > _chunk_name(number))]
            return bool(later) and _chunk_name(number) not in names

        try:
            if lost():
                with suppress(BlockingIOError), self._locked(group):
                    if lost():
                        self.discard(group, 0)
                        return True
        except FileNotFoundError as error:
            raise InputError(f"{error.filename} was removed; the same command encodes its inputs again") from error
        return False

    def end(self, group: Group) -> None:
        """Stop the encoding of a group on all hosts: everything needed from it was taken."""
        with suppress(FileNotFoundError):
            self._end(group).touch()

    def work(self, first: int = 0, step: int = 1) -> Generator[Failure | None, None, None]:
        """Encode what no other process encodes: every `step`-th group from the `first` on, then the others.

        Yields None after each chunk, and a failure for each group whose next records cannot be read.
        """
        for group in (*self._all[first::step], *self._all):
            yield from self.work_on(group)

    def work_on(self, group: Group) -> Generator[Failure | None, None, None]:
        """Encode one group, if it is not done and no other process encodes it. Yields what `work` does."""
        if not self._end(group).exists():
            # Another process has the group, or the directory is complete.
            with suppress(BlockingIOError, FileNotFoundError), self._locked(group):
                if not self._end(group).exists():
                    yield from self._encode(group)

    def _folder(self, group: Group) -> Path:
        return self._chunks / group.key

    def _locked(self, group: Group) -> AbstractContextManager[None]:
        return locked(self._folder(group) / "lock", wait=None)

    def _end(self, group: Group) -> Path:
        """Return the path of the file that says that no more chunks of a group will be written."""
        return self._folder(group) / _END

    def _encode(self, group: Group) -> Iterator[Failure | None]:
        first, last = self._last(group)
        chunks = gather(self._blocks(group, last), lambda block: len(block.tokens), _CHUNK_TOKENS)
        try:
            for number, blocks in enumerate(chunks, start=first):
                replace_file(self.chunk(group, number), pack(blocks))
                yield None
                if self._end(group).exists():
                    return
            self._end(group).touch()
        except InputError as error:
            yield group.key, error

    def _last(self, group: Group) -> tuple[int, Block | None]:
        """Return the number of the next chunk of a group, and the last block that there is."""
        for number in reversed(_numbers(self._folder(group))):
            try:
                return number + 1, unpack(self.chunk(group, number))[-1]
            except ValueError:
                self.chunk(group, number).unlink()
        return 0, None

    def _blocks(self, group: Group, last: Block | None) -> Iterator[Block]:
        """Yield what follows a block of a group, from the beginning without one."""
        inputs = group.inputs
        number, read, place, copying = (0, 0, None, False) if last is None else _after(last)
        while number < len(inputs):
            if copying:  # another process began it, perhaps from a directory that came later
                self.reuse = self._find_known()
            found = self.reuse.find(inputs[number].identity) if copying or not read else None
            if found is not None:
                for block in found.blocks(number):
                    if block.first >= read:
                        yield block
                number, read, place, copying = _after(block)
                continue
            if copying:
                raise InputError(
                    f"{self.directory}: the directory that its tokens were being copied from is missing or damaged; "
                    f"delete {self.directory}"
                )
            known = (n for n in range(number + 1, len(inputs)) if self.reuse.knows(inputs[n].identity))
            with read_ahead(inputs[number : next(known, len(inputs))], read, place) as batches:
                for batch in batches:
                    for block in encode(batch, self.tokenizer, number, read):
                        yield block
                        number, read, place, _ = _after(block)


def _after(block: Block) -> tuple[int, int, Any, bool]:
    """Return the input and the record that follow a block, the place of the record, and `Block.copying`."""
    if block.ended:
        return block.input + 1, 0, None, False
    return block.input, block.first + len(block.lengths), block.place, block.copying


def _chunk_name(number: int) -> str:
    return f"{number:06d}.npz"


def _numbers(folder: Path) -> list[int]:
    """Return the numbers of the chunks in a folder, sorted."""
    return sorted(int(name[: -len(".npz")]) for name in os.listdir(folder) if name.endswith(".npz"))


def _groups(name: str, inputs: Sequence[Input], made_by: tuple[Any, ...]) -> Iterator[Group]:
    seen: Counter[str] = Counter()
    first = size = 0
    for stop, each in enumerate(inputs, start=1):
        size += _GROUP_BYTES if each.size_bytes is None else each.size_bytes
        if size >= _GROUP_BYTES or stop == len(inputs):
            some = inputs[first:stop]
            content = json.dumps([name, *made_by, [each.identity for each in some]], sort_keys=True)
            seen[content] += 1
            key = hashlib.sha256(f"{seen[content]} {content}".encode()).hexdigest()[:24]
            yield Group(first, some, key)
            first, size = stop, 0
