"""One preparation: the tokens of a source, input after input, into a directory."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stacey_dist.data.parts import (
    ASIDE,
    FORMAT_VERSION,
    INDEX,
    PROGRESS,
    SPLITS,
    PartWriter,
    split_of,
    token_dtype,
)
from stacey_dist.data.readahead import Batch, End, read_ahead
from stacey_dist.data.reuse import Reuse, TokenizedInput
from stacey_dist.data.source import Input, Source
from stacey_dist.data.text import BadRecord
from stacey_dist.data.tokenizer import Tokenizer
from stacey_dist.errors import InputError
from stacey_dist.files import read_json, write_json

_COMMIT_TOKENS = 2**24
"""Progress is saved after so many tokens: few seconds of work to repeat, few waits for the disk."""

_LEAST_VALIDATION = 2**20
"""With max_tokens, separate validation documents are read up to at least this many tokens."""

_NAMED = 5
"""So many skipped records are named."""


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
        bytes: how much text was read, for the progress bar.
        finished: whether nothing is left to do.
    """

    name: str
    inputs: Sequence[Input]
    limit: int | None
    writer: PartWriter
    records: list[dict[str, Any]] = field(default_factory=list)
    current: dict[str, Any] = field(default_factory=dict)
    bytes: int = 0
    finished: bool = False

    @property
    def full(self) -> bool:
        """Whether the limit is reached."""
        return self.writer.tokens == self.limit

    @property
    def done(self) -> int:
        """How far it is: in tokens where they are limited, and otherwise in bytes of text."""
        return self.bytes if self.limit is None else self.writer.tokens

    def begin_input(self, documents: int) -> None:
        """Begin the next input, if there is one, after so many documents."""
        self.current = {}
        if len(self.records) < len(self.inputs):
            self.current = {
                "input": self.inputs[len(self.records)].identity,
                "read": 0,
                "documents": documents,
                "skipped": {"count": 0, "first": []},
                "splits": {split: {"documents": 0, "tokens": 0, "crc32": 0} for split in SPLITS},
            }

    def count_skipped(self, message: str) -> None:
        """Count a bad record of the input, and keep the messages of the first."""
        skipped = self.current["skipped"]
        skipped["count"] += 1
        if len(skipped["first"]) < _NAMED:
            skipped["first"].append(message)


