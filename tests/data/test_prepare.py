"""Preparing tokens: which documents go where, exact limits, the cache, what is refused."""

import errno
import fcntl
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from stacey_dist.data import (
    Document,
    Input,
    Source,
    TokenStream,
    files_source,
    parts,
    preparation,
    prepare,
)
from stacey_dist.data.encoding import Group
from stacey_dist.errors import InputError
from tests.data.helpers import ByteTokenizer, list_input, list_source, texts, tree, write_c4


def tokens_of(directory: Path, split: str) -> list[int]:
    stream = TokenStream(directory, split, 7)
    return np.concatenate([np.fromfile(p, "<u2") for p in sorted(directory.glob(f"{split}-*.bin"))]).tolist()[
        : stream.tokens
    ]


def expected(documents: list[str]) -> list[int]:
    return [token for text in documents for token in [*text.encode(), 256]]


@pytest.mark.usefixtures("small")
def test_holds_documents_out(tmp_path: Path) -> None:
    all_texts = texts(200)
    directory = prepare(list_source(all_texts), ByteTokenizer(), tmp_path, max_tokens=None, validation_every=10)
    assert tokens_of(directory, "train") == expected([t for i, t in enumerate(all_texts) if i % 10])
    assert tokens_of(directory, "validation") == expected(all_texts[::10])
    assert len(list(directory.glob("train-*.bin"))) > 5
    assert not (directory / "progress.json").exists()


def test_a_group_that_another_process_has_lost_is_taken_after_a_chunk_of_another_group() -> None:
    made: list[str] = []

    def chunks_of_another() -> Iterator[None]:
        while True:
            made.append("other")
            yield None

    def chunks_of_this() -> Iterator[None]:
        if len(made) >= 3:  # until then, another process has it
            made.append("this")
            yield None

    encoder = SimpleNamespace(work_on=lambda group: chunks_of_this(), work=chunks_of_another)
    waiting: Any = SimpleNamespace(_helpers=SimpleNamespace(running=False), _encoder=encoder)
    reports = preparation.Preparation._reports(waiting, Group(0, [], "key"))
    assert [next(reports) for _ in range(4)] == [[]] * 4
    assert made == ["other", "other", "other", "this"]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("limit", [2, 3, 499, 500, 501, 2000, 10**6])
def test_limit_is_exact(tmp_path: Path, limit: int) -> None:
    all_texts = texts(200)
    directory = prepare(list_source(all_texts), ByteTokenizer(), tmp_path, max_tokens=limit, validation_every=10)
    everything = expected([t for i, t in enumerate(all_texts) if i % 10])
    assert tokens_of(directory, "train") == everything[:limit]


@pytest.mark.usefixtures("small")
def test_separate_validation_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = list_source(texts(100), texts(100, seed=1))
    directory = prepare(source, ByteTokenizer(), tmp_path, max_tokens=None, validation_every=10)
    assert tokens_of(directory, "train") == expected(texts(100))
    assert tokens_of(directory, "validation") == expected(texts(100, seed=1))
    monkeypatch.setattr(preparation, "_LEAST_VALIDATION", 20)
    directory = prepare(source, ByteTokenizer(), tmp_path, max_tokens=1000, validation_every=10)
    assert tokens_of(directory, "train") == expected(texts(100))[:1000]
    assert tokens_of(directory, "validation") == expected(texts(100, seed=1))[:100]


def test_limit_stops_reading_and_closes(tmp_path: Path) -> None:
    events: list[str] = []

    def endless() -> Iterator[Document]:
        try:
            while True:
                yield Document("x" * 100_000, "endless")
        finally:
            events.append("closed")

    opened: list[Iterator[Document]] = []

    def open_one() -> Iterator[Document]:
        # Kept, so that it is not closed by being forgotten.
        opened.append(endless())
        return opened[-1]

    directory = prepare(
        Source([Input(open_one, "e")], "e"), ByteTokenizer(), tmp_path, max_tokens=10**6, validation_every=2
    )
    assert TokenStream(directory, "train", 8).tokens == 10**6
    assert events == ["closed"]


def test_reading_error_comes_through(tmp_path: Path) -> None:
    def bad() -> Iterator[Document]:
        yield Document("x", "s")
        raise InputError("line 2 is bad")

    with pytest.raises(InputError, match="line 2 is bad"):
        prepare(Source([Input(bad, "b")], "b"), ByteTokenizer(), tmp_path, max_tokens=None, validation_every=2)


