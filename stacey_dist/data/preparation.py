"""Prepare one source: join the chunks of its inputs, in order, into the parts of a directory."""

import contextlib
import itertools
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from stacey_dist.data.blocks import BAD, NAMED, Block, unpack
from stacey_dist.data.encoding import Encoder, Failure, Group
from stacey_dist.data.parts import ASIDE, FORMAT_VERSION, INDEX, PROGRESS, SPLITS, PartWriter, held_out_of, token_dtype
from stacey_dist.data.processes import Helpers
from stacey_dist.data.source import Input
from stacey_dist.errors import InputError
from stacey_dist.files import read_json, write_json

_COMMIT_TOKENS = 2**26
_COMMIT_TOKENS_PER_INPUT = 2**11
"""Saves of the progress are at least `_COMMIT_TOKENS` tokens apart, and at least this many per finished input: a save
writes a few hundred bytes per input."""

_LEAST_VALIDATION = 2**20
"""With max_tokens, separate validation documents are read up to at least this many tokens."""

_POLL_SECONDS = 0.1


@dataclass
class _Pass:
    """One reading of the training inputs, or of separate validation inputs.

    Attributes:
        name: ``train`` or ``validation``.
        inputs: what is read.
        limit: the pass ends when the split of its name has so many tokens; None for no limit.
        writer: of that split.
        records: what each finished input gave: ``read`` records, of which some were ``skipped``, after ``documents`` of
            other inputs, with the sums of each of the ``splits``.
        current: the same of the input that is being read; empty where there is none.
        place, copying: where that input is read next, and whether its tokens are being copied; as in `Block`.
        bytes: how much text was read, for the progress bar.
        finished: whether nothing is left to do.
    """

    name: str
    inputs: Sequence[Input]
    limit: int | None
    writer: PartWriter
    records: list[dict[str, Any]] = field(default_factory=list)
    current: dict[str, Any] = field(default_factory=dict)
    place: Any = None
    copying: bool = False
    bytes: int = 0
    finished: bool = False

    @property
    def full(self) -> bool:
        """Whether the limit is reached."""
        return self.writer.tokens == self.limit

    @property
    def done(self) -> int:
        """The progress of the pass: in tokens if they are limited, otherwise in bytes of text."""
        return self.bytes if self.limit is None else self.writer.tokens

    def position(self) -> dict[str, Any]:
        """Return what is saved of it, beside the records."""
        return {key: getattr(self, key) for key in ("current", "place", "copying", "bytes", "finished")}

    def begin_input(self, documents: int) -> None:
        """Begin the next input, if there is one, after so many documents."""
        self.current, self.place, self.copying = {}, None, False
        if len(self.records) < len(self.inputs):
            self.current = {
                "input": self.inputs[len(self.records)].identity,
                "read": 0,
                "documents": documents,
                "skipped": {"count": 0, "first": []},
                "splits": {split: {"documents": 0, "tokens": 0, "crc32": 0} for split in SPLITS},
            }

    def following(self, group: Group, block: Block) -> Block | None:
        """Return the rest of a block, not taken yet, or None. Raises ValueError if earlier records are missing."""
        number = group.first + block.input
        if number < len(self.records):
            return None
        taken = self.current["read"] - block.first
        if number > len(self.records) or taken < 0:
            raise ValueError("records before this chunk are missing")
        return block.after(taken) if taken < len(block.lengths) or block.ended else None


