"""One preparation: the tokens of a source, input after input, into a directory."""

from collections.abc import Callable, Sequence
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
from stacey_dist.data.reuse import Found, Reuse
from stacey_dist.data.source import Input, Source
from stacey_dist.data.text import BadRecord
from stacey_dist.data.tokenizer import Tokenizer
from stacey_dist.errors import SettingsError
from stacey_dist.files import read_json, write_json

_COMMIT_TOKENS = 2**24
"""Progress is made safe after so many tokens: not many seconds of work to repeat, few waits for the disk."""

_LEAST_VALIDATION = 2**20
"""With max_tokens, separate validation documents are read up to at least this many tokens."""

_NAMED = 5
"""So many skipped records are named."""


class Preparation:
    """The writers, the place in the inputs, the progress bar.

    There are two passes, ``train`` and, where there are separate validation inputs, ``validation``. A document is
    counted, for holding out every so many, if the tokenizer gives it any tokens.

    Args:
        directory: where the tokens go; locked by the caller. What an interrupted preparation left there is taken up.
        source: the documents.
        tokenizer: what to encode them with.
        max_tokens: as for `prepare`.
        validation_every: as for `prepare`.
        progress: show a progress bar on stderr.
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
        self.directory = directory
        self.source = source
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.validation_every = validation_every
        self.progress = progress
        self.position: dict[str, dict[str, Any]]
        self.inputs: dict[str, list[dict[str, Any]]]
        self.writers: dict[str, PartWriter]
        self._resume()
        self._committed = self._tokens()
        self._reuse = Reuse(directory, tokenizer.fingerprint, tokenizer.end_token_id, source.on_bad_record)

    def run(self) -> None:
        """Read, encode and write everything, index last."""
        every, separate = self.validation_every, self.source.validation_inputs
        if separate is not None:
            # What keeps the second from being read is said before the hours that the first takes.
            for inputs in (self.source.inputs, separate):
                next(iter(inputs[0].records()), None)
        self._pass("train", self.source.inputs, self.max_tokens)
        if separate is not None:
            limit = None if self.max_tokens is None else max(self.max_tokens // every, _LEAST_VALIDATION)
            self._pass("validation", separate, limit)
        for split, writer in self.writers.items():
            writer.close()
            if writer.tokens < 2:
                raise SettingsError(
                    f"the data give {writer.tokens} tokens for {split}, too few: add text, or lower "
                    f"data.validation_every (now {every})"
                )
        splits = {split: writer.state() | {"tokens": writer.tokens} for split, writer in self.writers.items()}
        write_json(self.directory / INDEX, self._header() | {"splits": splits})
        (self.directory / PROGRESS).unlink(missing_ok=True)
        for damaged in self.directory.glob(f"*{ASIDE}"):
            damaged.unlink()
        self._reuse.remove_outdated()

    def _header(self) -> dict[str, Any]:
        """Return what is written of the data beside their splits."""
        skipped = [each["skipped"] for name in SPLITS for each in (*self.inputs[name], self.position[name])]
        return {
            "format": FORMAT_VERSION,
            "dtype": token_dtype(self.tokenizer.vocab_size).str,
            "vocab_size": self.tokenizer.vocab_size,
            "end_token_id": self.tokenizer.end_token_id,
            "tokenizer": self.tokenizer.fingerprint,
            "source": self.source.identity,
            "held_out": self._held_out(),
            "inputs": self.inputs,
            "skipped": {
                "count": sum(each["count"] for each in skipped),
                "first": [message for each in skipped for message in each["first"]][:_NAMED],
            },
        }

    def _held_out(self) -> int | None:
        return self.validation_every if self.source.validation_inputs is None else None

    def _resume(self) -> None:
        """Take up the last commit; where there is none or its parts are damaged, begin anew."""
        size = self.tokenizer.vocab_size
        try:
            saved = read_json(self.directory / PROGRESS)
            self.position = {split: _new_position() | saved["position"][split] for split in SPLITS}
            self.inputs = {split: list(saved["inputs"][split]) for split in SPLITS}
            self.writers = {s: PartWriter(self.directory, s, size, saved["splits"][s]) for s in SPLITS}
        except (OSError, ValueError, KeyError, TypeError):
            self.position = {split: _new_position() for split in SPLITS}
            self.inputs = {split: [] for split in SPLITS}
            self.writers = {split: PartWriter(self.directory, split, size) for split in SPLITS}

    def _commit(self) -> None:
        for writer in self.writers.values():
            writer.flush()
        splits = {split: writer.state() for split, writer in self.writers.items()}
        position = {name: place | self._current_input(name) for name, place in self.position.items()}
        write_json(self.directory / PROGRESS, self._header() | {"position": position, "splits": splits})
        self._committed = self._tokens()

    def _current_input(self, name: str) -> dict[str, Any]:
        """Return the identity of the input that a pass is at, by which another preparation finds it."""
        inputs = (self.source.inputs if name == "train" else self.source.validation_inputs) or ()
        at = self.position[name]["input"]
        return {"identity": inputs[at].identity} if at < len(inputs) else {}

    def _tokens(self) -> int:
        return sum(writer.tokens for writer in self.writers.values())

    def _documents(self) -> int:
        return sum(writer.documents for writer in self.writers.values())

    def _pass(self, name: str, inputs: Sequence[Input], limit: int | None) -> None:
        """Go on from the last commit until the inputs end or split ``name`` has ``limit`` tokens."""
        place = self.position[name]
        if place["finished"]:
            return
        if place["input"] == place["read"] == 0:
            place["documents"] = self._documents()
        limited = self.writers[name]
        with self._bar(name, limit, place["bytes"] if limit is None else limited.tokens) as bar:

            def report(size: int, before: int) -> None:
                bar.update(size if limit is None else limited.tokens - before)
                bar.set_postfix_str(f"{limited.tokens / 1e6:.1f}M tokens", refresh=False)

            while place["input"] < len(inputs) and limited.tokens != limit:
                now = place["input"]
                found = self._reuse.find(inputs[now].identity) if place["read"] == 0 else None
                if found is not None and not self._ends_among_skipped(found, limited, limit):
                    before = limited.tokens
                    self._copy(name, found, inputs[now], limit)
                    report(found.bytes, before)
                else:
                    known = (n for n in range(now + 1, len(inputs)) if self._reuse.knows(inputs[n].identity))
                    self._read(name, inputs[now : next(known, len(inputs))], limit, report)
        place["finished"] = True
        self._commit()

    def _ends_among_skipped(self, found: Found, limited: PartWriter, limit: int | None) -> bool:
        """Return whether a copy would end at the limit, where it is not known how many records were skipped so far."""
        tokens = sum(mark["tokens"] for mark in found.record["splits"].values())
        return limit is not None and limited.tokens + tokens >= limit and found.record["skipped"]["count"] > 0

    def _read(self, name: str, inputs: Sequence[Input], limit: int | None, report: Callable[[int, int], None]) -> None:
        """Encode the inputs that come next."""
        place, limited = self.position[name], self.writers[name]
        first = place["input"]
        with read_ahead(inputs, place["read"]) as batches:
            for batch in batches:
                before = limited.tokens
                self._encode(name, batch, inputs, first, limit)
                place["bytes"] += batch.size
                report(batch.size, before)
                if batch.error is not None:
                    self._commit()
                    raise batch.error
                if limited.tokens == limit:
                    return
                self._commit_if_due()

    def _encode(self, name: str, batch: Batch, inputs: Sequence[Input], first: int, limit: int | None) -> None:
        place, limited = self.position[name], self.writers[name]
        encoded = iter(self.tokenizer.encode_batch(batch.texts))
        for record in batch.records:
            if isinstance(record, End):
                self._finish_input(name, inputs[place["input"] - first])
                continue
            if isinstance(record, BadRecord):
                _count_skipped(place["skipped"], record.message)
            elif tokens := next(encoded):
                tokens.append(self.tokenizer.end_token_id)
                self._append(name, tokens, limit)
            place["read"] += 1
            if limited.tokens == limit:
                return

    def _append(self, name: str, tokens: Any, limit: int | None) -> None:
        place, number = self.position[name], self._documents()
        split = split_of(name, self._held_out(), number)
        writer = self.writers[split]
        if limit is not None and split == name:
            tokens = tokens[: limit - writer.tokens]
        # Where a part begins: so many documents after the beginning of an input.
        writer.append(tokens, {"pass": name, "input": place["input"], "skip": number - place["documents"]})

    def _copy(self, name: str, found: Found, source: Input, limit: int | None) -> None:
        """Copy what another directory has of the input that comes next."""
        place, limited = self.position[name], self.writers[name]
        for tokens in found.documents():
            self._append(name, tokens, limit)
            if limited.tokens == limit:
                return
        place["read"], place["skipped"] = found.record["read"], found.record["skipped"]
        place["bytes"] += found.bytes
        if found.finished:
            self._finish_input(name, source)
        self._commit_if_due()

    def _finish_input(self, name: str, source: Input) -> None:
        """Write down what the input gave, and go on to the next."""
        place = self.position[name]
        marks = {split: writer.mark() for split, writer in self.writers.items()}
        self.inputs[name].append(
            {"input": source.identity, "splits": marks} | {key: place[key] for key in ("read", "documents", "skipped")}
        )
        place.update(_new_position(), input=place["input"] + 1, bytes=place["bytes"], documents=self._documents())

    def _commit_if_due(self) -> None:
        if self._tokens() - self._committed >= _COMMIT_TOKENS:
            self._commit()

    def _bar(self, name: str, limit: int | None, done: int) -> "tqdm[Any]":
        total = limit if limit is not None else self.source.size_bytes if name == "train" else None
        return tqdm(
            desc=f"tokenizing {name}",
            total=total,
            initial=done,
            unit="B" if limit is None else "tok",
            unit_scale=True,
            disable=not self.progress,
            dynamic_ncols=True,
        )


def _new_position() -> dict[str, Any]:
    """Return the place at the start of a pass: ``documents`` counts those before the input, ``read`` its records."""
    return {
        "input": 0,
        "read": 0,
        "documents": 0,
        "bytes": 0,
        "skipped": {"count": 0, "first": []},
        "finished": False,
    }


def _count_skipped(skipped: dict[str, Any], message: str) -> None:
    skipped["count"] += 1
    if len(skipped["first"]) < _NAMED:
        skipped["first"].append(message)
