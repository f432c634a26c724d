"""Records in batches, read by a thread while the batch before is encoded."""

import contextlib
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from stacey_dist.data.source import Input
from stacey_dist.data.text import BadRecord, Document
from stacey_dist.errors import SettingsError

BATCH_BYTES = 4 * 2**20
"""Text that is encoded at once: enough documents to occupy every core."""

_BATCH_RECORDS = 2**16


class End:
    """Stands where an input ends."""


@dataclass
class Batch:
    """Records in the order of reading.

    Attributes:
        records: documents, bad records, and an `End` after the last of each input.
        texts: the texts of the documents.
        size: of the texts, in bytes of UTF-8.
        error: what reading raised after these records, if it did.
    """

    records: list[Document | BadRecord | End] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    size: int = 0
    error: SettingsError | None = None


@contextlib.contextmanager
def read_ahead(inputs: Sequence[Input], skip: int) -> Iterator[Iterator[Batch]]:
    """Give an iterator over batches of the records of ``inputs``, without the first ``skip`` of the first input.

    One batch is read in advance by a thread. When the context is left, early or not, the thread has ended and
    the inputs are closed, if they can be. A SettingsError in reading is in the last batch, behind what was read before
    it; what else reading raises, the iterator raises.
    """
    batches = _batches(inputs, skip)
    with contextlib.closing(batches), ThreadPoolExecutor(1, "read-ahead") as pool:

        def ahead() -> Iterator[Batch]:
            coming = pool.submit(next, batches, None)
            while (batch := coming.result()) is not None:
                coming = pool.submit(next, batches, None)
                yield batch

        yield ahead()


def _batches(inputs: Sequence[Input], skip: int) -> Generator[Batch, None, None]:
    batch = Batch()
    records = _records(inputs, skip)
    with contextlib.closing(records):
        try:
            for record in records:
                batch.records.append(record)
                if isinstance(record, Document):
                    batch.texts.append(record.text)
                    batch.size += len(record.text.encode())
                if batch.size >= BATCH_BYTES or len(batch.records) >= _BATCH_RECORDS:
                    yield batch
                    batch = Batch()
        except SettingsError as error:
            batch.error = error
    if batch.records or batch.error:
        yield batch


def _records(inputs: Sequence[Input], skip: int) -> Generator[Document | BadRecord | End, None, None]:
    for each in inputs:
        records = each.records()
        try:
            for _ in zip(range(skip), records, strict=False):
                pass
            skip = 0
            yield from records
        finally:
            close = getattr(records, "close", None)
            if close is not None:
                close()
        yield End()
