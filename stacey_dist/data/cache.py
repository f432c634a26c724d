"""The cache of prepared tokens: a source is tokenized once, into parts that every later run memory-maps."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from stacey_dist.data.encoding import CHUNKS, Encoder, Failure
from stacey_dist.data.lock import locked_directory, make_directory
from stacey_dist.data.parts import FORMAT_VERSION, INDEX, read_index
from stacey_dist.data.preparation import Preparation
from stacey_dist.data.processes import Helpers
from stacey_dist.data.source import Source
from stacey_dist.data.tokenizer import Tokenizer
from stacey_dist.data.verify import damaged_parts, repair_parts
from stacey_dist.errors import InputError

_MOST_INPUTS = 2**20
"""The index has 600 bytes for each."""


def prepare(
    source: Source,
    tokenizer: Tokenizer,
    cache_dir: Path,
    *,
    max_tokens: int | None,
    validation_every: int,
    progress: bool = True,
    verify: bool = False,
    workers: int = 1,
    shard: tuple[int, int] = (0, 1),
) -> Path:
    """Return a directory with the source's tokens, made first if it is not there yet.

    The directory is ``cache_dir/<fingerprint>``, where the fingerprint covers the source's identity, the
    tokenizer, and the two settings below. It holds ``train-*.bin`` and ``validation-*.bin``, little-endian
    uint16 (uint32 above 65 536 ids), each document followed by the end token, and ``index.json``, which is
    written last: with it, it is complete.

    A killed preparation continues from the last chunk of each worker, and ends with the bytes of one that was never
    killed, whatever the number of workers. What another directory in ``cache_dir`` has of the same inputs and tokenizer
    is copied from there, so that only inputs that are new or have changed are encoded. Any number of processes, on any
    number of hosts, may ask for the same directory at once: one writes it, the workers of all encode, and those without
    workers wait.

    A part of a complete directory that is missing or has another size than recorded is prepared again.

    Args:
        source: the documents.
        tokenizer: what to encode them with.
        cache_dir: parent of all prepared directories.
        max_tokens: stop after exactly this many training tokens; None for all. Separate validation documents
            are then read up to ``max_tokens / validation_every`` tokens, but at least 1 Mi.
        validation_every: without separate validation documents, the first document and every so many after it
            are held out for validation; at least 2.
        progress: show a progress bar on stderr.
        verify: read all parts of a directory that is found, and prepare those again whose content has changed too.
        workers: processes that encode, to which the inputs are dealt out, each in one thread. 1: this process encodes,
            in as many threads as there are cores.
        shard: ``(i, n)`` where n hosts prepare the directory together and this is number i, from 0: where its workers
            begin. Any host takes over what is left.

    Raises:
        InputError: a bad setting, a document that cannot be read, no tokens for training or for
            validation, a full disk, or a damaged part that cannot be prepared again.
    """
    if max_tokens is not None and max_tokens < 2:
        raise InputError(f"max_tokens: {max_tokens} is not allowed; it must be at least 2")
    if validation_every < 2:
        raise InputError(f"validation_every: {validation_every} is not allowed; it must be at least 2")
    if workers < 1:
        raise InputError(f"workers: {workers} is not allowed; it must be at least 1")
    if not 0 <= shard[0] < shard[1]:
        raise InputError(f"shard: {shard[0]}/{shard[1]} is not allowed; it must be one of 0/{shard[1]} and so on")
    if len(source.inputs) > _MOST_INPUTS:
        raise InputError(f"files: {len(source.inputs):,} are too many; at most {_MOST_INPUTS:,} can be read: join some")
    directory = Path(cache_dir) / _fingerprint(source, tokenizer, max_tokens, validation_every)
    lock = partial(locked_directory, directory, "cache_dir", "make room, and the same command resumes")
    if (directory / INDEX).exists() and damaged_parts(directory, whole=verify):
        with lock():
            if _is_complete(directory):
                repair_parts(directory, damaged_parts(directory, whole=verify), source, tokenizer)
    if not (directory / INDEX).exists():
        make_directory(directory, "cache_dir")
        encoder = Encoder(directory, source, tokenizer, max_tokens)
        # The helpers start before the lock is taken: forked later, they would inherit it. They also encode while
        # another host holds it.
        with _encode_beside(encoder, workers, shard) as helpers:

            def check() -> None:
                for failure in helpers.reports(1.0):
                    if max_tokens is None:
                        raise failure[1]

            with lock(wait=check):
                if not _is_complete(directory):
                    Preparation(encoder, helpers, validation_every, progress).run()
        # Other hosts may be writing chunks that are no longer needed.
        shutil.rmtree(directory / CHUNKS, ignore_errors=True)
    return directory


def _is_complete(directory: Path) -> bool:
    """Return whether a directory has an index.

    NFS reads a directory again when it is opened, but may remember for a minute that a file in it was not there.
    """
    return INDEX in os.listdir(directory)


def _encode_beside(encoder: Encoder, workers: int, shard: tuple[int, int]) -> Helpers:
    """Start the processes that encode, each in one thread. None is started for one worker, which is this process.

    One process, with all cores, reads training text that is a single group: others would have nothing to do.
    """
    groups = len(encoder.groups["train"])
    if groups <= shard[0]:
        print("this host waits: the text has too few files for it", file=sys.stderr, flush=True)
    workers = min(workers, groups)

    def work(number: int) -> Iterator[Failure]:
        return filter(None, encoder.work(shard[0] * workers + number, shard[1] * workers))

    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        return Helpers(work, workers if workers > 1 else 0)
    finally:
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def skipped_records(directory: Path) -> str | None:
    """Return a line about the bad records that were left out of a directory, or None if there were none."""
    skipped = read_index(directory)["skipped"]
    if not skipped["count"]:
        return None
    first = "; ".join(skipped["first"])
    some = "the first: " if skipped["count"] > len(skipped["first"]) else ""
    return f"{skipped['count']:,} bad records were left out; {some}{first}"


def _fingerprint(source: Source, tokenizer: Tokenizer, max_tokens: int | None, validation_every: int) -> str:
    identity: list[Any] = [FORMAT_VERSION, source.identity, tokenizer.fingerprint, max_tokens, validation_every]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
