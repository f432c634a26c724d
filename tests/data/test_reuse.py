"""Only inputs that are new or have changed are encoded, and the result is that of a preparation from nothing."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stacey_dist.data import Source, files_source, preparation, prepare, reuse
from stacey_dist.data.cache import skipped_records
from stacey_dist.data.lock import locked
from stacey_dist.data.source import OnBadRecord
from stacey_dist.errors import InputError
from tests.data.helpers import ByteTokenizer, list_input, texts, tree, write_c4

Prepared = tuple[Path, int]


@pytest.fixture(autouse=True)
def small_copies(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reuse, "_DOCUMENTS", 7)
    monkeypatch.setattr(reuse, "_CHUNK", 77)


@pytest.fixture
def corpus(tmp_path: Path) -> list[Path]:
    """Five files of 40 documents, of 30 letters on the average."""
    (tmp_path / "corpus").mkdir()
    return [write_c4(tmp_path / "corpus" / f"{i}.jsonl", texts(40, seed=i)) for i in range(5)]


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Prepared]:
    def work(
        files: list[Path],
        *,
        validation: list[Path] | None = None,
        every: int = 10,
        limit: int | None = None,
        on_bad: OnBadRecord = "error",
        cache: str = "cache",
        tokenizer: ByteTokenizer | None = None,
    ) -> Prepared:
        """Prepare; return the directory and how many documents were encoded."""
        tokenizer = tokenizer or ByteTokenizer()
        source = files_source([str(f) for f in files], [str(f) for f in validation or []], "text", on_bad)
        directory = prepare(
            source, tokenizer, tmp_path / cache, max_tokens=limit, validation_every=every, progress=False, verify=True
        )
        return directory, tokenizer.encoded

    return work


def from_nothing(make: Callable[..., Prepared], *arguments: object, **options: object) -> dict[str, bytes]:
    directory = make(*arguments, cache="nothing", **options)[0]
    files = tree(directory)
    shutil.rmtree(directory.parent)
    return files


def break_line(file: Path, number: int, line: str = "{") -> None:
    lines = file.read_text().splitlines(keepends=True)
    lines[number - 1] = line + "\n"
    file.write_text("".join(lines))


def test_a_repaired_file_is_encoded_alone(make: Callable[..., Prepared], corpus: list[Path], tmp_path: Path) -> None:
    good = corpus[3].read_text()
    break_line(corpus[3], 31)
    tokenizer = ByteTokenizer()
    with pytest.raises(InputError, match=rf"{corpus[3]}, line 31: not one JSON object a line .*`on_bad_record` skip"):
        make(corpus, tokenizer=tokenizer)
    assert tokenizer.encoded == 150  # all that came before the bad line
    corpus[3].write_text(good)
    directory, encoded = make(corpus)
    assert encoded == 80  # the file that has changed, and the one behind it
    assert tree(directory) == from_nothing(make, corpus)
    # Half of another version of the text is of use to nobody.
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [directory.name]


def test_after_a_bad_line_skipping_goes_on_from_there(make: Callable[..., Prepared], corpus: list[Path]) -> None:
    break_line(corpus[3], 31)
    with pytest.raises(InputError):
        make(corpus)
    directory, encoded = make(corpus, on_bad="skip")
    assert encoded == 199 - 150
    assert tree(directory) == from_nothing(make, corpus, on_bad="skip")
    assert skipped_records(directory) is not None
    assert f"1 bad records were left out; {corpus[3]}, line 31" in str(skipped_records(directory))


@pytest.mark.parametrize("at", [0, 2, 4])
def test_one_file_that_has_changed_later(make: Callable[..., Prepared], corpus: list[Path], at: int) -> None:
    first, _ = make(corpus)
    write_c4(corpus[at], texts(33, seed=99))  # another number of documents: others are held out behind it
    second, encoded = make(corpus)
    assert second != first
    assert encoded == 33
    assert tree(second) == from_nothing(make, corpus)
    assert (first / "index.json").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"every": 7},
        {"limit": 900},
        {"limit": 1000, "every": 3},
        {"files": [4, 0, 2]},
        {"validation": [3], "files": [0, 1, 2]},
        {"on_bad": "skip"},
    ],
)
def test_other_settings_encode_nothing_again(
    make: Callable[..., Prepared], corpus: list[Path], change: dict[str, object]
) -> None:
    make(corpus)
    files = change.pop("files", range(5))
    options = {key: [corpus[i] for i in value] if key == "validation" else value for key, value in change.items()}  # type: ignore[attr-defined]
    chosen = [corpus[i] for i in files]  # type: ignore[attr-defined]
    directory, encoded = make(chosen, **options)
    assert encoded == 0
    assert tree(directory) == from_nothing(make, chosen, **options)


def test_what_was_cut_at_a_limit_is_no_whole_input(make: Callable[..., Prepared], corpus: list[Path]) -> None:
    make(corpus, limit=1500)
    directory, encoded = make(corpus)
    assert 0 < encoded < 200
    assert tree(directory) == from_nothing(make, corpus)


def test_a_limit_at_the_end_of_a_document(make: Callable[..., Prepared], corpus: list[Path]) -> None:
    """What was read of the training text until then is not counted for the first validation file."""
    limit = sum(len(text.encode()) + 1 for text in texts(40, seed=0)[:20])
    make(corpus[:2], validation=[corpus[4]], limit=limit)
    directory, encoded = make(corpus[:2], validation=[corpus[4]])
    assert encoded == 80  # the validation file is copied
    assert tree(directory) == from_nothing(make, corpus[:2], validation=[corpus[4]])


@pytest.mark.parametrize("documents", [13, 14, 15])
def test_a_limit_within_a_block(make: Callable[..., Prepared], corpus: list[Path], documents: int) -> None:
    """What follows the limit in its block is read when the input is read on."""
    limit = sum(len(text.encode()) + 1 for text in texts(40, seed=0)[:documents])
    break_line(corpus[4], 5)
    with pytest.raises(InputError):
        make(corpus[:1], validation=[corpus[4]], limit=limit)
    directory, encoded = make(corpus[:1])
    assert encoded < 40
    assert tree(directory) == from_nothing(make, corpus[:1])


def test_damaged_or_foreign_tokens_are_not_taken(make: Callable[..., Prepared], corpus: list[Path]) -> None:
    first, _ = make(corpus)
    part = sorted(first.glob("train-*.bin"))[4]
    content = bytearray(part.read_bytes())
    content[100] ^= 1
    part.write_bytes(content)
    (first / "train-00001.bin").unlink()
    (first.parent / "junk").mkdir()
    (first.parent / "junk" / "index.json").write_text('{"inputs": 3}')
    (first.parent / "file").write_text("")
    directory, encoded = make(corpus[::-1])
    assert 0 < encoded < 200
    assert encoded % 40 == 0
    assert tree(directory) == from_nothing(make, corpus[::-1])
    assert make(corpus, tokenizer=ByteTokenizer("another"))[1] == 200


def test_skipped_records_are_not_taken_for_an_error(make: Callable[..., Prepared], corpus: list[Path]) -> None:
    break_line(corpus[1], 5, '{"text": null}')
    directory, encoded = make(corpus, on_bad="skip")
    assert encoded == 199
    with pytest.raises(InputError, match=rf"{corpus[1]}, line 5: column 'text' holds NoneType"):
        make(corpus)
    again, encoded = make(corpus[:3], on_bad="skip")
    assert encoded == 0
    assert json.loads((again / "index.json").read_text())["skipped"]["count"] == 1
    # The same text without the bad line is other data: it says that nothing was skipped.
    assert directory != make(corpus[:1], on_bad="skip")[0]


def test_a_directory_in_use_is_not_removed(make: Callable[..., Prepared], corpus: list[Path]) -> None:
    good = corpus[3].read_text()
    break_line(corpus[3], 31)
    with pytest.raises(InputError):
        make(corpus)
    (unfinished,) = corpus[0].parent.parent.joinpath("cache").iterdir()
    corpus[3].write_text(good)
    with locked(unfinished / "lock"):
        make(corpus)
    assert (unfinished / "progress.json").exists()


def test_tokens_that_were_not_copied_stay(make: Callable[..., Prepared], corpus: list[Path]) -> None:
    good = corpus[2].read_text()
    break_line(corpus[2], 31)
    with pytest.raises(InputError):
        make(corpus[:3])
    (unfinished,) = corpus[0].parent.parent.joinpath("cache").iterdir()
    corpus[2].write_text(good)
    assert make(corpus[:1])[1] == 0  # copied
    assert unfinished.exists()  # it has the second file's tokens, too
    make(corpus[:3], limit=600)  # within the first file
    assert unfinished.exists()
    assert make(corpus[:3])[1] == 40
    assert not unfinished.exists()


def test_many_small_files_are_encoded_together(tmp_path: Path) -> None:
    sizes = []

    class Counting(ByteTokenizer):
        def encode_batch(self, texts: object) -> list[list[int]]:
            sizes.append(len(texts))  # type: ignore[arg-type]
            return super().encode_batch(texts)  # type: ignore[arg-type]

    inputs = [list_input(["abc" * 5], f"file {i}") for i in range(300)]
    prepare(Source(inputs, "many"), Counting(), tmp_path, max_tokens=None, validation_every=10, progress=False)
    assert max(sizes) == 20
    assert os.listdir(tmp_path) != []


def killed_later(directory: Path) -> None:
    """Make of a complete directory one whose preparation was killed after tokens were written, before a commit."""
    index = json.loads((directory / "index.json").read_text())
    (directory / "index.json").unlink()
    index["position"] = {name: {"current": {}} for name in ("train", "validation")}
    (directory / "progress.json").write_text(json.dumps(index))
    for split in ("train", "validation"):
        part = sorted(directory.glob(f"{split}-*.bin"))[-1]
        part.write_bytes(part.read_bytes() + b"\1" * 40)


def test_parts_that_were_being_written_are_reused(make: Callable[..., Prepared], corpus: list[Path]) -> None:
    killed_later(make(corpus[:4])[0])
    directory, encoded = make(corpus)
    assert encoded == 40
    assert tree(directory) == from_nothing(make, corpus)


@pytest.mark.parametrize("first", [0, 1])
def test_of_two_directories_the_intact_one_is_reused(
    make: Callable[..., Prepared], corpus: list[Path], first: int
) -> None:
    directories = sorted([make(corpus, every=10)[0], make(corpus, every=11)[0]])
    part = directories[first] / "train-00000.bin"
    part.write_bytes(b"\0\0" + part.read_bytes()[2:])
    assert make(corpus, every=12)[1] == 0


def test_one_failed_read_of_the_progress_costs_nothing(
    make: Callable[..., Prepared], corpus: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, _ = make(corpus)
    killed_later(directory)
    before = {path.name: path.read_bytes() for path in directory.glob("*.bin")}

    def stale(path: Path) -> None:
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    monkeypatch.setattr(preparation, "read_json", stale)
    with pytest.raises((InputError, OSError), match="Stale file handle"):
        make(corpus)
    assert len(before) > 2
    assert {path.name: path.read_bytes() for path in directory.glob("*.bin")} == before
