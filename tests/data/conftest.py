import pytest

from stacey_dist.data import Document, standard_library_documents


@pytest.fixture(scope="session")
def library() -> list[Document]:
    """Return the embedded text, whose extraction takes seconds."""
    return list(standard_library_documents())