class Preparation:
    """The writers, the passes over the inputs, the progress bar.

    A document is counted, for holding out every so many, if the tokenizer gives it any tokens.

    Args:
        directory: where the tokens go; locked by the caller. An interrupted preparation is resumed there.
        source, tokenizer, max_tokens, validation_every, progress: as for `prepare`.
    """

    def __init__(
        self,
        directory: Path,
        source: Source,
        tokenizer: Tokenizer,
        max_tokens: int | None,
        validation_every: int,
        progress: bool,
    ) -> None:
        self._directory = directory
        self._source = source
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._every = validation_every
        self._held_out = validation_every if source.validation_inputs is None else None
        self._progress = progress
        self._writers: dict[str, PartWriter]
        self._passes: list[_Pass]
        try:
            self._start(read_json(directory / PROGRESS))
        except (OSError, ValueError, KeyError, TypeError):  # there is no commit, or it is damaged
            self._start(None)
        self._committed = self._tokens()
        # A copy that ends at a limit would not know how many of the skipped records came before.
        with_skipped = source.on_bad_record == "skip" and max_tokens is None
        self._reuse = Reuse(directory, tokenizer.fingerprint, tokenizer.end_token_id, with_skipped)

    def run(self) -> None:
        """Read, encode and write everything, the index last."""
        if self._source.validation_inputs is not None:
            # An input that cannot be read is found before the hours that the others take.
            for each in self._passes:
                next(iter(each.inputs[0].records()), None)
        for each in self._passes:
            self._run(each)
        for split, writer in self._writers.items():
            writer.close()
            if writer.tokens < 2:
                raise InputError(
                    f"the data give {writer.tokens} tokens for {split}, too few: add text, or lower "
                    f"`validation_every` (now {self._every})"
                )
        splits = {split: writer.state() | {"tokens": writer.tokens} for split, writer in self._writers.items()}
        write_json(self._directory / INDEX, self._header() | {"splits": splits})
        (self._directory / PROGRESS).unlink(missing_ok=True)
        for damaged in self._directory.glob(f"*{ASIDE}"):
            damaged.unlink()
        self._reuse.remove_outdated()

    def _start(self, saved: dict[str, Any] | None) -> None:
        """Open the writers and the passes where the last commit left them, or at the beginning."""
        size, splits = self._tokenizer.vocab_size, saved["splits"] if saved else dict.fromkeys(SPLITS)
        self._writers = {split: PartWriter(self._directory, split, size, splits[split]) for split in SPLITS}
        least = None if self._max_tokens is None else max(self._max_tokens // self._every, _LEAST_VALIDATION)
        self._passes = [
            _Pass("train", self._source.inputs, self._max_tokens, self._writers["train"]),
            _Pass("validation", self._source.validation_inputs or (), least, self._writers["validation"]),
        ]
        if saved:
            for each in self._passes:
                place = saved["position"][each.name]
                each.records = saved["inputs"][each.name]
                each.current, each.bytes, each.finished = place["current"], place["bytes"], place["finished"]

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
                "first": [message for each in skipped for message in each["first"]][:_NAMED],
            },
        }

    def _commit(self) -> None:
        """Save the progress, to resume from."""
        for writer in self._writers.values():
            writer.flush()
        splits = {split: writer.state() for split, writer in self._writers.items()}
        position = {
            each.name: {"current": each.current, "bytes": each.bytes, "finished": each.finished}
            for each in self._passes
        }
        write_json(self._directory / PROGRESS, self._header() | {"position": position, "splits": splits})
        self._committed = self._tokens()

    def _commit_if_due(self) -> None:
        if self._tokens() - self._committed >= _COMMIT_TOKENS:
            self._commit()

    def _tokens(self) -> int:
        return sum(writer.tokens for writer in self._writers.values())

    def _documents(self) -> int:
        return sum(writer.documents for writer in self._writers.values())

    def _run(self, now: _Pass) -> None:
        """Tokenize from the last commit on, until the inputs end or the limit is reached."""
        if now.finished or not now.inputs:
            return
        if not now.current:
            now.begin_input(self._documents())
        with self._bar(now) as bar:
            while now.current and not now.full:
                found = None if now.current["read"] else self._reuse.find(now.current["input"])
                if found is None:
                    self._read(now, bar)
                else:
                    self._copy(now, found)
                _show(bar, now)
        now.finished = True
        self._commit()

    def _copy(self, now: _Pass, found: TokenizedInput) -> None:
        """Copy what another directory has of the current input."""
        for tokens in found.documents():
            self._append(now, tokens)
            if now.full:
                return
        now.current |= {key: found.record[key] for key in ("read", "skipped")}
        now.bytes += found.bytes
        if found.finished:
            self._finish_input(now)
        self._commit_if_due()

    def _read(self, now: _Pass, bar: "tqdm[Any]") -> None:
        """Encode the current input and those after it, up to one of which another directory may have the tokens."""
        first, last = len(now.records), len(now.inputs)
        known = (n for n in range(first + 1, last) if self._reuse.knows(now.inputs[n].identity))
        with read_ahead(now.inputs[first : next(known, last)], now.current["read"]) as batches:
            for batch in batches:
                self._encode(now, batch)
                now.bytes += batch.size
                _show(bar, now)
                if batch.error is not None:
                    self._commit()
                    raise batch.error
                if now.full:
                    return
                self._commit_if_due()

    def _encode(self, now: _Pass, batch: Batch) -> None:
        for record in batch.encode(self._tokenizer):
            if isinstance(record, End):
                self._finish_input(now)
                continue
            if isinstance(record, BadRecord):
                now.count_skipped(record.message)
            elif record:
                self._append(now, record)
            now.current["read"] += 1
            if now.full:
                return

    def _append(self, now: _Pass, tokens: Any) -> None:
        number = self._documents()
        split = split_of(now.name, self._held_out, number)
        writer = self._writers[split]
        if now.limit is not None and split == now.name:
            tokens = tokens[: now.limit - writer.tokens]
        # A part that begins here begins so many documents after the beginning of the input.
        start = {"pass": now.name, "input": len(now.records), "skip": number - now.current["documents"]}
        writer.append(tokens, start, now.current["splits"][split])

    def _finish_input(self, now: _Pass) -> None:
        now.records.append(now.current)
        now.begin_input(self._documents())

    def _bar(self, now: _Pass) -> "tqdm[Any]":
        total = now.limit if now.limit is not None else self._source.size_bytes if now.name == "train" else None
        return tqdm(
            desc=f"tokenizing {now.name}",
            total=total,
            initial=now.done,
            unit="B" if now.limit is None else "tok",
            unit_scale=True,
            disable=not self._progress,
            dynamic_ncols=True,
        )


def _show(bar: "tqdm[Any]", now: _Pass) -> None:
    bar.set_postfix_str(f"{now.writer.tokens / 1e6:.1f}M tokens", refresh=False)
    bar.update(now.done - bar.n)
