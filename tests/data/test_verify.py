"""Tokens that are not what was written are found, named, put aside, and prepared again with the same bytes."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from stacey_dist.data import Source, TokenStream, prepare, verify
from stacey_dist.data.verify import Verification, damaged_parts
from stacey_dist.errors import InputError
from tests.data.helpers import ByteTokenizer, list_input, texts, tree


class Dropping(ByteTokenizer):
    """Gives no tokens for a text that begins with é, as a normalizer may."""

    def encode_batch(self, texts: object) -> list[list[int]]:
        return [[] if ids[:1] == [195] else ids for ids in super().encode_batch(texts)]  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def small_reads(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_CHUNK", 258)


def source(separate: bool) -> Source:
    inputs = [list_input(texts(40, seed=i), f"list {i}") for i in range(5)]
    held_out = [list_input(texts(60, seed=9), "held out")] if separate else None
    return Source(inputs, ["some", separate], validation_inputs=held_out)


def make(
    cache: Path, tokenizer: ByteTokenizer | None = None, separate: bool = False, check: bool = False, limit: int = 5000
) -> Path:
    return prepare(
        source(separate),
        tokenizer or ByteTokenizer(),
        cache,
        max_tokens=limit,
        validation_every=3,
        progress=False,
        verify=check,
    )


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer, Dropping])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("limit", [2345, 10**6])
def test_every_part_is_prepared_again_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tokenizer: type[ByteTokenizer], separate: bool, limit: int
) -> None:
    directory = make(tmp_path, tokenizer(), separate, limit=limit)
    whole = tree(directory)
    names = [name for name in whole if name.endswith(".bin")]
    assert len(names) > 3
    everything = 260 if separate else 200
    for name in names:
        flip(directory / name)
        before = {path: path.stat().st_mtime_ns for path in directory.glob("*.bin") if path.name != name}
        again = tokenizer()
        assert make(tmp_path, again, separate, check=True, limit=limit) == directory
        assert tree(directory) == whole
        assert {path: path.stat().st_mtime_ns for path in before} == before
        assert f"{directory / name} does not hold what was written" in capsys.readouterr().err
        assert again.encoded < everything / 2  # a part is not more than a quarter, and batches are read ahead


def test_a_part_of_another_size_or_none_is_prepared_again_without_being_asked(tmp_path: Path) -> None:
    directory = make(tmp_path)
    whole = tree(directory)
    (directory / "train-00001.bin").write_bytes(b"\1" * 7)
    (directory / "validation-00000.bin").unlink()
    make(tmp_path)
    assert tree(directory) == whole


def test_damage_stops_a_run_and_the_next_start_repairs_it(tmp_path: Path) -> None:
    directory = make(tmp_path)
    whole = tree(directory)
    Verification(directory).check(finish=True)
    flip(directory / "train-00002.bin")
    flip(directory / "validation-00000.bin")
    running = Verification(directory)
    for _ in range(2):
        with pytest.raises(InputError) as raised:
            running.check()
        assert f"{directory}/train-00002.bin does not hold what was written" in str(raised.value)
        assert f"{directory}/validation-00000.bin does not hold what was written" in str(raised.value)
        assert "the next start prepares it again" in str(raised.value)
    assert (directory / "train-00002.bin.damaged").exists()
    make(tmp_path)
    assert tree(directory) == whole


def test_what_was_prepared_again_meanwhile_is_not_put_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make(tmp_path)
    whole = tree(directory)
    flip(directory / "train-00002.bin")
    found = verify._verify

    def slow(*arguments: object) -> object:
        damaged = found(*arguments)  # type: ignore[arg-type]
        if damaged is not None:
            monkeypatch.undo()
            make(tmp_path, check=True)
        return damaged

    monkeypatch.setattr(verify, "_verify", slow)
    running = Verification(directory)
    with pytest.raises(InputError, match="train-00002"):
        running.check(finish=True)
    assert tree(directory) == whole


def test_damage_is_named_in_a_directory_that_can_only_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make(tmp_path)
    flip(directory / "train-00002.bin")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(verify.os, "replace", refuse)
    with pytest.raises(InputError, match=r"train-00002\.bin does not hold what was written"):
        Verification(directory).check(finish=True)


def test_the_first_update_waits_for_a_time_and_the_export_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make(tmp_path)
    flip(directory / "train-00002.bin")
    go_on, found = threading.Event(), verify._verify
    monkeypatch.setattr(verify, "_verify", lambda *arguments: go_on.wait() and found(*arguments))  # type: ignore[arg-type]
    monkeypatch.setattr(verify, "_WAIT_SECONDS", 0.05)
    running = Verification(directory)
    running.check()  # big data: training begins
    running.check()
    go_on.set()
    with pytest.raises(InputError, match="train-00002"):
        running.check(finish=True)
    with pytest.raises(InputError, match="train-00002"):
        running.check()


def test_text_that_has_changed_unseen_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make(tmp_path)
    flip(directory / "train-00000.bin")
    monkeypatch.setattr(ByteTokenizer, "encode_batch", lambda self, batch: [[1] * len(text) for text in batch])
    with pytest.raises(InputError, match=r"train-00000\.bin .*gives other tokens now than when it was made; delete"):
        make(tmp_path, check=True)
    assert not list(directory.glob("*.tmp"))


def test_a_cache_of_0_1_0_is_verified_and_prepared_again(tmp_path: Path) -> None:
    """Its index has no place of a part in the text."""
    directory = make(tmp_path)
    whole = tree(directory)
    index = json.loads((directory / "index.json").read_text())
    old = {key: index[key] for key in ("format", "dtype", "vocab_size", "end_token_id", "tokenizer", "source")}
    keys = ("name", "tokens", "crc32")
    old["splits"] = {
        split: {"documents": content["documents"], "tokens": content["tokens"]}
        | {"parts": [{key: part[key] for key in keys} for part in content["parts"]]}
        for split, content in index["splits"].items()
    }
    identity = TokenStream(directory, "train", 8).identity
    (directory / "index.json").write_text(json.dumps(old))
    assert TokenStream(directory, "train", 8).identity == identity
    assert damaged_parts(directory, whole=True) == []
    flip(directory / "train-00002.bin")
    assert [part.entry["name"] for part in damaged_parts(directory, whole=True)] == ["train-00002.bin"]
    again = ByteTokenizer()
    make(tmp_path, again, check=True)
    assert again.encoded > 100
    assert tree(directory) == whole


def test_ids_are_in_the_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make(tmp_path)
    index = json.loads((directory / "index.json").read_text())
    (directory / "index.json").write_text(json.dumps(index | {"vocab_size": 200, "end_token_id": 3}))
    with pytest.raises(InputError, match=r"\.bin holds the token id 256, and the vocabulary ends at 199"):
        damaged_parts(directory, whole=True)
    with pytest.raises(InputError, match="holds the token id 256"):
        Verification(directory).check(finish=True)
    stream = TokenStream(directory, "train", 100)
    with pytest.raises(InputError, match="train holds the token id 256, and the vocabulary ends at 199"):
        stream.window(0)
    monkeypatch.setattr(ByteTokenizer, "encode_batch", lambda self, batch: [[257] for _ in batch])
    with pytest.raises(InputError, match="the tokenizer gives the id 257, and its vocabulary ends at 256"):
        make(tmp_path / "other")


@pytest.mark.parametrize(
    "change",
    [
        {"splits": {"train": {"parts": [{"name": "../../etc/passwd", "tokens": 3}]}}},
        {"splits": {"train": {"parts": [{"name": "train-00000.bin", "tokens": -3}]}}},
        {"splits": {"train": {"parts": [{"name": "train-00000.bin"}]}}},
        {"splits": 3},
        {"dtype": "O"},
        {"vocab_size": "many"},
        {"end_token_id": 300},
    ],
)
def test_an_index_that_says_something_else_is_damaged(tmp_path: Path, change: dict[str, object]) -> None:
    directory = make(tmp_path)
    index = json.loads((directory / "index.json").read_text())
    (directory / "index.json").write_text(json.dumps(index | change))
    for use in (lambda: TokenStream(directory, "train", 4), lambda: Verification(directory), lambda: make(tmp_path)):
        with pytest.raises(InputError, match=rf"^{directory}/index\.json is damaged \(.*delete {directory}"):
            use()


def test_parts_hold_the_tokens_of_the_split(tmp_path: Path) -> None:
    """What is verified is what is read: the sums of the parts are those of the bytes."""
    directory = make(tmp_path)
    ids = np.concatenate([np.fromfile(path, "<u2") for path in sorted(directory.glob("train-*.bin"))])
    stream = TokenStream(directory, "train", 50)
    assert ids.tolist()[1:] == [t for i in range(len(stream)) for t in stream.window(i)[1] if t >= 0]