def test_validation_that_cannot_be_read_is_said_before_training_text_is_read(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()

    def bad() -> Iterator[Document]:
        raise InputError("no such split")
        yield

    source = Source([list_input(texts(50))], "v", validation_inputs=[Input(bad, "bad")])
    with pytest.raises(InputError, match="no such split"):
        prepare(source, tokenizer, tmp_path, max_tokens=None, validation_every=2)
    assert tokenizer.encoded == 0


def test_complete_cache_is_not_tokenized_again(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    first = prepare(list_source(texts(50)), tokenizer, tmp_path, max_tokens=None, validation_every=10)
    assert tokenizer.encoded == 50
    before = tree(first)

    def unread() -> Iterator[Document]:
        raise AssertionError("read again")

    again = prepare(
        Source([Input(unread, "unread")], list_source(texts(50)).identity),
        tokenizer,
        tmp_path,
        max_tokens=None,
        validation_every=10,
    )
    assert again == first
    assert tokenizer.encoded == 50
    assert tree(again) == before


def test_fingerprint_follows_everything(tmp_path: Path) -> None:
    file = write_c4(tmp_path / "a.json.gz", texts(50))
    other = write_c4(tmp_path / "b.json.gz", texts(50))

    def make(**changes: object) -> Path:
        settings: dict[str, object] = {"files": [str(file)], "validation": [], "tokenizer": ByteTokenizer()}
        settings |= {"max_tokens": None, "validation_every": 10, "column": "text"} | changes
        source = files_source(settings["files"], settings["validation"], settings["column"])  # type: ignore[arg-type]
        return prepare(
            source,
            settings["tokenizer"],  # type: ignore[arg-type]
            tmp_path / "cache",
            max_tokens=settings["max_tokens"],  # type: ignore[arg-type]
            validation_every=settings["validation_every"],  # type: ignore[arg-type]
        )

    made = [
        make(),
        make(files=[str(other)]),
        make(files=[str(file), str(other)]),
        make(validation=[str(other)]),
        make(tokenizer=ByteTokenizer("other")),
        make(max_tokens=100),
        make(validation_every=5),
    ]
    assert make() == made[0]
    write_c4(file, texts(50, seed=2))
    made.append(make())
    assert len(set(made)) == len(made)


def test_dtype_follows_vocabulary(tmp_path: Path) -> None:
    for vocab_size, itemsize in ((2**16, 2), (2**16 + 1, 4)):
        tokenizer = ByteTokenizer(str(vocab_size), vocab_size)
        directory = prepare(list_source(["é", "ab"]), tokenizer, tmp_path, max_tokens=None, validation_every=2)
        assert (directory / "train-00000.bin").stat().st_size == 3 * itemsize
        inputs, labels = TokenStream(directory, "train", 2).window(0)
        assert (inputs.tolist(), labels.tolist()) == ([97, 98], [98, 256])


@pytest.mark.parametrize(
    ("source", "word"),
    [
        (list_source([]), "train"),
        (list_source(["one"]), "train"),
        (list_source(["one"] * 9, []), "validation"),
    ],
)
def test_too_little_text(tmp_path: Path, source: Source, word: str) -> None:
    for _ in range(2):
        with pytest.raises(InputError, match=f"0 tokens for {word}"):
            prepare(source, ByteTokenizer(), tmp_path, max_tokens=None, validation_every=100)


@pytest.mark.parametrize("settings", [{"max_tokens": 1}, {"max_tokens": -5}, {"validation_every": 1}])
def test_bad_settings(tmp_path: Path, settings: dict[str, int]) -> None:
    (name,) = settings
    with pytest.raises(InputError, match=f"^{name}: {settings[name]} is not allowed"):
        prepare(
            list_source(["a"]),
            ByteTokenizer(),
            tmp_path,
            **{"max_tokens": None, "validation_every": 9} | settings,
        )


def test_cache_dir_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"^cache_dir: .* cannot be made"):
        prepare(list_source(["a"]), ByteTokenizer(), tmp_path / "file", max_tokens=None, validation_every=9)


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(parts.PartWriter, "append", full)
    with pytest.raises(InputError, match=r"^cache_dir: the disk of .* is full; make room"):
        prepare(list_source(texts(5)), ByteTokenizer(), tmp_path, max_tokens=None, validation_every=2)


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(InputError, match=r"has no flock \(Function not implemented; Lustre: .*directory on another"):
        prepare(list_source(texts(5)), ByteTokenizer(), tmp_path, max_tokens=None, validation_every=2)
