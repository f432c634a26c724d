"""Tokenize a source once, into parts that are memory-mapped by every later run."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stacey_dist.data.lock import making
from stacey_dist.data.parts import FORMAT_VERSION, INDEX, PROGRESS, PartWriter, token_dtype, write_json
from stacey_dist.data.readahead import read_ahead
from stacey_dist.data.source import Source
from stacey_dist.data.text import Document
from stacey_dist.data.tokenizer import Tokenizer
from stacey_dist.errors import SettingsError

_COMMIT_TOKENS = 2**24
"""Progress is made safe after so many tokens: not many seconds of work to repeat, few waits for the disk."""

_LEAST_VALIDATION = 2**20
"""With max_tokens, separate validation documents are read up to at least this many tokens."""


def prepare(
    source: Source,
    tokenizer: Tokenizer,
    cache_dir: Path,
    *,
    max_tokens: int | None,
    validation_every: int,
    progress: bool = True,
) -> Path:
    """Return a directory with the source's tokens, making it first if it is not there yet.

    The directory is ``cache_dir/<fingerprint>``, where the fingerprint covers the source's identity, the
    tokenizer, and the two settings below. It holds ``train-*.bin`` and ``validation-*.bin``, little-endian
    uint16 (uint32 above 65 536 ids), each document followed by the end token, and ``index.json``, which is
    written last: with it, it is complete.

    A killed preparation goes on from its last commit, and ends with the same bytes as one that was never
    killed. Any number of processes may ask for the same directory at once: one makes it, the others wait.

    Args:
        source: the documents.
        tokenizer: what to encode them with.
        cache_dir: parent of all prepared directories.
        max_tokens: stop after exactly this many training tokens; None for all. Separate validation documents
            are then read up to ``max_tokens / validation_every`` tokens, but at least 1 Mi.
        validation_every: without separate validation documents, the first document and every so many after it
            are held out for validation; at least 2.
        progress: show a progress bar on stderr.

    Raises:
        SettingsError: a bad setting, a document that cannot be read, no tokens for training or for
            validation, or a full disk.
    """
    if max_tokens is not None and max_tokens < 2:
        raise SettingsError(f"data.max_tokens must be at least 2 or null, got {max_tokens}")
    if validation_every < 2:
        raise SettingsError(f"data.validation_every must be at least 2, got {validation_every}")
    directory = Path(cache_dir) / _fingerprint(source, tokenizer, max_tokens, validation_every)
    if not (directory / INDEX).exists():
        with making(directory, "data.cache_dir", "make room, and the same command goes on", announce=progress):
            if not (directory / INDEX).exists():
                _Preparation(directory, source, tokenizer, max_tokens, validation_every, progress).run()
    return directory


def _fingerprint(source: Source, tokenizer: Tokenizer, max_tokens: int | None, validation_every: int) -> str:
    identity = [FORMAT_VERSION, source.identity, tokenizer.fingerprint, max_tokens, validation_every]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]


class _Preparation:
    """One preparation: its writers, its place in the documents, its progress bar."""

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
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.position: dict[str, Any]
        self.writers: dict[str, PartWriter]
        self._resume()

    def run(self) -> None:
        """Read, encode and write everything, index last."""
        every, separate = self.validation_every, self.source.validation_documents
        if separate is None:
            self._pass(
                "train",
                self.source.documents,
                lambda i: "train" if i % every else "validation",
                self.max_tokens,
            )
        else:
            # What keeps the second from being read is said before the hours that the first takes.
            next(self.source.documents(), None)
            next(separate(), None)
            self._pass("train", self.source.documents, lambda _: "train", self.max_tokens)
            limit = None if self.max_tokens is None else max(self.max_tokens // every, _LEAST_VALIDATION)
            self._pass("validation", separate, lambda _: "validation", limit)
        for split, writer in self.writers.items():
            writer.close()
            if writer.tokens < 2:
                raise SettingsError(
                    f"the data give {writer.tokens} tokens for {split}, too few: add text, or lower "
                    f"data.validation_every (now {every})"
                )
        index = {
            "format": FORMAT_VERSION,
            "dtype": self.dtype.str,
            "vocab_size": self.tokenizer.vocab_size,
            "end_token_id": self.tokenizer.end_token_id,
            "tokenizer": self.tokenizer.fingerprint,
            "source": self.source.identity,
            "splits": {split: writer.state() | {"tokens": writer.tokens} for split, writer in self.writers.items()},
        }
        write_json(self.directory / INDEX, index)
        (self.directory / PROGRESS).unlink(missing_ok=True)

    def _resume(self) -> None:
        """Take up the last commit; where there is none or its parts are damaged, begin anew."""
        splits = ("train", "validation")
        try:
            saved = json.loads((self.directory / PROGRESS).read_text(encoding="utf-8"))
            self.position = saved["position"]
            self.writers = {s: PartWriter(self.directory, s, self.dtype, saved["splits"][s]) for s in splits}
        except (OSError, ValueError, KeyError):
            self.position = {split: {"documents": 0, "bytes": 0, "finished": False} for split in splits}
            self.writers = {split: PartWriter(self.directory, split, self.dtype) for split in splits}

    def _commit(self) -> None:
        for writer in self.writers.values():
            writer.flush()
        splits = {split: writer.state() for split, writer in self.writers.items()}
        write_json(self.directory / PROGRESS, {"position": self.position, "splits": splits})

    def _pass(
        self,
        name: str,
        documents: Callable[[], Iterator[Document]],
        split_of: Callable[[int], str],
        limit: int | None,
    ) -> None:
        """Go on from the last commit until the documents end or split ``name`` has ``limit`` tokens."""
        place = self.position[name]
        limited = self.writers[name]
        committed = limited.tokens
        if place["finished"]:
            return
        with (
            self._bar(name, limit, place["bytes"] if limit is None else limited.tokens) as bar,
            read_ahead(documents(), place["documents"]) as batches,
        ):
            for texts, size in batches:
                before = limited.tokens
                for tokens in self.tokenizer.encode_batch(texts):
                    writer = self.writers[split_of(place["documents"])]
                    place["documents"] += 1
                    tokens.append(self.tokenizer.end_token_id)
                    if limit is not None and writer is limited:
                        tokens = tokens[: limit - limited.tokens]
                    writer.append(tokens)
                    if limited.tokens == limit:
                        break
                place["bytes"] += size
                bar.update(size if limit is None else limited.tokens - before)
                bar.set_postfix_str(f"{limited.tokens / 1e6:.1f}M tokens", refresh=False)
                if limited.tokens == limit:
                    break
                if limited.tokens - committed >= _COMMIT_TOKENS:
                    self._commit()
                    committed = limited.tokens
        place["finished"] = True
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
