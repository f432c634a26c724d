"""Documents in batches, read by a thread while the batch before is encoded."""

import contextlib
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor

from stacey_dist.data.text import Document

BATCH_BYTES = 4 * 2**20
"""Text that is encoded at once: enough documents to occupy every core."""

Batch = tuple[list[str], int]
"""Texts, and their size in bytes of UTF-8."""


@contextlib.contextmanager
def read_ahead(documents: Iterator[Document], skip: int) -> Iterator[Iterator[Batch]]:
    """Give an iterator over the batches of ``documents`` after the first ``skip``.

    One batch is read in advance by a thread. When the context is left, early or not, the thread has ended and
    ``documents`` is closed, if it can be. What reading raises, the iterator raises.
    """
    batches = _batches(documents, skip)
    with contextlib.closing(batches), ThreadPoolExecutor(1, "read-ahead") as pool:

        def ahead() -> Iterator[Batch]:
            coming = pool.submit(next, batches, None)
            while (batch := coming.result()) is not None:
                coming = pool.submit(next, batches, None)
                yield batch

        yield ahead()


def _batches(documents: Iterator[Document], skip: int) -> Generator[Batch, None, None]:
    try:
        for _ in zip(range(skip), documents, strict=False):
            pass
        texts: list[str] = []
        size = 0
        for document in documents:
            texts.append(document.text)
            size += len(document.text.encode())
            if size >= BATCH_BYTES:
                yield texts, size
                texts, size = [], 0
        if texts:
            yield texts, size
    finally:
        close = getattr(documents, "close", None)
        if close is not None:
            close()
