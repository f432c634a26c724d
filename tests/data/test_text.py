"""All formats give the same documents, and every bad file is named."""

import gzip
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stacey_dist.data import Document, files_source, hub_source
from stacey_dist.data.paths import expand_files
from stacey_dist.data.text import PLAIN_TEXT_DOCUMENT, read_records
from stacey_dist.errors import InputError
from tests.data.helpers import hub_documents, read_documents, write_c4

TEXTS = ["One.\nTwo lines.", "naïve 日本語 😀", 'tab\t, "quotes", \\', " spaces \u2028 kept ", "x" * 100_000]


def read(*files: Path, column: str = "text") -> list[str]:
    return [document.text for document in read_documents([str(file) for file in files], column)]


@pytest.mark.parametrize("name", ["c4-train.00000-of-01024.json.gz", "a.jsonl.gz", "a.jsonl", "a.json"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    file = write_c4(tmp_path / name, TEXTS)
    assert read(file) == TEXTS
    assert read(file, column="url") == ["http://x/"] * len(TEXTS)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_parquet(tmp_path: Path, kind: Any) -> None:
    # Two row groups, and more rows than one batch.
    table = pa.table({"id": range(5 * 500), "text": pa.array(TEXTS[:4] * 500 + ["y"] * 500, kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1300)
    assert read(tmp_path / "a.parquet") == TEXTS[:4] * 500 + ["y"] * 500


def test_parquet_left_early_does_not_hang_at_exit(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": TEXTS * 1000}), tmp_path / "a.parquet", row_group_size=100)
    code = (
        "import sys, types\n"
        "sys.modules['stacey_dist'] = types.ModuleType('stacey_dist')\n"
        "sys.modules['stacey_dist'].__path__ = ['stacey_dist']\n"
        "from stacey_dist.data import files_source\n"
        f"documents = files_source([{str(tmp_path / 'a.parquet')!r}], [], 'text').documents()\n"
        "print(len(next(documents).text))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[2],
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "15\n", "")


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_plain_text_is_cut_at_blank_lines(tmp_path: Path, name: str, end: str) -> None:
    paragraphs = [f"Paragraph {i}.\nSecond line {'word ' * 100}end" for i in range(200)]
    content = "\n\n".join(paragraphs).replace("\n", end).encode("utf-8-sig")
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    documents = read(tmp_path / name)
    assert "\n\n".join(documents).split("\n\n") == paragraphs
    assert all(PLAIN_TEXT_DOCUMENT - 2 <= len(d) < PLAIN_TEXT_DOCUMENT + 600 for d in documents[:-1])


def test_plain_text_without_blank_lines(tmp_path: Path) -> None:
    lines = [f"{i} {'x' * 100}" for i in range(2000)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    documents = read(tmp_path / "a.txt")
    assert 3 <= len(documents) <= 5
    assert "\n".join(documents).split("\n") == lines


def test_files_follow_one_another(tmp_path: Path) -> None:
    files = [write_c4(tmp_path / f"{name}.json.gz", [name]) for name in "ba"]
    assert read(*files) == ["b", "a"]


def parquet(path: Path, **columns: Any) -> None:
    pq.write_table(pa.table(columns), path)


GOOD = b'{"text": "good"}\n'
SCRAMBLED = bytearray(gzip.compress(random.Random(0).randbytes(9999).hex().encode()))
SCRAMBLED[100:200] = b"\xff" * 100
BAD = {
    "truncated.json.gz": (gzip.compress(GOOD * 9999)[:-30], "truncated or damaged gzip after line"),
    "damaged.json.gz": (SCRAMBLED, "truncated or damaged gzip"),
    "foreign.json.gz": (gzip.compress(GOOD) + b"tail", "truncated or damaged gzip"),
    "notgzip.txt.gz": (b"plain", "truncated or damaged gzip after line 0"),
    "latin.txt": ("a\né".encode("latin-1"), "line 2: not UTF-8"),
    "junk.parquet": (b"PAR1 junk junk junk", "cannot be read as parquet"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as raised:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["a"], "url": ["b"]}, "no column 'text' .*it has body, url"),
        ({"text": ["a", None]}, "row 2: column 'text' holds NoneType"),
        ({"text": [1, 2]}, "row 1: column 'text' holds int"),
        ({"text": pa.array([], pa.string())}, "no text in it"),
    ],
)
def test_bad_parquet(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    parquet(tmp_path / "a.parquet", **columns)
    with pytest.raises(InputError, match=r"a\.parquet.*" + message):
        read(tmp_path / "a.parquet")


def test_no_place_behind_a_damaged_end_of_plain_text(tmp_path: Path) -> None:
    """From each place, what follows its record is read, and nothing twice."""
    file = tmp_path / "a.txt.gz"
    paragraph = "a" * PLAIN_TEXT_DOCUMENT + "\n\n"
    file.write_bytes(gzip.compress((paragraph * 2 + "last\n" + "b" * 300_000).encode(), 0)[:-100])
    records = list(read_records(str(file), "text"))
    assert [isinstance(record, Document) for record in records] == [True, True, False, True]
    assert records[0].place is not None
    for number, record in enumerate(records, start=1):
        if record.place is not None:
            assert list(read_records(str(file), "text", record.place)) == records[number:]


def test_truncated_parquet(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", text=TEXTS)
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-50])
    with pytest.raises(InputError, match=r"b\.parquet: cannot be read as parquet"):
        read(tmp_path / "b.parquet")


def test_vanished_file(tmp_path: Path) -> None:
    for name in ("a.json.gz", "a.jsonl", "a.parquet"):
        with pytest.raises(InputError, match=f"{name}.*cannot be read"):
            read(tmp_path / name)


def test_expand_files(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl", "[x].txt"):
        (tmp_path / name).write_text("x")
    expand = lambda *names: [  # noqa: E731
        Path(f).relative_to(tmp_path).as_posix() for f in expand_files("s", [f"{tmp_path}/{n}" for n in names])
    ]
    assert expand("*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert expand("**/*.jsonl") == ["a.jsonl", "b.jsonl", "deep/c.jsonl"]
    assert expand("b.jsonl", "*.jsonl") == ["b.jsonl", "a.jsonl"]
    assert expand("[x].txt") == ["[x].txt"]


def test_expand_files_errors(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "a.csv").write_text("x")
    for patterns, message in {
        (): "no files",
        ("missing*",): "'.*missing.*' matches no file",
        ("empty.jsonl",): r"empty\.jsonl is empty",
        ("a.csv",): r"a\.csv has none of the endings.*\.parquet",
        (".",): "is a directory",
    }.items():
        with pytest.raises(InputError, match=rf"^files: .*{message}"):
            expand_files("files", [f"{tmp_path}/{pattern}" for pattern in patterns])


def test_files_source_names_the_setting(tmp_path: Path) -> None:
    file = write_c4(tmp_path / "a.json.gz", TEXTS)
    with pytest.raises(InputError, match=r"^validation_files: "):
        files_source([str(file)], ["/nowhere/*"], "text")
    other = write_c4(tmp_path / "b.json.gz", TEXTS[::-1])
    source = files_source([str(file)], [str(other)], "text")
    assert source.validation_inputs is not None
    held_out = [record for each in source.validation_inputs for record in each.records()]
    assert held_out == list(read_documents([str(other)], "text"))
    assert [d.text for d in source.documents()] == TEXTS


def test_held_out_text_that_would_be_trained_on_is_refused(tmp_path: Path) -> None:
    for name in ("c4-train.json.gz", "c4-validation.json.gz"):
        write_c4(tmp_path / name, TEXTS)
    (tmp_path / "link.json.gz").symlink_to("c4-validation.json.gz")
    for validation in ("c4-validation*.json.gz", "link.json.gz"):
        with pytest.raises(InputError, match=r"^validation_files: .*c4-validation\.json\.gz is one of `files`"):
            files_source([f"{tmp_path}/c4-*.json.gz"], [f"{tmp_path}/{validation}"], "text")


def test_a_link_to_nothing_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.json.gz").symlink_to("annex/a.json.gz")
    with pytest.raises(InputError, match=r"^files: .*a\.json\.gz is a link to a file that is not there"):
        expand_files("files", [f"{tmp_path}/*.json.gz"])


@pytest.mark.parametrize("streaming", [True, False])
def test_hub_documents_of_a_local_dataset(tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    write_c4(tmp_path / "data" / "train.jsonl", [*TEXTS, ""])
    read_back = [d.text for d in hub_documents(str(tmp_path / "data"), None, "train", "text", streaming)]
    assert read_back == TEXTS
    with pytest.raises(InputError, match=r"row 1: no column 'body' .*it has text"):
        next(hub_documents(str(tmp_path / "data"), None, "train", "body", streaming))
    with pytest.raises(InputError, match="split 'test' cannot be loaded"):
        next(hub_documents(str(tmp_path / "data"), None, "test", "text", streaming))


def test_a_local_dataset_is_told_by_its_files(tmp_path: Path) -> None:
    def identity() -> Any:
        return hub_source(str(tmp_path), None, "train", None, "text", True).identity

    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "train.jsonl").write_text('{"text": "one"}\n')
    first = identity()
    assert identity() == first
    assert json.dumps(first)
    (tmp_path / "deep" / "train.jsonl").write_text('{"text": "another"}\n')
    second = identity()
    (tmp_path / "more.jsonl").write_text('{"text": "two"}\n')
    assert len({json.dumps(each) for each in (first, second, identity())}) == 3


def test_a_local_dataset_without_files_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^dataset: the directory {tmp_path} has no files"):
        hub_source(str(tmp_path), None, "train", None, "text", True)


def test_hub_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the Hub\nlong explanation")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    source = hub_source("allenai/c4", "en", "train", None, "text", True)
    with pytest.raises(InputError) as raised:
        next(source.documents())
    assert str(raised.value) == (
        "dataset 'allenai/c4', config 'en', split 'train' cannot be loaded: ConnectionError: Couldn't reach the Hub"
    )

    def broken(*arguments: object, **options: object) -> Any:
        assert (arguments, options) == (("allenai/c4", "en"), {"split": "validation", "streaming": True})
        yield {"text": "first"}
        raise OSError("connection lost")

    monkeypatch.setattr(datasets, "load_dataset", broken)
    source = hub_source("allenai/c4", "en", "train", "validation", "text", True)
    assert source.validation_inputs is not None
    documents = source.validation_inputs[0].records()
    assert next(documents) == Document("first", "dataset 'allenai/c4', config 'en', split 'validation', row 1")
    with pytest.raises(InputError, match=r"^validation_split: .* row 2 cannot be read: OSError: conn"):
        next(documents)
    assert json.dumps(source.identity)


def test_a_file_with_several_names_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "v3").mkdir()
    file = write_c4(tmp_path / "v3" / "a.jsonl", TEXTS)
    (tmp_path / "latest").symlink_to("v3")
    (tmp_path / "b.jsonl").symlink_to("v3/a.jsonl")
    found = expand_files("files", [f"{tmp_path}/b.jsonl", f"{tmp_path}/**/*.jsonl", str(file)])
    assert found == [f"{tmp_path}/b.jsonl"]


def test_a_split_is_not_held_out_of_itself() -> None:
    hub_source("allenai/c4", "en", "train[1%:]", "train[:1%]", "text", True)
    for held_out in ("train", "train[:1%]", "validation+train"):
        message = f"^validation_split: '{re.escape(held_out)}' has documents of the split for training, 'train'; null"
        with pytest.raises(InputError, match=message):
            hub_source("allenai/c4", "en", "train", held_out, "text", True)
