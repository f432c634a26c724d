"""Read records in batches, in a thread, while the previous batch is encoded.

One core reads 63 MB/s of gzipped JSON and encodes 1.5 MB/s: without the thread, 40 cores would wait half of the time.
"""

import contextlib
import itertools
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from stacey_dist.data.source import Input
from stacey_dist.data.text import BadRecord, Document
from stacey_dist.errors import InputError

BATCH_BYTES = 4 * 2**20
"""Text that is encoded at once: enough documents to occupy every core."""

_BATCH_RECORDS = 2**16


class End:
    """Stands where an input ends."""


Record = Document | BadRecord | End


@contextlib.contextmanager
def read_ahead(inputs: Sequence[Input], skip: int, place: Any = None) -> Iterator[Iterator[list[Record]]]:
    """Give an iterator over batches of the records of ``inputs``, without the first ``skip`` of the first input.

    Where the `place` of the last of these is given, they are not read again. An `End` follows the last record of each
    input.

    One batch is read in advance. When the context is left, early or not, the thread has ended and the inputs are
    closed. The iterator raises what reading raises, an InputError after a batch of what was read before it.
    """
    with contextlib.closing(_batches(inputs, skip, place)) as batches, ThreadPoolExecutor(1, "read-ahead") as pool:

        def ahead() -> Iterator[list[Record]]:
            coming = pool.submit(next, batches, None)
            while (batch := coming.result()) is not None:
                coming = pool.submit(next, batches, None)
                yield batch

        yield ahead()


def _batches(inputs: Sequence[Input], skip: int, place: Any) -> Generator[list[Record], None, None]:
    batch: list[Record] = []
    size, failure = 0, None
    with contextlib.closing(_records(inputs, skip, place)) as records:
        try:
            for record in records:
                batch.append(record)
                if isinstance(record, Document):
                    size += len(record.text.encode())
                if size >= BATCH_BYTES or len(batch) >= _BATCH_RECORDS:
                    yield batch
                    batch, size = [], 0
        except InputError as error:
            failure = error
    if batch:
        yield batch
    if failure is not None:
        raise failure


def _records(inputs: Sequence[Input], skip: int, place: Any) -> Generator[Record, None, None]:
    for each in inputs:
        with contextlib.closing(each.records() if place is None else each.records(place)) as records:
            yield from itertools.islice(records, skip if place is None else 0, None)
        yield End()
        skip, place = 0, None
