"""A path is that path, whatever characters it has, beside a decoy that it would match as a pattern."""

import gzip
import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stacey_dist.data import (
    TokenStream,
    files_source,
    hub_source,
    load_pretrained,
    load_sentencepiece,
    prepare,
    train_sentencepiece,
)
from stacey_dist.data.paths import expand_files
from stacey_dist.data.source import _directory_identity
from stacey_dist.errors import InputError
from tests.data.helpers import ByteTokenizer, hub_documents, list_source, texts

NAMES = {
    "run[1]": "run1",
    "a*b": "aXb",
    "q?r": "qqr",
    "[!x]": "y",
    "x::y": "x",
    "{a,b}": "a",
    "~z": "z",
    "with space": "with",
    "%41": "A",
    "file:x": "x",
    "$HOME": "home",
    "é\u0301": "e",
}
FORMATS = ("train.jsonl", "train.json.gz", "train.txt", "train.txt.gz", "train.parquet")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": [text]}), path)
        return
    content = (json.dumps({"text": text}) if ".json" in path.name else text).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of a folder in the current directory, with a decoy beside it."""
    monkeypatch.chdir(tmp_path)
    for file in FORMATS:
        write(tmp_path / request.param / file, "right")
        write(tmp_path / NAMES[request.param] / file, "decoy")
    return str(request.param)


def read(*patterns: str) -> list[str]:
    return [document.text for document in files_source(patterns, [], "text").documents()]


@pytest.mark.parametrize("file", FORMATS)
def test_files(name: str, tmp_path: Path, file: str) -> None:
    assert read(f"{name}/{file}") == read(str(tmp_path / name / file)) == ["right"]
    odd = tmp_path / f"{name}.{file}"
    write(odd, "right")
    write(tmp_path / f"{NAMES[name]}.{file}", "decoy")
    assert read(str(odd)) == read(odd.name) == ["right"]


def test_patterns_in_a_folder_with_such_a_name(name: str, tmp_path: Path) -> None:
    for pattern in ("*.jsonl", "t?ain.jsonl", "train.[j]sonl", "**/*.jsonl"):
        assert read(f"{name}/{pattern}") == read(f"{tmp_path}/{name}/{pattern}") == ["right"]
    with pytest.raises(InputError, match="matches no file"):
        expand_files("files", [f"{name}/nothing*.jsonl"])


@pytest.mark.parametrize("streaming", [True, False])
def test_local_data_sets(name: str, tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hub"))
    for folder, text in ((name, "right"), (NAMES[name], "decoy")):
        shutil.rmtree(tmp_path / folder)
        write(tmp_path / folder / "data" / "train-00000-of-00001.parquet", text)
        write(tmp_path / folder / "data" / "validation-00000-of-00001.parquet", f"{text}, held out")
    for path in (name, str(tmp_path / name)):
        found = [list(hub_documents(path, None, split, "text", streaming)) for split in ("train", "validation")]
        assert [[d.text for d in documents] for documents in found] == [["right"], ["right, held out"]]


def test_links_are_removed_and_are_not_made_in_such_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a[b]" / "train.jsonl", "right")
    (tmp_path / "t*").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    documents = hub_documents(str(tmp_path / "a[b]"), None, "train", "text", True)
    assert next(documents).text == "right"
    assert len(os.listdir(tmp_path / "tmp")) == 1
    documents.close()
    assert os.listdir(tmp_path / "tmp") == []
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "t*"))
    with pytest.raises(InputError, match=r"^dataset: .*a\[b\] has characters .* set TMPDIR to another"):
        next(hub_documents(str(tmp_path / "a[b]"), None, "train", "text", True))


def test_caches(name: str, tmp_path: Path) -> None:
    cache = tmp_path / name / "cache"
    decoy = prepare(list_source(texts(9)), ByteTokenizer(), tmp_path / NAMES[name], max_tokens=None, validation_every=3)
    directory = prepare(list_source(texts(90)), ByteTokenizer(), cache, max_tokens=None, validation_every=3)
    assert directory.parent == cache
    assert TokenStream(directory, "train", 9).tokens > 2 * TokenStream(decoy, "train", 9).tokens


def test_tokenizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["the quick brown fox jumps over the lazy dog " * 50]
    trained = train_sentencepiece(words, 290, tmp_path / "model")
    decoy = train_sentencepiece(words, 295, tmp_path / "decoy")
    trained.save(tmp_path / "export")
    decoy.save(tmp_path / "export of decoy")
    for name, other in list(NAMES.items())[:7:2]:
        shutil.copytree("model", name)
        shutil.copytree("export", f"{name}.export")
        shutil.copytree("decoy", other, dirs_exist_ok=True)
        shutil.copytree("export of decoy", f"{other}.export", dirs_exist_ok=True)
        for path in (name, str(tmp_path / name)):
            assert load_sentencepiece(f"{path}/tokenizer.model").vocab_size == 290
            assert load_pretrained(f"{path}.export").vocab_size == 290
        for each in (name, f"{name}.export", other, f"{other}.export"):
            shutil.rmtree(each)


def test_the_home_directory_and_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write(tmp_path / "home" / "a.jsonl", "at home")
    assert read("~/a.jsonl") == read("~/*.jsonl") == ["at home"]
    write(tmp_path / "~" / "a.jsonl", "here")
    assert read("~/a.jsonl") == read("~/*.jsonl") == ["here"]


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match=r"a\.jsonl is not a regular file"):
        expand_files("files", [f"{tmp_path}/*.jsonl"])
    os.mkfifo(tmp_path / "a.model")
    with pytest.raises(InputError, match=r"^path: .*a\.model cannot be read: it is a pipe"):
        load_sentencepiece(tmp_path / "a.model")


@pytest.mark.parametrize("name", ["set", "set[1]"])
def test_the_identity_of_a_directory_is_of_what_is_read(tmp_path: Path, name: str) -> None:
    directory, elsewhere = tmp_path / name, tmp_path / "elsewhere"
    directory.mkdir()
    elsewhere.mkdir()
    (elsewhere / "b.jsonl").write_text('{"text": "old"}\n')
    (directory / "a.jsonl").write_text('{"text": "a"}\n')
    (directory / "linked").symlink_to(elsewhere)
    (directory / "itself").symlink_to(directory)
    (directory / "below").mkdir()
    (directory / "below" / "c.jsonl").symlink_to(elsewhere / "b.jsonl")
    first = _directory_identity(str(directory))
    source = hub_source(str(directory), None, "train", None, "text", False)
    assert sorted(document.text for document in source.documents()) == ["a", "old"]
    (directory / ".cache").mkdir()
    (directory / ".cache" / "a.metadata").write_text("of a download")
    assert _directory_identity(str(directory)) == first
    (elsewhere / "b.jsonl").write_text('{"text": "new and longer"}\n')
    assert _directory_identity(str(directory)) != first
    (directory / "d.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=r"dataset: .*d\.jsonl"):
        _directory_identity(str(directory))
