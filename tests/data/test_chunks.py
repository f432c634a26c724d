"""Chunks that lack, or are there already, or are not needed, neither stop a preparation nor are encoded twice."""

import itertools
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from stacey_dist.data import Document, Input, Source, blocks, cache, encoding, preparation, prepare
from stacey_dist.data.encoding import Encoder
from stacey_dist.errors import InputError
from tests.data.helpers import ByteTokenizer, list_input, texts, tree

SOURCE = Source([list_input(texts(80, seed=i), str(i)) for i in range(3)], "inputs")
SETTINGS: dict[str, Any] = {"max_tokens": None, "validation_every": 10, "progress": False}


class Failing(ByteTokenizer):
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if self.encoded > 130:
            raise InputError("enough")
        return super().encode_batch(texts)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_CHUNK_TOKENS", 100)
    monkeypatch.setattr(encoding, "_GROUP_BYTES", 2000)  # each input is a group
    monkeypatch.setattr(blocks, "BATCH_BYTES", 200)


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the first group, of which all chunks were removed, and some of the second one.

    Whoever waits for another process again and again fails, as there is none.
    """
    waits = itertools.count()

    def fail(_: float) -> None:
        assert next(waits) < 5, "it waits for ever"

    monkeypatch.setattr(preparation.time, "sleep", fail)
    with pytest.raises(InputError, match="enough"):
        prepare(SOURCE, Failing(), tmp_path / "cache", **SETTINGS)
    (directory,) = (tmp_path / "cache").iterdir()
    return directory


def encoder(directory: Path) -> Encoder:
    directory.mkdir(parents=True, exist_ok=True)
    return Encoder(directory, SOURCE, ByteTokenizer(), None)


def chunks(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.glob("chunks/*/*.npz"))


@pytest.mark.parametrize("damage", ["progress", "part"])
def test_starting_over_after_chunks_were_removed(tmp_path: Path, interrupted: Path, damage: str) -> None:
    assert not any(path.endswith("000000.npz") for path in chunks(interrupted))
    if damage == "progress":
        (interrupted / "progress.json").write_text("{")
    else:
        min(interrupted.glob("*.bin")).unlink()
    prepare(SOURCE, ByteTokenizer(), tmp_path / "cache", **SETTINGS)
    assert tree(interrupted) == tree(prepare(SOURCE, ByteTokenizer(), tmp_path / "whole", **SETTINGS))


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("removed", [False, True])
def test_starting_over_after_a_limit(tmp_path: Path, workers: int, removed: bool) -> None:
    """The groups of which no more was needed have ended, whatever chunks they have."""
    source = Source(SOURCE.inputs, "inputs", [list_input(texts(200, seed=9))])
    settings = SETTINGS | {"max_tokens": 4000}

    class FailingLater(ByteTokenizer):
        def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
            if len(list(tmp_path.glob("cache/*/chunks/*/end"))) == 3:
                raise InputError("enough")
            return super().encode_batch(texts)

    with pytest.raises(InputError, match="enough"):
        prepare(source, FailingLater(), tmp_path / "cache", **settings)
    (directory,) = (tmp_path / "cache").iterdir()
    assert all((directory / "chunks" / group.key / "end").exists() for group in encoder(directory)._all)
    (directory / "progress.json").write_text("{")
    if removed:
        for path in chunks(directory):
            (directory / path).unlink()
    prepare(source, ByteTokenizer(), tmp_path / "cache", **settings, workers=workers)
    assert tree(directory) == tree(prepare(source, ByteTokenizer(), tmp_path / "whole", **settings))


def test_chunks_of_another_directory_leave_no_gap_and_none_is_taken_twice(tmp_path: Path, interrupted: Path) -> None:
    other = encoder(tmp_path / "other")
    assert list(filter(None, other.work())) == []
    for number in range(2, 99):
        other.chunk(other.groups["train"][1], number).unlink(missing_ok=True)
    shutil.move(tmp_path / "other", tmp_path / "cache")
    before = chunks(interrupted)
    assert len(before) == 1
    groups = encoder(interrupted).groups["train"]
    assert [path for path in chunks(interrupted) if groups[2].key not in path] == before
    tokenizer = ByteTokenizer()
    prepare(SOURCE, tokenizer, tmp_path / "cache", **SETTINGS)
    assert tokenizer.encoded < 80  # the rest of the second group; the third one is taken over
    assert tree(interrupted) == tree(prepare(SOURCE, ByteTokenizer(), tmp_path / "whole", **SETTINGS))


def test_chunks_of_another_directory_that_go_while_they_are_listed(
    tmp_path: Path, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its preparation is completed at that moment."""
    scandir = os.scandir

    def gone(path: Any = ".") -> Any:
        if str(path) == str(interrupted / "chunks"):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", gone)
    source = Source(SOURCE.inputs, "the same inputs")
    directory = prepare(source, ByteTokenizer(), tmp_path / "cache", **SETTINGS)
    assert (directory / "index.json").exists()


def test_a_preparation_that_another_process_completes_leaves_no_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(Encoder):
        def __init__(self, *arguments: Any) -> None:
            monkeypatch.setattr(cache, "Encoder", Encoder)
            prepare(SOURCE, ByteTokenizer(), tmp_path, **SETTINGS)  # by the other process
            super().__init__(*arguments)

    monkeypatch.setattr(cache, "Encoder", Late)
    directory = prepare(SOURCE, ByteTokenizer(), tmp_path, **SETTINGS)
    assert (directory / "index.json").exists()
    assert not (directory / "chunks").exists()


def test_chunks_that_somebody_removes_are_an_error(tmp_path: Path, interrupted: Path) -> None:
    class Removing(ByteTokenizer):
        def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
            shutil.rmtree(interrupted / "chunks", ignore_errors=True)
            return super().encode_batch(texts)

    with pytest.raises(InputError, match=r"chunks/.* was removed; the same command encodes its inputs again"):
        prepare(SOURCE, Removing(), tmp_path / "cache", **SETTINGS)
    prepare(SOURCE, ByteTokenizer(), tmp_path / "cache", **SETTINGS)
    assert tree(interrupted) == tree(prepare(SOURCE, ByteTokenizer(), tmp_path / "whole", **SETTINGS))


def test_validation_does_not_wait_for_text_beyond_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_CHUNK_TOKENS", 2000)
    monkeypatch.setattr(blocks, "BATCH_BYTES", 2000)
    late = time.monotonic() + 20

    def endless() -> Iterator[Document]:
        for i in itertools.count():
            assert time.monotonic() < late, "text beyond the limit is encoded"
            yield Document("abc" * 50, f"endless:{i}")

    # As many as workers: each would be in one of them for ever.
    source = Source([Input(endless, i) for i in range(3)], "endless", [list_input(texts(50))])
    settings = SETTINGS | {"max_tokens": 9000}
    alone, helped = (prepare(source, ByteTokenizer(), tmp_path / str(n), **settings, workers=n) for n in (1, 3))
    assert tree(alone) == tree(helped)


def test_no_process_waits_beside_the_one_that_reads_all_training_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "_GROUP_BYTES", 1)
    validation = [list_input(texts(5))]
    for inputs, count in ((1, 0), (3, 3)):
        source = Source([list_input(texts(5)) for _ in range(inputs)], "source", validation)
        encoder = encoding.Encoder(tmp_path / str(inputs), source, ByteTokenizer(), None)
        with cache._encode_beside(encoder, 64, (0, 1)) as helpers:
            assert len(helpers._running) == count
