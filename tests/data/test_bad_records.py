"""A line or row without a document ends the preparation with its place, or is left out, counted and named."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stacey_dist.data import TokenStream, files_source, prepare
from stacey_dist.data.cache import skipped_records
from stacey_dist.data.source import OnBadRecord
from stacey_dist.errors import InputError
from tests.data.helpers import ByteTokenizer, records

GOOD = b'{"text": "good"}\n'
LINES = {
    "no JSON": (b'{"text": "b"', "not one JSON object a line"),
    "two on a line": (GOOD[:-1] + GOOD, "not one JSON object a line"),
    "the beginning of a list": (b"[", "not one JSON object a line"),
    "a list": (b'["text"]', "expected one JSON object a line, got list"),
    "a string": (b'"text"', "expected one JSON object a line, got str"),
    "no text": (b'{"body": "b", "url": "c"}', "no column 'text' (text_column); it has body, url"),
    "nothing": (b"{}", "no column 'text' (text_column); it has none"),
    "a number": (b'{"text": 3}', "column 'text' holds int, not a string"),
    "null": (b'{"text": null}', "column 'text' holds NoneType"),
    "a big integer": (b'{"text": "x", "id": ' + b"7" * 4301 + b"}", "not one JSON object a line (Exceeds the limit"),
    "deep nesting": (b'{"text": "x", "a": ' + b"[" * 99_999 + b"]" * 99_999 + b"}", "not one JSON object a line"),
    "Latin-1": ('{"text": "é"}'.encode("latin-1"), "not UTF-8 (invalid continuation byte at byte 10)"),
    "half a character": (b'{"text": "a\xf0\x9f\x98"}', "not UTF-8"),
    "half a pair": (b'{"text": "a\\ud83d"}', "'\\ud83d' is not a Unicode character"),
    "the other half": (b'{"text": "\\ude00 a"}', "'\\ude00' is not a Unicode character"),
    "NUL bytes": (b"\0" * 4096, "a NUL byte"),
    "a NUL byte": (b'{"text": "a\0b"}', "a NUL byte"),
    "a control character": (b'{"text": "a\x01b"}', "not one JSON object a line (Invalid control character"),
}


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz"])
@pytest.mark.parametrize("kind", LINES)
def test_a_bad_line(tmp_path: Path, kind: str, ending: str) -> None:
    line, message = LINES[kind]
    file, content = tmp_path / f"a.{ending}", GOOD * 2 + line + b"\n" + GOOD
    file.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    found, bad = records(file)
    assert found == ["good"] * 3
    assert len(bad) == 1
    assert bad[0].startswith(f"{file}, line 3: {message}")
    assert len(bad[0].splitlines()) == 1
    assert len(bad[0]) < 400 + len(str(file))
    with pytest.raises(InputError, match=r"line 3: .*; fix it, or leave out bad records with `on_bad_record` skip"):
        list(files_source([str(file)], [], "text").documents())
    assert len(list(files_source([str(file)], [], "text", "skip").documents())) == 3


def test_integers_that_are_long_but_not_too_long(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "id": ' + "7" * 4300 + ', "b": 1e999}\n')
    assert records(tmp_path / "a.jsonl") == (["x"], [])


@pytest.mark.parametrize("cut", [1, 9, 400])
def test_a_damaged_gzip_gives_what_comes_before(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "a.jsonl.gz"
    lines = b"".join(json.dumps({"text": f"{i} {i * i}"}).encode() + b"\n" for i in range(2000))
    file.write_bytes(gzip.compress(lines)[:-cut])
    found, bad = records(file)
    assert found == [f"{i} {i * i}" for i in range(len(found))]
    assert len(bad) == 1
    assert bad[0].startswith(f"{file}: truncated or damaged gzip after line ")


def test_plain_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\nt\xffo\nthree\n\0\0\nfour\n")
    found, bad = records(tmp_path / "a.txt")
    assert found == ["one\nthree\nfour"]
    assert [message.removeprefix(f"{tmp_path}/a.txt, ")[:8] for message in bad] == ["line 2: ", "line 4: "]
    (tmp_path / "b.txt").write_bytes("ordinary text".encode("utf-16"))
    assert records(tmp_path / "b.txt")[0] == []
    assert "not as UTF-16" in records(tmp_path / "b.txt")[1][0]


def test_parquet(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    values = [b"one", None, b"t\xffo", b"three", b" \t", b"", b"a\0b", b"\xed\xa0\x80"]
    offsets = pa.array(values, pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(values), offsets.buffers())
    pq.write_table(pa.table({"text": text}), file)
    found, bad = records(file)
    assert found == ["one", "three", "a\0b"]
    assert [message.removeprefix(f"{file}, ").split(" (")[0] for message in bad] == [
        "row 2: column 'text' holds NoneType, not a string",
        "row 3: not UTF-8",
        "row 8: not UTF-8",
    ]
    pq.write_table(pa.table({"text": pa.array([["a"], None])}), file)
    assert len(records(file)[1]) == 2
    pq.write_table(pa.table({"text": pa.array(["a", None, "a"]).dictionary_encode()}), file)
    assert records(file)[0] == ["a", "a"]


BLANKS = [" ", "\t\n", "\u00a0\u2003\u3000", "\r\n \x0b\x0c\x1c\x85\u2028"]


def test_blank_documents_and_lines_are_left_out(tmp_path: Path) -> None:
    """They are neither documents nor bad records."""
    rows = ["a", *BLANKS, "", "b"]
    (tmp_path / "a.jsonl").write_text("\n \n\t\n".join(json.dumps({"text": text}) for text in rows))
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet")
    assert records(tmp_path / "a.jsonl") == records(tmp_path / "a.parquet") == (["a", "b"], [])
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in BLANKS))
    (tmp_path / "c.txt").write_text("\n \n\u00a0\n")
    pq.write_table(pa.table({"text": BLANKS}), tmp_path / "d.parquet")
    for name in ("b.jsonl", "c.txt", "d.parquet"):
        with pytest.raises(InputError, match=rf"{name}: no text in it"):
            records(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str) -> None:
    content = b"\xef\xbb\xbf" + (GOOD if "json" in name else b"good\n")
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert records(tmp_path / name) == (["good"], [])
    (tmp_path / "blank.jsonl").write_bytes(b"\xef\xbb\xbf\n" + GOOD)
    assert records(tmp_path / "blank.jsonl") == (["good"], [])


class Dropping(ByteTokenizer):
    """Gives no tokens for a text of zero-width characters, as a normalizer does."""

    def encode_batch(self, texts: Any) -> list[list[int]]:
        return super().encode_batch([text.replace("\u200b", "") for text in texts])


def make(file: Path, cache: Path, on_bad: OnBadRecord = "skip") -> Path:
    source = files_source([str(file)], [], "text", on_bad)
    return prepare(source, Dropping(), cache, max_tokens=None, validation_every=3, progress=False)


def tokens(directory: Path, split: str) -> list[int]:
    stream = TokenStream(directory, split, 1000)
    inputs, labels = stream.window(0)
    return [int(inputs[0]), *labels[: stream.total_labels].tolist()]


def test_no_document_is_empty(tmp_path: Path) -> None:
    """Two end tokens in a row would be one; and such documents do not count for what is held out."""
    file = tmp_path / "a.jsonl"
    rows = ["v", "\u200b", "t", "\u200b\u200b", " ", "u", "w"]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    directory = make(file, tmp_path / "cache")
    assert tokens(directory, "train") == [ord("t"), 256, ord("u"), 256]
    assert tokens(directory, "validation") == [ord("v"), 256, ord("w"), 256]


def test_skipped_records_are_counted_named_and_part_of_the_identity(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD * 6)
    whole = make(file, tmp_path / "whole")
    assert skipped_records(whole) is None
    assert TokenStream(make(file, tmp_path / "error", "error"), "train", 4).identity == (
        TokenStream(whole, "train", 4).identity
    )
    file.write_bytes(GOOD * 3 + b"{\n" * 7 + GOOD * 3)
    directory = make(file, tmp_path / "skip")
    assert tokens(directory, "train") == tokens(whole, "train")
    line = str(skipped_records(directory))
    assert line.startswith(f"7 bad records were left out; the first: {file}, line 4: ")
    assert "line 8: " in line
    assert "line 9: " not in line
    assert TokenStream(directory, "train", 4).identity != TokenStream(whole, "train", 4).identity


def test_a_damaged_file_among_skipped_records_has_a_warning(tmp_path: Path) -> None:
    bad = b"{" + b"\n{" * 9 + b"\n"
    content = bad + b"".join(b'{"text": "%d"}\n' % i for i in range(9000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content)[:-9])
    source = files_source([f"{tmp_path}/a.jsonl.gz"], [], "text", "skip")
    with pytest.warns(UserWarning, match=r"a.jsonl.gz: truncated or damaged gzip .*: the rest of the file is left out"):
        list(source.documents())