class Preparation:
    """The writers, the passes over the inputs, the progress bar.

    A document is counted, for holding out every so many, if the tokenizer gives it any tokens.

    Args:
        encoder: gives the chunks. Its directory, where the tokens go, is locked by the caller; an interrupted
            preparation is resumed there.
        helpers: processes that write the chunks; where there are none, this one does.
        validation_every, progress: as for `prepare`.
    """

    def __init__(self, encoder: Encoder, helpers: Helpers, validation_every: int, progress: bool) -> None:
        self._directory, self._source = encoder.directory, encoder.source
        self._tokenizer, self._max_tokens = encoder.tokenizer, encoder.max_tokens
        self._every = validation_every
        self._held_out = validation_every if self._source.validation_inputs is None else None
        self._progress = progress
        self._encoder = encoder
        self._helpers = helpers
        self._failures: dict[str, InputError] = {}
        self._taken: list[Path] = []
        self._writers: dict[str, PartWriter]
        self._passes: list[_Pass]
        try:
            self._start(read_json(self._directory / PROGRESS))
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # there is no commit, or it is damaged
            self._start(None)
        self._committed = self._tokens()

    def run(self) -> None:
        """Read, encode and write everything, the index last."""
        if self._source.validation_inputs is not None:
            # An input that cannot be read is found before the hours that the others take.
            for each in self._passes:
                next(iter(each.inputs[0].records()), None)
        for each in self._passes:
            self._run(each)
            # What is left of it is not needed: its limit was reached.
            for group in self._encoder.groups[each.name]:
                self._encoder.end(group)
        for split, writer in self._writers.items():
            writer.close()
            if writer.tokens < 2:
                raise InputError(
                    f"the data give {writer.tokens} tokens for {split}, too few: add documents (text is split at line "
                    f"ends), lower `validation_every` (now {self._every}), or give files to hold out"
                )
        splits = {split: writer.state() | {"tokens": writer.tokens} for split, writer in self._writers.items()}
        write_json(self._directory / INDEX, self._header() | {"splits": splits})
        (self._directory / PROGRESS).unlink(missing_ok=True)
        for damaged in self._directory.glob(f"*{ASIDE}"):
            damaged.unlink()
        self._encoder.reuse.remove_outdated(record["input"] for now in self._passes for record in now.records)

    def _start(self, saved: dict[str, Any] | None) -> None:
        """Open the writers and the passes where the last commit left them, or at the beginning."""
        dtype, splits = token_dtype(self._tokenizer.vocab_size), saved["splits"] if saved else dict.fromkeys(SPLITS)
        self._writers = {split: PartWriter(self._directory, split, dtype, splits[split]) for split in SPLITS}
        least = None if self._max_tokens is None else max(self._max_tokens // self._every, _LEAST_VALIDATION)
        self._passes = [
            _Pass("train", self._source.inputs, self._max_tokens, self._writers["train"]),
            _Pass("validation", self._source.validation_inputs or (), least, self._writers["validation"]),
        ]
        if saved:
            for each in self._passes:
                each.records = saved["inputs"][each.name]
                for key in each.position():
                    setattr(each, key, saved["position"][each.name][key])

    def _header(self) -> dict[str, Any]:
        """Return what the index and the saved progress say beside the splits."""
        records = [record for each in self._passes for record in (*each.records, each.current)]
        skipped = [record["skipped"] for record in records if record]
        return {
            "format": FORMAT_VERSION,
            "dtype": token_dtype(self._tokenizer.vocab_size).str,
            "vocab_size": self._tokenizer.vocab_size,
            "end_token_id": self._tokenizer.end_token_id,
            "tokenizer": self._tokenizer.fingerprint,
            "source": self._source.identity,
            "held_out": self._held_out,
            "inputs": {each.name: each.records for each in self._passes},
            "skipped": {
                "count": sum(each["count"] for each in skipped),
                "first": [message for each in skipped for message in each["first"]][:NAMED],
            },
        }

    def _commit(self) -> None:
        """Save the progress, to resume from, and remove the chunks that it covers."""
        for writer in self._writers.values():
            writer.flush()
        splits = {split: writer.state() for split, writer in self._writers.items()}
        position = {each.name: each.position() for each in self._passes}
        write_json(self._directory / PROGRESS, self._header() | {"position": position, "splits": splits})
        self._committed = self._tokens()
        # The last one stays: a process that continues its group begins after it.
        for chunk in self._taken[:-1]:
            chunk.unlink(missing_ok=True)
        del self._taken[:-1]

    def _commit_if_due(self) -> None:
        inputs = sum(len(each.records) for each in self._passes)
        if self._tokens() - self._committed >= max(_COMMIT_TOKENS, inputs * _COMMIT_TOKENS_PER_INPUT):
            self._commit()

    def _tokens(self) -> int:
        return sum(writer.tokens for writer in self._writers.values())

    def _documents(self) -> int:
        return sum(writer.documents for writer in self._writers.values())

    def _run(self, now: _Pass) -> None:
        """Write the tokens from the last commit on, until the inputs end or the limit is reached."""
        if now.finished or not now.inputs:
            return
        if not now.current:
            now.begin_input(self._documents())
        with self._bar(now) as bar, contextlib.closing(self._blocks(now)) as blocks:
            for block in blocks:
                self._take(now, block)
                bar.set_postfix_str(f"{now.writer.tokens / 1e6:.1f}M tokens", refresh=False)
                bar.update(now.done - bar.n)
                if now.full:
                    break
        now.finished = True
        self._commit()

    def _blocks(self, now: _Pass) -> Generator[Block, None, None]:
        """Yield what is left of a pass, chunk after chunk, as they are written."""
        for group in self._encoder.groups[now.name]:
            yield from self._blocks_of(group, now)

    def _blocks_of(self, group: Group, now: _Pass) -> Iterator[Block]:
        within = len(now.records) > group.first or now.current.get("read")
        number = self._encoder.first_chunk(group) if within else 0
        with contextlib.closing(self._reports(group)) as reports:
            while len(now.records) < group.first + len(group.inputs):
                chunk = self._encoder.chunk(group, number)
                if not chunk.exists():
                    if self._encoder.discard_if_lost(group, number):
                        number = 0
                    else:
                        self._raise_failure(group)
                        self._failures |= dict(next(reports))
                    continue
                try:
                    for block in unpack(chunk):
                        if (rest := now.following(group, block)) is not None:
                            yield rest
                except ValueError as error:
                    self._encoder.discard(group, number)
                    raise InputError(f"{error}; {chunk} was removed, and the same command encodes it again") from error
                self._taken.append(chunk)
                number += 1
                self._commit_if_due()
            self._encoder.end(group)

    def _raise_failure(self, group: Group) -> None:
        """Raise InputError where the records that come next cannot be read."""
        # With max_tokens, ignore errors in groups that were encoded ahead: the limit may come before them.
        failed = [error for key, error in self._failures.items() if key == group.key or self._max_tokens is None]
        if failed:
            self._commit()
            raise failed[0]

    def _reports(self, group: Group) -> Generator[list[Failure], None, None]:
        """Yield what the helpers report while a group's chunks are awaited.

        Without helpers, write these chunks, or one of another group while another process has this one.
        """
        others = self._encoder.work()
        while True:
            if self._helpers.running:
                yield self._helpers.reports(_POLL_SECONDS)
                continue
            waits = True
            for failure in itertools.chain(self._encoder.work_on(group), itertools.islice(others, 1)):
                waits = False
                yield [] if failure is None else [failure]
            if waits:  # what is left is in the hands of other processes
                time.sleep(_POLL_SECONDS)
                yield []
                others = self._encoder.work()

    def _take(self, now: _Pass, block: Block) -> None:
        """Append the documents of a block, up to the limit, and count its records."""
        documents = np.flatnonzero(block.lengths > 0)
        lengths, first = block.lengths[documents], self._documents()
        held_out, records = held_out_of(now.name, self._held_out, first, len(documents)), len(block.lengths)
        if now.limit is not None:
            limited = np.where(held_out == (now.name == "validation"), lengths, 0)
            ends, room = np.cumsum(limited), now.limit - now.writer.tokens
            if ends.size and ends[-1] >= room:
                last = int(np.searchsorted(ends, room))
                lengths, held_out, records = lengths[: last + 1].copy(), held_out[: last + 1], int(documents[last]) + 1
                lengths[last] -= ends[last] - room
        tokens = block.tokens[: lengths.sum()]
        skips = first - now.current["documents"] + np.arange(len(lengths))
        for split, mine in zip(SPLITS, (~held_out, held_out), strict=True):
            self._writers[split].append(
                tokens[np.repeat(mine, lengths)],
                lengths[mine],
                {"pass": now.name, "input": len(now.records)},
                skips[mine],
                now.current["splits"][split],
            )
        bad, skipped = int((block.lengths[:records] == BAD).sum()), now.current["skipped"]
        skipped["first"] += block.messages[: min(bad, NAMED - len(skipped["first"]))]
        skipped["count"] += bad
        now.current["read"] += records
        now.bytes += block.size
        # The place is behind the whole block.
        now.place, now.copying = block.place if records == len(block.lengths) else None, block.copying
        if block.ended and not now.full:
            now.records.append(now.current)
            now.begin_input(self._documents())

    def _bar(self, now: _Pass) -> "tqdm[Any]":
        sizes = [each.size_bytes for each in now.inputs]
        size = None if None in sizes else sum(filter(None, sizes))
        return tqdm(
            desc=f"tokenizing {now.name}",
            total=size if now.limit is None else now.limit,
            initial=now.done,
            unit="B" if now.limit is None else "tok",
            unit_scale=True,
            disable=not self._progress,
            dynamic_ncols=True,
        )
