from pathlib import Path

import pytest

from stacey_dist.data import Document, blocks, encoding, parts, preparation, standard_library_documents
from tests.shared import made_once


def extract(directory: Path) -> list[Document]:
    return list(standard_library_documents())


@pytest.fixture(scope="session")
def library() -> list[Document]:
    """Return the embedded text, whose extraction takes seconds."""
    return made_once(extract)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make parts, batches, chunks and the tokens between saves of the progress so small that a test has many."""
    monkeypatch.setattr(parts, "PART_TOKENS", 500)
    monkeypatch.setattr(blocks, "BATCH_BYTES", 300)
    monkeypatch.setattr(preparation, "_COMMIT_TOKENS", 1000)
    monkeypatch.setattr(encoding, "_CHUNK_TOKENS", 200)
