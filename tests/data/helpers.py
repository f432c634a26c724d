"""A tokenizer that can be predicted, and sources made of lists."""

import gzip
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stacey_dist.data import BadRecord, Document, Input, Source, hub_source
from stacey_dist.data.source import _opening
from stacey_dist.data.text import Records, read_records


def texts(count: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return ["".join(generator.choices("abcdé ", k=generator.randint(1, 60))) for _ in range(count)]


class ByteTokenizer:
    """Ids are UTF-8 bytes and 256 ends a document; counts the documents it encodes."""

    def __init__(self, fingerprint: str = "bytes", vocab_size: int = 257) -> None:
        self.vocab_size = vocab_size
        self.end_token_id = 256
        self.fingerprint = fingerprint
        self.encoded = 0

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        self.encoded += len(texts)
        return [list(text.encode()) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode()

    def save(self, directory: Path, texts: Sequence[str] = ()) -> None:
        raise NotImplementedError


def read_documents(files: Sequence[str], column: str) -> Iterator[Document]:
    """Yield the documents of files, and raise InputError for the first bad record, as a source does."""
    for file in files:
        yield from _opening("error", lambda file=file: read_records(file, column))()  # type: ignore[misc]


def records(file: Path) -> tuple[list[str], list[str]]:
    """Return the texts of a file, and the messages of its bad records."""
    found = list(read_records(str(file), "text"))
    return (
        [record.text for record in found if isinstance(record, Document)],
        [record.message for record in found if isinstance(record, BadRecord)],
    )


def hub_documents(dataset: str, config: str | None, split: str, column: str, streaming: bool) -> Records:
    return hub_source(dataset, config, split, None, column, streaming).inputs[0].records()


def list_input(texts: list[str], name: str = "list") -> Input:
    return Input(lambda: (Document(text) for text in texts), [name, texts], sum(map(len, texts)))


def list_source(texts: list[str], validation: list[str] | None = None) -> Source:
    held_out = None if validation is None else [list_input(validation)]
    return Source([list_input(texts)], [texts, validation], held_out)


def write_c4(path: Path, texts: list[str], **changes: Any) -> Path:
    """Write JSON lines in the layout of C4 on the Hub, gzipped where the name ends so."""
    rows = [{"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "http://x/"} | changes for text in texts]
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def tree(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}
